"""x @ W_hat.T + bias on every instruction set of this processor, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from flute_kernels import QuantSpec

from .helpers import (
    ALL_SPECS,
    BITS_AND_VECTORS,
    DTYPES,
    Layer,
    assert_near,
    random_layer,
    reference,
    same_bits,
    spec_id,
)

pytestmark = pytest.mark.usefixtures("isa", "poisoned")
BATCHES = (0, 1, 2, 3, 5, 8, 16, 33, 130)
SPEC = QuantSpec(bits=3, group_size=32)


def assert_right(layer: Layer, x: Tensor, bias: Tensor | None = None) -> None:
    out = layer.weight.linear(x, bias)
    assert out.dtype == x.dtype
    assert_near(out, reference(x, layer.dense, bias))


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
def test_every_spec_batch_and_dtype(spec: QuantSpec) -> None:
    layer = random_layer(spec, 37, 768)
    for rows, dtype in product(BATCHES, DTYPES):
        assert_right(layer, torch.randn(rows, 768).to(dtype))


@pytest.mark.parametrize(
    ("n", "k"), [(1, 32), (15, 96), (16, 32), (17, 160), (33, 544), (100, 1152), (513, 64)]
)
@pytest.mark.parametrize("vector_size", [1, 2])
def test_every_shape(n: int, k: int, vector_size: int) -> None:
    layer = random_layer(QuantSpec(bits=3, group_size=32, vector_size=vector_size), n, k)
    for rows, dtype in product((1, 4, 7, 19), DTYPES):
        assert_right(layer, torch.randn(rows, k).to(dtype))


@pytest.mark.parametrize("rows", range(1, 36))
def test_every_batch_up_to_two_tiles(rows: int) -> None:
    layer = random_layer(SPEC, 33, 96)
    for dtype in DTYPES:
        assert_right(layer, torch.randn(rows, 96).to(dtype))


@pytest.mark.parametrize("rows", [1, 8, 130])
def test_rows_too_long_for_one_pass(rows: int) -> None:
    """Packed x is cut into parts above some megabytes, and its workspace outgrows the one that is kept."""
    layer = random_layer(QuantSpec(bits=2, group_size=-1), 17, 40960)
    for dtype in DTYPES:
        assert_right(layer, torch.randn(rows, 40960).to(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32])
def test_every_storage_dtype(scale_dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    layer = random_layer(SPEC, 40, 96, scale_dtype=scale_dtype, table_dtype=table_dtype)
    for rows, dtype in product((1, 20), DTYPES):
        assert_right(layer, torch.randn(rows, 96).to(dtype))


@pytest.mark.parametrize(("rows", "tables"), [(48, 3), (64, 2), (176, 11), (80, 5)])
@pytest.mark.parametrize("vector_size", [1, 2])
def test_row_segments_with_tables_of_their_own(rows: int, tables: int, vector_size: int) -> None:
    layer = random_layer(QuantSpec(bits=3, group_size=32, vector_size=vector_size), rows, 96, tables=tables)
    for batch, dtype in product((1, 2, 20), DTYPES):
        assert_right(layer, torch.randn(batch, 96).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_every_dtype(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    layer = random_layer(SPEC, 37, 96)
    for rows in (0, 1, 3, 20):
        x = torch.randn(rows, 96).to(dtype)
        assert_right(layer, x, (torch.randn(37) * 10).to(bias_dtype))
        assert_right(layer, x, (torch.randn(74) * 10).to(bias_dtype)[::2])
        assert_right(layer, x, torch.tensor(3.0).to(bias_dtype).expand(37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3, 4), (0,), (2, 0), (0, 3)])
def test_any_leading_dimensions(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(random_layer(SPEC, 37, 96), torch.randn(*lead, 96).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    layer = random_layer(SPEC, 37, 96)
    wide = torch.randn(24, 20, 200).to(dtype)
    for x in (
        wide[:, 0, :96],
        wide[0, :1, 7:103],
        wide[:, ::2, 3:99],
        wide[:, :, ::2][..., :96],
        wide[:, :, :96].transpose(0, 1),
        wide[0, 0, :96].expand(9, 96),
        wide[0, 0, :1].expand(5, 96),
        torch.randn(96, 9).to(dtype).T,
    ):
        assert not x.is_contiguous() or x.storage_offset()
        assert_right(layer, x)


@pytest.mark.parametrize(("bits", "vector_size"), BITS_AND_VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_gives_the_weight_back_exactly(bits: int, vector_size: int, dtype: torch.dtype) -> None:
    layer = random_layer(QuantSpec(bits=bits, group_size=64, vector_size=vector_size), 37, 192)
    weight, identity = layer.weight, torch.eye(192, dtype=dtype)
    expected = layer.dense.to(dtype)
    assert torch.equal(weight.linear(identity).T, expected)
    for step in (1, 2, 3, 5):
        pieces = [weight.linear(rows) for rows in identity.split(step)]
        assert torch.equal(torch.cat(pieces).T, expected)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_go_where_linear_sends_them(rows: int, dtype: torch.dtype) -> None:
    layer = random_layer(SPEC, 37, 96)
    weight = layer.weight
    x = torch.randn(rows, 96).to(dtype)
    for value in (float("inf"), -float("inf"), float("nan")):
        bad = x.clone()
        bad[rows // 2, 5] = value
        out, ref = weight.linear(bad), reference(bad, layer.dense)
        assert torch.equal(out.isnan(), ref.isnan())
        assert torch.equal(out == float("inf"), ref == float("inf"))
        assert torch.equal(out == -float("inf"), ref == -float("inf"))
        others = torch.arange(rows) != rows // 2
        assert same_bits(out[others], weight.linear(x)[others])


@pytest.mark.parametrize("rows", [1, 40])
def test_results_beyond_float16_are_infinite(rows: int) -> None:
    layer = random_layer(SPEC, 37, 96)
    x = torch.full((rows, 96), 6e4).half()
    expected = reference(x, layer.dense)
    sure = (expected.abs() > 66000) | (expected.abs() < 65000)
    assert (expected.abs() > 66000).any()
    assert torch.equal(layer.weight.linear(x).isinf()[sure], (expected.abs() > 66000)[sure])


@pytest.mark.parametrize("rows", [1, 40])
def test_sums_are_kept_in_float32(rows: int) -> None:
    """A long sum of ones stops growing at 2048 in float16 and at 256 in bfloat16."""
    codes = torch.zeros(16, 8192, dtype=torch.uint8)
    layer = random_layer(QuantSpec(group_size=-1), 16, 8192)
    stored = type(layer.stored).from_codes(
        codes, torch.ones(16, 1).half(), torch.ones(16), QuantSpec(group_size=-1)
    )
    for dtype in DTYPES:
        out = Layer(stored, codes, torch.ones(16, 8192)).weight.linear(torch.ones(rows, 8192, dtype=dtype))
        assert (out == 8192).all()


@pytest.mark.parametrize("rows", [1, 3, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_give_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    weight, x = random_layer(SPEC, 512, 512).weight, torch.randn(rows, 512).to(dtype)
    first = weight.linear(x)
    assert all(same_bits(weight.linear(x), first) for _ in range(5))


@pytest.mark.parametrize("rows", [1, 3, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(rows: int, dtype: torch.dtype) -> None:
    weight, x = random_layer(SPEC, 500, 512).weight, torch.randn(rows, 512).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(weight.linear(x))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_a_layer_of_a_real_model() -> None:
    layer = random_layer(QuantSpec(bits=4, group_size=128), 1536, 2048, tables=3)
    for rows, dtype in product((1, 12), DTYPES):
        assert_right(layer, torch.randn(rows, 2048).to(dtype), torch.randn(1536))
