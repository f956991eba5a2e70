"""LutWeight: a stored linear made ready for a device, and back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flute_kernels import FormatError, LutWeight, QuantizedLinear, QuantSpec, UnsupportedError

from .helpers import (
    ALL_SPECS,
    DTYPES,
    Layer,
    assert_near,
    random_layer,
    reference,
    refusal,
    same_bits,
    spec_id,
)
from .test_hadamard import rotated

N, K = 48, 96


@pytest.fixture
def layer() -> Layer:
    return random_layer(QuantSpec(bits=3, group_size=32), N, K)


# --- in and out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
@pytest.mark.parametrize("rows", [1, 37, 48])
def test_the_stored_tensors_come_back_bit_for_bit(spec: QuantSpec, rows: int) -> None:
    stored = random_layer(spec, rows, 768, scale_dtype=torch.bfloat16, table_dtype=torch.float32).stored
    again = LutWeight.from_linear(stored).to_linear()
    again.validate()
    assert again.spec == spec
    for name, tensor in stored.to_tensors().items():
        assert same_bits(again.to_tensors()[name], tensor)


def test_tables_and_rotation_come_back_too() -> None:
    spec = QuantSpec(bits=2, group_size=32, hadamard=32, hadamard_seed=7)
    stored = random_layer(spec, N, K, tables=3).stored
    again = LutWeight.from_linear(stored).to_linear()
    assert again.spec == spec
    assert same_bits(again.codebook, stored.codebook)


def test_bias_is_the_callers() -> None:
    stored = random_layer(QuantSpec(), N, 64).stored
    stored.bias = torch.ones(N)
    weight = LutWeight.from_linear(stored)
    assert weight.to_linear().bias is None
    assert weight.to_linear(stored.bias).bias is stored.bias
    x = torch.randn(2, 64)
    assert_near(weight.linear(x), reference(x, stored.dequantize()))


def test_its_attributes(layer: Layer) -> None:
    weight = layer.weight
    assert (weight.out_features, weight.in_features, weight.device) == (N, K, torch.device("cpu"))
    assert weight.spec == layer.stored.spec
    assert repr(weight) == f"LutWeight(out_features=48, in_features=96, {weight.spec})"


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=2), QuantSpec(bits=4, vector_size=2), QuantSpec(hadamard=64)]
)
def test_it_takes_little_more_than_what_is_stored(spec: QuantSpec) -> None:
    stored = random_layer(spec, 512, 512).stored
    extra = LutWeight.from_linear(stored).nbytes - stored.nbytes
    assert 0 <= extra <= 4 * 512 + 4 * max(16, spec.table_entries) * spec.vector_size


def test_views_are_laid_out_like_copies(layer: Layer) -> None:
    stored = layer.stored
    views = QuantizedLinear(
        stored.spec,
        torch.stack([stored.qweight] * 2, -1)[..., 0],
        stored.scales.T.contiguous().T,
        torch.cat([stored.codebook] * 2, 2)[:, :, :1],
    )
    assert same_bits(LutWeight.from_linear(views).dequantize(), layer.dense)


@pytest.mark.parametrize("spec", [QuantSpec(group_size=32), QuantSpec(group_size=-1)], ids=spec_id)
def test_it_shares_no_memory_with_the_stored_tensors(spec: QuantSpec) -> None:
    """A caller may reuse or free them; the kernels hold addresses."""
    layer = random_layer(spec, N, K)
    stored, weight = layer.stored, layer.weight
    for tensor in stored.to_tensors().values():
        tensor.zero_()
    assert same_bits(weight.dequantize(), layer.dense)
    written = weight.to_linear()
    copies = {name: tensor.clone() for name, tensor in written.to_tensors().items()}
    for tensor in written.to_tensors().values():
        tensor.zero_()
    assert same_bits(weight.dequantize(), layer.dense)
    for name, tensor in weight.to_linear().to_tensors().items():
        assert same_bits(tensor, copies[name])


def by_pickle(weight: LutWeight) -> LutWeight:
    loaded: LutWeight = pickle.loads(pickle.dumps(weight))
    return loaded


def by_torch_save(weight: LutWeight) -> LutWeight:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded: LutWeight = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_lives_on_without_the_original(duplicate: Callable[[LutWeight], LutWeight]) -> None:
    """The kernels' handle holds addresses: a copy with those of freed memory would read anything."""
    layer = random_layer(QuantSpec(bits=3, group_size=32, hadamard=32), N, K, tables=3)
    weight = layer.weight
    other, x = duplicate(weight), torch.randn(3, K)
    expected = weight.linear(x)
    del weight
    torch.full((1 << 20,), float("nan"))  # some of the freed memory is used again
    assert torch.equal(other.linear(x), expected)
    assert other.spec == layer.stored.spec


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
def test_a_device_without_kernels_is_refused(layer: Layer) -> None:
    for device in ("cuda", torch.device("cuda", 1), "meta"):
        with refusal(UnsupportedError, f"device is {device}", "cpu"):
            LutWeight.from_linear(layer.stored, device)


