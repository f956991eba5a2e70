"""The CPU room's layout of a weight, made from the canonical tensors and turned back exactly.

``csrc/qgemm/cpu/layout.h`` says what each tensor is and why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels.checks import check_tensors
from flute_kernels.cpu.memory import empty
from flute_kernels.errors import FormatError
from flute_kernels.format import QuantizedLinear, QuantSpec
from flute_kernels.format.linear import SCALE_DTYPES
from flute_kernels.format.spec import PER_ROW
from flute_kernels.packed import PackedWeight

__all__ = ["BLOCK", "check_layout", "pack", "unpack"]

BLOCK = 16
_MIN_ENTRIES = 16


def pack(linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 ``[ceil(N/16), K*bits/32, 16]``, scales ``[ceil(N/16), K/g, 16]``, tables float32."""
    return _block_rows(linear.qweight), _block_rows(linear.scales), _tables(linear.codebook)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """The canonical ``qweight`` and ``scales`` again."""
    return _unblock_rows(weight.codes, weight.out_features), _unblock_rows(weight.scales, weight.out_features)


def _unblock_rows(blocked: Tensor, rows: int) -> Tensor:
    """``[ceil(N/16), C, 16]`` back to ``[N, C]``."""
    return (
        blocked.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(-1, blocked.shape[1])[:rows]
    )


def _block_rows(rows: Tensor) -> Tensor:
    n, columns = rows.shape
    whole = n // BLOCK
    blocked = empty((-(-n // BLOCK), columns, BLOCK), rows.dtype)
    blocked[:whole] = rows[: whole * BLOCK].view(whole, BLOCK, columns).transpose(1, 2)
    if whole * BLOCK != n:
        blocked[whole:] = 0
        blocked[whole, :, : n - whole * BLOCK] = rows[whole * BLOCK :].T
    return blocked


def _tables(codebook: Tensor) -> Tensor:
    """float32 ``[T, vector_size, max(16, entries)]``, small tables repeated."""
    tables = codebook.to(torch.float32).transpose(1, 2).contiguous()
    repeat = max(1, _MIN_ENTRIES // tables.shape[2])
    return tables.repeat(1, 1, repeat)


def check_layout(weight: PackedWeight) -> None:
    """The weight is what a kernel will read: an operator's caller may have made it by hand."""
    codes, scales, tables, table_of_block, out_features, in_features, bits, vector_size, group_size = weight
    spec = QuantSpec(bits=bits, vector_size=vector_size, group_size=PER_ROW)
    spec.check_in_features(in_features)
    if group_size < 32 or in_features % group_size:
        raise FormatError(
            f"group_size is {group_size}; expected 32 or more that divide in_features = {in_features}."
        )
    blocks, count = -(-out_features // BLOCK), tables.shape[0]
    expected = {
        "codes": (codes, (torch.int32,), [blocks, in_features * bits // 32, BLOCK]),
        "scales": (scales, SCALE_DTYPES, [blocks, in_features // group_size, BLOCK]),
        "tables": (tables, (torch.float32,), [count, vector_size, max(spec.table_entries, _MIN_ENTRIES)]),
    }
    if table_of_block is not None:
        expected["table_of_block"] = (table_of_block, (torch.int32,), [blocks])
    elif count != 1:
        raise FormatError(f"tables holds {count} tables without table_of_block; expected one.")
    check_tensors(expected, codes.device)
