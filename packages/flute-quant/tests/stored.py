"""What a checkpoint folder holds, and whether it is what was quantized in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flute_kernels import QuantizedLinear


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_holds(folder: Path, linears: Mapping[str, QuantizedLinear]) -> None:
    stored = tensors_of(folder)
    for module, linear in linears.items():
        for part, value in linear.to_tensors(f"{module}.").items():
            assert torch.equal(stored[part], value), part
