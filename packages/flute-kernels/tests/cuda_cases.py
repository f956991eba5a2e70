"""Random problems on the GPU, each drawn from one number, with their float64 answers."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flute_kernels import LutWeight, QuantizedLinear, QuantSpec

from .helpers import GROUP_SIZES, dense_weight

BLOCKS = 50 if os.environ.get("FLUTE_LONG_TESTS") == "1" else 1
"""Of random cases; each is a test."""


@dataclass
class Product:
    """``x @ dense.T + bias``; ``dense`` is what ``weight`` stands for, in float64."""

    weight: LutWeight
    x: Tensor
    bias: Tensor | None
    dense: Tensor

    def relative_error(self, out: Tensor) -> float:
        """‖out - ref‖ / ‖ref‖, with the norm that ref would have on average if its terms had random signs
        where that is more: one or two results may nearly cancel, and then the rounding of a single weight
        weighs more than they do."""
        x, bias = self.x.double(), None if self.bias is None else self.bias.double()
        ref = torch.nn.functional.linear(x, self.dense, bias)
        squares = torch.nn.functional.linear(x**2, self.dense**2, None if bias is None else bias**2)
        size = max(torch.linalg.vector_norm(ref), squares.sum().sqrt())
        return (torch.linalg.vector_norm(out.double() - ref) / size).item()


def draw_spec(draw: random.Random) -> tuple[QuantSpec, torch.dtype]:
    """How a weight is stored, and the dtype of x."""
    bits, p, group = draw.choice((2, 3, 4)), draw.choice((1, 2)), draw.choice(GROUP_SIZES)
    return (
        QuantSpec(bits=bits, vector_size=p, group_size=group),
        draw.choice((torch.float16, torch.bfloat16)),
    )


def draw_k(draw: random.Random, spec: QuantSpec, most: tuple[int, int]) -> int:
    """A multiple of the group and of 32, up to about one of ``most``."""
    step = max(spec.group_size, 32)
    return step * draw.randint(1, max(1, draw.choice(most) // step))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cuda")


def make_weight(
    generator: torch.Generator, spec: QuantSpec, n: int, k: int, tables: int, scale_dtype: torch.dtype
) -> tuple[LutWeight, Tensor]:
    """A random weight, and in float64 what it stands for."""
    codes = torch.randint(
        0, spec.table_entries, (n, k // spec.vector_size), generator=generator, device="cuda"
    )
    codes[:, 0] = codes[:, -1] = spec.table_entries - 1  # the last entry is in use
    scales = (normal(generator, n, k // spec.group_size_for(k)) * 0.1).to(scale_dtype)
    codebook = normal(generator, tables, spec.table_entries, spec.vector_size).half()
    weight = LutWeight.from_linear(QuantizedLinear.from_codes(codes, scales, codebook, spec))
    return weight, dense_weight(codes, scales, codebook).double()


@dataclass
class Case:
    """One product, from ``seed`` alone. ``str(case)`` is what a failure report needs."""

    seed: int
    spec: QuantSpec = field(init=False)
    dtype: torch.dtype = field(init=False)
    m: int = field(init=False)
    n: int = field(init=False)
    k: int = field(init=False)
    tables: int = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.spec, self.dtype = draw_spec(draw)
        usual = (1, 1, 2, 3, 5, 8, 9, 16, 17, 31, 64, 128, 129)
        self.m = draw.choice((*usual, *draw.choices(range(1, 300), k=3)))
        self.k = draw_k(draw, self.spec, (512, 3000))
        self.tables = draw.choice((1, 1, 2, 3))
        most = draw.choice((200, 700, 2500))
        self.n = draw.randint(1, most) if self.tables == 1 else 16 * self.tables * draw.randint(1, 16)
        self.scale_dtype = draw.choice((torch.float16, torch.bfloat16))
        self.bias_dtype = draw.choice((None, None, self.dtype, torch.float32))
        self.strided = draw.choice((0, 0, 0, 1, 2))

    def make(self) -> Product:
        """The problem's tensors and answer."""
        generator = torch.Generator("cuda").manual_seed(self.seed)
        n, k = self.n, self.k
        weight, dense = make_weight(generator, self.spec, n, k, self.tables, self.scale_dtype)
        x = normal(generator, self.m, k * (1 + self.strided)).to(self.dtype)
        x = x[:, self.strided : self.strided + k] if self.strided else x  # 2 or 4 bytes off, wider rows
        bias = None if self.bias_dtype is None else normal(generator, n).to(self.bias_dtype)
        return Product(weight, x, bias, dense)


@dataclass
class Mixture:
    """Products of a mixture of experts, from ``seed`` alone: rows of x by expert, then nobody's."""

    seed: int
    spec: QuantSpec = field(init=False)
    dtype: torch.dtype = field(init=False)
    counts: list[int] = field(init=False)
    rest: int = field(init=False)
    n: int = field(init=False)
    k: int = field(init=False)
    tables: int = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.spec, self.dtype = draw_spec(draw)
        experts, most = draw.choice((1, 3, 8, 40)), draw.choice((2, 20, 70, 140, 300))
        self.counts = [draw.choice((0, draw.randint(0, most), draw.randint(0, most))) for _ in range(experts)]
        self.rest = draw.choice((0, 0, 5))
        self.n = 32 * draw.randint(1, draw.choice((4, 20)))
        self.k = draw_k(draw, self.spec, (512, 1500))
        self.tables = draw.choice((1, experts, 2 * experts))

    def error(self) -> float:
        """The largest relative error of an expert; infinite if rows that are nobody's are not zeros."""
        generator = torch.Generator("cuda").manual_seed(self.seed)
        rows, m = len(self.counts) * self.n, sum(self.counts)
        weight, dense = make_weight(generator, self.spec, rows, self.k, self.tables, torch.float16)
        x = normal(generator, m + self.rest, self.k).to(self.dtype)
        x[m:] = float("nan")
        out = weight.linear_grouped(x, torch.tensor(self.counts, dtype=torch.int32, device="cuda"))
        of_experts = dense.unflatten(0, (len(self.counts), -1))
        errors = [
            Product(weight, of, None, matrix).relative_error(result)
            for of, matrix, result in zip(
                x[:m].split(self.counts), of_experts, out[:m].split(self.counts), strict=True
            )
            if len(of)
        ]
        return max(errors, default=0.0) if (out[m:] == 0).all() else float("inf")
