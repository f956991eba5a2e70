"""NormalFloat: a table whose entries are equally likely under a Gaussian, with an exact zero."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalfloat_table"]

# The tail probability at which the outermost entries sit. QLoRA averages two ways of spreading
# 15 and 16 intervals over the half line; the same number serves every bit width.
_TAIL = (1 / 32 + 1 / 30) / 2


def normalfloat_table(bits: int) -> Tensor:
    """NormalFloat of ``bits`` bits: float32 ``[2**bits]``, ascending, from -1 to 1, zero among them.

    Quantiles of a standard normal at 2**(bits-1) equispaced probabilities from the tail to 1/2 and
    at 2**(bits-1) more above 1/2, divided by the largest.

    Source: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E; at 4 bits it is their NF4.
    """
    half = 1 << (bits - 1)
    below = torch.linspace(_TAIL, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - _TAIL, half + 1, dtype=torch.float64)[1:]
    quantiles: Tensor = torch.special.ndtri(torch.cat([below, above]))
    return (quantiles / quantiles.abs().max()).to(torch.float32)
