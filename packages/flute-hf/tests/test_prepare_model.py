"""``prepare_model``: any torch module, in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flute_hf import FluteLinear, prepare_model
from flute_kernels import FormatError, QuantSpec
from flute_quant import QuantizationError

from .helpers import effective_weight, flute_layers, load, logits, quantized


class Net(nn.Module):
    """One layer at two places, one that stays, one whose width is no multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.again = self.up
        self.odd = nn.Linear(50, 7)
        self.lm_head = nn.Linear(64, 32, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.lm_head(hidden + self.down(self.up(hidden).relu() + self.again(hidden)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def test_replaces_linear_layers_in_place(net: Net) -> None:
    tokens = torch.arange(8)
    before = net(tokens)
    config = prepare_model(net, bits=4, group_size=32)
    assert type(net.up) is FluteLinear
    assert net.again is net.up
    assert type(net.odd) is type(net.lm_head) is nn.Linear
    assert config.spec == QuantSpec(bits=4, group_size=32)
    assert sorted(config.modules_to_not_convert) == ["lm_head", "odd"]
    found = net(tokens)
    assert (found - before).norm() < 0.2 * before.norm()
    net.up, net.down = net.up.dequantize(), net.down.dequantize()
    net.again = net.up
    torch.testing.assert_close(found, net(tokens), rtol=1e-4, atol=1e-4)


def test_channels_of_a_module_that_takes_no_tokens_are_guessed_and_that_is_said(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    other = Net()
    other.load_state_dict(net.state_dict())
    prepare_model(net)
    (record,) = [r for r in caplog.records if r.name == "flute_hf"]
    assert record.getMessage() == (
        "The importance of input channels was guessed from the weights' columns, because random tokens "
        "could not be run through the model: Net is no Transformers model with a token embedding."
    )
    caplog.clear()
    prepare_model(other, importance="columns")
    assert not caplog.records
    assert torch.equal(net.up.qweight, other.up.qweight)
    assert torch.equal(net.up.scales, other.up.scales)


def test_fake_keeps_linear_layers_with_the_quantized_values(net: Net) -> None:
    other = Net()
    other.load_state_dict(net.state_dict())
    real = prepare_model(net, bits=3)
    assert prepare_model(other, bits=3, fake=True) == real
    assert type(other.up) is type(other.down) is nn.Linear
    assert other.again is other.up
    torch.testing.assert_close(other.up.weight.detach(), effective_weight(net.up), rtol=1e-6, atol=1e-7)
    assert other.up.weight.dtype == torch.float32
    torch.testing.assert_close(other(torch.arange(8)).detach(), net(torch.arange(8)), rtol=1e-4, atol=1e-4)


def test_fake_in_16_bits_rounds_once(net: Net) -> None:
    half = Net().requires_grad_(False)
    half.load_state_dict(net.state_dict())
    half.to(torch.bfloat16)
    exact = Net()
    exact.load_state_dict(half.state_dict())
    prepare_model(half, fake=True)
    prepare_model(exact)
    assert half.up.weight.dtype == torch.bfloat16
    assert torch.equal(half.up.weight, effective_weight(exact.up).to(torch.bfloat16))


def test_bias_is_the_same_parameter(net: Net) -> None:
    bias = net.up.bias
    prepare_model(net)
    assert net.up.bias is bias


def test_a_transformers_model_saves_itself(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load(llama)
    parameters = model.num_parameters()
    prepare_model(model, bits=4, group_size=128)
    assert model.num_parameters() == parameters
    assert torch.equal(logits(model, ids), logits(quantized(llama, group_size=128), ids))
    model.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(load(tmp_path / "q"), ids), logits(model, ids))
    assert not flute_layers(model.dequantize())


def test_a_fake_transformers_model_saves_itself_in_full(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load(llama)
    prepare_model(model, fake=True)
    model.save_pretrained(tmp_path / "fake")
    again = load(tmp_path / "fake")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_options(net: Net) -> None:
    prepare_model(net, bits=3, ignore=["down"], overrides={"up": {"bits": 2}}, hadamard=16, hadamard_seed=5)
    assert net.up.spec == QuantSpec(bits=2, group_size=64, hadamard=16, hadamard_seed=5)
    assert type(net.down) is nn.Linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, FormatError, "bits is 5; supported are 2, 3 and 4."),
        ({"group_size": 48}, FormatError, "group_size is 48; supported are 32, 64, 128 and 256"),
        ({"ignore": ["nothing"]}, QuantizationError, "ignore 'nothing' matches none"),
        ({"method": "magic"}, QuantizationError, "The method 'magic' is unknown"),
    ],
    ids=["bits", "group", "ignore", "method"],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], message: str, net: Net) -> None:
    with pytest.raises(error) as caught:
        prepare_model(net, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not flute_layers(net)


def test_no_linear_layer() -> None:
    with pytest.raises(QuantizationError, match="Sequential has 0 linear modules"):
        prepare_model(nn.Sequential(nn.ReLU()))


def test_a_bare_linear_layer() -> None:
    with pytest.raises(QuantizationError, match=r"is itself an nn\.Linear\. Put it into an nn\.Sequential"):
        prepare_model(nn.Linear(64, 64))


def test_twice(net: Net) -> None:
    prepare_model(net)
    with pytest.raises(QuantizationError, match="Net is quantized already: up has 4 bits"):
        prepare_model(net)


def test_weights_that_are_not_finite(net: Net) -> None:
    net.down.weight[0, 0] = torch.nan
    with pytest.raises(
        QuantizationError, match=r"down\.weight has 1 of 8192 weights that are NaN or infinite"
    ):
        prepare_model(net)
