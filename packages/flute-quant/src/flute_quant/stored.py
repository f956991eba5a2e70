"""What a stored matrix computes with, and how far that is from the weight that it was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels import QuantizedLinear
from flute_quant.methods.nearest import Nearest, nearest_for
from flute_quant.rotation import unrotate
from flute_quant.tensor import ErrorStats

__all__ = ["dequantized", "nearest_of", "stored_error"]


def dequantized(linear: QuantizedLinear) -> Tensor:
    """Float32 ``[N, K]`` in the basis of the model, a rotation undone."""
    weight = linear.dequantize()
    spec = linear.spec
    return unrotate(weight, spec.hadamard, spec.hadamard_seed) if spec.hadamard else weight


def stored_error(weight: Tensor, linear: QuantizedLinear) -> ErrorStats:
    """The error of what is stored for a weight ``[N, K]``, on whichever device that is."""
    exact = weight.to(torch.float32)
    difference = dequantized(linear).to(weight.device) - exact
    error, energy = (x.square().sum(dtype=torch.float64) for x in (difference, exact))
    return ErrorStats(weight.numel(), float(error), float(energy))


def nearest_of(linear: QuantizedLinear, device: torch.device) -> Nearest:
    """The encoder of the table that a matrix is stored with, on a device."""
    table = linear.codebook[0].to(device, torch.float32)
    return nearest_for(table[:, 0].contiguous() if linear.spec.vector_size == 1 else table)
