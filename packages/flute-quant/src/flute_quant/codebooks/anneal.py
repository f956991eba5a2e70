"""How the tables of pairs were found: Lloyd's algorithm, shaken less and less.

Alone, Lloyd's algorithm stops at the nearest arrangement that no small move betters, 0.4 to 1.0 % above the
best one known. Entries that are pushed about while they settle, and pushed less with every step, find
arrangements near that one. ``python -m flute_quant.codebooks.anneal 3 --seconds 60`` prints what it finds.

Source: Linde, Buzo, Gray, "An algorithm for vector quantizer design", IEEE Trans. Commun. 28 (1980), with the
noise of Zeger, Vaisey, Gersho, "Globally optimal vector quantizer design by stochastic relaxation", IEEE
Trans. Signal Process. 40 (1992). The best distortions known are those of G. Pagès and J. Printems.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import cache

import torch
from torch import Tensor

__all__ = ["anneal_pairs", "lloyd_step", "pair_distortion"]

# The density is summed on grids instead of random samples: no sampling noise. Points along one side, and how
# far out in sigma: to anneal on, to settle on, and to be exact on. The last one's cells are 0.034 wide, a
# twelfth of the distance between entries of the 256-entry table; the mass beyond it is 1e-7.
_ROUGH, _FINE, _EXACT = (96, 4.5), (160, 5.0), (320, 5.5)
_STEPS = 400
# In units of the distance between neighbouring entries, at the first step.
_NOISE = 0.175


def anneal_pairs(entries: int, seed: int, steps: int = _STEPS) -> Tensor:
    """Pairs for two independent standard normals: float32 ``[entries, 2]``, another table for every seed.

    Args:
        entries: of the table.
        seed: of the noise.
        steps: with noise; more of them cool down more slowly.
    """
    generator = torch.Generator().manual_seed(seed)
    table = _spiral(entries)
    for step in range(steps):
        table = lloyd_step(table, *_grid(*_ROUGH))
        # Neighbours are as far apart as the density of the best quantizer says: see _spiral.
        width = (4 * math.pi / entries) ** 0.5 * torch.exp(table.square().sum(1, keepdim=True) / 8)
        noise = torch.randn(entries, 2, generator=generator)
        table = table + noise * width * (_NOISE * (1 - step / steps))
    for grid, more in ((_FINE, 30), (_EXACT, 60)):
        for _ in range(more):
            table = lloyd_step(table, *_grid(*grid))
    return table


def pair_distortion(table: Tensor) -> float:
    """Mean squared error of one of two standard normals under the nearest entry of ``[E, 2]``."""
    points, mass = _grid(*_EXACT)
    least = _distances(table, points).amin(1) + points.square().sum(1)
    return float((least.double() * mass.double()).sum()) / 2


def lloyd_step(table: Tensor, points: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
    """Every entry at the centre of the mass that is nearest to it; an entry that has none stays.

    Args:
        table: float32 ``[E, 2]``.
        points, mass: ``[G, 2]`` and ``[G]``, by default the finest grid.
    """
    if points is None or mass is None:
        points, mass = _grid(*_EXACT)
    nearest = _distances(table, points).argmin(1)
    total = torch.zeros(len(table)).index_add_(0, nearest, mass)
    centre = torch.zeros_like(table).index_add_(0, nearest, points * mass[:, None])
    return torch.where(total[:, None] > 0, centre / total.clamp_min(1e-30)[:, None], table)


def _distances(table: Tensor, points: Tensor) -> Tensor:
    """Squared distances ``[G, E]``, less the points' own squares."""
    return torch.addmm(table.square().sum(1)[None], points, table.T, alpha=-2)


@cache
def _grid(side: int, reach: float) -> tuple[Tensor, Tensor]:
    """Points ``[G, 2]`` of a disc and the Gaussian's mass at them, which sums to 1."""
    axis = ((torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1) * reach
    points = torch.cartesian_prod(axis, axis)
    points = points[points.norm(dim=1) <= reach]
    mass = torch.exp(-points.square().sum(1) / 2)
    return points.float(), (mass / mass.sum()).float()


def _spiral(entries: int) -> Tensor:
    """A sunflower spiral with the best quantizer's density.

    In two dimensions that is the square root of the Gaussian's: again a Gaussian, of sigma sqrt(2).
    """
    index = torch.arange(entries, dtype=torch.float64)
    radius = (-4 * torch.log1p(-(index + 0.5) / entries)).sqrt()
    angle = index * math.pi * (3 - math.sqrt(5))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).float()


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bits", type=int)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    started, seed, least = time.monotonic(), 0, math.inf
    while time.monotonic() - started < options.seconds:
        table = anneal_pairs(4**options.bits, seed)
        found = pair_distortion(table)
        if found < least:
            least = found
            entries = [[round(x, 5) for x in pair] for pair in table.tolist()]
            print(json.dumps({"seed": seed, "distortion": round(found, 7), "entries": entries}), flush=True)
        seed += 1


if __name__ == "__main__":
    _main()