def test_stored_tensors_without_data_are_refused(layer: Layer) -> None:
    stored = layer.stored
    empty = QuantizedLinear(
        stored.spec, stored.qweight.to("meta"), stored.scales.to("meta"), stored.codebook.to("meta")
    )
    with refusal(UnsupportedError, "meta", "cpu"):
        LutWeight.from_linear(empty)


@pytest.mark.parametrize(
    ("rows", "tables", "border"), [(40, 2, 20), (48, 2, 24), (17, 2, 9), (96, 5, 20), (64, 64, 1)]
)
def test_tables_that_change_inside_sixteen_rows_are_refused(rows: int, tables: int, border: int) -> None:
    stored = random_layer(QuantSpec(bits=2, group_size=32), rows, 32, tables=tables).stored
    with refusal(FormatError, f"{tables} tables", f"{rows} rows", f"row {border}", "16"):
        LutWeight.from_linear(stored)


def test_a_stored_linear_is_validated_first(layer: Layer) -> None:
    layer.stored.scales = layer.stored.scales.float()
    with refusal(FormatError, "scales", "float32", "float16 or bfloat16"):
        LutWeight.from_linear(layer.stored)


@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize("shape", [(), (95,), (2, 97), (2, 0), (96, 2), (0, 95)])
def test_x_of_another_width_is_refused(shape: tuple[int, ...], hadamard: int) -> None:
    """With a rotation too: the sentence names the layer's width, not that of the signs."""
    weight = random_layer(QuantSpec(group_size=32, hadamard=hadamard), N, K).weight
    with refusal(FormatError, str(list(shape)), K):
        weight.linear(torch.zeros(shape))


@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_x_of_another_dtype_is_refused(dtype: torch.dtype, hadamard: int) -> None:
    weight = random_layer(QuantSpec(group_size=32, hadamard=hadamard), N, K).weight
    with refusal(UnsupportedError, dtype, "float32, float16 and bfloat16"):
        weight.linear(torch.zeros(2, K).to(dtype))


@pytest.mark.parametrize("hadamard", [0, 32])
def test_tensors_elsewhere_are_refused(hadamard: int) -> None:
    weight = random_layer(QuantSpec(group_size=32, hadamard=hadamard), N, K).weight
    with refusal(FormatError, "meta", "cpu"):
        weight.linear(torch.zeros(2, K, device="meta"))
    with refusal(FormatError, "bias", "meta", "cpu"):
        weight.linear(torch.zeros(2, K), torch.zeros(N, device="meta"))


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(N - 1),
        torch.zeros(N + 1),
        torch.zeros(1),
        torch.tensor(0.0),
        torch.zeros(1, N),
        torch.zeros(N, dtype=torch.float64),
        torch.zeros(N, dtype=torch.int32),
    ],
    ids=lambda b: f"{str(b.dtype).removeprefix('torch.')}-{list(b.shape)}",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_bias_is_refused(layer: Layer, bias: Tensor, dtype: torch.dtype) -> None:
    with refusal(FormatError, "bias", bias.dtype, str(list(bias.shape)), f"[{N}]"):
        layer.weight.linear(torch.zeros(2, K, dtype=dtype), bias)


# --- rotation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_weight_rotates_its_input(block: int, dtype: torch.dtype) -> None:
    layer = random_layer(QuantSpec(group_size=32, hadamard=block, hadamard_seed=11), N, K)
    x, bias = torch.randn(5, K).to(dtype), torch.randn(N)
    out = layer.weight.linear(x, bias)
    assert_near(out, rotated(x, layer.stored.signs(), block) @ layer.dense.double().T + bias.double())


def test_a_rotated_weight_gives_back_what_is_stored() -> None:
    layer = random_layer(QuantSpec(group_size=32, hadamard=32), N, K)
    assert torch.equal(layer.weight.to_linear().codes(), layer.codes.to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_rotated_once_serves_all_weights_with_that_rotation(dtype: torch.dtype) -> None:
    spec = QuantSpec(group_size=32, hadamard=32, hadamard_seed=11)
    weights = [random_layer(spec, rows, K).weight for rows in (48, 16)]
    x, bias = torch.randn(5, K).to(dtype), torch.randn(16)
    once = weights[0].rotate(x)
    assert torch.equal(weights[0].linear_rotated(once), weights[0].linear(x))
    assert torch.equal(weights[1].linear_rotated(once, bias), weights[1].linear(x, bias))


def test_without_a_rotation_the_input_is_what_it_was(layer: Layer) -> None:
    x = torch.randn(5, K)
    assert layer.weight.rotate(x) is x
    assert torch.equal(layer.weight.linear_rotated(x), layer.weight.linear(x))


def test_an_input_of_another_width_is_not_rotated() -> None:
    weight = random_layer(QuantSpec(group_size=32, hadamard=32), N, K).weight
    with refusal(FormatError, "[2, 64]", K):
        weight.rotate(torch.zeros(2, 64))
