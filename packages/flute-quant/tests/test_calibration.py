"""Calibration: what layers are given, how the result is kept, and what if something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_quant import (
    CalibrationText,
    QuantizationError,
    Recipe,
    load_recipe,
    plan_modules,
    quantize_checkpoint,
    quantize_model,
    quantize_tensor,
    recipe_method,
)
from flute_quant.calibration.layers import trace_layers
from flute_quant.calibration.meter import MomentMeter
from flute_quant.calibration.run import calibrate_layers, dequantized
from flute_quant.calibration.store import InMemory
from flute_quant.calibration.text import parse_amount
from flute_quant.checkpoint.calibrate import calibrate_folder
from flute_quant.checkpoint.layout import plan_folder
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.workfolder import partial_path
from flute_quant.cli import main
from flute_quant.evaluation import TokenizedText, load_tokenizer, text_windows
from flute_quant.importance.channels import column_importance
from flute_quant.methods import CalibratedMethod, InputMoments, calibrated
from flute_quant.rotation import rotate

from .stored import assert_holds

Checkpoints = Callable[[str], Path]
SPEC = QuantSpec(3, 32)
TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def method(**steps: Any) -> CalibratedMethod:
    return recipe_method(Recipe(**steps))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """3,000 words of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in torch.randint(124, (3000,), generator=generator).tolist()]
    (tmp_path / "source-text.txt").write_text(" ".join(words))
    return tmp_path / "source-text.txt"


# --- what layers are given -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-fp32", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral"),
        *("qwen3-moe", "llama4", "gpt-oss", "mamba"),
    ],
)
def test_layers_one_by_one_compute_what_the_model_does(checkpoints: Checkpoints, name: str) -> None:
    """Models of two kinds of attention give their layers different masks and positions."""
    model = load(checkpoints(name))
    linears = [p.name for p in plan_modules(model, SPEC).linears]
    seen: list[Tensor] = []
    body = getattr(model, "model", None) or model.backbone
    norm = getattr(body, "norm", None) or body.norm_f
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        body(TOKENS[:4], use_cache=False)
    hook.remove()
    calls, hidden = trace_layers(model, [TOKENS[:4], TOKENS[4:]], linears, torch.device("cpu"))
    assert len(calls) == 2
    assert len(hidden) == 2
    with torch.no_grad():
        found = calls[1](calls[0](hidden[0]))
    assert torch.equal(found, seen[0])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_that_is_no_sequence_of_layers_is_refused() -> None:
    with pytest.raises(QuantizationError, match="Linear cannot be calibrated layer by layer"):
        trace_layers(nn.Linear(32, 32), [TOKENS], [], torch.device("cpu"))


def test_moments_are_those_of_the_inputs_and_modules_with_one_input_share_them() -> None:
    torch.manual_seed(0)
    spec, rotated = QuantSpec(3), QuantSpec(3, hadamard=32, hadamard_seed=7)
    modules = nn.ModuleDict({key: nn.Linear(32, 32) for key in ("a", "b", "turned", "other")})
    x, y = torch.randn(2, 5, 7, 32)
    meter = MomentMeter(
        {key: (module, rotated if key == "turned" else spec) for key, module in modules.items()}
    )
    with meter.measuring():
        for batch in range(5):
            for key in ("a", "b", "turned"):
                modules[key](x[batch])
            modules["other"](y[batch])
    found = meter.moments()
    assert list(found) == ["a", "b", "turned", "other"]
    assert found["a"] is found["b"]
    flat, second = x.flatten(0, 1), y.flatten(0, 1)
    turned = rotate(flat, 32, 7)
    for key, inputs in (("a", flat), ("turned", turned), ("other", second)):
        torch.testing.assert_close(found[key].hessian, inputs.T @ inputs / 35)
        assert found[key].tokens == 35
        assert found[key].drift is None


def test_drift_is_between_the_same_tokens_of_two_models() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 32)
    plain, quantized = torch.randn(2, 5, 7, 32)
    meter = MomentMeter({"": (linear, QuantSpec(3))})
    for batch in range(5):
        with meter.remembering():
            linear(plain[batch])
        with meter.measuring():
            linear(quantized[batch])
    before, after = plain.flatten(0, 1), quantized.flatten(0, 1)
    torch.testing.assert_close(meter.moments()[""].drift, after.T @ (before - after) / 35)


