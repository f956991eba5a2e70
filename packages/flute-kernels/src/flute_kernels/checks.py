"""What the operators ask of their arguments on every device, before anything is read."""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels.errors import FormatError, UnsupportedError
from flute_kernels.format.spec import MAX_HADAMARD
from flute_kernels.packed import PackedWeight

__all__ = [
    "ACTIVATION_DTYPES",
    "DTYPES",
    "check_dtype",
    "check_hadamard",
    "check_qgemm",
    "check_qgemm_grouped",
    "check_tensors",
]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Activation dtypes, with the kernels' number of each."""
ACTIVATION_DTYPES = tuple(DTYPES)
"""Dtypes that x, bias and results may have."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raise UnsupportedError unless weights can be dequantized to ``dtype``."""
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype is {dtype}; supported are float32, float16 and bfloat16.")


def check_qgemm(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """x and bias fit the weight."""
    n, k, device = weight.out_features, weight.in_features, weight.codes.device
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise FormatError(
                f"{name} is on {tensor.device}, the weight on {device}; expected the same device."
            )
    if x.ndim == 0 or x.shape[-1] != k:
        raise FormatError(f"x has shape {list(x.shape)}; its last dimension must be in_features = {k}.")
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}; supported are float32, float16 and bfloat16.")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype not in DTYPES):
        raise FormatError(
            f"bias is {bias.dtype} {list(bias.shape)}; expected float32, float16 or bfloat16 [{n}]."
        )


_EXPERT_ROWS = 16
"""An expert's rows come in multiples of this: a kernel's block of rows belongs to one expert."""


def check_qgemm_grouped(x: Tensor, counts: Tensor, weight: PackedWeight) -> int:
    """x and counts fit a weight of stacked experts; returns the rows that one expert has."""
    check_qgemm(x, weight, None)
    if x.ndim != 2:
        raise FormatError(f"x has shape {list(x.shape)}; expected [rows, {weight.in_features}].")
    if counts.dtype != torch.int32 or counts.ndim != 1 or counts.shape[0] == 0:
        raise FormatError(f"counts is {counts.dtype} {list(counts.shape)}; expected torch.int32 [experts].")
    if counts.device != x.device:
        raise FormatError(f"counts is on {counts.device}, x on {x.device}; expected the same device.")
    n, experts = weight.out_features, counts.shape[0]
    if n % (experts * _EXPERT_ROWS):
        raise FormatError(
            f"out_features = {n} over {experts} experts is {n / experts:g} rows each; "
            f"expected a multiple of {_EXPERT_ROWS}."
        )
    return n // experts


def check_tensors(
    expected: dict[str, tuple[Tensor, tuple[torch.dtype, ...], list[int]]], device: torch.device
) -> None:
    """Each tensor has one of its dtypes and its shape, is contiguous, and is where the codes are."""
    for name, (tensor, dtypes, shape) in expected.items():
        if tensor.dtype not in dtypes or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise FormatError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}"
                f"{'' if tensor.is_contiguous() else ', not contiguous'}; "
                f"expected contiguous {' or '.join(map(str, dtypes))} {shape}."
            )
        if tensor.device != device:
            raise FormatError(f"{name} is on {tensor.device}, codes on {device}; expected the same.")


def check_hadamard(x: Tensor, signs: Tensor | None, block_size: int) -> None:
    """x and signs fit a rotation in blocks of ``block_size``."""
    if block_size < 2 or block_size > MAX_HADAMARD or block_size & (block_size - 1):
        raise FormatError(f"block_size is {block_size}; expected a power of two from 2 to {MAX_HADAMARD}.")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % block_size:
        raise FormatError(
            f"x has shape {list(x.shape)}; its last dimension must be a multiple of {block_size}."
        )
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}; supported are float32, float16 and bfloat16.")
    if signs is not None and (tuple(signs.shape) != (x.shape[-1],) or signs.dtype != torch.float32):
        raise FormatError(f"signs is {signs.dtype} {list(signs.shape)}; expected float32 [{x.shape[-1]}].")
    if signs is not None and signs.device != x.device:
        raise FormatError(f"signs is on {signs.device}, x on {x.device}; expected the same device.")
