"""What the operators take of a weight, under one name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["PackedWeight"]


class PackedWeight(NamedTuple):
    """A weight in the kernels' layout, its fields in the order of the operators' schemas.

    Args:
        codes, scales, tables: the weight in the layout of their device.
        table_of_block: int32, the table of each block of 16 rows, or None where there is one table.
        out_features, in_features: N and K.
        bits, vector_size, group_size: as in :class:`~flute_kernels.QuantSpec`, -1 resolved to K.
    """

    codes: Tensor
    scales: Tensor
    tables: Tensor
    table_of_block: Tensor | None
    out_features: int
    in_features: int
    bits: int
    vector_size: int
    group_size: int

    @classmethod
    def split(cls, operands: tuple[Any, ...]) -> tuple[PackedWeight, Any]:
        """An operator's arguments from ``codes`` on: the weight, and the one after it (None by default)."""
        count = len(cls._fields)
        return cls(*operands[:count]), operands[count] if len(operands) > count else None
