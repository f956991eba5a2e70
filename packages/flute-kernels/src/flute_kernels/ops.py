"""The operators ``flute_kernels::{qgemm, qgemm_grouped, dequantize, hadamard}``, known to torch's dispatcher.

Weights come in the layout that :class:`flute_kernels.LutWeight` makes for a device; it is the only
caller that most code needs. ``torch.library.Library`` is used rather than its decorators because a
call then costs a third (4.7 instead of 14.5 microseconds), which a decode step pays hundreds of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute_kernels.checks import check_dtype, check_hadamard, check_qgemm, check_qgemm_grouped
from flute_kernels.cpu import kernels as cpu
from flute_kernels.cuda import kernels as cuda
from flute_kernels.errors import UnsupportedError
from flute_kernels.packed import PackedWeight

__all__ = ["dequantize", "hadamard", "qgemm", "qgemm_grouped"]

_library = torch.library.Library("flute_kernels", "DEF")
_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor tables, Tensor? table_of_block, "
    "int out_features, int in_features, int bits, int vector_size, int group_size"
)
_library.define(f"qgemm(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor")
_library.define(f"qgemm_grouped(Tensor x, Tensor counts, {_WEIGHT}) -> Tensor")
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
    numbers = (out_features, in_features, bits, vector_size, group_size)
    out: Tensor = torch.ops.flute_kernels.qgemm.default(
        x, codes, scales, tables, table_of_block, *numbers, bias
    )
    return out


def qgemm_grouped(
    x: Tensor,
    counts: Tensor,
    codes: Tensor,
    scales: Tensor,
    tables: Tensor,
    table_of_block: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    vector_size: int,
    group_size: int,
) -> Tensor:
    """Rows of ``x``, sorted by expert, each times its own expert's weight.

    The experts' weights ``[N, K]`` lie on top of each other in one weight of ``experts * N`` rows, in
    the ordinary layout. The host never waits for ``counts``, which may be computed on the GPU.

    Args:
        x: float32, float16 or bfloat16 ``[M, K]``; the first ``counts[0]`` rows are those of expert 0.
        counts: int32 ``[experts]``, rows of x that each expert has, on the device of ``x``. Rows after
            the last expert's, which belong to none, give zeros.
        codes, scales, tables, table_of_block: as for :func:`qgemm`.
        out_features: ``experts * N``; N is a multiple of 16.
        in_features, bits, vector_size, group_size: as for :func:`qgemm`.

    Returns:
        ``[M, N]`` in the dtype of ``x``; not differentiable.

    Raises:
        FormatError: a shape or device does not fit. On a CPU also: a count is negative, or they sum up to
            more than M. On a GPU, nothing beyond the tensors is read then, and the result means nothing.
        UnsupportedError: no kernel serves the dtype or device, or x wants a gradient.
    """
    numbers = (out_features, in_features, bits, vector_size, group_size)
    out: Tensor = torch.ops.flute_kernels.qgemm_grouped.default(
        x, counts, codes, scales, tables, table_of_block, *numbers
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
    """``W_hat`` as ``[N, K]``, rounded once to ``dtype``. Arguments as for :func:`qgemm`."""
    out: Tensor = torch.ops.flute_kernels.dequantize.default(
        codes, scales, tables, table_of_block, out_features, in_features, bits, vector_size, group_size, dtype
    )
    return out


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
    out: Tensor = torch.ops.flute_kernels.hadamard.default(x, signs, block_size, transpose)
    return out


# --- shapes without data ----------------------------------------------------------------------------


def _qgemm_fake(x: Tensor, *operands: Any) -> Tensor:
    weight, bias = PackedWeight.split(operands)
    check_qgemm(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.out_features)


def _qgemm_grouped_fake(x: Tensor, counts: Tensor, *operands: Any) -> Tensor:
    weight, _ = PackedWeight.split(operands)
    return x.new_empty(x.shape[0], check_qgemm_grouped(x, counts, weight))


def _dequantize_fake(*operands: Any) -> Tensor:
    weight, dtype = PackedWeight.split(operands)
    check_dtype(dtype)
    return weight.codes.new_empty(weight.out_features, weight.in_features, dtype=dtype)


def _hadamard_fake(x: Tensor, signs: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    check_hadamard(x, signs, block_size)
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
        weight = PackedWeight(*ctx.saved_tensors, *ctx.weight_numbers)
        grad_x = grad @ dequantize(*weight, ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[10]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, *[None] * 9, grad_bias)


def _qgemm_grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    raise UnsupportedError(
        f"x {list(inputs[0].shape)} wants a gradient, which the product with {inputs[1].shape[0]} experts "
        "does not have; call it under torch.no_grad()."
    )


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise AssertionError("its setup raises")


def _hadamard_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, ctx.block_size, ctx.transpose = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors
    return hadamard(grad, signs, ctx.block_size, not ctx.transpose), None, None, None


for _key, _kernels in (("CPU", cpu), ("CUDA", cuda)):
    _library.impl("qgemm", _kernels.qgemm, _key)
    _library.impl("qgemm_grouped", _kernels.qgemm_grouped, _key)
    _library.impl("dequantize", _kernels.dequantize, _key)
    _library.impl("hadamard", _kernels.hadamard, _key)
torch.library.register_fake("flute_kernels::qgemm", _qgemm_fake, lib=_library)
torch.library.register_fake("flute_kernels::qgemm_grouped", _qgemm_grouped_fake, lib=_library)
torch.library.register_fake("flute_kernels::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("flute_kernels::hadamard", _hadamard_fake, lib=_library)
torch.library.register_autograd(
    "flute_kernels::qgemm", _qgemm_backward, setup_context=_qgemm_setup, lib=_library
)
torch.library.register_autograd(
    "flute_kernels::qgemm_grouped", _no_backward, setup_context=_qgemm_grouped_setup, lib=_library
)
torch.library.register_autograd(
    "flute_kernels::hadamard", _hadamard_backward, setup_context=_hadamard_setup, lib=_library
)
