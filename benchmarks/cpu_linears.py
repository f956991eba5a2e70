"""The CPU kernels against torch.nn.functional.linear in bfloat16 and float32.

Every side gets as many weights as it takes to exceed the last-level cache twice, and goes through them in
turn; the sides take turns too, so that a busy machine is busy for all. Figures are medians. Every result
is checked against float64 before anything is timed::

    nox -s bench -- cpu
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import linear

from flute_kernels import LutWeight, QuantizedLinear, QuantSpec

SHAPES = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of the largest output
Call = Callable[[], object]


def main() -> None:
    """Print the ratios, and save them where asked."""
    parser = argparse.ArgumentParser(description="CPU kernels against torch.")
    parser.add_argument("--rounds", type=int, default=41, metavar="N", help="timed rounds (default 41)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(record.cpu_model())
    with torch.inference_mode():
        figures = {
            "single": [
                figure
                for shape in SHAPES["single"]
                for m, rounds in ((1, options.rounds), (512, max(3, options.rounds // 8)))
                for figure in single(shape, m, rounds)
            ],
            "models": [
                figure
                for name, model in SHAPES["models"].items()
                for figure in whole_model(name, model["linears"] * model["layers"], options.rounds)
            ],
        }
    if options.save:
        record.save("cpu-linears", figures, options.tag)


def single(shape: Sequence[int], m: int, rounds: int) -> list[dict[str, Any]]:
    """One shape: 4, 3 and 2 bits in groups of 128, with bfloat16 and (4 bits) float32 activations."""
    n, k = shape
    x = torch.randn(m, k)
    calls = {
        "torch bf16": in_turn(dense(n, k, torch.bfloat16), x.bfloat16(), linear),
        "torch fp32": in_turn(dense(n, k, torch.float32), x, linear),
        "4-bit, fp32 x": in_turn(quantized(n, k, 4, 128), x, run),
    }
    for bits in (4, 3, 2):
        calls[f"{bits}-bit, bf16 x"] = in_turn(quantized(n, k, bits, 128), x.bfloat16(), run)
    return report(f"{n} x {k}, M = {m}", medians(calls, rounds))


def whole_model(name: str, shapes: Sequence[Sequence[int]], rounds: int) -> list[dict[str, Any]]:
    """All linears of a model once, one row of activations, as a decoded token meets them."""
    inputs = {k: torch.randn(1, k) for _, k in shapes}
    halves = {k: x.bfloat16() for k, x in inputs.items()}
    torch_bf16 = [torch.randn(n, k).bfloat16() for n, k in shapes]
    torch_fp32 = [weight.float() for weight in torch_bf16]
    calls: dict[str, Call] = {
        "torch bf16": lambda: [linear(halves[w.shape[1]], w) for w in torch_bf16],
        "torch fp32": lambda: [linear(inputs[w.shape[1]], w) for w in torch_fp32],
    }
    for bits in (4, 3, 2):
        weights = [checked(n, k, bits, 64) for n, k in shapes]
        for dtype, xs in (("bf16", halves), ("fp32", inputs)):
            calls[f"{bits}-bit, {dtype} x"] = lambda ws=weights, xs=xs: [
                w.linear(xs[w.in_features]) for w in ws
            ]
    return report(f"{len(shapes)} linears of {name}, M = 1", medians(calls, rounds))


# --- weights ----------------------------------------------------------------------------------------


def cache_bytes() -> int:
    """Of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text(encoding="utf-8").strip().rstrip("K")) << 10)
    return max(sizes)


def copies(bytes_each: float) -> int:
    """How many weights exceed the cache twice."""
    return int(2 * cache_bytes() / bytes_each) + 1


def dense(n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights for torch."""
    return [torch.randn(n, k).to(dtype) for _ in range(copies(n * k * dtype.itemsize))]


def quantized(n: int, k: int, bits: int, group_size: int) -> list[LutWeight]:
    """Weights for FLUTE."""
    return [checked(n, k, bits, group_size) for _ in range(copies(n * k * bits / 8))]


def checked(n: int, k: int, bits: int, group_size: int) -> LutWeight:
    """A random weight whose products with 1, 12 and 33 rows are right, in 64 of the outputs."""
    spec = QuantSpec(bits=bits, group_size=group_size)
    stored = QuantizedLinear(
        spec,
        torch.randint(-(2**31), 2**31, (n, k * bits // 32), dtype=torch.int32),
        torch.rand(n, k // group_size).half(),
        torch.randn(1, spec.table_entries, 1).half(),
    )
    weight = LutWeight.from_linear(stored)
    rows = torch.randperm(n)[:64]
    reference = weight.dequantize()[rows].double()
    for m, dtype in itertools.product((1, 12, 33), TOLERANCE):
        x = torch.randn(m, k).to(dtype)
        expected = x.double() @ reference.T
        error = float((weight.linear(x)[:, rows].double() - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"{n} x {k}, {spec}, M = {m}, {dtype}: relative error {error:.2e}.")
    return weight


# --- timing -----------------------------------------------------------------------------------------


def run(x: Tensor, weight: LutWeight) -> Tensor:
    """linear() with FLUTE's weight."""
    return weight.linear(x)


def in_turn(weights: Sequence[Any], x: Tensor, product: Callable[[Tensor, Any], Tensor]) -> Call:
    """A call that uses the next weight each time."""
    turn = itertools.cycle(weights)
    return lambda: product(x, next(turn))


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for timed in [False] * 2 + [True] * rounds:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if timed:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, times: dict[str, float]) -> list[dict[str, Any]]:
    """Print one table, with how many times faster than torch each line is."""
    print(f"\n{title}\n{'':16}{'ms':>9}{'x bf16':>9}{'x fp32':>9}")
    figures = []
    for name, milliseconds in times.items():
        ratios = [times[peer] / milliseconds for peer in ("torch bf16", "torch fp32")]
        print(f"{name:16}{milliseconds:9.3f}{ratios[0]:9.2f}{ratios[1]:9.2f}", flush=True)
        figures.append(
            {"problem": title, "side": name, "ms": milliseconds, "x_bf16": ratios[0], "x_fp32": ratios[1]}
        )
    return figures


if __name__ == "__main__":
    main()
