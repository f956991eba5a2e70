"""A quantized checkpoint says what its twin says: the model whose weights are the dequantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flute_quant import Override

from .models import Checkpoint
from .serving import Engine, Step, assert_alike


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_families(checkpoint: Callable[..., Checkpoint], engine: Engine, family: str) -> None:
    model = checkpoint(family)
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group_size": 64},
        {"bits": 2, "group_size": -1},
        {"bits": 2, "vector_size": 2, "method": "lloyd-pairs"},
        {"hadamard": 64, "hadamard_seed": 5},
        {"include": ("lm_head",)},
    ],
    ids=["3 bits", "a scale a row", "pairs", "rotated", "head"],
)
def test_formats(checkpoint: Callable[..., Checkpoint], engine: Engine, options: dict[str, object]) -> None:
    model = checkpoint("llama", **options)
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


def test_matrices_of_one_layer_with_different_bits(
    checkpoint: Callable[..., Checkpoint], engine: Engine
) -> None:
    overrides = (Override.of("v_proj", bits=3), Override.of("up_proj", group_size=64))
    model = checkpoint("qwen2", overrides=overrides)  # with biases
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


def test_tied_embeddings(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    model = checkpoint("llama", shape=(("tie_word_embeddings", True),))
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


@pytest.mark.parametrize("options", [{}, {"include": ("lm_head",)}], ids=["head in 16 bits", "head"])
def test_adapters(
    checkpoint: Callable[..., Checkpoint], engine: Engine, tmp_path: Path, options: dict[str, object]
) -> None:
    model = checkpoint("llama", **options)
    rank, widths = 8, {"q_proj": (128, 128), "v_proj": (128, 64), "down_proj": (192, 128)}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": list(widths),
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, (k, n) in widths.items():
            block = "mlp" if name == "down_proj" else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    # vLLM's kernels for adapters know no float32.
    dtype, tolerance = ("float16", 0.03) if torch.cuda.is_available() else ("float32", 1e-3)

    def steps(folder: Path, adapter: Path | None) -> list[list[Step]]:
        llm = engine.load(folder, dtype=dtype, enable_lora=True, max_lora_rank=rank)
        return engine.steps(llm, adapter=adapter)

    with_adapter = steps(model.quantized, tmp_path)
    assert_alike(with_adapter, steps(model.twin, tmp_path), tolerance)
    with pytest.raises(AssertionError):
        assert_alike(with_adapter, steps(model.twin, None), tolerance)
