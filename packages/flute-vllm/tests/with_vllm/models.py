"""Checkpoints for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from flute_kernels import QuantizedLinear, QuantSpec
from flute_quant import load_dequantized, quantize_checkpoint
from flute_quant.rotation import unrotate

CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "mixtral": "MixtralConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ONE_LAYER = (("num_hidden_layers", 1),)


@dataclass
class Checkpoint:
    """Folders of one model: before quantization, quantized, and with the quantized values in float32."""

    source: Path
    quantized: Path
    twin: Path


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    method: str = "learned",
    include: tuple[str, ...] = (),
    overrides: tuple[Any, ...] = (),
    shape: tuple[tuple[str, Any], ...] = (),
    experts: bool = False,
    seed: int = 0,
    **spec: int,
) -> Checkpoint:
    """A random model, quantized with tables of each matrix's own.

    Args:
        folder: where its folders go.
        family: of :data:`CONFIGS`.
        method, include, overrides, experts: as ``quantize_checkpoint`` takes them.
        shape: what differs from :data:`SHAPE`.
        seed: of the weights.
        spec: of ``QuantSpec``; 4 bits in groups of 32 by default.
    """
    made = Checkpoint(folder / "source", folder / "quantized", folder / "twin")
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS[family])(**{**SHAPE, **EXPERTS.get(family, {}), **dict(shape)})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # Transformers starts them at zero, which would hide them
    model.save_pretrained(made.source)
    quantize_checkpoint(
        made.source,
        made.quantized,
        QuantSpec(**{"bits": 4, "group_size": 32, **spec}),
        method=method,
        include=include,
        overrides=overrides,
        experts=experts,
        dtype="keep",
        min_coverage=0.0,
    )
    load_dequantized(made.quantized, dtype=torch.float32).save_pretrained(made.twin)
    return made


def dequantized(linear: QuantizedLinear) -> Tensor:
    """The matrix that a stored one stands for, float32, any rotation undone."""
    weight, spec = linear.dequantize(), linear.spec
    return unrotate(weight, spec.hadamard, spec.hadamard_seed) if spec.hadamard else weight
