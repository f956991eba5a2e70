"""Memory for packed weights, in huge pages where the system has them.

A decode step reads every weight of a model once. With pages of 4 KiB the walk through the page tables
costs a quarter of that time (two threads, 4096 x 4096 at 4 bits: 55 instead of 76 billion weights a
second), so packed tensors come from large chunks that Linux is asked to back with pages of 2 MiB. Many
small tensors share a chunk, and tensors of neighbouring layers are neighbours in memory.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from flute_kernels import _C

__all__ = ["empty"]

_PAGE = 2 << 20
_CHUNK = 32 << 20
_LINE = 64


class _Arena:
    """Hands out parts of a chunk in order. A chunk lives as long as a tensor in it, or until it is full."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def take(self, size: int) -> Tensor:
        with self._lock:
            if self._used + size > self._chunk.numel():
                chunk = _huge(max(size, _CHUNK))
                if size > _CHUNK // 2:  # would leave little to share
                    return chunk[:size]
                self._chunk, self._used = chunk, 0
            start = self._used
            self._used += -(-size // _LINE) * _LINE
            return self._chunk[start : start + size]


def _huge(size: int) -> Tensor:
    buffer = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu")
    start = -buffer.data_ptr() % _PAGE
    _C.advise_huge_pages(buffer.data_ptr() + start, size)
    return buffer[start : start + size]


_arena = _Arena()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like :func:`torch.empty` on the CPU, aligned to 64 bytes."""
    part = _arena.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    # Through .data, for a version counter of its own: autograd would take a write to a neighbour for a
    # change of this tensor.
    return part.data
