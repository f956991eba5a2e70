"""The operators on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flute_kernels import _C
from flute_kernels.checks import DTYPES, check_dtype, check_hadamard, check_qgemm
from flute_kernels.cpu.layout import check_layout
from flute_kernels.errors import UnsupportedError

__all__ = [
    "dequantize",
    "hadamard",
    "is_plain",
    "plain_qgemm",
    "qgemm",
    "refuse_forward_mode",
    "weight_handle",
]


def _as_rows(x: Tensor) -> Tensor:
    """``[M, K]`` whose rows have adjacent elements; no copy where the strides already allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def weight_handle(
    codes: Tensor, scales: Tensor, tables: Tensor, table_of_block: Tensor | None, *numbers: int
) -> Any:
    table_address = 0 if table_of_block is None else table_of_block.data_ptr()
    return _C.QWeight(
        codes.data_ptr(), scales.data_ptr(), DTYPES[scales.dtype], tables.data_ptr(), table_address, *numbers
    )


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's dispatcher has nothing to add: no gradient, tracing, mode, transform or subclass.

    :func:`plain_qgemm` is then called without it, which saves more time than a small matrix takes to
    multiply (some nine microseconds a call).
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.is_contiguous()
        and (bias is None or (type(bias) in (Tensor, torch.nn.Parameter) and bias.is_contiguous()))
        and not (_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and not _function_modes()
        and not _is_tracing()
        and _functorch_transform() is None
    )


def refuse_forward_mode(x: Tensor, bias: Tensor | None) -> None:
    """Raise UnsupportedError where forward-mode differentiation would silently find no tangent."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, bias)
    ):
        raise UnsupportedError("Forward-mode derivatives of a quantized product are not supported.")


_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing
_functorch_transform = torch._C._functorch.peek_interpreter_stack
_threads = torch.get_num_threads


def plain_qgemm(
    handle: Any, x: Tensor, codes: Tensor, out_features: int, in_features: int, bias: Tensor | None
) -> Tensor:
    """The CPU kernel on a contiguous x, outside of the dispatcher."""
    shape = x.shape
    dtype = DTYPES.get(x.dtype, -1)
    if dtype < 0 or not shape or shape[-1] != in_features or bias is not None:
        check_qgemm(x, codes, out_features, in_features, bias)
    out = torch.empty((*shape[:-1], out_features), dtype=x.dtype)
    _C.qgemm_cpu(
        handle,
        x.data_ptr(),
        x.numel() // in_features,
        in_features,
        dtype,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(),
        out_features,
        _threads(),
    )
    return out


def qgemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    tables: Tensor,
    table_of_block: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    vector_size: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    check_qgemm(x, codes, out_features, in_features, bias)
    numbers = (out_features, in_features, bits, vector_size, group_size)
    check_layout(codes, scales, tables, table_of_block, *numbers)
    handle = weight_handle(codes, scales, tables, table_of_block, *numbers)
    rows = _as_rows(x)
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    _C.qgemm_cpu(
        handle,
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        DTYPES[x.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(),
        out_features,
        _threads(),
    )
    return out


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tables: Tensor,
    table_of_block: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    vector_size: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    check_dtype(dtype)
    numbers = (out_features, in_features, bits, vector_size, group_size)
    check_layout(codes, scales, tables, table_of_block, *numbers)
    handle = weight_handle(codes, scales, tables, table_of_block, *numbers)
    out = torch.empty((out_features, in_features), dtype=dtype)
    _C.dequantize_cpu(handle, out.data_ptr(), DTYPES[dtype], torch.get_num_threads())
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
        torch.get_num_threads(),
    )
    return out.view(x.shape)
