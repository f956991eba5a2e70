"""Random layers with the matrix that they stand for, and how far a product may be from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flute_kernels import FluteError, LutWeight, QuantizedLinear, QuantSpec

BITS_AND_VECTORS = list(product((2, 3, 4), (1, 2)))
GROUP_SIZES = (32, 64, 128, 256, -1)
ALL_SPECS = [
    QuantSpec(bits=b, group_size=g, vector_size=p) for (b, p), g in product(BITS_AND_VECTORS, GROUP_SIZES)
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ‖out - ref‖ / ‖ref‖ against a float64 reference."""


def spec_id(spec: QuantSpec) -> str:
    return f"b{spec.bits}p{spec.vector_size}g{spec.group_size}"


@dataclass
class Layer:
    """A stored linear, the codes that it was made of, and its ``W_hat`` worked out without bit streams."""

    stored: QuantizedLinear
    codes: Tensor
    dense: Tensor

    @property
    def weight(self) -> LutWeight:
        return LutWeight.from_linear(self.stored)


def random_layer(
    spec: QuantSpec,
    rows: int = 48,
    columns: int = 256,
    *,
    tables: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    table_dtype: torch.dtype = torch.float16,
) -> Layer:
    codes = torch.randint(0, spec.table_entries, (rows, columns // spec.vector_size))
    codes[:, 0] = codes[:, -1] = spec.table_entries - 1  # the last entry is in use
    scales = (torch.randn(rows, columns // spec.group_size_for(columns)) * 0.1).to(scale_dtype)
    codebook = torch.randn(tables, spec.table_entries, spec.vector_size).to(table_dtype)
    stored = QuantizedLinear.from_codes(codes, scales, codebook, spec)
    return Layer(stored, codes, dense_weight(codes, scales, codebook))


def operands(weight: LutWeight) -> tuple[Any, ...]:
    """What the operators take of a weight: tensors in the kernels' layout, then numbers."""
    return tuple(weight._packed)


def dense_weight(codes: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    """The format's formula: ``scales[n, k // g] * codebook[n * T // N, code]``, float32."""
    table = torch.arange(len(codes), device=codes.device) * len(codebook) // len(codes)
    values = codebook.float()[table[:, None], codes.long()].flatten(1)
    return values * scales.float().repeat_interleave(values.shape[1] // scales.shape[1], 1)


def reference(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())


def assert_near(out: Tensor, ref: Tensor, tolerance: float | None = None) -> None:
    assert out.shape == ref.shape
    error = torch.linalg.vector_norm(out.double() - ref) / torch.linalg.vector_norm(ref).clamp_min(1e-30)
    limit = TOLERANCE[out.dtype] if tolerance is None else tolerance
    assert error.item() <= limit  # written so that NaN fails, too


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextmanager
def refusal(error: type[FluteError], *parts: object) -> Iterator[None]:
    """The block must raise ``error`` with one line that ends as a sentence does and has every part."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert [str(p) for p in parts if str(p) not in message] == [], message
