"""Scales that are learned on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from flute_kernels import QuantizedLinear, QuantSpec
from flute_kernels.format import unpack_codes
from flute_quant import (
    QuantizationError,
    Recipe,
    learn_scales,
    quantize_checkpoint,
    quantize_model,
    quantize_tensor,
    recipe_method,
)
from flute_quant.cli import main
from flute_quant.codebooks import normalfloat_table
from flute_quant.learning.linear import LearnedLinear, Teaching
from flute_quant.rotation import rotate
from flute_quant.stored import dequantized

from .stored import assert_holds

Checkpoints = Callable[[str], Path]
TOKENS = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(0))
SPECS = [QuantSpec(3, 32), QuantSpec(2, 32, 2), QuantSpec(3, 32, hadamard=32, hadamard_seed=3)]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model: Any, linears: dict[str, QuantizedLinear]) -> float:
    with torch.no_grad():
        wanted = model(TOKENS).logits.log_softmax(2)
        before = {name: model.get_submodule(name).weight.clone() for name in linears}
        for name, linear in linears.items():
            model.get_submodule(name).weight.copy_(dequantized(linear))
        found = model(TOKENS).logits.log_softmax(2)
        for name, weight in before.items():
            model.get_submodule(name).weight.copy_(weight)
    return float((wanted.exp() * (wanted - found)).sum(2).mean())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("nearest", [True, False])
def test_the_gradient_of_a_scale_is_that_of_its_weights_times_the_looked_up_values(
    spec: QuantSpec, nearest: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    quantized, _ = quantize_tensor(linear.weight, spec)
    module = LearnedLinear(linear, quantized, nearest, Teaching())
    x, pull = torch.randn(5, 64), torch.randn(5, 32)
    (module(x) * pull).sum().backward()
    turned = rotate(x, spec.hadamard, spec.hadamard_seed) if spec.hadamard else x
    values = module.looked_up(module.scales.detach())
    expected = ((pull.T @ turned).view(32, 2, 32) * values).sum(2)
    assert module.scales.grad is not None
    torch.testing.assert_close(module.scales.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x), x @ dequantized(module.quantized()).T + linear.bias)


def test_it_computes_as_the_16_bit_module_while_it_teaches() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    quantized, _ = quantize_tensor(linear.weight, QuantSpec(2, 32))
    teaching = Teaching()
    module = LearnedLinear(linear, quantized, True, teaching)
    x = torch.randn(5, 64)
    assert not torch.equal(module(x), linear(x))
    teaching.on = True
    assert torch.equal(module(x), linear(x))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"nearest_codes": False}, {"loss": "nll"}])
def test_the_loss_falls(checkpoints: Checkpoints, spec: QuantSpec, options: dict[str, Any]) -> None:
    model = load(checkpoints("llama"))
    linears, _ = quantize_model(model, spec, method="lloyd-pairs" if spec.vector_size == 2 else "nf")
    seen: list[float] = []
    learned = learn_scales(
        model,
        linears,
        TOKENS,
        epochs=8,
        learning_rate=1e-3,
        progress=lambda done, total, loss: seen.append(loss),
        **options,
    )
    assert len(seen) == 48
    assert sum(seen[-6:]) < sum(seen[:6])
    if "loss" not in options:
        assert divergence(model, learned) < 0.8 * divergence(model, linears)
    for name, linear in learned.items():
        assert torch.equal(linear.codebook, linears[name].codebook)
        assert torch.equal(linear.qweight, linears[name].qweight) or options != {"nearest_codes": False}


def test_the_model_is_as_it_was_and_the_result_is_the_same_every_time(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama")).train()
    linears, _ = quantize_model(model, QuantSpec(3, 32), method="nf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    results = [learn_scales(model, linears, TOKENS) for _ in range(2)]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, linear in results[0].items():
        assert torch.equal(linear.scales, results[1][name].scales)
        assert torch.equal(linear.qweight, results[1][name].qweight)
        assert not torch.equal(linear.scales, linears[name].scales)


def test_only_inputs_of_layers_are_kept_for_the_backward_pass(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    linears, _ = quantize_model(model, QuantSpec(3, 32), method="nf")
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        learn_scales(model, linears, TOKENS[:1])
    # Of the MLP, whose 96 channels only the inside of a layer has.
    assert not [value for value in kept if value.shape[-2:] == (32, 96)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "mse"}, "loss is 'mse'; supported are kl, nll"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 and epochs 1"),
        ({"epochs": 0}, "epochs 0"),
        ({"tokens": TOKENS[:, :1]}, r"tokens are \[6, 1\]; a step needs two"),
        ({"tokens": TOKENS.float()}, "expected integers"),
    ],
)
def test_refusals(checkpoints: Checkpoints, options: dict[str, Any], said: str) -> None:
    model = load(checkpoints("llama"))
    linears, _ = quantize_model(model, QuantSpec(3, 32), method="nf")
    with pytest.raises(QuantizationError, match=said):
        learn_scales(model, linears, **{"tokens": TOKENS, **options})


def test_a_loss_that_is_not_finite_is_refused(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    linears, _ = quantize_model(model, QuantSpec(3, 32), method="nf")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(QuantizationError, match="loss of step 1 of 6 is nan"):
        learn_scales(model, linears, TOKENS)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


# --- as a method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_the_method_learns_normalfloat_scales_on_the_calibration_tokens(
    checkpoints: Checkpoints, loss: str
) -> None:
    """The table is NormalFloat's, each code its weight's nearest entry, the result that of the function."""
    model = load(checkpoints("llama"))
    spec = QuantSpec(3, 32)
    start, _ = quantize_model(model, spec, method="nf")
    recipe = Recipe(start="nf", feedback=False, propagate=False, learn=loss, learn_epochs=2)
    method = "nfl" if loss == "kl" else recipe_method(recipe)
    seen: list[int] = []
    found, report = quantize_model(
        model, spec, method=method, calibration=TOKENS, learning=lambda done, total, value: seen.append(total)
    )
    epochs = 1 if loss == "kl" else 2
    assert seen == [6 * epochs] * (6 * epochs)
    expected = learn_scales(model, start, TOKENS, loss=loss, epochs=epochs)
    for name, linear in found.items():
        assert torch.equal(linear.codebook.flatten(), normalfloat_table(3).half())
        assert torch.equal(linear.qweight, expected[name].qweight)
        assert torch.equal(linear.scales, expected[name].scales)
        weight = model.get_submodule(name).weight.detach()
        groups = weight.view(*linear.scales.shape, -1) / linear.scales.float()[..., None]
        nearest = (groups[..., None] - linear.codebook.flatten().float()).abs().argmin(-1)
        codes = unpack_codes(linear.qweight, 3).view(nearest.shape)
        assert float((codes == nearest).float().mean()) > 0.999  # ties aside
        exact = float((dequantized(linear) - weight).square().sum() / weight.square().sum())
        assert report.errors[name].relative == pytest.approx(exact, rel=1e-4)


def test_after_feedback_codes_stay(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    before, after = (
        quantize_model(model, QuantSpec(3, 32), method=recipe_method(Recipe(learn=learn)), calibration=TOKENS)
        for learn in ("none", "kl")
    )
    for name, linear in after[0].items():
        assert torch.equal(linear.qweight, before[0][name].qweight)
        assert not torch.equal(linear.scales, before[0][name].scales)


def test_a_checkpoint_is_what_it_is_in_memory_and_a_resumed_run_does_not_learn_again(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    class Stop(BaseException):
        """Like KeyboardInterrupt: no failure."""

    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    options: dict[str, Any] = {"method": "nfl", "calibration": TOKENS}
    steps: list[int] = []

    def stop(event: Any) -> None:
        if steps:
            raise Stop

    def learning(done: int, total: int, loss: float) -> None:
        steps.append(done)

    # lm_head is no layer's: it is quantized after all scales are learned.
    options["include"] = ["lm_head"]
    with pytest.raises(Stop):
        quantize_checkpoint(source, out, QuantSpec(3, 32), learning=learning, progress=stop, **options)
    assert steps == [1, 2, 3, 4, 5, 6]
    report = quantize_checkpoint(source, out, QuantSpec(3, 32), learning=learning, **options)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert report.resumed >= 2  # the layers, and the files that were written before the head
    linears, memory = quantize_model(load(source), QuantSpec(3, 32), **options)
    assert_holds(out, linears)
    for name in linears:
        assert report.errors[name] == pytest.approx(memory.errors[name].relative, rel=1e-4)


def test_experts_are_not_learned_which_is_noted(checkpoints: Checkpoints, tmp_path: Path) -> None:
    report = quantize_checkpoint(
        checkpoints("mixtral"),
        tmp_path / "out",
        QuantSpec(3, 32),
        method="nfl",
        calibration=TOKENS,
        experts=True,
        min_coverage=0,
    )
    assert report.calibration
    assert all("expert" in name for name in report.calibration)
    assert set(report.calibration.values()) == {
        "experts are no modules of the model, so that their scales are not learned"
    }


def test_the_command_line(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 124}" for i in range(500)))
    arguments = ["quantize", str(checkpoints("llama")), str(tmp_path / "out"), "--bits", "3"]
    calibration = ["--calibration", str(text), "--calibration-tokens", "4x32"]
    assert main([*arguments, "--method", "nfl"]) == 2
    assert "it needs a text or tokens to calibrate with" in capsys.readouterr().err
    assert main([*arguments, "--method", "nfl", "--dry-run", *calibration]) == 0
    assert "method nfl, estimated time" in capsys.readouterr().out
    assert main([*arguments, "--method", "nfl", *calibration]) == 0
    shown = capsys.readouterr()
    assert "method nfl" in shown.out
    assert "learning scales  loss" in shown.err
