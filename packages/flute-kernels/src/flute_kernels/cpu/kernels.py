"""The operators on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute_kernels import _C
from flute_kernels.checks import DTYPES, check_dtype, check_hadamard, check_qgemm, check_qgemm_grouped
from flute_kernels.cpu.layout import BLOCK, check_layout
from flute_kernels.errors import FormatError
from flute_kernels.packed import PackedWeight

__all__ = ["dequantize", "hadamard", "plain_qgemm", "qgemm", "qgemm_grouped", "weight_handle"]


def _as_rows(x: Tensor) -> Tensor:
    """``[M, K]`` whose rows have adjacent elements; no copy where the strides already allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def weight_handle(weight: PackedWeight, rows: range | None = None) -> _C.QWeight:
    """What the compiled kernels know of a weight; it does not keep the tensors alive.

    Args:
        rows: those of the weight that are meant, from a multiple of 16 on; all by default.
    """
    codes, scales, tables, table_of_block, out_features, *numbers = weight
    rows = range(out_features) if rows is None else rows
    block = rows.start // BLOCK
    return _C.QWeight(
        _address(codes, block),
        _address(scales, block),
        DTYPES[scales.dtype],
        tables.data_ptr(),
        0 if table_of_block is None else _address(table_of_block, block),
        len(tables),
        len(rows),
        *numbers,
    )


def _address(tensor: Tensor, first: int) -> int:
    """Of ``tensor[first]``."""
    return tensor.data_ptr() + first * tensor.stride(0) * tensor.element_size()


_threads = torch.get_num_threads


def plain_qgemm(handle: _C.QWeight, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The product outside of the dispatcher, with a contiguous x and a weight that is known to be right."""
    shape = x.shape
    if x.dtype not in DTYPES or not shape or shape[-1] != weight.in_features or bias is not None:
        check_qgemm(x, weight, bias)
    return _launch_qgemm(handle, x, weight, bias, x.numel() // weight.in_features, weight.in_features)


def qgemm(x: Tensor, *operands: Any) -> Tensor:
    """Implements ``flute_kernels::qgemm``."""
    weight, bias = PackedWeight.split(operands)
    check_qgemm(x, weight, bias)
    check_layout(weight)
    rows = _as_rows(x)
    bias = None if bias is None else bias.contiguous()
    out = _launch_qgemm(weight_handle(weight), rows, weight, bias, rows.shape[0], rows.stride(0))
    return out.view(*x.shape[:-1], weight.out_features)


def _launch_qgemm(
    handle: _C.QWeight, x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: int, stride: int
) -> Tensor:
    out = torch.empty((*x.shape[:-1], weight.out_features), dtype=x.dtype)
    _C.qgemm_cpu(
        handle,
        x.data_ptr(),
        rows,
        stride,
        DTYPES[x.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(),
        weight.out_features,
        _threads(),
    )
    return out


def qgemm_grouped(x: Tensor, counts: Tensor, *operands: Any) -> Tensor:
    """Implements ``flute_kernels::qgemm_grouped``: one product for each expert that has rows."""
    weight, _ = PackedWeight.split(operands)
    n = check_qgemm_grouped(x, counts, weight)
    check_layout(weight)
    numbers = _checked_counts(counts, len(x))
    x = _as_rows(x)
    out = torch.empty((len(x), n), dtype=x.dtype)
    first = 0
    for expert, count in enumerate(numbers):
        if count:
            _C.qgemm_cpu(
                weight_handle(weight, range(expert * n, (expert + 1) * n)),
                _address(x, first),
                count,
                x.stride(0),
                DTYPES[x.dtype],
                0,
                0,
                _address(out, first),
                n,
                _threads(),
            )
            first += count
    out[first:] = 0
    return out


def _checked_counts(counts: Tensor, rows: int) -> list[int]:
    numbers: list[int] = counts.tolist()
    for expert, count in enumerate(numbers):
        if count < 0:
            raise FormatError(f"counts[{expert}] is {count}; expected a number of rows, 0 or more.")
    if sum(numbers) > rows:
        raise FormatError(f"counts sum up to {sum(numbers)} rows; x has {rows}.")
    return numbers


def dequantize(*operands: Any) -> Tensor:
    """Implements ``flute_kernels::dequantize``."""
    weight, dtype = PackedWeight.split(operands)
    check_dtype(dtype)
    check_layout(weight)
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype)
    _C.dequantize_cpu(weight_handle(weight), out.data_ptr(), DTYPES[dtype], _threads())
    return out


def hadamard(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    check_hadamard(x, signs, block_size)
    rows = _as_rows(x)
    signs = None if signs is None else signs.contiguous()
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _C.hadamard_cpu(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        DTYPES[x.dtype],
        0 if signs is None else signs.data_ptr(),
        block_size,
        transpose,
        out.data_ptr(),
        out.shape[1],
        _threads(),
    )
    return out.view(x.shape)
