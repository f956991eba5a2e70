"""FLUTE's products on a GPU beside torch.mm and every peer that is installed.

Each side's result is checked against its own dequantized weight in float32 before it is timed; weights are
used in turn so that none is in the L2 cache; times are medians of CUDA-graph replays, for which sides take
turns::

    nox -s bench -- gpu                       or, where nothing can be installed:
    python benchmarks/gpu/linears.py --rows 1,8,16 --bits 4
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py serves all benchmarks
import record
from checks import DTYPES, check
from problem import Problem
from sides import SIDES, Absent, Side
from timing import Replays, copy_bandwidth, in_turns
from torch import Tensor

SHAPES = json.loads((Path(__file__).parents[1] / "shapes.json").read_text(encoding="utf-8"))["gpu"]
_CHECKED_ROWS = 512


def main() -> None:
    """Print a table for each shape, bits and dtype, and save the figures where asked."""
    parser = argparse.ArgumentParser(description="GPU kernels against torch.mm and peers.")
    parser.add_argument("--shapes", help="such as 4096x4096,28672x4096 (N x K); default: shapes.json")
    parser.add_argument("--rows", help="of x, such as 1,8,16; default: shapes.json")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--dtypes", default="fp16,bf16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    record.add_argument(parser)
    options = parser.parse_args()
    shapes = [_numbers(s, "x") for s in options.shapes.split(",")] if options.shapes else SHAPES["shapes"]
    rows = _numbers(options.rows, ",") if options.rows else SHAPES["rows"]
    bandwidth = copy_bandwidth()
    print(f"{record.gpu_model()}; an elementwise kernel moves {bandwidth:.2f} TB/s")
    figures: list[dict[str, Any]] = []
    for dtype in options.dtypes.split(","):
        for n, k in shapes:
            for bits in _numbers(options.bits, ","):
                problem = Problem(n, k, bits, options.group_size, DTYPES[dtype])
                figures += compare(problem, rows, options.sides.split(","), bandwidth)
                if options.save:  # each time, since a run takes many minutes
                    record.save("gpu-linears", {"bandwidth_tb_s": bandwidth, "times": figures}, options.tag)


def _numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator)]


def compare(p: Problem, rows: list[int], names: list[str], bandwidth: float) -> list[dict[str, Any]]:
    """One table: microseconds of each side, and how many times faster than torch.mm."""
    dtype = str(p.dtype).removeprefix("torch.")
    title = f"{p.n} x {p.k}, {p.bits} bits, g = {p.group_size}, {dtype}"
    sides: dict[str, Side] = {}
    for name in names:
        with reported(name, title):
            sides[name] = SIDES[name](p)
    print(f"\n{title}\n{'M':>6}{'floor':>9}" + "".join(f"{name:>20}" for name in sides))
    figures = []
    for m in rows:
        x = p.x(m)
        ready: dict[str, Replays] = {}
        for name, side in sides.items():
            if side.fewest_rows <= m <= side.most_rows:
                with reported(name, title):
                    check_side(side, x)
                    ready[name] = Replays(lambda i, side=side, x=x: side.call(i, x), side.copies)
        times = in_turns(ready)
        floor = floor_us(p, m, bandwidth)
        base = times.get("torch.mm")
        line = f"{m:6}{floor:9.1f}"
        for name in sides:
            us = times.get(name)
            ratio = f" {base / us:5.2f}x" if us and base and name != "torch.mm" else " " * 7
            line += f"{us:13.1f}{ratio}" if us else " " * 20
            if us:
                figures.append(
                    {"n": p.n, "k": p.k, "bits": p.bits, "group_size": p.group_size, "dtype": dtype, "m": m}
                    | {"side": name, "us": round(us, 3), "floor_us": round(floor, 3)}
                    | {"x_torch": round(base / us, 3) if base else None}
                )
        print(line, flush=True)
    return figures


@contextmanager
def reported(name: str, title: str) -> Iterator[None]:
    """A side that is absent or fails must not end the comparison."""
    try:
        yield
    except Absent as why:
        print(f"({name} is left out of {title}: {why})")
    except Exception as error:
        print(f"({name} failed on {title}: {type(error).__name__}: {str(error).splitlines()[0][:150]})")


def check_side(side: Side, x: Tensor) -> None:
    """Raise if a side's results are wrong, with its first or its last weight, in some of many rows."""
    some = torch.randperm(len(x), device=x.device)[:_CHECKED_ROWS]
    expected = x[some].float() @ side.weight.t()
    for copy in {0, side.copies - 1}:
        check(side.call(copy, x)[some], expected, x.dtype, f"M = {len(x)}")


def floor_us(p: Problem, m: int, bandwidth: float) -> float:
    """Microseconds that moving each byte once takes; products are not counted."""
    return (p.bytes + 2 * m * (p.n + p.k)) / bandwidth / 1e6


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
