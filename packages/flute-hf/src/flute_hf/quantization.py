"""The seam to flute_quant: which modules are quantized, and how one weight is."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from flute_kernels import QuantizationConfig, QuantizedLinear, QuantSpec
from flute_quant import (
    Override,
    QuantizationError,
    QuantizationPlan,
    plan_modules,
    quantize_tensor,
    resolve_method,
)
from flute_quant.checkpoint.names import parameter_names

__all__ = ["QuantizationError", "QuantizationPlan", "parameter_names", "plan", "quantize", "stored_config"]


def plan(model: nn.Module, wanted: QuantizationConfig) -> QuantizationPlan:
    """What ``wanted`` means for the modules of this model; its names may be patterns.

    Raises:
        QuantizationError: a pattern that matches nothing, an unknown method, nothing to quantize.
    """
    resolve_method(wanted.method)
    base = asdict(wanted.spec)
    overrides = [
        Override.of(pattern, **{k: v for k, v in asdict(spec).items() if v != base[k]})
        for pattern, spec in wanted.overrides.items()
    ]
    return plan_modules(model, wanted.spec, ignore=wanted.modules_to_not_convert, overrides=overrides)


def stored_config(made: QuantizationPlan, wanted: QuantizationConfig) -> QuantizationConfig:
    """The config of a model quantized by this plan."""
    return made.config(resolve_method(wanted.method).name)


def quantize(weight: Tensor, spec: QuantSpec, method: str, name: str) -> QuantizedLinear:
    """Quantize a weight ``[N, K]`` where it is.

    Raises:
        QuantizationError: NaN or infinite weights, or a scale that its dtype cannot hold; ``name`` is said.
    """
    linear, _ = quantize_tensor(weight, spec, method=method, name=name)
    return linear
