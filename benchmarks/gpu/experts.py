"""FLUTE's grouped products for mixtures of experts beside the 16-bit one of torch.

Tokens choose their experts at random, evenly or with a few that most of them like; each side gets rows that
are sorted already. Results are checked against a float32 product before they are timed; weights are used in
turn so that none is in the L2 cache; times are medians of CUDA-graph replays::

    nox -s bench -- gpu-experts               or, where nothing can be installed:
    python benchmarks/gpu/experts.py --tokens 1,16,256
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py serves all benchmarks
import record
from checks import DTYPES, check
from problem import Problem, copies_of
from timing import Replays, in_turns

SHAPES = json.loads((Path(__file__).parents[1] / "shapes.json").read_text(encoding="utf-8"))["experts"]


class Mixture(NamedTuple):
    """A layer's weights ``[experts * N, K]``, and how many experts a token has."""

    name: str
    experts: int
    chosen: int
    n: int
    k: int


def main() -> None:
    """Print a table for each layer, and save the figures where asked."""
    parser = argparse.ArgumentParser(description="Grouped GPU kernels against 16-bit ones.")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--dtypes", default="bf16")
    parser.add_argument("--group-size", type=int, default=128)
    record.add_argument(parser)
    options = parser.parse_args()
    tokens = [int(number) for number in options.tokens.split(",")]
    figures = [
        figure
        for dtype in options.dtypes.split(",")
        for layer in SHAPES
        for bits in map(int, options.bits.split(","))
        for figure in compare(Mixture(**layer), bits, options.group_size, DTYPES[dtype], tokens)
    ]
    if options.save:
        record.save("gpu-experts", {"times": figures}, options.tag)


def compare(
    mixture: Mixture, bits: int, group_size: int, dtype: torch.dtype, tokens: list[int]
) -> list[dict[str, Any]]:
    """One table: microseconds of each side by tokens and how they choose."""
    p = Problem(mixture.experts * mixture.n, mixture.k, bits, group_size, dtype)
    weight = p.looked_up.view(mixture.experts, mixture.n, mixture.k)
    full = weight.to(dtype)
    copies_16 = copies(full.numel() * 2, tokens[0] * mixture.chosen, mixture)
    copies_flute = copies(p.bytes, tokens[0] * mixture.chosen, mixture)
    quantized = [p.flute() for _ in range(copies_flute)]
    fulls = [full, *(full.clone() for _ in range(copies_16 - 1))]
    title = f"{mixture.name}: {mixture.chosen} of {mixture.experts} experts, {mixture.n} x {mixture.k}"
    print(f"\n{title}, {bits} bits, g = {group_size}, {dtype}")
    print(f"{'tokens':>7} {'choice':8}{'FLUTE':>9}{'torch':>9}{'ratio':>7}")
    figures = []
    for count in tokens:
        for choice in ("even", "skewed"):
            counts = choose(mixture, count, choice)
            x = p.x(int(counts.sum()))
            ends = counts.cumsum(0).to(torch.int32)
            expected = reference(x, counts, weight)
            sides: dict[str, tuple[Callable[[int], Tensor], int]] = {
                "FLUTE": (lambda i, x=x, c=counts: quantized[i].linear_grouped(x, c), copies_flute),
                "torch grouped_mm": (
                    lambda i, x=x, e=ends: torch._grouped_mm(x, fulls[i].transpose(1, 2), offs=e),
                    copies_16,
                ),
            }
            for name, (call, _) in sides.items():
                check(call(0), expected, dtype, f"{name}, {title}, {count} tokens")
            times = in_turns({name: Replays(*side) for name, side in sides.items()})
            for name, us in times.items():
                figures.append(
                    mixture._asdict()
                    | {"bits": bits, "group_size": group_size, "dtype": str(dtype).removeprefix("torch.")}
                    | {"tokens": count, "choice": choice, "side": name, "us": round(us, 3)}
                )
            flute, base = times["FLUTE"], times["torch grouped_mm"]
            print(f"{count:7} {choice:8}{flute:9.1f}{base:9.1f}{base / flute:7.2f}", flush=True)
    return figures


def copies(size: float, rows: int, mixture: Mixture) -> int:
    """How many weights are used in turn: one call reads those of some experts alone."""
    return copies_of(size * min(rows, mixture.experts) / mixture.experts, most=8)


def choose(mixture: Mixture, tokens: int, choice: str) -> Tensor:
    """int32 rows of each expert, each token's experts being different ones."""
    generator = torch.Generator().manual_seed(tokens)
    liked = torch.ones(mixture.experts)
    if choice == "skewed":
        liked[: mixture.experts // 8] = 8.0
    chosen = torch.multinomial(liked.expand(tokens, -1), mixture.chosen, generator=generator)
    return torch.bincount(chosen.flatten(), minlength=mixture.experts).to(torch.int32).cuda()


def reference(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """float32 products, expert by expert."""
    parts = x.float().split(counts.tolist())
    return torch.cat([part @ of.t() for part, of in zip(parts, weight, strict=True)])


if __name__ == "__main__":
    main()
