"""What the tests compare with: reference weights, models made of them, tensors on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import flute_hf
from flute_quant.rotation import unrotate

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def quantized(
    folder: Path, dtype: torch.dtype = torch.float32, device_map: str | None = None, **options: object
) -> PreTrainedModel:
    """A 16-bit folder, quantized while it loads."""
    config = flute_hf.FluteConfig(**options)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map=device_map
    )


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def flute_layers(model: nn.Module) -> dict[str, flute_hf.FluteLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, flute_hf.FluteLinear)}


def effective_weight(layer: flute_hf.FluteLinear) -> Tensor:
    """What a layer multiplies with, by the format's definition and without a kernel."""
    stored, spec = layer.quantized(), layer.spec
    weight = stored.dequantize()
    return unrotate(weight, spec.hadamard, spec.hadamard_seed) if spec.hadamard else weight


def twin(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that ``model`` should be: the source, with the quantized values in its own linear layers."""
    other = load(folder, dtype)
    for name, layer in flute_layers(model).items():
        other.get_submodule(name).weight.data = effective_weight(layer).to(dtype)
    return other


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything that a folder's safetensors files hold."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder with one file of weights."""
    tensors = {name: tensor.clone() for name, tensor in tensors_of(folder).items()}
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
