"""The blockwise Hadamard rotation of the weight format, for weights: the reference in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flute_kernels.format import hadamard_signs

__all__ = ["AUTO_HADAMARD", "fwht", "rotate", "unrotate"]

AUTO_HADAMARD = 1024
"""The block that ``auto`` asks for; a layer takes the largest power of two up to it that divides its K.

Beyond some hundred weights the sum of that many terms is as Gaussian as it gets, and larger blocks only
forbid more ways of splitting K over the processes of tensor parallelism."""


def fwht(values: Tensor, block: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard transform of neighbouring blocks of the last dimension.

    Args:
        values: floating point ``[..., K]``, K a multiple of ``block``.
        block: a power of two.

    Returns:
        ``[..., K]``: every block multiplied with H / sqrt(block), where H is symmetric and its own
        inverse up to that factor, so that applying it twice gives the input back.
    """
    shape = values.shape
    result = values.reshape(-1, block)
    stride = 1
    while stride < block:
        pairs = result.view(-1, block // (2 * stride), 2, stride)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        result = torch.stack([low + high, low - high], 2).view(-1, block)
        stride *= 2
    return (result / math.sqrt(block)).view(shape)


def rotate(values: Tensor, block: int, seed: int) -> Tensor:
    """``H(signs * values) / sqrt(block)`` along the last dimension, for inputs and for weight rows alike.

    The map is orthogonal: a dot product of two rotated vectors is that of the vectors themselves.
    """
    signs = hadamard_signs(values.shape[-1], seed).to(values.device, values.dtype)
    return fwht(values * signs, block)


def unrotate(values: Tensor, block: int, seed: int) -> Tensor:
    """Inverse of :func:`rotate`."""
    signs = hadamard_signs(values.shape[-1], seed).to(values.device, values.dtype)
    return fwht(values, block) * signs
