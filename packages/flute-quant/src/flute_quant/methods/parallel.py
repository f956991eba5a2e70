"""Spread chunks of rows over cores: one Python thread a core, each running torch's operators serially.

The operators of one chunk take some 100 microseconds each. Letting each of them split its own work
over the cores costs a barrier an operator, which on a busy machine waits for whole time slices
(measured: 10 times slower beside one other process). Threads that never meet do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["map_chunks", "ordinary_tensors"]

T = TypeVar("T")
Chunk = tuple[int, int]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No gradients, and results that may be used with gradients later; torch keeps both modes per thread."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def map_chunks(work: Callable[[int, int], T], chunks: Sequence[Chunk], device: torch.device) -> list[T]:
    """``work(start, stop)`` of every chunk, in order; on a GPU one after another."""
    threads = min(torch.get_num_threads(), len(chunks))
    if device.type != "cpu" or threads < 2:
        return [work(*chunk) for chunk in chunks]

    def guarded(chunk: Chunk) -> T:
        with ordinary_tensors():
            return work(*chunk)

    pool = ThreadPoolExecutor(threads, initializer=_serial)
    try:
        return list(pool.map(guarded, chunks))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # see _serial


def _serial() -> None:
    # torch keeps the number per thread, and a copy from which threads that are new to torch start.
    # The caller's own number is not touched; it writes it back to that copy afterwards.
    torch.set_num_threads(1)
