"""The random signs of a Hadamard rotation, from a seed, the same on every machine and every torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flute_kernels.format.spec import NO_SIGNS

__all__ = ["hadamard_signs"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def hadamard_signs(in_features: int, seed: int) -> Tensor:
    """Signs of ``in_features`` channels: -1 where the top bit of the k-th SplitMix64 output is set.

    Args:
        in_features: channels.
        seed: the generator's 64-bit state before the first output, or -1 for no signs.

    Returns:
        float32 ``[in_features]`` of +1 and -1, on the CPU.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    if seed == NO_SIGNS:
        return torch.ones(in_features, dtype=torch.float32, device="cpu")
    signs = []
    for k in range(1, in_features + 1):
        z = (seed + k * _GAMMA) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        signs.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(signs, dtype=torch.float32, device="cpu")
