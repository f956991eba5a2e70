"""The importance of input channels: what is measured, on which models, and what if it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from flute_kernels import QuantSpec
from flute_quant import (
    Override,
    QuantizationError,
    column_importance,
    load_importance,
    plan_modules,
    quantize_checkpoint,
    quantize_model,
    random_token_importance,
)
from flute_quant.checkpoint.measure import measure_channels, measure_folder
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.importance import tokens
from flute_quant.importance.meter import ChannelMeter
from flute_quant.importance.tokens import NoPassError, random_tokens
from flute_quant.rotation import rotate

Checkpoints = Callable[[str], Path]


def load(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(folder, dtype="auto")


def specs_of(model: nn.Module, spec: QuantSpec | None = None) -> dict[str, QuantSpec]:
    return {p.name: p.spec for p in plan_modules(model, spec or QuantSpec(4, 32)).linears}


# --- what is measured ----------------------------------------------------------------------------


def test_it_is_the_mean_square_of_the_inputs_of_random_tokens(checkpoints: Checkpoints) -> None:
    """Of the first layer the inputs can be written down: embeddings, normalized."""
    model = load(checkpoints("llama-fp32"))
    name = "model.layers.0.self_attn.q_proj"
    found = random_token_importance(model, specs_of(model))[name]
    ids = random_tokens(128, {0, 1, 2}, 64)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1)
    square = x.double().square().mean(0)
    torch.testing.assert_close(found.double(), square / square.mean() + 1e-3, rtol=1e-5, atol=0)
    assert found.dtype == torch.float32


def test_a_rotated_module_is_measured_as_its_codes_see_it() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 32))
    x = torch.randn(5, 7, 64) * torch.linspace(0, 3, 64)
    meter = ChannelMeter({"0": QuantSpec(4, hadamard=64, hadamard_seed=5)})
    with meter.attached(linear):
        linear(x[:3])
        linear(x[3:])
    square = rotate(x.flatten(0, 1), 64, 5).double().square().mean(0)
    torch.testing.assert_close(
        meter.importance()["0"].double(), square / square.mean() + 1e-3, rtol=1e-5, atol=0
    )


def test_random_tokens_are_the_same_ones_every_time_and_never_special() -> None:
    ids = random_tokens(50, {0, 7, 49, 1000, -1}, 512)
    assert ids.shape == (6, 512)
    assert torch.equal(ids, random_tokens(50, {0, 7, 49}, 512))
    assert set(ids.unique().tolist()) == set(range(50)) - {0, 7, 49}
    with pytest.raises(NoPassError, match="vocabulary of 2 has special tokens only"):
        random_tokens(2, {0, 1}, 8)


def test_the_model_is_as_it_was_afterwards(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama")).train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first = random_token_importance(model, specs_of(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    second = random_token_importance(model.eval(), specs_of(model))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- from disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-fp32", "llama-tied", "llama-sharded", "qwen2", "qwen3", "gemma2", "gemma3"),
        *("mixtral", "qwen3-moe", "llama4", "gpt-oss", "mamba"),
    ],
)
def test_a_pass_that_reads_weights_from_disk_measures_what_one_in_memory_does(
    checkpoints: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Mamba, a layer uses weights of linear modules without calling them."""
    monkeypatch.setattr(tokens, "LENGTH", 24)  # Mamba goes step by step
    model = load(checkpoints(name))
    specs = specs_of(model)
    expected = random_token_importance(model, specs)
    assert expected.keys() == specs.keys()
    found = measure_channels(CheckpointFolder.open(checkpoints(name)), specs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[module], expected[module]) for module in found)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_computed_buffers_are_those_of_the_loaded_model(
    checkpoints: Checkpoints, tmp_path: Path, rope: dict[str, Any]
) -> None:
    config = transformers.LlamaConfig.from_pretrained(checkpoints("llama"), rope_parameters=rope)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "rope")
    model = load(tmp_path / "rope")
    expected = random_token_importance(model, specs_of(model))
    found = measure_channels(CheckpointFolder.open(tmp_path / "rope"), specs_of(model))
    assert all(torch.equal(found[module], expected[module]) for module in expected)


