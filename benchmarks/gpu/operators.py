"""What the format's options cost a product, and how fast the operators beside it are.

Smaller groups, vector codebooks and several tables, each beside groups of 128 with one table of scalars;
dequantizing and rotation beside an elementwise kernel's bandwidth; packing the weights of a model; the time
that a call takes of the host. Every result is checked before it is timed::

    python benchmarks/gpu/operators.py --save
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # record.py and served.py serve all benchmarks
import record
from checks import DTYPES, check
from problem import copies_of
from served import config, layer_linears
from timing import Replays, copy_bandwidth, in_turns, microseconds
from torch import Tensor

from flute_kernels import LutWeight, QuantizedLinear, QuantSpec, hadamard

# Rows that three tables divide, at borders of 16.
SHAPES = ((28704, 4096), (8208, 28672), (4128, 4096))
ROWS = (1, 8, 16)
OPTIONS: dict[str, dict[str, Any]] = {
    "g = 128": {},
    "g = 32": {"group_size": 32},
    "pairs": {"vector_size": 2},
    "three tables": {"tables": 3},
}
BLOCKS = tuple(1 << i for i in range(1, 13))


def main() -> None:
    """Print a table for each of them, and save the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    record.add_argument(parser)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{record.gpu_model()}; an elementwise kernel moves {bandwidth:.2f} TB/s")
    figures = {
        "bandwidth_tb_s": bandwidth,
        "options": options_of_the_format(),
        "dequantize": dequantizing(bandwidth),
        "hadamard": rotation(bandwidth),
        "packing": packing(),
        "host": host(),
    }
    if options.save:
        record.save("gpu-operators", figures, options.tag)


