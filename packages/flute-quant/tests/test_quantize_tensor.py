"""Quantizing one weight: how close it comes, what it stores, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flute_kernels import FormatError, QuantizedLinear, QuantSpec
from flute_quant import (
    QuantizationError,
    fit_spec,
    method_names,
    quantize_tensor,
    resolve_method,
    table_method,
)
from flute_quant.methods import AbsMax, CalibratedMethod, InputMoments, Loss, Search, TableMethod, methods
from flute_quant.methods.registry import ALIASES
from flute_quant.rotation import unrotate


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs_of(method: str, columns: int) -> InputMoments | None:
    """Independent inputs for the methods that need some."""
    calibrated = isinstance(methods()[method], CalibratedMethod)
    return InputMoments(torch.eye(columns), None, columns) if calibrated else None


def spec_of(method: str, bits: int, **more: int) -> QuantSpec:
    return QuantSpec(bits=bits, vector_size=2 if method == "lloyd-pairs" else 1, **more)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0070), (3, 0.0298), (2, 0.113)])
def test_the_gaussian_table_with_search_reaches_its_error(bits: int, bound: float) -> None:
    _, error = quantize_tensor(gaussian(1024, 1024), QuantSpec(bits, 64), method="lloyd")
    assert error.mean <= bound


@pytest.mark.parametrize(("bits", "known"), [(4, 0.0084), (3, 0.0406), (2, 0.316)])
def test_normalfloat_with_absmax_has_its_known_error(bits: int, known: float) -> None:
    _, error = quantize_tensor(gaussian(1024, 1024), QuantSpec(bits, 64), method="nf")
    assert error.mean == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_refinement_lowers_the_squared_error_on_a_gaussian(bits: int) -> None:
    weight = gaussian(512, 1024)
    errors = [
        quantize_tensor(weight, spec_of(method, bits), method=method)[1].mean
        for method in ("nf", "nf-search", "lloyd", "lloyd-pairs")
    ]
    nf, nf_search, lloyd, lloyd_pairs = errors
    assert nf > nf_search > lloyd_pairs
    assert lloyd > lloyd_pairs


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", list(methods()))
def test_the_noted_error_is_that_of_the_stored_tensors(method: str, bits: int) -> None:
    if method == "fp" and bits == 2:
        pytest.skip("a float table of 2 bits is not defined")
    weight = gaussian(96, 256)
    spec = spec_of(method, bits, group_size=64)
    linear, error = quantize_tensor(weight, spec, method=method, inputs=inputs_of(method, 256))
    actual = (linear.dequantize() - weight).double().square().sum()
    assert error.squared_error == pytest.approx(float(actual), rel=1e-3)
    assert error.energy == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert error.relative < {2: 0.4, 3: 0.06, 4: 0.015}[bits]
    again = QuantizedLinear.from_tensors(linear.to_tensors("a."), linear.spec, prefix="a.")
    assert torch.equal(again.dequantize(), linear.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([32, 64, 128, 256, -1]),
    pairs=st.booleans(),
    rows=st.integers(1, 9),
    units=st.integers(1, 3),
    exponent=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    method=st.sampled_from(["nf", "nf-keep", "lloyd", "int"]),
)
def test_any_shape_gives_valid_tensors_and_no_error_above_the_weight(
    bits: int, group: int, pairs: bool, rows: int, units: int, exponent: int, dtype: torch.dtype, method: str
) -> None:
    spec = QuantSpec(bits, group, 2 if pairs else 1)
    columns = units * (group if group > 0 else 32)
    weight = (gaussian(rows, columns, seed=bits) * 10.0**exponent).to(dtype)
    linear, error = quantize_tensor(weight, spec, method=method)
    linear.validate(out_features=rows, in_features=columns)
    assert 0 <= error.relative < 0.6


@pytest.mark.parametrize("method", ["nf", "lloyd", "int"])
def test_pairs_of_a_scalar_table_are_the_same_bits(method: str) -> None:
    weight = gaussian(33, 192)
    one, _ = quantize_tensor(weight, QuantSpec(3, 64, 1), method=method)
    two, _ = quantize_tensor(weight, QuantSpec(3, 64, 2), method=method)
    assert torch.equal(one.qweight, two.qweight)
    assert torch.equal(one.dequantize(), two.dequantize())


def test_the_result_does_not_depend_on_threads() -> None:
    weight = gaussian(700, 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize_tensor(weight, QuantSpec(), method="lloyd"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for linear, error in results[1:]:
        assert torch.equal(linear.qweight, results[0][0].qweight)
        assert torch.equal(linear.scales, results[0][0].scales)
        assert error == results[0][1]


def test_a_group_of_zeros_stays_zero_and_its_neighbours_are_untouched() -> None:
    weight = gaussian(4, 128)
    weight[1, 64:] = 0
    for method in methods():
        spec, inputs = spec_of(method, 4), inputs_of(method, 128)
        linear, error = quantize_tensor(weight, spec, method=method, inputs=inputs)
        assert float(linear.dequantize()[1, 64:].abs().max()) == 0, method
        assert error.relative < 0.02
    linear, error = quantize_tensor(torch.zeros(4, 64), QuantSpec(), method="lloyd")
    assert (float(linear.dequantize().abs().max()), error.relative) == (0.0, 0.0)


def test_a_group_too_small_for_float16_becomes_zero_or_near_and_its_error_is_counted() -> None:
    weight = gaussian(2, 128)
    weight[0, :64] *= 1e-9
    for method in ("nf", "lloyd", "nf-keep"):
        linear, error = quantize_tensor(weight, QuantSpec(), method=method)
        actual = float((linear.dequantize() - weight).double().square().sum())
        assert error.squared_error == pytest.approx(actual, rel=1e-3)
        assert float(linear.dequantize()[0, :64].abs().max()) < 1e-7


def test_bfloat16_scales_hold_what_float16_cannot() -> None:
    huge, tiny = gaussian(4, 64) * 1e7, gaussian(4, 64) * 1e-9
    with pytest.raises(QuantizationError, match=r"big.weight has a weight of .* 65504"):
        quantize_tensor(huge, QuantSpec(), method="nf", name="big.weight")
    with pytest.raises(QuantizationError, match=r"largest scale of small.weight is .* 6.1e-05"):
        quantize_tensor(tiny, QuantSpec(), method="nf", name="small.weight")
    for weight in (huge, tiny, gaussian(4, 64) * 1e30):
        linear, error = quantize_tensor(weight, QuantSpec(), method="lloyd", scale_dtype=torch.bfloat16)
        assert linear.scales.dtype == torch.bfloat16
        assert error.relative < 0.012


@pytest.mark.parametrize(("value", "count"), [(math.nan, 1), (math.inf, 3), (-math.inf, 2)])
def test_values_that_are_not_finite_are_named_and_counted(value: float, count: int) -> None:
    weight = gaussian(600, 256)
    weight.view(-1)[torch.arange(count) * 31_000] = value
    with pytest.raises(QuantizationError, match=rf"layer.weight has {count} of 153600 weights"):
        quantize_tensor(weight, QuantSpec(), method="lloyd", name="layer.weight")


def test_shapes_and_options_outside_of_the_format_are_refused() -> None:
    for weight, said in (
        (gaussian(4, 48), "in_features is 48"),
        (gaussian(4, 96), "group_size 64 does not divide"),
    ):
        with pytest.raises(FormatError, match=said):
            quantize_tensor(weight, QuantSpec())
    for bad, said in (
        (torch.zeros(4, dtype=torch.float32), r"\[4\]"),
        (torch.zeros(4, 64, dtype=torch.int32), "int32"),
        (torch.zeros(0, 64), "nothing to quantize"),
    ):
        with pytest.raises(QuantizationError, match=said):
            quantize_tensor(bad, QuantSpec())
    with pytest.raises(QuantizationError, match="'magic' is unknown; there are default, signed, nf"):
        quantize_tensor(gaussian(4, 64), QuantSpec(), method="magic")
    with pytest.raises(QuantizationError, match="vector_size is 1"):
        quantize_tensor(gaussian(4, 64), QuantSpec(), method="lloyd-pairs")
    with pytest.raises(QuantizationError, match="scale_dtype"):
        quantize_tensor(gaussian(4, 64), QuantSpec(), scale_dtype=torch.float32)


@pytest.mark.parametrize(
    ("k", "asked", "group", "note"),
    [
        (576, 128, 64, "group size 64 instead of 128, because K = 576"),
        (96, 256, 32, "group size 32 instead of 256, because K = 96"),
        (512, 256, 256, None),
        (96, -1, -1, None),
    ],
)
def test_a_group_that_does_not_divide_k_becomes_the_largest_smaller_one(
    k: int, asked: int, group: int, note: str | None
) -> None:
    assert fit_spec(QuantSpec(group_size=asked), k) == (QuantSpec(group_size=group), note)


def test_a_hadamard_block_that_does_not_divide_k_becomes_the_largest_that_does() -> None:
    spec, note = fit_spec(QuantSpec(hadamard=1024), 1536)
    assert (spec.hadamard, note) == (512, "Hadamard block 512 instead of 1024, because K = 1536")
    with pytest.raises(QuantizationError, match="K = 100"):
        fit_spec(QuantSpec(), 100)


@pytest.mark.parametrize("block", [32, 128])
def test_a_rotated_weight_comes_back_and_gains_from_outliers_spread_out(block: int) -> None:
    weight = gaussian(64, 256)
    weight[:, 7] *= 30  # one channel of outliers, which a rotation spreads over its block
    spec = QuantSpec(4, 64, hadamard=block, hadamard_seed=5)
    linear, error = quantize_tensor(weight, spec, method="nf")
    restored = unrotate(linear.dequantize(), block, 5)
    assert float((restored - weight).square().sum()) == pytest.approx(error.squared_error, rel=1e-3)


def test_importance_moves_error_to_channels_that_matter_less() -> None:
    weight = gaussian(256, 64)
    importance = torch.ones(64)
    importance[:8] = 100
    plain, _ = quantize_tensor(weight, QuantSpec(3), method="lloyd")
    weighted, _ = quantize_tensor(weight, QuantSpec(3), method="lloyd", importance=importance)
    before, after = ((q.dequantize() - weight).square().mean(0) for q in (plain, weighted))
    assert float(after[:8].mean()) < 0.8 * float(before[:8].mean())
    with pytest.raises(QuantizationError, match=r"expected \[64\]"):
        quantize_tensor(weight, QuantSpec(3), method="lloyd", importance=importance[:5])


def test_a_higher_power_keeps_outliers_and_a_lower_one_tolerates_them() -> None:
    weight = gaussian(256, 256).pow(3)  # heavy tails
    source = methods()["lloyd"]
    assert isinstance(source, TableMethod)
    worst, typical = [], []
    for power in (1.0, 2.0, 4.0):
        method = TableMethod(f"p{power}", "", source.table, Search(Loss(power=power)))
        linear, _ = quantize_tensor(weight, QuantSpec(4), method=method)
        difference = (linear.dequantize() - weight).abs()
        worst.append(float(difference.view(-1, 64).amax(1).mean()))
        typical.append(float(difference.median()))
    assert worst[0] > worst[1] > worst[2]
    assert typical[0] < typical[1] < typical[2]


def test_signed_scales_use_the_longer_side_of_an_asymmetric_table() -> None:
    weight = gaussian(256, 256)
    source = methods()["int"]
    assert isinstance(source, TableMethod)
    errors = [
        quantize_tensor(weight, QuantSpec(2), method=TableMethod("i", "", source.table, Search(signed=s)))[
            1
        ].mean
        for s in (False, True)
    ]
    assert errors[1] < errors[0]
    linear, _ = quantize_tensor(weight, QuantSpec(2), method="int")
    assert bool((linear.scales < 0).any())
    assert bool((linear.scales > 0).any())


def test_a_table_that_fits_the_weights_exactly_leaves_no_error() -> None:
    table = torch.tensor([-3.0, -0.5, 0.25, 7.0])
    weight = table[torch.randint(0, 4, (64, 128), generator=torch.Generator().manual_seed(0))]
    linear, error = quantize_tensor(weight, QuantSpec(2), method=table_method(table))
    assert error.relative < 1e-6
    assert torch.equal(linear.codebook[0, :, 0].float(), table)


def test_a_users_pairs_and_scalars_serve_vectors_of_two() -> None:
    weight = gaussian(64, 128)
    pairs = torch.randn(256, 2, generator=torch.Generator().manual_seed(2))
    linear, _ = quantize_tensor(weight, QuantSpec(4, vector_size=2), method=table_method(pairs))
    assert torch.equal(linear.codebook[0].float(), pairs)
    assert linear.codebook.dtype == torch.float32  # float16 would not hold these values
    scalars = [float(v) for v in range(-8, 8)]
    linear, _ = quantize_tensor(weight, QuantSpec(4, vector_size=2), method=table_method(scalars))
    assert linear.codebook.shape == (1, 256, 2)


def test_a_learned_table_beats_the_gaussian_one_on_other_weights() -> None:
    uniform = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = [quantize_tensor(uniform, QuantSpec(3), method=m)[1].mean for m in ("lloyd", "learned")]
    # Eight equal steps over [-1, 1] are the optimum without scales: their error is a known number.
    assert errors[1] < (2 / 8) ** 2 / 12 < errors[0]


def test_aliases_resolve_to_the_name_that_is_recorded() -> None:
    assert resolve_method("default").name == ALIASES["default"]
    assert "default" in method_names()
    assert isinstance(resolve_method("nf"), TableMethod)
    assert isinstance(
        resolve_method(TableMethod("own", "", lambda spec: torch.ones(4), AbsMax())), TableMethod
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_finds_the_scale_that_a_plain_search_finds(bits: int) -> None:
    """The tabulated search against every candidate tried exactly, with the importance of channels."""
    weight = gaussian(64, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.05
    linear, _ = quantize_tensor(weight, QuantSpec(bits, 64), method="signed", importance=importance)
    groups = weight.view(-1, 64)
    cost_of = (
        importance.view(2, 64).repeat(64, 1) * (groups.abs() / groups.abs().amax(1, keepdim=True)).sqrt()
    )

    def cost(values: torch.Tensor) -> torch.Tensor:
        return (cost_of * (groups - values).square()).sum(1)

    table = linear.codebook[0, :, 0].float()
    best = torch.full((len(groups),), math.inf)
    for factor in 2 ** (torch.arange(-21, 4) / 24):
        for sign in (-1, 1):
            scale = (sign * factor * groups.abs().amax(1, keepdim=True)).half().float()
            best = torch.minimum(
                best, cost(scale * table[(groups / scale - table[:, None, None]).abs().argmin(0)])
            )
    found = cost(linear.dequantize().view(-1, 64))
    # Values in 2,048 bins make the search's costs inexact: of nearly equal candidates it may miss the best.
    assert float((found / best).max()) < 1.02
    assert float((found / best).mean()) < 1.001


def test_signed_has_less_error_than_normalfloat_and_uses_both_signs() -> None:
    weight = gaussian(256, 256)
    for bits, factor in ((4, 0.82), (3, 0.72), (2, 0.4)):
        linear, error = quantize_tensor(weight, QuantSpec(bits, 64), method="signed")
        assert error.mean < factor * quantize_tensor(weight, QuantSpec(bits, 64), method="nf")[1].mean
        assert 0.4 < float((linear.scales < 0).float().mean()) < 0.6


def test_importance_moves_error_to_the_channels_that_matter_least() -> None:
    weight = gaussian(256, 128)
    importance = torch.ones(128)
    importance[::2] = 30.0
    plain, _ = quantize_tensor(weight, QuantSpec(3, 64))
    weighted, _ = quantize_tensor(weight, QuantSpec(3, 64), importance=importance)
    before, after = ((x.dequantize() - weight).square().mean(0) for x in (plain, weighted))
    assert float(after[::2].mean()) < 0.9 * float(before[::2].mean())
    assert float(after[1::2].mean()) > float(before[1::2].mean())


def test_the_default_for_pairs_is_a_table_of_pairs() -> None:
    assert resolve_method("default", QuantSpec(3, vector_size=2)).name == "lloyd-pairs"
    assert resolve_method("default", QuantSpec(3)).name == "signed"
    weight = gaussian(64, 64)
    found, _ = quantize_tensor(weight, QuantSpec(3, vector_size=2))
    expected, _ = quantize_tensor(weight, QuantSpec(3, vector_size=2), method="lloyd-pairs")
    assert torch.equal(found.qweight, expected.qweight)


@pytest.mark.parametrize("method", ["signed", "nf", "learned", "lloyd-pairs"])
def test_the_tensors_are_ordinary_and_their_own(method: str) -> None:
    """They can be changed, and be a part of what gradients flow through, without harm to the next weight."""
    weight, spec = gaussian(64, 128), spec_of(method, 3)
    with torch.inference_mode():
        first, _ = quantize_tensor(weight.clone(), spec, method=method)
    second, _ = quantize_tensor(weight, spec, method=method)
    for linear in (first, second):
        for tensor in (linear.qweight, linear.scales, linear.codebook):
            assert not tensor.is_inference()
            assert not tensor.requires_grad
    expected = second.dequantize().clone()
    first.codebook.zero_()
    second.codebook.zero_()
    again, _ = quantize_tensor(weight, spec, method=method)
    assert torch.equal(again.dequantize(), expected)
    x = torch.ones(128, requires_grad=True)
    (again.dequantize() @ x).sum().backward()
    assert x.grad is not None
