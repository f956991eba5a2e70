"""The table of pairs with the least squared error on a Gaussian that annealing found."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["gaussian_pairs", "lloyd_pairs_table"]

_FILE = Path(__file__).with_name("gaussian_pairs.json")


def lloyd_pairs_table(bits: int) -> Tensor:
    """``2**(2 * bits)`` pairs for two independent standard normals: float32 ``[2**(2 * bits), 2]``.

    The largest component is 1. Against the Cartesian square of the scalar optimum, the entries fill
    a disc instead of a square and their cells are near hexagons, which lowers the squared error by 8 % at
    2 bits, 14 % at 3 and 18 % at 4.
    """
    table = gaussian_pairs(bits)
    return table / table.abs().max()


def gaussian_pairs(bits: int) -> Tensor:
    """The same in units of the normals' standard deviation, as ``flute_quant.codebooks.anneal`` found it."""
    return _read()[bits].clone()


@cache
def _read() -> dict[int, Tensor]:
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    return {int(bits): torch.tensor(found["entries"]) for bits, found in stored.items()}