def made(n: int, k: int, bits: int, *, tables: int = 1, **options: Any) -> QuantizedLinear:
    """A weight of random codes, scales and tables."""
    spec = QuantSpec(**{"bits": bits, "group_size": 128, **options})
    codes = torch.randint(0, spec.table_entries, (n, k // spec.vector_size), device="cuda")
    scales = (torch.rand(n, k // spec.group_size_for(k), device="cuda") + 0.5).half()
    codebook = torch.randn(tables, spec.table_entries, spec.vector_size, device="cuda").half() / 8
    return QuantizedLinear.from_codes(codes.int(), scales, codebook, spec)


def options_of_the_format() -> list[dict[str, Any]]:
    """Microseconds of a product under each of the options, float16."""
    print("\nproducts, float16: microseconds, and times that of g = 128")
    rows = []
    for n, k in SHAPES:
        for bits in (4, 3, 2):
            linears = {name: made(n, k, bits, **option) for name, option in OPTIONS.items()}
            dense = {name: LutWeight.from_linear(linear).dequantize() for name, linear in linears.items()}
            copies = copies_of(n * k * bits / 8)
            weights = {
                name: [LutWeight.from_linear(linear) for _ in range(copies)]
                for name, linear in linears.items()
            }
            for m in ROWS:
                x = torch.randn(m, k, device="cuda").half()
                ready = {}
                for name, mine in weights.items():
                    check(mine[-1].linear(x), x.float() @ dense[name].t(), x.dtype, name)
                    ready[name] = Replays(lambda i, mine=mine, x=x: mine[i].linear(x), copies)
                times = in_turns(ready)
                base = times["g = 128"]
                line = "  ".join(f"{name} {us:.1f} ({us / base:.3f})" for name, us in times.items())
                print(f"{n} x {k}, {bits} bits, M = {m}: {line}", flush=True)
                rows += [
                    {"n": n, "k": k, "bits": bits, "m": m, "option": name, "us": round(us, 3)}
                    for name, us in times.items()
                ]
    return rows


def dequantizing(bandwidth: float) -> list[dict[str, Any]]:
    """Of 28672 x 8192 into 16 bits: bytes read and written, as a part of an elementwise kernel's."""
    print("\ndequantizing 28672 x 8192: microseconds, part of the elementwise kernel's bandwidth")
    rows = []
    for dtype in DTYPES.values():
        for bits in (4, 3, 2):
            linear = made(28672, 8192, bits)
            weight = LutWeight.from_linear(linear)
            exact = weight.dequantize(torch.float32)
            check(weight.dequantize(dtype), exact, dtype, f"{bits} bits")
            us = microseconds(lambda _, w=weight, d=dtype: w.dequantize(d), 1)
            part = (linear.nbytes + exact.numel() * 2) / us / 1e6 / bandwidth
            print(f"{bits} bits, {dtype}: {us:.1f}, {part:.2f}", flush=True)
            rows.append({"bits": bits, "dtype": _name(dtype), "us": round(us, 2), "part": round(part, 3)})
    return rows


def rotation(bandwidth: float) -> list[dict[str, Any]]:
    """Of 16384 x 8192: bytes read and written, as a part of an elementwise kernel's."""
    print("\nrotating 16384 x 8192: part of the elementwise kernel's bandwidth, by block size")
    rows = []
    signs = torch.randint(0, 2, (8192,), device="cuda").float() * 2 - 1
    for dtype in (*DTYPES.values(), torch.float32):
        x = torch.randn(16384, 8192, device="cuda").to(dtype)
        for transpose in (False, True):
            parts = {}
            for block in BLOCKS:
                few = x[:16]
                expected = _rotated(few.float(), signs, block, transpose)
                check(hadamard(few, signs, block, transpose), expected, dtype, f"blocks of {block}")
                call: Callable[[int], Tensor] = lambda _, b=block, t=transpose, x=x: hadamard(x, signs, b, t)  # noqa: E731
                us = microseconds(call, 1)
                parts[block] = 2 * x.numel() * x.element_size() / us / 1e6 / bandwidth
                rows.append(
                    {"dtype": _name(dtype), "block": block, "transpose": transpose, "us": round(us, 2)}
                    | {"part": round(parts[block], 3)}
                )
            line = "  ".join(f"{block}: {part:.2f}" for block, part in parts.items())
            print(f"{_name(dtype)}{', transposed' if transpose else ''}: {line}", flush=True)
    return rows


def _rotated(x: Tensor, signs: Tensor, block: int, transpose: bool) -> Tensor:
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = (x if transpose else x * signs).view(len(x), -1, block)
    mixed = (blocks @ matrix / block**0.5).view_as(x)
    return mixed * signs if transpose else mixed


def packing() -> dict[str, float]:
    """Seconds to pack the linears of Llama-3-8B at 4 bits, and to unpack them again."""
    described = config("Llama-3-8B")
    layers = described["num_hidden_layers"]
    linears = [made(n, k, 4) for n, k in layer_linears(described).values()]
    weights = [LutWeight.from_linear(linear) for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        if not torch.equal(weight.to_linear().qweight, linear.qweight):
            raise ValueError("unpacking did not give back what was packed")
    seconds = {}
    for name, work in {
        "pack": lambda: [LutWeight.from_linear(linear) for linear in linears],
        "unpack": lambda: [weight.to_linear() for weight in weights],
    }.items():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(layers):
            work()
        torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - begin, 4)
    print(f"\nLlama-3-8B's linears, 4 bits: packed in {seconds['pack']} s, unpacked in {seconds['unpack']} s")
    return seconds


def host() -> list[dict[str, Any]]:
    """Microseconds that a call takes of the host, which never waits for the GPU, by rows of x."""
    rows = []
    weight = LutWeight.from_linear(made(1024, 1024, 4))
    full = weight.dequantize(torch.float16)
    for m in (1, 16, 64, 256):
        x = torch.randn(m, 1024, device="cuda").half()
        calls: dict[str, Callable[[], Tensor]] = {
            "torch.mm": lambda x=x: torch.mm(x, full.t()),
            "LutWeight.linear": lambda x=x: weight.linear(x),
        }
        for name, call in calls.items():
            us = min(_host_microseconds(call) for _ in range(5))
            rows.append({"m": m, "call": name, "us": round(us, 2)})
        print(f"M = {m}: " + ", ".join(f"{row['call']} {row['us']} us" for row in rows[-2:]), flush=True)
    return rows


def _host_microseconds(call: Callable[[], Tensor], calls: int = 300) -> float:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * spent / calls


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
