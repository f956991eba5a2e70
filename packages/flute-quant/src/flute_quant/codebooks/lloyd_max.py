"""Lloyd-Max: the scalar table with the least squared error on a Gaussian."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["lloyd_max_table"]

_NORMAL = NormalDist()
# Lloyd's iteration contracts by a constant factor a step; 16 levels need about 1,500 steps for this.
_TOLERANCE = 1e-10
_MAX_STEPS = 20_000


def lloyd_max_table(bits: int) -> Tensor:
    """The optimal ``2**bits`` levels of a standard normal, divided by the largest: float32, ascending.

    Alternates between the two conditions of an optimum until neither moves: borders lie midway
    between levels, and each level is the mean of its interval.

    Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982);
    J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960).
    """
    positive = _positive_levels(bits)
    levels = [-v for v in reversed(positive)] + list(positive)
    return torch.tensor([v / levels[-1] for v in levels], dtype=torch.float32)


@cache
def _positive_levels(bits: int) -> tuple[float, ...]:
    # The Gaussian is even and so is the optimum: only the positive half is iterated, from 0 up.
    count = 1 << (bits - 1)
    levels = [_NORMAL.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]
    for _ in range(_MAX_STEPS):
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        moved = [_mean(a, b) for a, b in pairwise(borders)]
        step = max(abs(a - b) for a, b in zip(levels, moved, strict=True))
        levels = moved
        if step < _TOLERANCE:
            break
    return tuple(levels)


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal inside ``(low, high)``, both not negative."""
    above = 0.0 if high == math.inf else _NORMAL.pdf(high)
    # erfc keeps the difference of two small tails exact where 1 - cdf would cancel.
    mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    return (_NORMAL.pdf(low) - above) / mass