def test_an_encoder_decoder_gets_the_tokens_on_both_sides(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=64, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = load(tmp_path / "t5", transformers.T5ForConditionalGeneration)
    expected = random_token_importance(model, specs_of(model))
    assert expected.keys() == specs_of(model).keys()
    found = measure_channels(CheckpointFolder.open(tmp_path / "t5"), specs_of(model))
    assert all(torch.equal(found[module], expected[module]) for module in expected)


def test_names_may_lack_the_base_models_prefix(checkpoints: Checkpoints) -> None:
    specs = specs_of(load(checkpoints("llama"), transformers.AutoModel))
    assert all(not name.startswith("model.") for name in specs)
    found = measure_channels(CheckpointFolder.open(checkpoints("llama")), specs)
    assert found.keys() == specs.keys()


def test_smaller_batches_measure_the_same(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoints("llama-fp32"))
    expected = random_token_importance(model, specs_of(model))
    sizes: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(tokens, "_ACTIVATION_BYTES", 4 * 64 * (8 * 96 + 2 * 4 * 64) * 4)
    found = random_token_importance(model, specs_of(model))
    assert sizes == [4, 2]
    for module in expected:
        torch.testing.assert_close(found[module], expected[module], rtol=1e-4, atol=1e-5)


# --- where it cannot be measured -----------------------------------------------------------------

GUESSED = "The importance of input channels was guessed from the weights' columns"


def test_a_model_that_cannot_be_run_is_quantized_and_that_is_said(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    report = quantize_checkpoint(tmp_path / "vit", tmp_path / "out", QuantSpec(4, 32))
    assert report.importance == "columns"
    assert report.importance_note == (
        f"{GUESSED}, because random tokens could not be run through the model: "
        "ViTForImageClassification is no Transformers model with a token embedding."
    )
    noted = json.loads((tmp_path / "out/flute_report.json").read_text())["importance"]
    assert noted == {"source": "columns", "note": report.importance_note}
    quantize_checkpoint(tmp_path / "vit", tmp_path / "columns", QuantSpec(4, 32), importance="columns")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "columns" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_experts_per_tok": 9}, "out of range"),
        (
            {"num_attention_heads": 50000, "max_position_embeddings": 9999},
            "bytes of activations (800000 chan",
        ),
        ({"vocab_size": 10**12}, "[128, 64] in the checkpoint, not [1000000000000, 64]"),
        ({"hidden_size": 96}, "model.norm.weight is [64] in the checkpoint, not [96]"),
        ({"hidden_act": "relu6"}, None),
    ],
    ids=["fails", "too large", "vocabulary", "other shapes", "runs"],
)
def test_a_config_that_fails_in_the_pass_costs_the_measurement_only(
    copy_of: Checkpoints, tmp_path: Path, change: dict[str, object], reason: str | None
) -> None:
    source = copy_of("qwen3-moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    folder = CheckpointFolder.open(source)
    measured = measure_folder(folder, {"model.layers.1.self_attn.q_proj": QuantSpec()})
    if reason is None:
        assert (measured.source, measured.note) == ("random tokens", None)
    else:
        assert measured.source == "columns"
        assert measured.note is not None
        assert measured.note.startswith(GUESSED)
        assert reason in measured.note


def test_buffers_larger_than_any_model_has_are_not_computed(copy_of: Checkpoints) -> None:
    source = copy_of("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"head_dim": 1 << 30}))
    measured = measure_folder(CheckpointFolder.open(source), {"model.layers.0.mlp.up_proj": QuantSpec()})
    assert measured.note is not None
    assert "its computed buffers take 4,294,967,296 bytes" in measured.note


def test_modules_that_no_token_reaches_are_guessed(tmp_path: Path) -> None:
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision).to_dict(),
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "out", QuantSpec(4, 32))
    assert report.importance == "random tokens"
    assert report.importance_note is not None
    assert report.importance_note.startswith(f"{GUESSED} for 8 of 15 linears, such as model.vision_tower")
    assert report.importance_note.endswith("of which random tokens showed no inputs.")


def test_a_module_that_is_no_transformers_model_is_guessed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    found, report = quantize_model(model, QuantSpec(4, 32))
    assert report.importance.source == "columns"
    assert report.importance.note is not None
    assert "Sequential is no Transformers model" in report.importance.note
    expected, _ = quantize_model(
        model, QuantSpec(4, 32), importance={"0": column_importance(model[0].weight, QuantSpec(4, 32))}
    )
    assert torch.equal(found["0"].qweight, expected["0"].qweight)


# --- how it is asked for -------------------------------------------------------------------------


def test_a_model_in_memory_and_its_folder_become_the_same(checkpoints: Checkpoints, tmp_path: Path) -> None:
    overrides = [Override.of("o_proj", hadamard=32)]
    linears, report = quantize_model(load(checkpoints("llama")), QuantSpec(3, 32), overrides=overrides)
    assert report.importance.source == "random tokens"
    assert report.importance.note is None
    quantize_checkpoint(checkpoints("llama"), tmp_path / "out", QuantSpec(3, 32), overrides=overrides)
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, linear in linears.items():
        assert torch.equal(linear.qweight, stored[f"{name}.qweight"])
        assert torch.equal(linear.scales, stored[f"{name}.scales"])


def test_only_methods_that_are_made_for_it_run_the_model_unasked(checkpoints: Checkpoints) -> None:
    model = load(checkpoints("llama"))
    for method, option, source in (
        ("signed", "auto", "random tokens"),
        ("nf", "auto", "none"),
        ("lloyd", "auto", "none"),
        ("lloyd", "random", "random tokens"),
        ("signed", "none", "none"),
    ):
        _, report = quantize_model(model, QuantSpec(4, 32), method=method, importance=option)
        assert report.importance.source == source


def test_columns_are_guessed_from_their_size_in_the_basis_of_the_codes() -> None:
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 0.1
    weight[:, 4] = 0
    found = column_importance(weight, QuantSpec())
    square = weight.square().mean(0)
    torch.testing.assert_close(found, 1 / (square / square.mean()).clamp_min(0.01))
    assert float(found[4]) == 100
    turned = column_importance(weight, QuantSpec(hadamard=64))
    assert float(turned.max() / turned.min()) < 2  # a rotation mixes the columns
    assert torch.equal(column_importance(torch.zeros(4, 64), QuantSpec()), torch.ones(64))


def test_files_of_importance(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64, dtype=torch.bfloat16), "b": torch.ones(32)}, tmp_path / "good.safetensors")
    found = load_importance(tmp_path / "good.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in found.items()} == {
        "a": ((64,), torch.float32),
        "b": ((32,), torch.float32),
    }
    save_file({"a": torch.ones(64, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(QuantizationError, match=r"a in .* is F32 \[64, 2\]; expected a float \[K\]"):
        load_importance(tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(QuantizationError, match=r"cannot be read: .*truncated"):
        load_importance(tmp_path / "cut.safetensors")
