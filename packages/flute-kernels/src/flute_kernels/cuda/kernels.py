"""The operators on CUDA tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flute_kernels import _C
from flute_kernels.checks import DTYPES, check_dtype, check_hadamard, check_qgemm, check_qgemm_grouped
from flute_kernels.cuda.grouped import multiply_grouped
from flute_kernels.cuda.layout import check_layout, current_stream, pad_rows
from flute_kernels.packed import PackedWeight

__all__ = [
    "dequantize",
    "hadamard",
    "multiply_dequantized",
    "plain_qgemm",
    "qgemm",
    "qgemm_grouped",
    "weight_handle",
]

_CHUNK_BYTES = 64 << 20
"""Of a dequantized part of a weight, where that leaves it enough rows."""
_CHUNK_ROWS = 2048
"""Fewer rows of a part would not fill the GPU in torch's product."""
_ALIGNMENT = 16


def weight_handle(weight: PackedWeight) -> _C.QWeight:
    """What the compiled kernels know of a weight; it does not keep the tensors alive."""
    codes, scales, tables, _, *numbers = weight
    return _C.QWeight(
        codes.data_ptr(), scales.data_ptr(), DTYPES[scales.dtype], tables.data_ptr(), 0, len(tables), *numbers
    )


def _as_rows(x: Tensor) -> Tensor:
    """``[M, K]`` with adjacent elements in a row and rows at multiples of 16 bytes, none upon another."""
    rows = x.reshape(-1, x.shape[-1])
    if (
        rows.stride(1) != 1
        or (rows.stride(0) < rows.shape[1] and rows.shape[0] > 1)
        or rows.stride(0) * rows.element_size() % _ALIGNMENT
        or rows.data_ptr() % _ALIGNMENT
    ):
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows


def plain_qgemm(handle: _C.QWeight, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The product outside of the dispatcher, with a contiguous x and a weight that is known to be right."""
    check_qgemm(x, weight, bias)
    return _multiply(handle, x, weight, bias)


def qgemm(x: Tensor, *operands: Any) -> Tensor:
    """Implements ``flute_kernels::qgemm``."""
    weight, bias = PackedWeight.split(operands)
    check_qgemm(x, weight, bias)
    check_layout(weight)
    return _multiply(weight_handle(weight), x, weight, None if bias is None else bias.contiguous())


def _multiply(handle: _C.QWeight, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    rows = _as_rows(x)
    m, n = rows.shape[0], weight.out_features
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if x.dtype == torch.float32 or not _multiply_fused(handle, pad_rows(rows), bias, out):
        multiply_dequantized(handle, rows, weight, bias, out)
    return out.view(*x.shape[:-1], n)


def _multiply_fused(handle: _C.QWeight, rows: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """``out = rows @ W_hat.T + bias`` in one kernel family; False where none serves the problem."""
    operands = (
        handle,
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        DTYPES[rows.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(),
        out.shape[1],
    )
    return _run(_C.qgemm_cuda, operands, rows.device)


def _run(kernel: Callable[..., int], operands: tuple[Any, ...], device: torch.device) -> bool:
    """Call a fused kernel, with workspace where it wants some; False where none serves the problem."""
    stream = current_stream(device)
    wanted = kernel(*operands, 0, device.index, stream)
    if wanted > 0:
        workspace = torch.empty(wanted, dtype=torch.uint8, device=device)
        wanted = kernel(*operands, workspace.data_ptr(), device.index, stream)
    return wanted == 0


def qgemm_grouped(x: Tensor, counts: Tensor, *operands: Any) -> Tensor:
    """Implements ``flute_kernels::qgemm_grouped``."""
    weight, _ = PackedWeight.split(operands)
    n = check_qgemm_grouped(x, counts, weight)
    check_layout(weight)
    rows, counts, handle = _as_rows(x), counts.contiguous(), weight_handle(weight)
    out = torch.empty((len(rows), n), dtype=x.dtype, device=x.device)
    if len(rows) == 0:
        return out
    if x.dtype == torch.float32:
        _warn_of_float32()
    elif _multiply_grouped_fused(handle, pad_rows(rows), counts, out):
        return out

    def dequantize_rows(part: Tensor, first: int) -> None:
        _dequantize_rows(handle, part, first)

    multiply_grouped(rows, counts, out, dequantize_rows)
    return out


def _multiply_grouped_fused(handle: _C.QWeight, rows: Tensor, counts: Tensor, out: Tensor) -> bool:
    """``out = `` each row times its expert's weight, in one kernel family; False where none serves it.

    It fills all of ``out``, with zeros below the last expert's rows; whatever ``counts`` say, it touches
    nothing else.
    """
    operands = (
        handle,
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        DTYPES[rows.dtype],
        counts.data_ptr(),
        counts.shape[0],
        out.data_ptr(),
        out.shape[1],
    )
    return _run(_C.qgemm_grouped_cuda, operands, rows.device)


def _dequantize_rows(handle: _C.QWeight, part: Tensor, first: int) -> None:
    """Fill ``part`` with the weight's rows from ``first`` on, a multiple of 16."""
    device = part.device
    dtype, stream = DTYPES[part.dtype], current_stream(device)
    _C.dequantize_cuda(handle, part.data_ptr(), dtype, first, len(part), device.index, stream)


def multiply_dequantized(
    handle: _C.QWeight, rows: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> None:
    """``out = rows @ W_hat.T + bias``, a part of the weight's rows after the other."""
    if rows.dtype == torch.float32:
        _warn_of_float32()
    n, k = weight.out_features, weight.in_features
    step = min(n, max(_CHUNK_ROWS, _CHUNK_BYTES // (k * rows.element_size()) // 256 * 256))
    part = torch.empty((step, k), dtype=rows.dtype, device=rows.device)
    for first in range(0, n, step):
        count = min(step, n - first)
        _dequantize_rows(handle, part[:count], first)
        torch.mm(rows, part[:count].t(), out=out[:, first : first + count])
    if bias is not None:
        out += bias


_warned_of_float32 = False


def _warn_of_float32() -> None:
    global _warned_of_float32
    if not _warned_of_float32:
        _warned_of_float32 = True
        warnings.warn(
            "x is float32, which the GPU kernels do not multiply: the weight is dequantized at every call. "
            "float16 and bfloat16 are fast.",
            stacklevel=4,
        )


def dequantize(*operands: Any) -> Tensor:
    """Implements ``flute_kernels::dequantize``."""
    weight, dtype = PackedWeight.split(operands)
    check_dtype(dtype)
    check_layout(weight)
    device = weight.codes.device
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=device)
    _dequantize_rows(weight_handle(weight), out, 0)
    return out


def hadamard(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    """Implements ``flute_kernels::hadamard``."""
    check_hadamard(x, signs, block_size)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    signs = None if signs is None else signs.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _C.hadamard_cuda(
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
        x.device.index,
        current_stream(x.device),
    )
    return out.view(x.shape)
