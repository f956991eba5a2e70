"""Block-wise training: what a layer puts out comes nearer to what it should, in the same format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_kernels.format import unpack_codes
from flute_quant import (
    Recipe,
    quantize_checkpoint,
    quantize_model,
    quantize_tensor,
    recipe_method,
    resolve_method,
)
from flute_quant.calibration.blockwise import BlockTraining, train_block
from flute_quant.calibration.rounding import RoundedLinear
from flute_quant.checkpoint.workfolder import partial_path
from flute_quant.methods import InputMoments
from flute_quant.rotation import rotate
from flute_quant.stored import dequantized

from .stored import assert_holds

Checkpoints = Callable[[str], Path]
SPECS = [
    QuantSpec(3, 32),
    QuantSpec(2, 32),
    QuantSpec(2, 32, 2),
    QuantSpec(3, 32, hadamard=32, hadamard_seed=3),
]
TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
TRAINING = BlockTraining(epochs=20, reach=0.5, scale_reach=0.1)
CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class Perceptron(nn.Module):
    """A layer with a branch that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.never = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def perceptron() -> tuple[Perceptron, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    layer = Perceptron()
    inputs = list(torch.randn(6, 2, 16, 64))
    with torch.no_grad():
        return layer, inputs, [layer(x) for x in inputs]


# --- one module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_it_starts_from_the_stored_codes_and_scales(spec: QuantSpec, calibrated: bool) -> None:
    """Also where error feedback chose others than each weight's nearest entry."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    turned = rotate(x, spec.hadamard, spec.hadamard_seed) if spec.hadamard else x
    inputs = InputMoments(turned.T @ turned / 200, None, 200)
    options: dict[str, Any] = {"method": "gptq", "inputs": inputs} if calibrated else {}
    stored, _ = quantize_tensor(linear.weight, spec, bias=linear.bias.detach(), **options)
    module = RoundedLinear(linear, stored)
    found = module.quantized()
    assert torch.equal(found.qweight, stored.qweight)
    assert torch.equal(found.scales, stored.scales)
    torch.testing.assert_close(module(x), x @ dequantized(stored).T + linear.bias, rtol=1e-4, atol=1e-4)
    if not calibrated and spec.vector_size == 1:  # nearest under a signed scale search
        weight = rotate(linear.weight.detach(), 32, 3) if spec.hadamard else linear.weight.detach()
        exact = weight.view(32, 2, 32) / stored.scales.float()[..., None]
        torch.testing.assert_close(module.positions.detach().view(32, 2, 32), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_pass_straight_through_the_rounding(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    stored, _ = quantize_tensor(linear.weight, spec)
    module = RoundedLinear(linear, stored)
    x, pull = torch.randn(5, 64), torch.randn(5, 32)
    (module(x) * pull).sum().backward()
    turned = rotate(x, spec.hadamard, spec.hadamard_seed) if spec.hadamard else x
    of_weight = (pull.T @ turned).view(32, 2, 32)
    scales = stored.scales.float()[..., None]
    weight = stored.dequantize().view(32, 2, 32)
    assert module.positions.grad is not None
    assert module.stretch.grad is not None
    torch.testing.assert_close(module.positions.grad, (of_weight * scales).view(32, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.stretch.grad, (of_weight * weight).sum(2), rtol=1e-4, atol=1e-4)


def test_the_spacing_of_a_table_is_the_mean_distance_of_neighbours() -> None:
    linear = nn.Linear(64, 32)
    stored, _ = quantize_tensor(linear.weight, QuantSpec(2, 32), method="int")
    table = stored.codebook.flatten().float()
    expected = float((table.max() - table.min()) / 3)
    assert RoundedLinear(linear, stored).spacing == pytest.approx(expected)


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_the_error_of_the_output_falls_below_two_thirds(spec: QuantSpec) -> None:
    layer, inputs, targets = perceptron()
    stored = {name: quantize_tensor(getattr(layer, name).weight, spec)[0] for name in ("up", "down")}
    trained = train_block(layer, layer, stored, inputs, targets, TRAINING, device=CPU)
    assert trained.after < 0.66 * trained.before
    assert 0 < trained.moved < 0.5
    # What is reported is what is stored.
    for name, linear in trained.linears.items():
        getattr(layer, name).weight.data.copy_(dequantized(linear))
    with torch.no_grad():
        errors = [
            ((layer(x) - y).square().sum(2) / y.square().sum(2)).mean()
            for x, y in zip(inputs, targets, strict=True)
        ]
    assert float(torch.stack(errors).mean()) == pytest.approx(trained.after, rel=1e-2)


def test_tables_stay_and_what_no_token_reaches_stays_as_it_is() -> None:
    layer, inputs, targets = perceptron()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    stored = {
        name: quantize_tensor(getattr(layer, name).weight, QuantSpec(3, 32))[0]
        for name in ("up", "down", "never")
    }
    trained = train_block(layer, layer, stored, inputs, targets, TRAINING, device=CPU)
    for name, linear in trained.linears.items():
        assert torch.equal(linear.codebook, stored[name].codebook)
        assert linear.spec == stored[name].spec
        assert torch.equal(linear.qweight, stored[name].qweight) == (name == "never")
        assert torch.equal(linear.scales, stored[name].scales) == (name == "never")
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())
    assert all(type(getattr(layer, name)) is nn.Linear for name in stored)


@pytest.mark.parametrize("names", [(), ("never",)])
def test_a_layer_without_anything_to_train_keeps_its_start(names: tuple[str, ...]) -> None:
    layer, inputs, targets = perceptron()
    stored = {name: quantize_tensor(getattr(layer, name).weight, QuantSpec(3, 32))[0] for name in names}
    trained = train_block(layer, layer, stored, inputs, targets, TRAINING, device=CPU)
    assert trained.linears == stored
    assert (trained.before, trained.after, trained.moved) == (0, 0, 0)


def test_a_weight_moves_no_further_than_its_reach() -> None:
    layer, inputs, targets = perceptron()
    spec = QuantSpec(3, 32)
    stored = {"up": quantize_tensor(layer.up.weight, spec)[0]}
    training = BlockTraining(epochs=3, reach=0.5, scale_reach=0.05)
    trained = train_block(layer, layer, stored, inputs, targets, training, device=CPU).linears["up"]
    change = (trained.scales.float() / stored["up"].scales.float() - 1).abs()
    assert 0 < float(change.max()) < 0.051  # float16's rounding comes on top
    codes = [unpack_codes(linear.qweight, 3).int() for linear in (stored["up"], trained)]
    order = stored["up"].codebook.flatten().argsort().argsort()
    # Half of a mean distance never jumps over an entry.
    assert int((order[codes[0].long()] - order[codes[1].long()]).abs().max()) == 1


def test_without_a_reach_only_scales_are_trained() -> None:
    layer, inputs, targets = perceptron()
    stored = {
        name: quantize_tensor(getattr(layer, name).weight, QuantSpec(3, 32))[0] for name in ("up", "down")
    }
    training = BlockTraining(epochs=10, reach=0, scale_reach=0.1)
    trained = train_block(layer, layer, stored, inputs, targets, training, device=CPU)
    assert trained.after < 0.98 * trained.before
    assert trained.moved == 0
    for name, linear in trained.linears.items():
        assert torch.equal(linear.qweight, stored[name].qweight)
        assert not torch.equal(linear.scales, stored[name].scales)


def test_one_token_of_great_energy_does_not_outweigh_the_others() -> None:
    layer, inputs, targets = perceptron()
    spec = QuantSpec(2, 32)
    stored = {name: quantize_tensor(getattr(layer, name).weight, spec)[0] for name in ("up", "down")}
    for x in inputs:
        x[:, 0] *= 100
    with torch.no_grad():
        targets = [layer(x) for x in inputs]
    trained = train_block(layer, layer, stored, inputs, targets, TRAINING, device=CPU)
    for name, linear in trained.linears.items():
        getattr(layer, name).weight.data.copy_(dequantized(linear))
    with torch.no_grad():
        others = [
            ((layer(x) - y)[:, 1:].square().sum(2) / y[:, 1:].square().sum(2)).mean()
            for x, y in zip(inputs, targets, strict=True)
        ]
    assert float(torch.stack(others).mean()) < 0.7 * trained.before


def test_where_training_makes_it_worse_the_start_is_the_result() -> None:
    layer, inputs, targets = perceptron()
    stored = {"up": quantize_tensor(layer.up.weight, QuantSpec(4, 32))[0]}
    wild = BlockTraining(epochs=1, reach=10.0, scale_reach=0.5)
    trained = train_block(layer, layer, stored, inputs[:1], targets[:1], wild, device=CPU)
    assert not trained.after < trained.before
    assert trained.linears["up"] is stored["up"]
    assert trained.moved == 0


# --- the whole way -------------------------------------------------------------------------------


def steps(**more: Any) -> Any:
    return recipe_method(Recipe(**{"feedback": False, "epochs": 10, "reach": 0.5, **more}))


@pytest.mark.parametrize("more", [{}, {"propagate": False}, {"feedback": True, "correction": 0.5}])
def test_the_model_says_more_of_what_it_said_than_from_the_start_alone(
    checkpoints: Checkpoints, more: dict[str, Any]
) -> None:
    model = load(checkpoints("llama-fp32"))
    with torch.no_grad():
        wanted = model(TOKENS).logits

    def distance(method: Any) -> float:
        linears, _ = quantize_model(model, QuantSpec(3, 32), method=method, calibration=TOKENS)
        changed = load(checkpoints("llama-fp32"))
        for key, linear in linears.items():
            changed.get_submodule(key).weight.data.copy_(dequantized(linear))
        with torch.no_grad():
            return float((changed(TOKENS).logits - wanted).square().mean())

    assert distance(steps(**more)) < 0.8 * distance(steps(**{**more, "epochs": 0}))


def test_the_model_in_memory_is_as_it_was_and_the_result_the_same_every_time(
    checkpoints: Checkpoints,
) -> None:
    model = load(checkpoints("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    results = [
        quantize_model(model, QuantSpec(3, 32), method="blockwise", calibration=TOKENS) for _ in range(2)
    ]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, linear in results[0][0].items():
        assert torch.equal(linear.qweight, results[1][0][name].qweight)
        assert torch.equal(linear.scales, results[1][0][name].scales)
        error = results[0][1].errors[name].relative
        weight = model.get_submodule(name).weight.detach()
        exact = float((dequantized(linear) - weight).square().sum() / weight.square().sum())
        assert error == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ["llama-sharded", "qwen2", "gemma2", "mamba"])
def test_from_disk_it_is_what_it_is_in_memory(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints(name), dtype="auto").eval()
    method = steps(epochs=2)
    linears, _ = quantize_model(model, QuantSpec(3, 32), method=method, calibration=TOKENS)
    report = quantize_checkpoint(
        checkpoints(name),
        tmp_path / "out",
        QuantSpec(3, 32),
        method=method,
        calibration=TOKENS,
        min_coverage=0,
    )
    assert report.calibration is not None
    assert_holds(tmp_path / "out", linears)


def test_pairs_begin_with_what_calibrated_gives_and_their_codes_stay(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    spec = QuantSpec(2, 32, 2)
    planned = resolve_method("blockwise", spec)
    assert planned.name == "blockwise-pairs"
    assert resolve_method("blockwise", QuantSpec(2, 32)).name == "blockwise"
    found, start = (
        quantize_model(model, spec, method=method, calibration=TOKENS)[0]
        for method in ("blockwise", "calibrated")
    )
    first = [name for name in found if name.startswith("model.layers.0.")]
    assert all(torch.equal(found[name].qweight, start[name].qweight) for name in first)
    assert all(torch.equal(found[name].codebook, start[name].codebook) for name in first)
    assert not all(torch.equal(found[name].scales, start[name].scales) for name in first)


class Stop(BaseException):
    """Like KeyboardInterrupt: no failure."""


@pytest.mark.parametrize("propagate", [True, False])
def test_a_resumed_run_gives_the_same_bytes(
    checkpoints: Checkpoints, tmp_path: Path, propagate: bool
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    options = {"method": steps(epochs=2, propagate=propagate), "calibration": TOKENS}

    def stop(event: Any) -> None:
        if event.name.startswith("model.layers.1"):
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, out, QuantSpec(3, 32), progress=stop, **options)
    assert partial_path(out).exists()
    report = quantize_checkpoint(source, out, QuantSpec(3, 32), **options)
    assert report.resumed == 1
    quantize_checkpoint(source, tmp_path / "whole", QuantSpec(3, 32), **options)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_keep_their_start_and_the_rest_of_the_layer_is_trained_around_them(
    checkpoints: Checkpoints, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file

    reports = {}
    for epochs in (0, 20):
        # Two tokens, which reach some experts only.
        reports[epochs] = quantize_checkpoint(
            checkpoints(name),
            tmp_path / str(epochs),
            QuantSpec(3, 32),
            method=steps(epochs=epochs, propagate=False),
            calibration=TOKENS[:1, :2],
            experts=True,
            min_coverage=0,
        )
    start, trained = (load_file(tmp_path / str(epochs) / "model.safetensors") for epochs in (0, 20))
    changed = {key for key in start if not torch.equal(start[key], trained[key])}
    assert changed
    assert not [key for key in changed if "expert" in key]
    before, notes = (reports[epochs].calibration or {} for epochs in (0, 20))
    unreached = {key for key, note in before.items() if note.startswith("no calibration token")}
    assert unreached
    experts = {key.removesuffix(".qweight") for key in start if "expert" in key and key.endswith(".qweight")}
    for key in experts:
        said = "no calibration token reached it" if key in unreached else "experts are quantized before"
        assert notes[key].startswith(said)


def test_one_layer_is_trained_at_a_time(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """While modules of one are trained, no other layer has weights."""
    from flute_quant.calibration import run
    from flute_quant.checkpoint import calibrate

    stores: list[Any] = []
    present: list[set[str]] = []

    class Watched(calibrate.StreamedModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            stores.append(self)

    def look(*args: Any, **kwargs: Any) -> Any:
        there = [n for n, p in stores[0].model.named_parameters() if any(p.stride())]
        present.append({".".join(n.split(".")[:3]) for n in there})
        return train_block(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "StreamedModel", Watched)
        patch.setattr(run, "train_block", look)
        quantize_checkpoint(
            checkpoints("llama-sharded"),
            tmp_path / "out",
            QuantSpec(3, 32),
            method=steps(epochs=1),
            calibration=TOKENS,
        )
    assert present == [{"model.layers.0"}, {"model.layers.1"}]
