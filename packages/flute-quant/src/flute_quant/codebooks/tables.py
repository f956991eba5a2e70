"""From values to what a checkpoint stores: pair tables and 16-bit rounding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cartesian_square", "stored_table"]


def cartesian_square(table: Tensor) -> Tensor:
    """Every pair of a scalar table ``[E]``: ``[E * E, 2]``, the first weight in the low bits of the code.

    That order makes the pair's code the two scalar codes side by side, so the bit stream stays as it is.
    """
    entries = table.shape[0]
    return torch.stack([table.repeat(entries), table.repeat_interleave(entries)], 1)


def stored_table(table: Tensor, *, exact: bool = False) -> Tensor:
    """The table as it is stored: float16, or float32 where ``exact`` asks for values that float16 lacks."""
    half = table.to(torch.float16)
    if exact and not torch.equal(half.to(torch.float32), table.to(torch.float32)):
        return table.to(torch.float32)
    return half
