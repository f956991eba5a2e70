"""Integer codes with zero points as a table: ``scale * (code - zero)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flute_kernels.format.spec import BITS
from flute_quant.errors import QuantizationError

__all__ = ["IntegerGrid", "integer_grid"]


@dataclass(frozen=True)
class IntegerGrid:
    """The table that holds every ``code - zero`` of a matrix.

    Args:
        bits: of the table.
        lowest: its first entry; the others count up from there.
        zero: the one zero point, or None where groups have different ones, so that codes must be moved.
        note: where the table is larger than the source's codes, in words.
    """

    bits: int
    lowest: int
    zero: int | None
    note: str | None

    @property
    def table(self) -> Tensor:
        """float16 ``[2**bits]``; integers this small are exact."""
        return torch.arange(self.lowest, self.lowest + (1 << self.bits), dtype=torch.float16)

    def move(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """Codes ``[N, K]`` of a source whose groups have zero points ``[N, G]``, as entries of the table."""
        if self.zero is not None:
            return codes
        n, k = codes.shape
        shift = (-zeros.to(torch.int16) - self.lowest).to(torch.uint8)
        return (codes.view(n, zeros.shape[1], -1) + shift[..., None]).view(n, k)


def integer_grid(bits: int, zeros: Tensor, name: str) -> IntegerGrid:
    """Find it.

    One zero point for the whole matrix (symmetric quantization) is a table of the same size. Several need
    a larger one: there is room for them at 2 and 3 bits, and seldom at 4.

    Args:
        bits: of the source's codes, 2, 3 or 4.
        zeros: integer zero points of the groups.
        name: what errors call them.

    Raises:
        QuantizationError: no table is large enough.
    """
    low, high = (int(v) for v in torch.aminmax(zeros))
    if low == high:
        return IntegerGrid(bits, -low, low, None)
    values = (1 << bits) + high - low
    wide = [b for b in BITS if values <= 1 << b]
    if not wide:
        largest = max(BITS)
        raise QuantizationError(
            f"{name} has zero points from {low} to {high} (asymmetric quantization), so that {bits}-bit "
            f"codes stand for {values} values; one table of {largest} bits holds {1 << largest}. Supported "
            "are symmetric checkpoints, whose zero point is everywhere the same."
        )
    note = f"{wide[0]} bits for {bits}-bit codes with zero points from {low} to {high}"
    return IntegerGrid(wide[0], -high, None, note)
