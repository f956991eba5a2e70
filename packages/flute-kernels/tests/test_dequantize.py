"""The weight as a matrix again: exact on every instruction set, rounded once."""

from __future__ import annotations

import pytest
import torch

from flute_kernels import LutWeight, QuantizedLinear, QuantSpec, UnsupportedError

from .helpers import ALL_SPECS, DTYPES, assert_near, random_layer, refusal, same_bits, spec_id
from .test_hadamard import rotated

pytestmark = pytest.mark.usefixtures("isa", "poisoned")


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
def test_every_spec_gives_the_formula_exactly(spec: QuantSpec) -> None:
    layer = random_layer(spec, 37, 768)
    weight = layer.weight
    for dtype in DTYPES:
        assert same_bits(weight.dequantize(dtype), layer.dense.to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 32), (16, 32), (17, 96), (100, 1152)])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_every_shape(n: int, k: int, scale_dtype: torch.dtype) -> None:
    layer = random_layer(QuantSpec(bits=3, group_size=32), n, k, scale_dtype=scale_dtype)
    for dtype in DTYPES:
        assert same_bits(layer.weight.dequantize(dtype), layer.dense.to(dtype))


@pytest.mark.parametrize("vector_size", [1, 2])
def test_row_segments_with_tables_of_their_own(vector_size: int) -> None:
    spec = QuantSpec(bits=2, group_size=32, vector_size=vector_size)
    layer = random_layer(spec, 80, 96, tables=5, table_dtype=torch.float32)
    assert same_bits(layer.weight.dequantize(), layer.dense)


def table_of(values: torch.Tensor) -> LutWeight:
    """A weight whose 256 entries are the given pairs, each used once in every row."""
    spec = QuantSpec(bits=4, group_size=-1, vector_size=2)
    codes = torch.arange(256).expand(16, 256)
    return LutWeight.from_linear(
        QuantizedLinear.from_codes(codes, torch.ones(16, 1).half(), values.reshape(256, 2), spec)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", range(-27, 17))
def test_rounding_is_to_nearest_even(dtype: torch.dtype, exponent: int) -> None:
    """Numbers, ties and their neighbours from below float16's subnormals to above its largest."""
    steps = torch.arange(128, dtype=torch.float64)
    halves = (1 + steps * torch.finfo(dtype).eps / 2) * 2.0**exponent
    values = torch.cat([halves, halves.float().nextafter(torch.tensor(0.0)).double()]).float()
    values = torch.cat([values, -values])
    assert same_bits(table_of(values).dequantize(dtype)[3], values.to(dtype))


def test_the_rotation_is_undone() -> None:
    spec = QuantSpec(bits=4, group_size=32, hadamard=32, hadamard_seed=3)
    layer = random_layer(spec, 37, 96)
    signs = layer.stored.signs()
    assert signs is not None
    for dtype in DTYPES:
        assert_near(layer.weight.dequantize(dtype), rotated(layer.dense, signs, 32, transpose=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
@pytest.mark.parametrize("hadamard", [0, 32])
def test_other_dtypes_are_refused(dtype: torch.dtype, hadamard: int) -> None:
    weight = random_layer(QuantSpec(hadamard=hadamard)).weight
    with refusal(UnsupportedError, dtype, "float32, float16 and bfloat16"):
        weight.dequantize(dtype)