def test_correction_gives_the_16_bit_outputs_on_the_quantized_model_inputs() -> None:
    """With inputs that are a linear map of the others, and no rounding to speak of, it does so exactly."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(400, 64)
    quantized = x @ (torch.eye(64) + 0.1 * torch.randn(64, 64))
    hessian = quantized.T @ quantized / 400
    factor = calibrated.factorized(hessian, damping=1e-6, by_activation=True, vector_size=1)
    assert factor is not None
    moved = calibrated._corrected(weight, quantized.T @ (x - quantized) / 400, factor, 1.0)
    torch.testing.assert_close(quantized @ moved.T, x @ weight.T, rtol=1e-2, atol=1e-2)


# --- the whole way -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(2, 32, 2), QuantSpec(3, 32, hadamard=32)])
def test_outputs_are_nearer_to_those_of_the_model_than_without_calibration(
    checkpoints: Checkpoints, spec: QuantSpec
) -> None:
    model = load(checkpoints("llama-fp32"))
    with torch.no_grad():
        wanted = model(TOKENS).logits

    def distance(name: str | CalibratedMethod, **options: Any) -> float:
        linears, _ = quantize_model(model, spec, method=name, **options)
        changed = load(checkpoints("llama-fp32"))
        for key, linear in linears.items():
            changed.get_submodule(key).weight.data.copy_(dequantized(linear))
        with torch.no_grad():
            return float((changed(TOKENS).logits - wanted).square().mean())

    plain = distance("default")
    fed = distance(method(), calibration=TOKENS)
    fitted = distance(method(rounds=3), calibration=TOKENS)
    assert fed < 0.8 * plain
    assert fitted < fed


def test_the_model_in_memory_is_as_it_was(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_model(model, SPEC, method="calibrated", calibration=TOKENS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama-sharded", "qwen2", "gemma2", "mamba"])
def test_from_disk_it_is_what_it_is_in_memory(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    steps = method(rounds=1, correction=0.5)
    linears, _ = quantize_model(load(checkpoints(name)), SPEC, method=steps, calibration=TOKENS)
    report = quantize_checkpoint(
        checkpoints(name), tmp_path / "out", SPEC, method=steps, calibration=TOKENS, min_coverage=0
    )
    assert report.importance == "calibration text"
    assert report.calibration == {}
    assert_holds(tmp_path / "out", linears)


def test_a_method_without_data_takes_the_text_for_the_importance_of_channels(
    checkpoints: Checkpoints,
) -> None:
    model = load(checkpoints("llama-fp32"))
    found, report = quantize_model(model, SPEC, method="signed", calibration=TOKENS)
    assert report.importance.source == "calibration text"
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS)).flatten(0, 1)
    square = x.square().mean(0)
    weight = model.get_submodule(name).weight
    importance = square / square.mean() + 1e-3
    expected, _ = quantize_tensor(weight, SPEC, method="signed", importance=importance)
    assert torch.equal(found[name].qweight, expected.qweight)


def test_propagation_is_what_later_layers_see(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama-fp32"))
    found = [
        quantize_model(model, SPEC, method=method(propagate=flag), calibration=TOKENS)[0]
        for flag in (True, False)
    ]
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert torch.equal(found[0][first].qweight, found[1][first].qweight)
    assert not torch.equal(found[0][second].qweight, found[1][second].qweight)


def test_several_devices_share_the_modules_and_give_the_same_result(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    planned = plan_modules(model, SPEC).linears
    results = [
        list(calibrate_layers(InMemory(model), planned, TOKENS, method(rounds=1), devices=devices))
        for devices in ([torch.device("cpu")], [torch.device("cpu")] * 3)
    ]
    for one, three in zip(*results, strict=True):
        assert list(one.linears) == list(three.linears)
        for name in one.linears:
            assert torch.equal(one.linears[name].qweight, three.linears[name].qweight)
            assert torch.equal(one.linears[name].scales, three.linears[name].scales)


def test_one_layer_has_its_weights_at_a_time(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from flute_quant.checkpoint import calibrate as module

    stores = []

    class Watched(module.StreamedModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            stores.append(self)

    present: list[set[str]] = []

    def look(name: str, error: float | None, weights: int) -> None:
        # An absent tensor is one element that is spread over its shape.
        there = [n for n, p in stores[0].model.named_parameters() if any(p.stride())]
        present.append({".".join(n.split(".")[:3]) for n in there})

    plan = plan_folder(CheckpointFolder.open(checkpoints("llama-sharded")), SPEC, method=method())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "StreamedModel", Watched)
        calibrate_folder(
            plan, tmp_path, TOKENS, device=torch.device("cpu"), scale_dtype=torch.float16, progress=look
        )
    assert present == [{"model.layers.0"}] * 7 + [{"model.layers.1"}] * 7


# --- interrupted runs ----------------------------------------------------------------------------


class Stop(BaseException):
    """Like KeyboardInterrupt: no failure."""


@pytest.mark.parametrize("steps", [{"rounds": 1}, {"propagate": False}, {"correction": 1.0}])
@pytest.mark.parametrize("after", [3, 9])
def test_a_resumed_run_gives_the_same_bytes(
    checkpoints: Checkpoints, tmp_path: Path, text: Path, steps: dict[str, Any], after: int
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    options = {"method": method(**steps), "calibration": CalibrationText(text, 8, 32)}
    seen: list[Any] = []

    def stop(event: Any) -> None:
        seen.append(event)
        if len(seen) == after:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, out, SPEC, progress=stop, **options)
    assert not out.exists()
    events: list[Any] = []
    report = quantize_checkpoint(source, out, SPEC, progress=events.append, **options)
    assert report.resumed == after // 7
    assert events[-1].done == events[-1].total
    quantize_checkpoint(source, tmp_path / "whole", SPEC, **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial_path(out).exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"calibration": "longer"}, "calibration"),
        ({"method": method(rounds=1)}, "options"),
        ({"method": "signed", "calibration": None}, "calibration, importance, options"),
    ],
)
def test_another_calibration_does_not_continue_where_one_stopped(
    checkpoints: Checkpoints, tmp_path: Path, text: Path, changed: dict[str, Any], said: str
) -> None:
    source, out = checkpoints("llama-sharded"), tmp_path / "out"
    options: dict[str, Any] = {"method": method(), "calibration": CalibrationText(text, 8, 32)}

    def stop(event: Any) -> None:
        if event.name.startswith("model.layers.1"):
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, out, SPEC, progress=stop, **options)
    options |= changed
    if options["calibration"] == "longer":
        options["calibration"] = CalibrationText(text, 9, 32)
    heard: list[str] = []
    assert quantize_checkpoint(source, out, SPEC, say=heard.append, **options).resumed == 0
    assert heard == [f"Discarding {partial_path(out)}, which belongs to another run (different: {said})."]


# --- what is missing -----------------------------------------------------------------------------


def test_inputs_that_are_not_finite_name_the_layer(
    copy_of: Callable[[str], Path], tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    source = copy_of("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 3e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError) as caught:
        quantize_checkpoint(source, tmp_path / "out", SPEC, method="calibrated", calibration=TOKENS)
    assert str(caught.value) == (
        "The calibration inputs of model.layers.1.self_attn.q_proj have values that are NaN, infinite or too "
        "large to be squared, in 256 tokens; expected none."
    )
    leaves_nothing()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_see_their_own_tokens_and_those_without_any_are_quantized_without_data(
    checkpoints: Checkpoints, tmp_path: Path, name: str
) -> None:
    options = {"method": method(propagate=False), "experts": True, "min_coverage": 0}
    full = quantize_checkpoint(
        checkpoints(name),
        tmp_path / "full",
        SPEC,
        calibration=TOKENS,
        **options,  # type: ignore[arg-type]
    )
    assert full.calibration == {}
    # Two tokens, each of which goes to two of the four experts.
    few = quantize_checkpoint(
        checkpoints(name),
        tmp_path / "few",
        SPEC,
        calibration=TOKENS[:1, :2],
        **options,  # type: ignore[arg-type]
    )
    assert few.calibration
    assert all("expert" in key for key in few.calibration)
    assert set(few.calibration.values()) == {
        "no calibration token reached it, so it was quantized without data"
    }
    noted = json.loads((tmp_path / "few" / "flute_report.json").read_text())["calibration"]
    assert noted == {"sequences": 1, "length": 2, "notes": few.calibration}
    source = load_file(checkpoints(name) / "model.safetensors")
    stored = load_file(tmp_path / "few" / "model.safetensors")
    for key in few.calibration:
        weight = source[f"{key}.weight"]
        expected, _ = quantize_tensor(
            weight, SPEC, method="signed", importance=column_importance(weight, SPEC)
        )
        assert torch.equal(stored[f"{key}.qweight"], expected.qweight)


def test_an_expert_is_quantized_for_the_inputs_that_it_has(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Against a dense reference of the first layer's routing."""
    folder = checkpoints("mixtral")
    model = load(folder)
    block = model.model.layers[0].mlp
    seen: list[tuple[Any, ...]] = []
    hook = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model.model(TOKENS, use_cache=False)
    hook.remove()
    x, chosen, _ = seen[0]
    quantize_checkpoint(
        folder, tmp_path / "out", SPEC, method=method(), calibration=TOKENS, experts=True, min_coverage=0
    )
    stored, source = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    for expert in range(4):
        mine = x[(chosen == expert).any(1)].float()
        gate, up = (
            mine.bfloat16() @ source[f"model.layers.0.block_sparse_moe.experts.{expert}.{key}.weight"].T
            for key in ("w1", "w3")
        )
        inner = (torch.nn.functional.silu(gate) * up).float()
        for key, inputs in (("w1", mine), ("w3", mine), ("w2", inner)):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{key}"
            moments = InputMoments(inputs.T @ inputs / len(inputs), None, len(inputs))
            expected, _ = quantize_tensor(source[f"{name}.weight"], SPEC, method=method(), inputs=moments)
            same = (stored[f"{name}.qweight"] == expected.qweight).float().mean()
            assert same > 0.9, name  # sums in another order round a few codes otherwise


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(3, 32, hadamard=32, hadamard_seed=5)])
def test_a_hessian_shrinks_to_what_is_known_of_each_channel(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 64) @ torch.randn(64, 64)
    moments, alone = x.T @ x / 100, (x.T @ x / 100).diagonal().diag()

    def turned(matrix: Tensor) -> Tensor:
        return rotate(rotate(matrix, 32, 5).T, 32, 5) if spec.hadamard else matrix

    for strength in (0.0, 0.25, 1.0):
        found = calibrated._shrunk(turned(moments).clone(), strength, spec)
        expected = turned((1 - strength) * moments + strength * alone)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_singular_hessian_takes_more_damping_which_is_noted() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(5, 64)
    notes: list[str] = []
    inputs = InputMoments(x.T @ x / 5, None, 5)
    quantize_tensor(weight, SPEC, method=method(damping=1e-8), inputs=inputs, noted=notes.append)
    (note,) = notes
    assert note.startswith("damping 1e-")
    assert note.endswith("instead of 1e-08, because its Hessian is singular")
    notes.clear()
    quantize_tensor(weight, SPEC, method=method(damping=0.01), inputs=inputs, noted=notes.append)
    assert notes == []


