"""Models of ``shapes.json`` as folders: what a benchmark serves, loads or quantizes without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["SERVED", "config", "layer_linears", "write_checkpoint"]

SERVED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)["served"]
_CONTEXT = 8192


def config(model: str) -> dict[str, Any]:
    """``config.json`` of a model of :data:`SERVED` in bfloat16."""
    made = {
        **SERVED[model],
        "max_position_embeddings": _CONTEXT,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    made.setdefault("tie_word_embeddings", made["model_type"] == "gemma2")
    return made


def layer_linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The linears of a decoder layer of the Llama family: name to ``(out_features, in_features)``."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def write_checkpoint(folder: Path, model: str, layers: int) -> int:
    """A checkpoint of a Llama's shapes and random values, a file a layer; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=False)
    described = {**config(model), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    hidden = described["hidden_size"]
    outer = dict.fromkeys(("model.embed_tokens", "lm_head"), (described["vocab_size"], hidden))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    size = 0
    for number in range(layers + 1):
        names = {f"model.layers.{number}.{name}": shape for name, shape in layer_linears(described).items()}
        norms = [f"model.layers.{number}.{n}_layernorm" for n in ("input", "post_attention")]
        if number == layers:
            names, norms = outer, ["model.norm"]
        made = {
            f"{name}.weight": (torch.randn(shape, device=device) * 0.02).to("cpu", torch.bfloat16)
            for name, shape in names.items()
        }
        made |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        file = f"model-{number:03}.safetensors"
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
        size += sum(tensor.nbytes for tensor in made.values())
    torch.cuda.empty_cache()  # for those who load it
    described_index = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described_index), encoding="utf-8")
    return size
