"""``from_pretrained(source, quantization_config=FluteConfig(...))``: what comes out is the planned model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

import flute_hf
from flute_hf import FluteConfig
from flute_hf.quantizer import first_gpu
from flute_kernels import QuantSpec
from flute_quant import QuantizationError, quantize_checkpoint

from .helpers import FAMILIES, flute_layers, load, logits, quantized, tensors_of, twin


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_its_dequantized_weights_compute(
    family: str, source: Callable[[str], Path], ids: Tensor
) -> None:
    folder = source(family)
    model = quantized(folder)
    other = twin(model, folder)
    assert len(flute_layers(model)) == 14
    torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=1e-4, atol=1e-4)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(tokens, other.generate(ids, max_new_tokens=12, do_sample=False))
    assert tokens.shape == (2, 19)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 64},
        {"bits": 4, "group_size": -1},
        {"bits": 3, "vector_size": 2, "method": "lloyd-pairs"},
        {"bits": 4, "hadamard": 64, "hadamard_seed": 7},
    ],
    ids=str,
)
def test_every_kind_of_table_and_rotation(options: dict[str, object], llama: Path, ids: Tensor) -> None:
    model = quantized(llama, **options)
    torch.testing.assert_close(logits(model, ids), logits(twin(model, llama), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_activations(dtype: torch.dtype, llama: Path, ids: Tensor) -> None:
    model = quantized(llama, dtype)
    assert model.dtype == dtype
    found, expected = logits(model, ids), logits(twin(model, llama, torch.float32), ids)
    assert found.dtype == dtype
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (found.float() - expected).norm() < tolerance * expected.norm()


def test_heads_and_embeddings_stay_and_are_recorded(llama: Path) -> None:
    model = quantized(llama)
    assert type(model.lm_head) is nn.Linear
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]
    assert model.config.quantization_config.overrides == {}


def test_a_group_that_does_not_fit_is_made_smaller_said_and_recorded(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantized(llama, group_size=128)
    layer = model.model.layers[0].mlp
    assert (layer.up_proj.spec.group_size, layer.down_proj.spec.group_size) == (128, 64)
    overrides = model.config.quantization_config.overrides
    assert overrides == {
        f"model.layers.{i}.mlp.down_proj": QuantSpec(bits=4, group_size=64) for i in range(2)
    }
    (record,) = [r for r in caplog.records if r.name == "flute_hf"]
    assert record.getMessage() == (
        "2 of 14 layers, such as model.layers.0.mlp.down_proj, take group size 64 instead of 128, "
        "because K = 192."
    )


def test_layers_can_be_left_out_and_treated_differently(llama: Path) -> None:
    model = quantized(
        llama, bits=3, modules_to_not_convert=["o_proj"], overrides={"layers.1.mlp.*": {"bits": 4}}
    )
    assert len(flute_layers(model)) == 12
    bits = {name: layer.spec.bits for name, layer in flute_layers(model).items()}
    assert {name for name, b in bits.items() if b == 4} == {
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    kept = model.config.quantization_config.modules_to_not_convert
    assert sorted(kept) == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification], ids=["base", "classifier"])
def test_a_part_of_the_model_or_another_head_gets_the_same_weights(kind: Any, llama: Path) -> None:
    whole = flute_layers(quantized(llama))
    part = flute_layers(kind.from_pretrained(llama, quantization_config=FluteConfig()))
    assert len(part) == len(whole) == 14
    for name, layer in part.items():
        same = whole[name if name in whole else f"model.{name}"]
        assert torch.equal(layer.qweight, same.qweight)
        assert torch.equal(layer.scales, same.scales)


def test_importance_is_an_option(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.0.mlp.up_proj"
    given = {name: torch.linspace(0, 4, 128)}
    scales = {}
    for label, option in (("auto", "auto"), ("random", "random"), ("none", "none"), ("given", given)):
        model = quantized(llama, importance=option)
        scales[label] = flute_layers(model)[name].scales
        quantize_checkpoint(llama, tmp_path / label, importance=option)  # type: ignore[arg-type]
        assert torch.equal(scales[label], tensors_of(tmp_path / label)[f"{name}.scales"])
    assert torch.equal(scales["auto"], scales["random"])
    assert not torch.equal(scales["auto"], scales["none"])
    assert not torch.equal(scales["given"], scales["none"])
    assert not caplog.records
    with pytest.raises(QuantizationError, match="1 modules, such as up, and none of the 14 modules"):
        quantized(llama, importance={"up": torch.ones(128)})


def test_without_a_checkpoint_folder_channels_are_guessed_and_that_is_said(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load(llama)
    model = LlamaForCausalLM.from_pretrained(
        None, config=plain.config, state_dict=plain.state_dict(), quantization_config=FluteConfig()
    )
    messages = [r.getMessage() for r in caplog.records if r.name == "flute_hf"]
    assert messages == [
        "The importance of input channels was guessed from the weights' columns, because random tokens "
        "could not be run through the model: the weights are in 0 folders, not in one."
    ]
    columns = flute_layers(quantized(llama, importance="columns"))
    for name, layer in flute_layers(model).items():
        assert torch.equal(layer.qweight, columns[name].qweight)


def test_random_tokens_run_where_the_model_will() -> None:
    for device_map, device in (
        ({"": 0}, "cuda:0"),
        ({"model.embed_tokens": "cpu", "model.layers.0": 1, "model.layers.1": 2}, "cuda:1"),
        ({"": torch.device("cuda", 3)}, "cuda:3"),
        ({"": "cpu"}, "cpu"),
        ({"": "disk"}, "cpu"),
        (None, "cpu"),
    ):
        assert str(first_gpu(device_map)) == device


def test_the_users_config_is_left_alone(llama: Path) -> None:
    config = FluteConfig(bits=4, group_size=128)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert config == FluteConfig(bits=4, group_size=128)


def test_the_model_is_never_held_in_16_bits_and_quantized(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight is quantized before the next one is read."""
    events: list[str] = []
    take = flute_hf.FluteQuantizer.take_weight

    def watched(self: flute_hf.FluteQuantizer, model: nn.Module, name: str, weight: Tensor) -> None:
        in_16_bits = [
            n
            for n, m in model.named_modules()
            if type(m) is nn.Linear and not m.weight.is_meta and n != "lm_head"
        ]
        assert not in_16_bits
        events.append(name)
        take(self, model, name, weight)

    monkeypatch.setattr(flute_hf.FluteQuantizer, "take_weight", watched)
    quantized(llama)
    assert len(events) == 14


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_stay_in_16_bits_and_that_is_said(
    family: str, source: Callable[[str], Path], ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = source(family)
    model = quantized(folder)
    assert len(flute_layers(model)) == 8
    torch.testing.assert_close(logits(model, ids), logits(twin(model, folder), ids), rtol=1e-4, atol=1e-4)
    (message,) = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "flute_hf"
    ]
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert message.startswith("4 fused expert parameters, such as model.layers.0.mlp.experts.gate_up_proj")
    assert f" {experts} of the model's {model.num_parameters()} weights " in message


def test_num_parameters_and_footprint_count_quantized_weights(llama: Path) -> None:
    model, plain = quantized(llama), load(llama)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < plain.num_parameters(only_trainable=True)
    weights = sum(m.in_features * m.out_features for m in flute_layers(model).values())
    saved = plain.get_memory_footprint() - model.get_memory_footprint()
    # 32 bits a weight become 4, a scale of 16 for each 64, and a kilobyte a layer for tables.
    assert saved == pytest.approx(weights * (32 - 4 - 16 / 64) / 8, rel=0.05)


def test_device_maps(llama: Path, ids: Tensor) -> None:
    expected = logits(quantized(llama), ids)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        config = FluteConfig()
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map=device_map)
        assert torch.equal(logits(model, ids), expected)
