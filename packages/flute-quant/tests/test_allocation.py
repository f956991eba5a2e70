"""Bits by layer: the program is exact, the budget is kept, siblings agree, and sensitive layers get more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from flute_kernels import QuantSpec
from flute_quant import (
    Override,
    QuantizationError,
    inspect_checkpoint,
    quantize_checkpoint,
    quantize_model,
    resolve_method,
)
from flute_quant.allocation import (
    allocate_checkpoint,
    allocate_model,
    default_choices,
    knapsack,
    least_loss,
)
from flute_quant.allocation.sensitivity import measured_divergences
from flute_quant.cli import main

Checkpoints = Callable[[str], Path]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- the program ---------------------------------------------------------------------------------

UNIT = st.lists(st.tuples(st.integers(0, 60), st.floats(0, 9, width=32)), min_size=1, max_size=4)


def totals(units: list[list[tuple[int, float]]], picked: Any) -> tuple[int, float]:
    chosen = [unit[i] for unit, i in zip(units, picked, strict=True)]
    return sum(cost for cost, _ in chosen), sum(loss for _, loss in chosen)


@settings(deadline=None)
@given(units=st.lists(UNIT, min_size=1, max_size=5), budget=st.integers(0, 250))
def test_no_combination_within_the_budget_has_less_loss(
    units: list[list[tuple[int, float]]], budget: int
) -> None:
    within = [
        totals(units, picked)
        for picked in itertools.product(*(range(len(unit)) for unit in units))
        if totals(units, picked)[0] <= budget
    ]
    if not within:
        with pytest.raises(ValueError, match=f"more than the budget of {budget}"):
            least_loss(units, budget)
        return
    cost, loss = totals(units, least_loss(units, budget))
    assert cost <= budget
    assert loss == pytest.approx(min(loss for _, loss in within))


def test_where_costs_are_rounded_to_steps_the_budget_is_kept_and_used_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knapsack, "_STEPS", 40)
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(1, 10_007, (30, 5), generator=generator).sort(1).values
    losses = torch.rand(30, 5, generator=generator).sort(1, descending=True).values
    units = [list(zip(c.tolist(), v.tolist(), strict=True)) for c, v in zip(costs, losses, strict=True)]
    budget = int(costs.float().mean(1).sum())
    cost, loss = totals(units, least_loss(units, budget))
    monkeypatch.undo()
    exact_cost, exact_loss = totals(units, least_loss(units, budget))
    assert max(cost, exact_cost) <= budget
    assert exact_loss <= loss < 1.25 * exact_loss
    cheapest_step = min(b[0] - a[0] for unit in units for a, b in itertools.pairwise(unit))
    assert budget - exact_cost < 100 * cheapest_step + 10_007


# --- a model -------------------------------------------------------------------------------------


def test_choices_are_all_that_the_method_has_around_the_spec() -> None:
    scalars = default_choices(QuantSpec(4, 64), resolve_method("signed"))
    assert {(c.bits, c.group_size, c.vector_size) for c in scalars} == {
        (b, g, 1) for b in (2, 3, 4) for g in (32, 64, 128)
    }
    rotated = default_choices(QuantSpec(4, 256, 2, 64, 5), resolve_method("higgs"))
    assert {(c.group_size, c.vector_size) for c in rotated} == {(g, p) for g in (128, 256) for p in (1, 2)}
    assert {(c.hadamard, c.hadamard_seed) for c in rotated} == {(64, 5)}
    # A method without a table of scalars has no such choice, one without 2 bits none of those.
    pairs = default_choices(QuantSpec(4, 64, 2), resolve_method("lloyd-pairs"))
    assert {c.vector_size for c in pairs} == {2}
    assert {c.bits for c in default_choices(QuantSpec(4, -1), resolve_method("fp"))} == {3, 4}


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("average", [2.9, 3.6, 4.4])
def test_the_budget_is_kept_to_the_bit_and_siblings_agree(
    checkpoints: Checkpoints, sensitivity: str, average: float
) -> None:
    """On layers of some thousand weights tables are a large part of the bits."""
    model = load(checkpoints("llama-fp32"))
    found = allocate_model(model, average, QuantSpec(3, 32), method="lloyd", sensitivity=sensitivity)
    linears, _ = quantize_model(model, QuantSpec(3, 32), method="lloyd", overrides=found.overrides)
    weights = sum(x.out_features * x.in_features for x in linears.values())
    stored = sum(8 * x.nbytes for x in linears.values())
    assert stored / weights == pytest.approx(found.bits_per_weight)
    assert average - 0.25 < found.bits_per_weight <= average
    assert {name: x.spec for name, x in linears.items()} == found.specs
    for i in (0, 1):
        layer = f"model.layers.{i}."
        assert len({found.specs[f"{layer}self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({found.specs[f"{layer}mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert len(found.losses) == 2 * 4


def test_a_layer_that_matters_more_gets_more_bits(checkpoints: Checkpoints) -> None:
    """All layers are equally large and hard to quantize here; the outputs of one are then enlarged."""
    specs = []
    for factor in (0.02, 50.0):
        model = load(checkpoints("llama-fp32"))
        layer = model.model.layers[1]
        with torch.no_grad():
            for other in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
                other.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(factor)
        found = allocate_model(model, 3.3, QuantSpec(3, 32), method="lloyd", importance="none")
        specs.append(found.specs["model.layers.1.mlp.down_proj"])
    assert specs[0].bits < specs[1].bits


def test_sensitivity_is_the_divergence_with_one_unit_changed(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(3, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj")

    def noisy(name: str) -> torch.Tensor:
        weight = before[f"{name}.weight"]
        return weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    found = measured_divergences(model, [names[:1], names[1:], names], noisy, tokens)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        p = model(tokens).logits.log_softmax(-1).double()
        for name in names:
            model.get_submodule(name).weight.copy_(noisy(name))
        q = model(tokens).logits.log_softmax(-1).double()
    assert found[2] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert 0 < min(found[:2]) < found[2]


def test_losses_of_units_add_up_to_that_of_the_whole(checkpoints: Checkpoints) -> None:
    """Enough bits for the better of two choices everywhere: what is promised is what is then measured."""
    model = load(checkpoints("llama-fp32"))
    choices = [QuantSpec(2, 32), QuantSpec(2, -1)]
    found = allocate_model(model, 9, QuantSpec(2, 32), method="lloyd", choices=choices)
    assert set(found.specs.values()) == {choices[0]}
    linears, _ = quantize_model(model, QuantSpec(2, 32), method="lloyd", overrides=found.overrides)
    whole = measured_divergences(model, [tuple(linears)], lambda name: linears[name].dequantize())
    alone = measured_divergences(model, [(name,) for name in linears], lambda n: linears[n].dequantize())
    assert sum(found.losses.values()) == pytest.approx(whole[0], rel=1e-3)
    assert sum(alone) != pytest.approx(whole[0], rel=0.05)


def test_the_command_measures_on_a_text(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{i % 90}" for i in range(300)))
    arguments = [
        "quantize",
        str(checkpoints("llama-fp32")),
        "--group-size",
        "32",
        "--method",
        "lloyd",
        "--bits",
        "3.3",
    ]
    said = []
    for options in ([], ["--sensitivity-text", str(tmp_path / "text")]):
        assert main([*arguments[:2], str(tmp_path / f"out{len(options)}"), *arguments[2:], *options]) == 0
        said.append(capsys.readouterr().out)
    assert all("Allocated 3." in words for words in said)
    assert all("KL on held-out tokens: " in words for words in said)
    # The text of calibration serves for both, unless another one is given.
    calibration = ["--calibration", str(tmp_path / "text"), "--calibration-tokens", "4x32"]
    assert main([*arguments[:2], str(tmp_path / "calibrated"), *arguments[2:], *calibration]) == 0
    verdict = [words.splitlines()[0] for words in (*said, capsys.readouterr().out)]
    assert verdict[2].split(",")[0] != verdict[0].split(",")[0]
    missing = ["--sensitivity-text", str(tmp_path / "nowhere")]
    assert main([*arguments[:2], str(tmp_path / "other"), *arguments[2:], *missing]) == 2
    assert "nowhere: No such file" in capsys.readouterr().err


def test_what_an_override_says_is_no_choice(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    fixed = Override.of("layers.0.mlp.down_proj", bits=4, group_size=-1)
    found = allocate_model(
        model,
        3.2,
        QuantSpec(3, 32),
        method="lloyd",
        overrides=[fixed],
        ignore=["o_proj"],
        sensitivity="error",
    )
    assert found.specs["model.layers.0.mlp.down_proj"] == QuantSpec(4, -1)
    assert "model.layers.0.self_attn.o_proj" not in found.specs
    linears, _ = quantize_model(
        model, QuantSpec(3, 32), method="lloyd", overrides=[fixed, *found.overrides], ignore=["o_proj"]
    )
    assert {name: x.spec for name, x in linears.items()} == found.specs


def test_a_folder_gets_what_its_model_gets(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama-sharded")
    for sensitivity in ("kl", "error"):
        options = {"method": "lloyd", "sensitivity": sensitivity}
        in_memory = allocate_model(load(source), 3.3, QuantSpec(3, 32), **options)
        on_disk = allocate_checkpoint(source, 3.3, QuantSpec(3, 32), **options)
        assert on_disk.specs == in_memory.specs
    quantize_checkpoint(
        source, tmp_path / "out", QuantSpec(3, 32), method="lloyd", overrides=on_disk.overrides
    )
    assert inspect_checkpoint(tmp_path / "out").bits_per_weight == pytest.approx(on_disk.bits_per_weight)


def test_refusals_say_the_numbers(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    with pytest.raises(QuantizationError, match=r"average of 2 bits .* cheapest of 6 choices take 2\.\d+"):
        allocate_model(model, 2, QuantSpec(3, 32), method="lloyd")
    with pytest.raises(QuantizationError, match="sensitivity is 'noise'; supported are kl, error"):
        allocate_model(model, 3.3, QuantSpec(3, 32), sensitivity="noise")
    with pytest.raises(QuantizationError, match=r"matrices of experts .* sensitivity 'error'"):
        allocate_checkpoint(checkpoints("mixtral"), 3.6, QuantSpec(3, 32), method="lloyd", experts=True)
    broken = load(checkpoints("llama-fp32"))
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(QuantizationError, match="predictions on 384 tokens are not finite"):
        allocate_model(broken, 3.3, QuantSpec(3, 32), method="lloyd")


def test_experts_are_allocated_by_their_errors(checkpoints: Checkpoints) -> None:
    found = allocate_checkpoint(
        checkpoints("mixtral"), 3.6, QuantSpec(3, 32), method="lloyd", experts=True, sensitivity="error"
    )
    specs = {name: spec for name, spec in found.specs.items() if ".experts.0." in name}
    assert len(specs) == 2 * 3
    for i in (0, 1):
        gate, up = (specs[f"model.layers.{i}.block_sparse_moe.experts.0.{n}"] for n in ("w1", "w3"))
        assert gate == up


# --- the command line ----------------------------------------------------------------------------


def test_an_average_on_the_command_line(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--group-size", "32", "--method", "lloyd", "--override", "o_proj=bits:4"]
    out = tmp_path / "out"
    assert main(["quantize", str(checkpoints("llama-fp32")), str(out), "--bits", "3.3", *arguments]) == 0
    said = capsys.readouterr().out
    found = inspect_checkpoint(out)
    assert 3.0 < found.bits_per_weight <= 3.3
    assert len({x.bits for x in found.layers}) > 1
    assert all(x.bits == 4 for x in found.layers if x.name.endswith("o_proj"))
    assert f"Allocated {found.bits_per_weight:.3f} bits a weight: " in said
    source, other = str(checkpoints("llama-fp32")), str(tmp_path / "other")
    for average in ("1.5", "nan"):
        assert main(["quantize", source, other, "--bits", average, *arguments]) == 2
        assert f"An average of {average} bits a weight is asked for" in capsys.readouterr().err
    assert main(["quantize", source, other, "--bits", "inf", *arguments]) == 0
    assert {x.bits for x in inspect_checkpoint(other).layers} == {4}


def test_a_calibrated_method_is_judged_by_what_it_starts_from(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    spec = QuantSpec(bits=3, group_size=32)
    calibrated = allocate_model(model, 3.5, spec, method="calibrated", sensitivity="error", importance="none")
    start = allocate_model(model, 3.5, spec, method="default", sensitivity="error", importance="none")
    assert calibrated.overrides == start.overrides


def test_a_device_that_is_not_there(checkpoints: Checkpoints) -> None:
    with pytest.raises(QuantizationError, match="device is 'gpu'; supported are cpu and cuda"):
        allocate_checkpoint(checkpoints("llama-fp32"), 3.5, QuantSpec(bits=3, group_size=32), device="gpu")


def test_the_destination_is_looked_at_before_anything_is_measured(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    arguments = ["quantize", str(checkpoints("llama-fp32")), str(tmp_path / "there"), "--bits", "3.5"]
    assert main(arguments) != 0
    said = capsys.readouterr()
    assert "there" in said.err
    assert "Allocated" not in said.out


# --- the check on held-out tokens ----------------------------------------------------------------


def test_the_result_is_the_best_of_some_on_held_out_tokens(checkpoints: Checkpoints) -> None:
    """Its divergence is what the quantized model then has, and no more than with one spec for all layers."""
    model = load(checkpoints("llama-fp32"))
    spec = QuantSpec(3, 32)
    tokens, held_out = torch.randint(3, 128, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"method": "lloyd", "tokens": tokens, "held_out": held_out}
    found = allocate_model(model, 3.6, spec, **options)
    assert next(iter(found.checked)) == "what the losses say"
    assert list(found.checked)[-1] == "3 bits g32 for all"
    least = min(found.checked.values())

    def divergence(**more: Any) -> float:
        linears, _ = quantize_model(model, spec, method="lloyd", **more)
        return measured_divergences(model, [tuple(linears)], lambda n: linears[n].dequantize(), held_out)[0]

    assert divergence(overrides=found.overrides) == pytest.approx(least, rel=1e-4)
    assert divergence() == pytest.approx(found.checked["3 bits g32 for all"], rel=1e-4)
    verdict = found.verdict()
    assert verdict is not None
    assert f"{least:.4f}" in verdict


@pytest.mark.parametrize("best", [0, 1, 2])
def test_whatever_is_best_is_kept(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    from flute_quant.allocation import allocate as module

    monkeypatch.setattr(
        module._Task, "_measured", lambda self, specs, *more: [float(i != best) for i in range(len(specs))]
    )
    found = allocate_model(load(checkpoints("llama-fp32")), 3.6, QuantSpec(3, 32), method="lloyd")
    kept = list(found.checked)[best]
    assert found.verdict() is not None
    assert str(found.verdict()).endswith(f"kept: {kept}.")
    assert (set(found.specs.values()) == {QuantSpec(3, 32)}) == (kept == "3 bits g32 for all")
    if kept == "no layer below 3 bits":
        assert min(spec.bits for spec in found.specs.values()) == 3


def test_errors_alone_and_single_choices_are_not_checked(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    spec = QuantSpec(3, 32)
    found = [
        allocate_model(model, 3.6, spec, method="lloyd", sensitivity="error"),
        allocate_model(model, 9, spec, method="lloyd", choices=[QuantSpec(4, 32)]),
    ]
    assert [(x.checked, x.verdict()) for x in found] == [({}, None)] * 2
