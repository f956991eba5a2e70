"""The seam to flute_quant: which modules are quantized, and how one weight is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from flute_kernels import QuantizationConfig, QuantizedLinear, QuantSpec
from flute_quant import (
    Override,
    QuantizationError,
    QuantizationPlan,
    plan_modules,
    quantize_tensor,
    resolve_data_free_method,
    resolve_method,
)
from flute_quant.checkpoint.measure import measure_channels
from flute_quant.checkpoint.names import parameter_names
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.importance import ChannelImportance, measured_importance, planned_importance
from flute_quant.model import importance_in_memory as _importance_in_memory

__all__ = [
    "ChannelImportance",
    "QuantizationError",
    "QuantizationPlan",
    "importance_in_memory",
    "importance_on_disk",
    "parameter_names",
    "plan",
    "quantize",
    "stored_config",
]


def plan(model: nn.Module, wanted: QuantizationConfig) -> QuantizationPlan:
    """What ``wanted`` means for the modules of this model; its names may be patterns.

    Raises:
        QuantizationError: a pattern that matches nothing, a method that is unknown or needs a text, or
            nothing to quantize.
    """
    resolve_data_free_method(wanted.method, wanted.spec)
    base = asdict(wanted.spec)
    overrides = [
        Override.of(pattern, **{k: v for k, v in asdict(spec).items() if v != base[k]})
        for pattern, spec in wanted.overrides.items()
    ]
    return plan_modules(model, wanted.spec, ignore=wanted.modules_to_not_convert, overrides=overrides)


def stored_config(made: QuantizationPlan, wanted: QuantizationConfig) -> QuantizationConfig:
    """The config of a model quantized by this plan."""
    return made.config(resolve_method(wanted.method, wanted.spec).name)


def importance_on_disk(
    files: Sequence[str],
    made: QuantizationPlan,
    method: str,
    option: str | Mapping[str, Tensor],
    device: torch.device,
) -> ChannelImportance:
    """The importance of input channels for a model whose weights are still in ``files``.

    The files are those of one checkpoint folder, whose own model runs the random tokens: the result
    is that of ``flute_quant.quantize_checkpoint``. The model that is loaded may be a part of that one,
    or have another head. ``device`` is where it is run.

    Raises:
        QuantizationError: given tensors for other modules.
    """
    specs = {planned.name: planned.spec for planned in made.linears}
    planned = planned_importance(option, resolve_method(method, made.spec), specs)
    if planned is not None:
        return planned

    def measure() -> dict[str, Tensor]:
        folders = {Path(file).parent for file in files}
        if len(folders) != 1:
            raise ValueError(f"the weights are in {len(folders)} folders, not in one")
        return measure_channels(CheckpointFolder.open(folders.pop()), specs, device=device)

    return measured_importance(measure, specs)


def importance_in_memory(
    model: nn.Module, made: QuantizationPlan, method: str, option: str | Mapping[str, Tensor]
) -> ChannelImportance:
    """The importance of input channels, measured on the model where it is.

    Raises:
        QuantizationError: given tensors for other modules.
    """
    return _importance_in_memory(model, made, resolve_method(method, made.spec), option)


def quantize(
    weight: Tensor, spec: QuantSpec, method: str, name: str, importance: ChannelImportance
) -> QuantizedLinear:
    """Quantize the weight ``[N, K]`` of module ``name`` where it is.

    Raises:
        QuantizationError: NaN or infinite weights, or a scale that its dtype cannot hold; ``name`` is said.
    """
    linear, _ = quantize_tensor(
        weight, spec, method=method, name=f"{name}.weight", importance=importance.of(name, weight, spec)
    )
    return linear
