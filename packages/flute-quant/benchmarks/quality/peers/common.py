"""What the peers' scripts share: a model's linears in, dequantized weights and what they cost out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

__all__ = ["linears", "load", "parser", "write"]


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that ``rows.py`` passes."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--bits", type=int, required=True)
    p.add_argument("--group-size", type=int, required=True)
    p.add_argument("--device", default="cpu")
    return p


def load(folder: Path, device: str) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """All linear modules except the head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def write(
    out: Path, weights: dict[str, Tensor], bits_per_weight: float, seconds: float, packages: list[str]
) -> None:
    """Weights in bfloat16, in which the grid runs every model."""
    noted = {
        "bits_per_weight": bits_per_weight,
        "seconds": seconds,
        "packages": {name: version(name) for name in packages},
    }
    tensors = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()
    }
    save_file(tensors, out, {"peer": json.dumps(noted)})
