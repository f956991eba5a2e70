"""Quantize the linear modules of a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear, QuantSpec
from flute_quant.methods import Method, resolve_method
from flute_quant.patterns import Override
from flute_quant.plan import PlannedLinear, QuantizationPlan, plan_modules
from flute_quant.tensor import ErrorStats, quantize_tensor

__all__ = ["ModelReport", "quantize_model"]


@dataclass(frozen=True)
class ModelReport:
    """What :func:`quantize_model` did.

    Args:
        plan: the modules and their specs.
        method: name of the method.
        errors: module name to its error.
        parameters: parameters of the model, tied ones once.
    """

    plan: QuantizationPlan
    method: str
    errors: dict[str, ErrorStats]
    parameters: int

    @property
    def covered(self) -> int:
        """Parameters that were quantized."""
        return sum(p.weights for p in self.plan.linears)


def quantize_model(
    model: nn.Module,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    scale_dtype: torch.dtype = torch.float16,
    importance: Mapping[str, Tensor] | None = None,
    progress: Callable[[PlannedLinear, ErrorStats], None] | None = None,
) -> tuple[dict[str, QuantizedLinear], ModelReport]:
    """Quantize a model's linear modules where they are; the model itself is not changed.

    Args:
        model: any torch module with its weights loaded.
        spec, ignore, include, overrides: see :func:`~flute_quant.plan.plan_modules`.
        method, scale_dtype: see :func:`~flute_quant.tensor.quantize_tensor`.
        importance: module name to float32 ``[K]``, for the modules that have one.
        progress: called after every module.

    Returns:
        Module name to stored tensors (with the module's bias), and the report.

    Raises:
        QuantizationError: nothing to quantize, NaN or infinite weights, an unknown method or pattern.
    """
    chosen = resolve_method(method)
    plan = plan_modules(model, spec, ignore=ignore, include=include, overrides=overrides)
    linears: dict[str, QuantizedLinear] = {}
    errors: dict[str, ErrorStats] = {}
    for planned in plan.linears:
        module = model.get_submodule(planned.name)
        assert isinstance(module, nn.Linear)
        bias = module._parameters.get("bias")
        linears[planned.name], errors[planned.name] = quantize_tensor(
            module.weight,
            planned.spec,
            method=chosen,
            name=f"{planned.name}.weight",
            bias=None if bias is None else bias.detach(),
            scale_dtype=scale_dtype,
            importance=None if importance is None else importance.get(planned.name),
        )
        if progress is not None:
            progress(planned, errors[planned.name])
    parameters = sum(p.numel() for p in model.parameters())
    return linears, ModelReport(plan, chosen.name, errors, parameters)