def test_where_no_damping_helps_the_start_is_the_result_and_it_is_noted() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1e6  # no inputs have such moments
    notes: list[str] = []
    found, _ = quantize_tensor(
        weight, SPEC, method=method(), inputs=InputMoments(hessian, None, 1), noted=notes.append
    )
    expected, _ = quantize_tensor(weight, SPEC, method="signed", importance=torch.ones(64))
    assert torch.equal(found.qweight, expected.qweight)
    assert notes == [
        "its Hessian has no Cholesky factor, not even with 10 times its mean diagonal added, so errors are "
        "only weighted by the inputs' mean squares"
    ]


def test_a_calibrated_method_takes_no_weight_without_inputs() -> None:
    with pytest.raises(QuantizationError, match="it needs the moments of the inputs of w"):
        quantize_tensor(torch.randn(32, 64), SPEC, method="gptq", name="w")


def test_notes_of_modules_reach_the_report(checkpoints: Checkpoints, tmp_path: Path) -> None:
    report = quantize_checkpoint(
        checkpoints("llama"),
        tmp_path / "out",
        SPEC,
        method=method(damping=1e-8),
        calibration=TOKENS[:1, :2],
        include=["lm_head"],
    )
    assert report.calibration is not None
    outside = "it is in no layer that tokens run through, so it was quantized without data"
    assert report.calibration["lm_head"] == outside
    assert "damping" in report.calibration["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "calibrated"}, "The method 'calibrated' is calibrated; it needs a text or tokens"),
        (
            {"calibration": TOKENS, "importance": "random"},
            "importance is 'random' and there is a calibration text, which measures it",
        ),
        ({"calibration": TOKENS.float()}, r"The calibration tokens are torch.float32 \[8, 32\]"),
        (
            {"calibration": TOKENS + 100},
            "tokens reach from 103 to 227; the model's vocabulary has 128",
        ),
    ],
)
def test_refusals(
    checkpoints: Checkpoints,
    tmp_path: Path,
    options: dict[str, Any],
    said: str,
    leaves_nothing: Callable[[], None],
) -> None:
    with pytest.raises(QuantizationError, match=said):
        quantize_checkpoint(checkpoints("llama"), tmp_path / "out", SPEC, **options)
    leaves_nothing()
    with pytest.raises(QuantizationError, match=said):
        quantize_model(load(checkpoints("llama")), SPEC, **options)


