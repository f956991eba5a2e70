"""Quantize the linear modules of a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear, QuantSpec
from flute_quant.calibration.run import calibrate_layers
from flute_quant.calibration.store import InMemory
from flute_quant.calibration.text import OUTSIDE, check_calibration, check_tokens
from flute_quant.importance import (
    ChannelImportance,
    ImportanceOption,
    measured_importance,
    planned_importance,
    random_token_importance,
)
from flute_quant.importance.tokens import input_embedding
from flute_quant.learning.finish import finish_scales, learns
from flute_quant.methods import Method, data_free_method, resolve_method
from flute_quant.patterns import Override
from flute_quant.plan import PlannedLinear, QuantizationPlan, plan_modules
from flute_quant.tensor import ErrorStats, quantize_tensor

__all__ = ["ModelReport", "importance_in_memory", "quantize_model"]


@dataclass(frozen=True)
class ModelReport:
    """What :func:`quantize_model` did.

    Args:
        plan: the modules and their specs.
        method: name of the method.
        errors: module name to its error.
        parameters: parameters of the model, tied ones once.
        importance: where the importance of input channels came from; its note says why it was not
            measured as asked.
        calibration: module name to what calibration had to do differently for it, in words; None where
            nothing was calibrated.
    """

    plan: QuantizationPlan
    method: str
    errors: dict[str, ErrorStats]
    parameters: int
    importance: ChannelImportance
    calibration: dict[str, str] | None = None

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
    importance: ImportanceOption = "auto",
    calibration: Tensor | None = None,
    progress: Callable[[PlannedLinear, ErrorStats], None] | None = None,
    learning: Callable[[int, int, float], None] | None = None,
) -> tuple[dict[str, QuantizedLinear], ModelReport]:
    """Quantize a model's linear modules where they are; the model itself is not changed.

    Args:
        model: any torch module with its weights loaded.
        spec, ignore, include, overrides: see :func:`~flute_quant.plan.plan_modules`.
        method, scale_dtype: see :func:`~flute_quant.tensor.quantize_tensor`.
        importance: what errors in each input channel cost, one of
            :data:`~flute_quant.importance.IMPORTANCE_OPTIONS` or module name to float32 ``[K]`` for the
            modules that have one. To measure it, a Transformers model runs 3,072 random tokens; what
            cannot be measured is guessed from the weights' columns.
        calibration: token ids ``[S, L]``, whose inputs to every linear module are what it is quantized for.
            Methods made for it need it; for others it measures the importance of input channels.
        progress: called after every module.
        learning: called after every step that learns scales on the whole model, where the method does, with
            steps done, steps in all and the loss.

    Returns:
        Module name to stored tensors (with the module's bias), and the report.

    Raises:
        QuantizationError: nothing to quantize, NaN or infinite weights, an unknown method or pattern.
    """
    chosen = resolve_method(method, spec)
    plan = plan_modules(model, spec, ignore=ignore, include=include, overrides=overrides)
    linears: dict[str, QuantizedLinear] = {}
    errors: dict[str, ErrorStats] = {}
    notes: dict[str, str] | None = None
    check_calibration(chosen, calibration, importance)
    if calibration is None:
        weighting = importance_in_memory(model, plan, chosen, importance)
    else:
        weighting = ChannelImportance("calibration text", columns=True)
        notes = {}
        embedding = input_embedding(model)
        tokens = check_tokens(calibration, 0 if embedding is None else embedding.num_embeddings)
        for layer in calibrate_layers(
            InMemory(model), plan.linears, tokens, chosen, scale_dtype=scale_dtype, progress=progress
        ):
            linears |= layer.linears
            errors |= layer.errors
            notes |= layer.notes
        if learns(chosen):
            learned = finish_scales(model, linears, tokens, chosen, learning)
            linears |= learned[0]
            errors |= learned[1]
    for planned in plan.linears:
        if planned.name in linears:
            continue
        if notes is not None:
            notes[planned.name] = OUTSIDE
        module = model.get_submodule(planned.name)
        assert isinstance(module, nn.Linear)
        bias = module._parameters.get("bias")
        linears[planned.name], errors[planned.name] = quantize_tensor(
            module.weight,
            planned.spec,
            method=data_free_method(chosen, planned.spec),
            name=f"{planned.name}.weight",
            bias=None if bias is None else bias.detach(),
            scale_dtype=scale_dtype,
            importance=weighting.of(planned.name, module.weight.detach(), planned.spec),
        )
        if progress is not None:
            progress(planned, errors[planned.name])
    order = [p.name for p in plan.linears]
    parameters = sum(p.numel() for p in model.parameters())
    report = ModelReport(
        plan, chosen.name, {name: errors[name] for name in order}, parameters, weighting, notes
    )
    return {name: linears[name] for name in order}, report


def importance_in_memory(
    model: nn.Module, plan: QuantizationPlan, method: Method, option: ImportanceOption
) -> ChannelImportance:
    """The importance that ``option`` stands for, measured on the model as it is where that is asked.

    Raises:
        QuantizationError: an unknown option, or given tensors for other modules.
    """
    specs = {p.name: p.spec for p in plan.linears}
    planned = planned_importance(option, method, specs)
    if planned is not None:
        return planned
    return measured_importance(lambda: random_token_importance(model, specs), specs)
