"""One sentence, before the model says a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flute_kernels import FormatError, UnsupportedError
from flute_quant import Override

from .models import Checkpoint
from .serving import Engine

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def damaged(checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Callable[..., Path]:
    """A quantized folder, its tensors and config changed by a function each."""

    def make(
        tensors: Callable[[dict[str, Tensor]], object] = lambda t: None,
        config: Callable[[dict[str, object]], object] = lambda c: None,
        family: str = "llama",
    ) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoint(family).quantized, folder)
        weights = load_file(folder / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((folder / "config.json").read_text())
        config(described["quantization_config"])
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    return make


def refused(engine: Engine, folder: Path, *parts: str, **options: object) -> None:
    with pytest.raises((FormatError, UnsupportedError, ValueError)) as info:
        engine.load(folder, **options)
    message = str(info.value)
    assert all(part in message for part in parts), message


def test_missing_tensor(engine: Engine, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda t: t.pop(f"{LAYER}.qweight"))
    refused(engine, folder, LAYER, "qweight", "missing")


def test_missing_matrix_of_a_merged_layer(engine: Engine, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda t: t.pop("model.layers.0.self_attn.k_proj.scales"))
    refused(engine, folder, "model.layers.0.self_attn.qkv_proj", "scales", "1 of its 3", "missing")


@pytest.mark.parametrize(("name", "said"), [("model.embed_tokens", "embed"), ("lm_head", "lm_head")])
def test_missing_matrix_in_16_bits(
    engine: Engine, damaged: Callable[..., Path], name: str, said: str
) -> None:
    refused(engine, damaged(lambda t: t.pop(f"{name}.weight")), said, "weight is missing")


def test_missing_bias(engine: Engine, damaged: Callable[..., Path]) -> None:
    name = "model.layers.1.self_attn.v_proj"
    refused(engine, damaged(lambda t: t.pop(f"{name}.bias"), family="qwen2"), f"{name}: bias is missing")


def test_missing_part_of_a_16_bit_checkpoint(
    engine: Engine, checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint("llama").source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parts = ("model.layers.1.mlp.gate_up_proj: weight", "1 of its 2", "missing")
    refused(engine, folder, *parts, quantization="flute")


def test_wrong_shape(engine: Engine, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:, :-1].contiguous()}))
    refused(engine, folder, LAYER, "scales", "[128, 5]", "[128, 6]")


def test_wrong_dtype(engine: Engine, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].to(torch.int64)}))
    refused(engine, folder, LAYER, "qweight", "int64", "int32")


def test_scale_that_is_no_number(engine: Engine, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda t: t[f"{LAYER}.scales"].fill_(float("nan")))
    refused(engine, folder, LAYER, "scales", "finite")


def test_unknown_format_version(engine: Engine, damaged: Callable[..., Path]) -> None:
    refused(engine, damaged(config=lambda c: c.update(format_version=7)), "format_version", "7")


def test_half_of_a_merged_layer_quantized(engine: Engine, damaged: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.k_proj"
    folder = damaged(config=lambda c: c["modules_to_not_convert"].append(name))
    refused(engine, folder, name, "16 bits")


def test_unknown_option(engine: Engine, checkpoint: Callable[..., Checkpoint]) -> None:
    source = checkpoint("llama").source
    refused(engine, source, "'bit'", "bits", quantization="flute", hf_overrides={"flute": {"bit": 3}})


def test_gate_and_up_of_experts_that_differ(engine: Engine, checkpoint: Callable[..., Checkpoint]) -> None:
    model = checkpoint("mixtral", experts=True, overrides=(Override.of("w3", bits=3),))
    name = "model.layers.0.block_sparse_moe.experts.0"
    refused(engine, model.quantized, f"{name}.w1 is", "bits=4", f"{name}.w3 is", "bits=3", "alike")


def test_missing_expert(engine: Engine, checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    folder, name = tmp_path / "damaged", "model.layers.1.mlp.experts.3.up_proj"
    shutil.copytree(checkpoint("qwen3_moe", experts=True).quantized, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[f"{name}.scales"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(engine, folder, f"{name}: scales is missing")


def test_adapters_on_quantized_experts(engine: Engine, checkpoint: Callable[..., Checkpoint]) -> None:
    model = checkpoint("qwen3_moe", experts=True)
    refused(engine, model.quantized, "model.layers.0.mlp.experts", "LoRA", enable_lora=True)