# --- the text ------------------------------------------------------------------------------------


def test_windows_are_evenly_spaced_and_do_not_overlap(tmp_path: Path) -> None:
    text = CalibrationText(tmp_path / "none", 4, 10)
    found, note = text.windows(TokenizedText(torch.arange(100), None, "none"), None)
    assert found[:, 0].tolist() == [0, 30, 60, 90]
    assert note is None
    found, note = text.windows(TokenizedText(torch.arange(25), None, "none"), 8)
    assert found.shape == (3, 8)
    assert found[:, 0].tolist() == [0, 8, 17]
    assert note == (
        "Calibrated with 3 x 8 tokens instead of 4 x 10, "
        "because the model takes 8 tokens at once and the text has 25 tokens."
    )
    with pytest.raises(QuantizationError, match="has 9 tokens; one sequence takes 10"):
        text.windows(TokenizedText(torch.arange(9), None, "none"), None)


def test_a_token_that_windows_begin_with_is_one_of_theirs(tmp_path: Path) -> None:
    """Nine tokens of the text and one before them make a window of ten."""
    text = CalibrationText(tmp_path / "none", 4, 10)
    found, note = text.windows(TokenizedText(torch.arange(36), 99, "<s>"), None)
    assert found[:, 0].tolist() == [99] * 4
    assert found[:, 1:].flatten().tolist() == list(range(36))
    assert note is None


