"""The operators ``flute_kernels::{qgemm, dequantize, hadamard}``, registered with torch's dispatcher.

Weights come in the layout that :class:`flute_kernels.LutWeight` makes for a device; it is the only
caller that most code needs. ``torch.library.Library`` is used rather than its decorators because a
call then costs a third (4.7 instead of 14.5 microseconds), which a decode step pays hundreds of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute_kernels import _C
from flute_kernels.errors import FluteError, FormatError, UnsupportedError
from flute_kernels.format.spec import MAX_HADAMARD

__all__ = ["DTYPES", "dequantize", "hadamard", "qgemm"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Activation dtypes, with the kernels' number of each."""

_library = torch.library.Library("flute_kernels", "DEF")
_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor tables, Tensor? table_of_block, "
    "int out_features, int in_features, int bits, int vector_size, int group_size"
)
_library.define(f"qgemm(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor")
_library.define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")
_library.define("hadamard(Tensor x, Tensor? signs, int block_size, bool transpose=False) -> Tensor")


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
    """``x @ W_hat.T + bias`` for a weight in the kernels' layout.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        codes, scales, tables: the weight in the layout of ``x``'s device.
        table_of_block: int32, the table of each block of 16 rows, or None where there is one table.
        out_features, in_features: N and K.
        bits, vector_size, group_size: as in :class:`~flute_kernels.QuantSpec`, -1 resolved to K.
        bias: ``[N]`` or None; added in float32 before the result is rounded.

    Returns:
        ``[..., N]`` in the dtype of ``x``; differentiable with respect to ``x`` and ``bias``.

    Raises:
        FormatError: a shape or device does not fit.
        UnsupportedError: no kernel serves the dtype or device.
    """
    return torch.ops.flute_kernels.qgemm.default(
        x,
        codes,
        scales,
        tables,
        table_of_block,
        out_features,
        in_features,
        bits,
        vector_size,
        group_size,
        bias,
    )


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
    """``W_hat`` as ``[N, K]``, rounded once to ``dtype``. Arguments as for :func:`qgemm`."""
    return torch.ops.flute_kernels.dequantize.default(
        codes, scales, tables, table_of_block, out_features, in_features, bits, vector_size, group_size, dtype
    )


