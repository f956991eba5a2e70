"""The CPU room's layout of a weight, made from the canonical tensors and turned back exactly.

``csrc/qgemm/cpu/layout.h`` says what each tensor is and why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels.format import QuantizedLinear

__all__ = ["BLOCK", "pack", "unpack_rows"]

BLOCK = 16
_MIN_ENTRIES = 16


def pack(linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 ``[ceil(N/16), K*bits/32, 16]``, scales ``[ceil(N/16), K/g, 16]``, tables float32."""
    return _block_rows(linear.qweight), _block_rows(linear.scales), _tables(linear.codebook)


def unpack_rows(blocked: Tensor, rows: int) -> Tensor:
    """``[ceil(N/16), C, 16]`` back to ``[N, C]``."""
    return blocked.transpose(1, 2).reshape(-1, blocked.shape[1])[:rows].contiguous()


def _block_rows(rows: Tensor) -> Tensor:
    n, columns = rows.shape
    blocks = -(-n // BLOCK)
    if blocks * BLOCK != n:
        padded = rows.new_zeros(blocks * BLOCK, columns)
        padded[:n] = rows
        rows = padded
    return rows.view(blocks, BLOCK, columns).transpose(1, 2).contiguous()


def _tables(codebook: Tensor) -> Tensor:
    """float32 ``[T, vector_size, max(16, entries)]``, small tables repeated."""
    tables = codebook.to(torch.float32).transpose(1, 2).contiguous()
    repeat = max(1, _MIN_ENTRIES // tables.shape[2])
    return tables.repeat(1, 1, repeat)
