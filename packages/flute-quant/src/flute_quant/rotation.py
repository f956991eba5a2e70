"""The blockwise Hadamard rotation of the weight format, for weights: the reference in plain torch."""

from __future__ import annotations

import math
from functools import lru_cache

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
    return fwht(values * _signs(values.shape[-1], seed, values.device, values.dtype), block)


def unrotate(values: Tensor, block: int, seed: int) -> Tensor:
    """Inverse of :func:`rotate`."""
    return fwht(values, block) * _signs(values.shape[-1], seed, values.device, values.dtype)


@lru_cache(maxsize=64)
def _signs(channels: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, because they are computed one by one: a training step rotates every weight of a layer."""
    with torch.inference_mode(False):
        return hadamard_signs(channels, seed).to(device, dtype)
