"""Rows sorted by expert, each times its expert's weight, out of dequantized parts and torch's products.

How many rows an expert has is known to the device alone, and asking would stop the host until all work
before is done (and cannot be captured in a graph). Rows are therefore dealt into tiles, each of one expert
and of a height that depends on shapes only; there are as many tiles as the worst counts need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["multiply_grouped"]

_CHUNK_BYTES = 256 << 20
"""Of dequantized weights, for all experts and once more for the tiles, where that leaves 16 rows of each."""
_LOWEST, _HIGHEST = 8, 128
"""Rows of a tile: fewer would read weights for little, more would mostly be padding."""
_BLOCK = 16


class _Tiles(NamedTuple):
    """Where the rows of x go.

    Args:
        expert: ``[tiles]``, of each tile.
        rows: ``[tiles, height]``, of x; padding repeats rows that exist.
        place: ``[M]``, of each row of x in the tiles, counted in rows.
        has_expert: ``[M]``, False where a row belongs to none.
    """

    expert: Tensor
    rows: Tensor
    place: Tensor
    has_expert: Tensor


def multiply_grouped(
    x: Tensor, counts: Tensor, out: Tensor, dequantize: Callable[[Tensor, int], None]
) -> None:
    """``out = `` every row of x times its expert's weight, zero where it has none.

    Args:
        x: ``[M, K]`` of at least one row, sorted by expert.
        counts: int32 ``[experts]``, rows of each; whatever they say, nothing beyond ``x`` is read.
        out: ``[M, N]``; N is a multiple of 16.
        dequantize: fills ``[rows, K]`` of the dtype of ``x`` with the stacked weight from a row on.
    """
    tiles = _deal(counts, len(x))
    n, experts, (count, height) = out.shape[1], len(counts), tiles.rows.shape
    padded = x[tiles.rows]
    row_bytes = (experts + count) * x.shape[1] * x.element_size()
    step = min(n, max(_BLOCK, _CHUNK_BYTES // row_bytes // _BLOCK * _BLOCK))
    for first in range(0, n, step):
        width = min(step, n - first)
        part = x.new_empty(experts, width, x.shape[1])
        for expert in range(experts):
            dequantize(part[expert], expert * n + first)
        product = torch.bmm(padded, part[tiles.expert].transpose(1, 2)).view(count * height, width)
        out[:, first : first + width] = product[tiles.place].masked_fill_(~tiles.has_expert[:, None], 0)


def _deal(counts: Tensor, rows: int) -> _Tiles:
    experts = len(counts)
    per_expert = -(-rows // experts)
    height = min(_HIGHEST, max(_LOWEST, 1 << (per_expert - 1).bit_length()))
    # Every expert rounds up to whole tiles, and one that has any has a row.
    count = min(rows, rows // height + experts)

    ends = counts.long().clamp(min=0).cumsum(0).clamp(max=rows)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    of_expert = (ends - starts + height - 1) // height
    tile_ends = of_expert.cumsum(0)
    tile_starts = tile_ends - of_expert

    tile = torch.arange(count, device=counts.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp(max=experts - 1)
    first = starts[expert] + (tile - tile_starts[expert]) * height
    within = torch.arange(height, device=counts.device)

    row = torch.arange(rows, device=counts.device)
    owner = torch.searchsorted(ends, row, right=True)
    has_expert = owner < experts
    owner = owner.clamp(max=experts - 1)
    place = torch.where(has_expert, tile_starts[owner] * height + row - starts[owner], 0)
    return _Tiles(expert, (first[:, None] + within).clamp(max=rows - 1), place, has_expert)
