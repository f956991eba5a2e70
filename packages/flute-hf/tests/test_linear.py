"""FluteLinear: one weight, two forms, and everything that torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from flute_hf import FluteLinear
from flute_kernels import FormatError, QuantizedLinear, QuantSpec, UnsupportedError
from flute_quant import quantize_tensor

N, K = 48, 128
STORED = ("qweight", "scales", "codebook")


def make(
    spec: QuantSpec | None = None, *, bias: bool = True, scale_dtype: torch.dtype = torch.float16
) -> FluteLinear:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    offset = torch.linspace(-1, 1, N) if bias else None
    linear, _ = quantize_tensor(weight, spec or QuantSpec(), bias=offset, scale_dtype=scale_dtype)
    return FluteLinear.from_quantized(linear)


def stored(layer: FluteLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in STORED}


def assert_stored(layer: FluteLinear, expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        found = getattr(layer, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(bits=3, group_size=128), QuantSpec(hadamard=32)], ids=str
)
def test_forward_is_that_of_the_dequantized_layer(spec: QuantSpec, bias: bool, x: Tensor) -> None:
    layer = make(spec, bias=bias)
    dense = layer.dequantize(torch.float32)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


def test_the_first_forward_prepares_and_drops_the_stored_tensors(x: Tensor) -> None:
    layer = make()
    before = stored(layer)
    assert not layer.is_prepared
    assert set(dict(layer.named_buffers())) == set(STORED)
    layer(x)
    assert layer.is_prepared
    assert dict(layer.named_buffers()) == {}
    assert_stored(layer, before)  # made on demand


def test_restore_gives_back_every_bit(x: Tensor) -> None:
    layer = make()
    before, out = stored(layer), layer(x)
    layer.restore()
    assert not layer.is_prepared
    assert set(dict(layer.named_buffers())) == set(STORED)
    assert_stored(layer, before)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_conversions_change_the_bias_only(
    dtype: torch.dtype, prepared: bool, scale_dtype: torch.dtype
) -> None:
    layer = make(scale_dtype=scale_dtype)
    before = stored(layer)
    if prepared:
        layer.prepare()
    layer.to(dtype)
    assert layer.bias is not None
    assert (layer.bias.dtype, layer.dtype) == (dtype, dtype)
    assert layer.is_prepared == prepared
    assert_stored(layer, before)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double", "cpu"])
def test_conversion_methods(convert: str) -> None:
    layer = nn.Sequential(make())
    layer[0].prepare()
    before = stored(layer[0])
    getattr(layer, convert)()
    assert_stored(layer[0], before)


def test_moving_to_meta_and_emptying_keeps_dtypes_and_shapes() -> None:
    layer = make(scale_dtype=torch.bfloat16)
    layer.prepare()
    before = stored(layer)
    layer.to("meta")
    assert layer.device.type == "meta"
    with pytest.raises(NotImplementedError):
        layer.to("cpu")
    layer.to_empty(device="cpu")
    for name, tensor in before.items():
        assert getattr(layer, name).shape == tensor.shape
        assert getattr(layer, name).dtype == tensor.dtype
    layer.load_state_dict({**before, "bias": torch.zeros(N)})
    assert_stored(layer, before)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(prepared: bool, assign: bool, x: Tensor) -> None:
    layer, other = make(), make(scale_dtype=torch.bfloat16)
    if prepared:
        layer.prepare()
        other.prepare()
    state = layer.state_dict()
    assert list(state) == ["bias", *STORED]
    other.load_state_dict(state, assign=assign)
    assert_stored(other, stored(layer))
    assert torch.equal(other(x), layer(x))


def test_loading_copies_unless_told_to_assign() -> None:
    layer, other = make(), make()
    other.restore()
    state = layer.state_dict()
    other.load_state_dict(state)
    state["qweight"].zero_()
    assert bool(other.qweight.any())


def test_loading_takes_tables_of_another_number_and_dtype() -> None:
    layer = make()
    state = layer.state_dict()
    state["codebook"] = state["codebook"].float().repeat(3, 1, 1)  # one for every 16 rows
    layer.load_state_dict(state)
    assert layer.codebook.shape == (3, 16, 1)
    assert layer.codebook.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scales"), "scales is missing"),
        (
            lambda s: s.update(scales=s["scales"].float()),
            "scales is float32 [48, 2]; expected float16 or bfloat16",
        ),
        (
            lambda s: s.update(qweight=s["qweight"][:, :-4]),
            "qweight is int32 [48, 12]; expected int32 [48, 16]",
        ),
        (lambda s: s["scales"].fill_(torch.nan), "scales has 96 of 96 values that are NaN or infinite"),
    ],
    ids=["missing", "dtype", "shape", "nan"],
)
def test_loading_refuses_what_the_format_does_not_have(change: object, message: str) -> None:
    layer = make()
    layer.prepare()
    before = stored(layer)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    change(state)  # type: ignore[operator]
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    assert message in str(caught.value)
    assert_stored(layer, before)


def test_missing_and_unexpected_keys_are_reported_as_torch_does() -> None:
    layer = nn.Sequential(make())
    found = layer.load_state_dict({"0.other": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["0.other"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*0.qweight"):
        layer.load_state_dict({})


@pytest.mark.parametrize("prepared", [False, True])
def test_copies_and_pickles_are_their_own_layers(prepared: bool, x: Tensor) -> None:
    layer = make()
    if prepared:
        layer.prepare()
    expected = layer.dequantize(torch.float32)(x)
    if not prepared:
        layer.restore()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert other.is_prepared == prepared
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
        assert_stored(other, stored(layer))
        assert other.qweight.data_ptr() != layer.qweight.data_ptr()


def test_gradients_reach_the_input_and_the_bias(x: Tensor) -> None:
    layer = make()
    x.requires_grad_()
    layer(x).square().sum().backward()
    dense = layer.dequantize(torch.float32)
    y = x.detach().requires_grad_()
    bias = layer.bias
    assert bias is not None
    found, bias.grad = bias.grad, None
    dense(y).square().sum().backward()
    assert found is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, bias.grad, rtol=1e-3, atol=1e-3)


def test_a_layer_first_used_in_inference_mode_can_be_trained_on(x: Tensor) -> None:
    layer = make(QuantSpec(group_size=-1))
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(hadamard=32)], ids=str)
def test_compiles_as_one_graph(spec: QuantSpec, x: Tensor) -> None:
    layer = make(spec)
    layer.prepare()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_prepared_compiles_with_a_break(x: Tensor) -> None:
    layer = make()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), make()(x), rtol=1e-5, atol=1e-5)
    assert layer.is_prepared


def test_layers_do_not_share_the_table_that_a_method_hands_out() -> None:
    first, second = make(), make()
    assert first.codebook.data_ptr() != second.codebook.data_ptr()


def test_asking_for_a_16_bit_weight_says_what_there_is() -> None:
    with pytest.raises(
        AttributeError, match=r"its 48 x 128 weights are codes of 4 bits\. dequantize\(\)\.weight"
    ):
        _ = make().weight


def test_other_missing_attributes_are_torchs_business() -> None:
    with pytest.raises(AttributeError, match="'FluteLinear' object has no attribute 'nothing'"):
        _ = make().nothing


def test_a_device_without_kernels_is_refused_at_the_first_forward(x: Tensor) -> None:
    layer = FluteLinear(QuantSpec(), K, N, device="meta")
    with pytest.raises(UnsupportedError, match="device is meta"):
        layer(x)


def test_a_width_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(FormatError, match="in_features is 100; it must be a positive multiple of 32"):
        FluteLinear(QuantSpec(), 100, N)


def test_it_says_what_it_is() -> None:
    spec = QuantSpec(bits=3, group_size=32, vector_size=2, hadamard=64)
    assert repr(make(spec)) == (
        "FluteLinear(in_features=128, out_features=48, bias=True, "
        "bits=3, group_size=32, vector_size=2, hadamard=64)"
    )


def test_quantized_is_the_linear_that_it_was_made_from() -> None:
    weight = torch.randn(N, K)
    linear, _ = quantize_tensor(weight, QuantSpec(), bias=torch.ones(N))
    layer = FluteLinear.from_quantized(linear)
    layer.prepare()
    found = layer.quantized()
    assert isinstance(found, QuantizedLinear)
    for name, tensor in linear.to_tensors().items():
        assert torch.equal(getattr(found, name), tensor)