@pytest.mark.parametrize("begins", [False, True])
def test_windows_begin_as_those_of_compare(
    copy_of: Callable[[str], Path], tmp_path: Path, text: Path, begins: bool
) -> None:
    """With the beginning-of-text token where the tokenizer puts one before a text, else without."""
    source = copy_of("llama")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if begins:
        file = source / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        file.write_text(json.dumps(tokenizer))
    tokens: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        from flute_quant.checkpoint import calibrate as module

        def look(store: Any, planned: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
            tokens.append(ids)
            return calibrate_layers(store, planned, ids, *args, **options)

        patch.setattr(module, "calibrate_layers", look)
        plan = plan_folder(CheckpointFolder.open(source), SPEC, method=method())
        calibrate_folder(
            plan,
            tmp_path,
            CalibrationText(text, 4, 32),
            device=torch.device("cpu"),
            scale_dtype=torch.float16,
        )
    expected = text_windows(load_tokenizer(source), text.read_text(), count=4, length=32)
    assert expected.bos == ("<s>" if begins else "none")
    assert torch.equal(tokens[0], expected.tokens)


def test_amounts() -> None:
    assert parse_amount("128x2048") == (128, 2048)
    for wrong in ("128", "x", "0x5", "5x1", "-1x5", "1x2x3", "99999999x2"):
        with pytest.raises(QuantizationError, match="expected sequences and tokens of each"):
            parse_amount(wrong)


def test_a_text_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    with pytest.raises(QuantizationError, match=r"text cannot be read: No such file"):
        CalibrationText(file).read()
    file.write_bytes(b"abc\xff")
    with pytest.raises(QuantizationError, match="is not UTF-8 at byte 3"):
        CalibrationText(file).read()


# --- recipes and the command line ----------------------------------------------------------------


def test_a_recipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    recipe = Recipe(
        start="lloyd", table="kmeans", rounds=2, refit=("codes",), shrink=0.25, epochs=2, learn="nll"
    )
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(file) == recipe
    file.write_text("{}")
    assert load_recipe(file) == Recipe()


def test_a_recipe_in_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "mine.yaml"
    file.write_text("start: nf\nrounds: 2\nrefit: [scales, codes]\n")
    assert load_recipe(file) == Recipe(start="nf", rounds=2, refit=("scales", "codes"))
    file.write_text("a: [")
    with pytest.raises(QuantizationError, match=r"mine\.yaml is not YAML: "):
        load_recipe(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"round": 1}', "a key 'round'; there are start, table, feedback"),
        ('{"epochs": -1}', "epochs = -1; expected a whole number from 0 to 1000"),
        ('{"reach": -1}', "reach = -1; expected a number from 0 to 10"),
        (
            '{"epochs": 1, "reach": 0, "scale_reach": 0}',
            "reach = 0; expected more than 0 where scale_reach is 0",
        ),
        ('{"scale_reach": 1}', "scale_reach = 1; expected a number from 0 to 0.5"),
        ('{"learn": "mse"}', "learn = 'mse'; expected one of 'none', 'kl', 'nll'"),
        ('{"learn_epochs": 0}', "learn_epochs = 0; expected a whole number from 1 to 1000"),
        ('{"learning_rate": 0}', "learning_rate = 0; expected a number from 1e-8 to 1"),
        ('{"rounds": -1}', "rounds = -1; expected a whole number from 0 to 100"),
        ('{"rounds": true}', "rounds = True; expected a whole number"),
        ('{"damping": 0}', "damping = 0; expected a number from 1e-8 to 10"),
        ('{"shrink": 2}', "shrink = 2; expected a number from 0 to 1"),
        ('{"refit": ["bias"]}', r"refit = \('bias',\); expected a list of some of scales, table, codes"),
        ('{"refit": "codes"}', "refit = 'codes'; expected a list"),
        ('{"table": "mine"}', "table = 'mine'; expected 'start' or 'kmeans'"),
        ('{"feedback": 1}', "feedback = 1; expected true or false"),
        ('{"propagate": false, "correction": 1}', "correction = 1; expected 0 where propagate is false"),
        ('{"start": "gptq"}', "start = 'gptq'; expected a data-free method, one of signed, nf"),
        ("[]", "The recipe is a list; expected keys and values"),
        ("{", r"mine\.json is not JSON"),
        ("\xff", r"mine\.json is not UTF-8 at byte 0"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(QuantizationError, match=said):
        recipe_method(load_recipe(file))


def test_a_recipe_file_that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"mine\.json cannot be read: No such file"):
        load_recipe(tmp_path / "mine.json")
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(QuantizationError, match=r"mine\.toml is neither a \.json nor a \.yaml file"):
        load_recipe(tmp_path / "mine.toml")


def test_the_command_line(
    checkpoints: Checkpoints, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.json"
    recipe.write_text('{"rounds": 1}')
    arguments = ["quantize", str(checkpoints("llama")), str(tmp_path / "out"), "--group-size", "32"]
    calibration = ["--calibration", str(text), "--calibration-tokens", "8x128"]
    assert main([*arguments, "--recipe", str(recipe), *calibration]) == 0
    shown = capsys.readouterr()
    assert "method mine weighted by the calibration text" in shown.out
    assert "Calibrated with 8 x 64 tokens instead of 8 x 128, because the model takes 64" in shown.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["method"] == "mine"
    estimate = ["--method", "calibrated", "--overwrite", "--dry-run"]
    assert main([*arguments, *estimate, *calibration]) == 0
    assert "method calibrated, estimated time" in capsys.readouterr().out
    assert main([*arguments, *estimate]) == 2
    assert "it needs a text or tokens to calibrate with" in capsys.readouterr().err
    assert main([*arguments, "--method", "calibrated", "--overwrite"]) == 2
    assert "it needs a text or tokens to calibrate with" in capsys.readouterr().err
