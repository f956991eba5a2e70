"""One linear layer to time: codes, scales and inputs that every side of a comparison shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flute_kernels import LutWeight, QuantizedLinear, QuantSpec

__all__ = ["NF4", "Problem", "copies_of"]

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
_COLD_BYTES = 220e6
"""Weights are used in turn until this many bytes have gone by, so that none is still in the L2 cache."""


def copies_of(size: float, most: int = 64) -> int:
    """How many weights, of which a call reads ``size`` bytes, are used in turn."""
    return max(1, min(most, math.ceil(_COLD_BYTES / size)))


@dataclass
class Problem:
    """``x[M, K] @ W_hat[N, K].T`` with ``bits``-bit codes in groups of ``group_size``."""

    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    seed: int = 0
    codes: Tensor = field(init=False)
    scales: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)
        shape = (self.n, self.k)
        self.codes = torch.randint(
            0, 1 << self.bits, shape, dtype=torch.uint8, device="cuda", generator=generator
        )
        scales = torch.rand(self.n, self.k // self.group_size, device="cuda", generator=generator)
        self.scales = ((scales * 0.8 + 0.6) * 0.02).to(self.dtype)

    def x(self, m: int) -> Tensor:
        """Random inputs ``[m, K]``."""
        return torch.randn(m, self.k, device="cuda").to(self.dtype)

    @property
    def bytes(self) -> int:
        """Of codes and scales."""
        return self.n * self.k * self.bits // 8 + self.scales.numel() * 2

    def copies(self, size: float | None = None) -> int:
        """How many weights of ``size`` bytes are used in turn."""
        return copies_of(size or self.bytes)

    def table(self) -> Tensor:
        """A table in float32: NF4, or every so many of its entries."""
        entries = torch.tensor(NF4, device="cuda")
        return (
            entries[torch.linspace(0, 15, 1 << self.bits, device="cuda").round().long()]
            .to(self.dtype)
            .float()
        )

    @cached_property
    def uniform(self) -> Tensor:
        """What uniform integers of the same codes stand for: float32 ``(code - 2**(bits-1)) * scale``."""
        return self.scaled(self.codes.float() - (1 << (self.bits - 1)))

    @cached_property
    def looked_up(self) -> Tensor:
        """What :meth:`table` stands for: float32 ``table[code] * scale``."""
        return self.scaled(self.table()[self.codes.int()])

    def scaled(self, values: Tensor) -> Tensor:
        """``values`` of every weight times its scale."""
        groups = values.view(self.n, -1, self.group_size)
        return (groups * self.scales.float()[..., None]).view(self.n, self.k)

    def flute(self) -> LutWeight:
        """FLUTE's weight of :attr:`looked_up`."""
        spec = QuantSpec(bits=self.bits, group_size=self.group_size)
        codebook = self.table().half().view(1, -1, 1)
        return LutWeight.from_linear(
            QuantizedLinear.from_codes(self.codes.int(), self.scales, codebook, spec)
        )