def hadamard(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    """Blockwise orthonormal Walsh-Hadamard rotation of the last dimension.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        signs: float32 ``[K]`` of +1 and -1, or None for none.
        block_size: power of two from 2 to 4096 that divides K.
        transpose: False: ``H (signs * x)``; True, its inverse: ``signs * (H x)``.

    Returns:
        The rotated ``x``, contiguous, in its dtype; sums are made in float32 and rounded once.

    Raises:
        FormatError: a shape or device does not fit.
        UnsupportedError: no kernel serves the dtype or device.
    """
    return torch.ops.flute_kernels.hadamard.default(x, signs, block_size, transpose)


# --- checks, shared by real and fake implementations ------------------------------------------------


def _check_qgemm(x: Tensor, codes: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != codes.device:
            raise FormatError(f"{name} is on {tensor.device}, the weight on {codes.device}; expected the same device.")
    refusal = _qgemm_refusal(x, out_features, in_features, bias)
    if refusal is not None:
        raise refusal


def _qgemm_refusal(x: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> FluteError | None:
    if x.ndim == 0 or x.shape[-1] != in_features:
        return FormatError(f"x has shape {list(x.shape)}; its last dimension must be in_features = {in_features}.")
    if x.dtype not in DTYPES:
        return UnsupportedError(f"x is {x.dtype}; supported are float32, float16 and bfloat16.")
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype not in DTYPES):
        return FormatError(
            f"bias is {bias.dtype} {list(bias.shape)}; expected float32, float16 or bfloat16 [{out_features}]."
        )
    return None


def _check_hadamard(x: Tensor, signs: Tensor | None, block_size: int) -> None:
    if block_size < 2 or block_size > MAX_HADAMARD or block_size & (block_size - 1):
        raise FormatError(f"block_size is {block_size}; expected a power of two from 2 to {MAX_HADAMARD}.")
    if x.ndim == 0 or x.shape[-1] % block_size:
        raise FormatError(
            f"x has shape {list(x.shape)}; its last dimension must be a multiple of {block_size}."
        )
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}; supported are float32, float16 and bfloat16.")
    if signs is not None and (tuple(signs.shape) != (x.shape[-1],) or signs.dtype != torch.float32):
        raise FormatError(f"signs is {signs.dtype} {list(signs.shape)}; expected float32 [{x.shape[-1]}].")
    if signs is not None and signs.device != x.device:
        raise FormatError(f"signs is on {signs.device}, x on {x.device}; expected the same device.")


# --- CPU --------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
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

    :func:`qgemm_cpu` is then called without it, which saves more time than a small matrix takes to
    multiply (some nine microseconds a call).
    """
    return (
        type(x) is Tensor
        and x.is_contiguous()
        and not (x.requires_grad or (bias is not None and (bias.requires_grad or not bias.is_contiguous())))
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and not _function_modes()
        and not _is_tracing()
        and _functorch_transform() is None
    )


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing
_functorch_transform = torch._C._functorch.peek_interpreter_stack
_threads = torch.get_num_threads


def qgemm_cpu(
    handle: Any, x: Tensor, codes: Tensor, out_features: int, in_features: int, bias: Tensor | None
) -> Tensor:
    """The CPU kernel on a contiguous x, outside of the dispatcher."""
    shape = x.shape
    dtype = DTYPES.get(x.dtype)
    if dtype is None or not shape or shape[-1] != in_features or bias is not None:
        _check_qgemm(x, codes, out_features, in_features, bias)
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


def _qgemm_cpu(
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
    _check_qgemm(x, codes, out_features, in_features, bias)
    handle = weight_handle(
        codes, scales, tables, table_of_block, out_features, in_features, bits, vector_size, group_size
    )
    rows = as_rows(x)
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


def _dequantize_cpu(
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
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype is {dtype}; supported are float32, float16 and bfloat16.")
    handle = weight_handle(
        codes, scales, tables, table_of_block, out_features, in_features, bits, vector_size, group_size
    )
    out = torch.empty((out_features, in_features), dtype=dtype)
    _C.dequantize_cpu(handle, out.data_ptr(), DTYPES[dtype], torch.get_num_threads())
    return out


def _hadamard_cpu(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    _check_hadamard(x, signs, block_size)
    rows = as_rows(x)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _C.hadamard_cpu(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        DTYPES[x.dtype],
        0 if signs is None else signs.contiguous().data_ptr(),
        block_size,
        transpose,
        out.data_ptr(),
        out.shape[1],
        torch.get_num_threads(),
    )
    return out.view(x.shape)


# --- shapes without data ----------------------------------------------------------------------------


def _qgemm_fake(
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
    _check_qgemm(x, codes, out_features, in_features, bias)
    return x.new_empty(*x.shape[:-1], out_features)


def _dequantize_fake(
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
    return codes.new_empty(out_features, in_features, dtype=dtype)


def _hadamard_fake(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    _check_hadamard(x, signs, block_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- gradients --------------------------------------------------------------------------------------
# The weight is frozen; x and bias are not, so that adapters can be trained on a quantized base.


def _qgemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, bias = inputs
    ctx.weight_numbers = weight[4:]
    ctx.save_for_backward(*weight[:4])
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _qgemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(*ctx.saved_tensors, *ctx.weight_numbers, ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[10]:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, *[None] * 9, grad_bias)


def _hadamard_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, ctx.block_size, ctx.transpose = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors
    return hadamard(grad, signs, ctx.block_size, not ctx.transpose), None, None, None


_library.impl("qgemm", _qgemm_cpu, "CPU")
_library.impl("dequantize", _dequantize_cpu, "CPU")
_library.impl("hadamard", _hadamard_cpu, "CPU")
torch.library.register_fake("flute_kernels::qgemm", _qgemm_fake, lib=_library)
torch.library.register_fake("flute_kernels::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("flute_kernels::hadamard", _hadamard_fake, lib=_library)
torch.library.register_autograd(
    "flute_kernels::qgemm", _qgemm_backward, setup_context=_qgemm_setup, lib=_library
)
torch.library.register_autograd(
    "flute_kernels::hadamard", _hadamard_backward, setup_context=_hadamard_setup, lib=_library
)
