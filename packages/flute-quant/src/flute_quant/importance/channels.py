"""The importance of every module's input channels, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.methods import Method, WeightRows

__all__ = [
    "IMPORTANCE_OPTIONS",
    "ChannelImportance",
    "ImportanceOption",
    "column_importance",
    "load_importance",
    "planned_importance",
    "resolve_importance",
]

IMPORTANCE_OPTIONS = ("auto", "random", "columns", "none")
"""``random``: mean squares of the inputs of random tokens. ``columns``: guessed from each weight alone.
``none``: all channels alike. ``auto``: ``random`` where the method is made for it, else ``none``."""

ImportanceOption = str | Mapping[str, Tensor]
"""One of :data:`IMPORTANCE_OPTIONS`, or module name to float32 ``[K]``."""

# A column that is nearly empty says little about its input: 100 times the mean is as far as it goes.
_LEAST_COLUMN = 1e-2


@dataclass(frozen=True)
class ChannelImportance:
    """The importance of the input channels of a model's linear modules.

    Args:
        source: ``"random tokens"``, ``"columns"``, ``"given"`` or ``"none"``.
        values: module name to float32 ``[K]`` on the CPU, in the rotated basis where its spec rotates.
        columns: whether a module without a value takes :func:`column_importance` (else all its
            channels count alike).
        note: a sentence where less was measured than asked for, or None.
    """

    source: str = "none"
    values: Mapping[str, Tensor] = field(default_factory=dict)
    columns: bool = False
    note: str | None = None

    def of(self, name: str, weight: Tensor, spec: QuantSpec) -> Tensor | None:
        """The importance ``[K]`` of module ``name``, whose weight ``[N, K]`` this is, on its device."""
        found = self.values.get(name)
        if found is not None:
            return found.to(weight.device)
        return column_importance(weight, spec, f"{name}.weight") if self.columns else None


def column_importance(weight: Tensor, spec: QuantSpec, name: str = "weight") -> Tensor:
    """A guess at inputs from the weight ``[N, K]`` alone: float32 ``[K]``.

    Training lets the columns of strong inputs stay small, so importance is one over the mean square
    of a column, at most 100 times that of a mean column.

    Raises:
        QuantizationError: the weight has NaN or infinite values.
    """
    rows = WeightRows(weight.detach(), spec, name)
    total = torch.zeros(rows.columns, dtype=torch.float64, device=rows.device)
    for start, stop in rows.chunks():
        total += rows.read(start, stop).square().sum(0, dtype=torch.float64)
    mean = total.mean()
    if not bool(mean > 0):
        return torch.ones(rows.columns, device=rows.device)
    return (1 / (total / mean).clamp_min(_LEAST_COLUMN)).to(torch.float32)


def resolve_importance(option: ImportanceOption, method: Method) -> str:
    """What an option means for a method: ``"random"``, ``"columns"``, ``"none"`` or ``"given"``.

    Raises:
        QuantizationError: an unknown option.
    """
    if not isinstance(option, str):
        return "given"
    if option not in IMPORTANCE_OPTIONS:
        raise QuantizationError(
            f"importance is {option!r}; supported are {', '.join(IMPORTANCE_OPTIONS)}, "
            "and tensors by module name."
        )
    if option != "auto":
        return option
    # Methods that others registered may be older than this property.
    return "random" if getattr(method, "wants_importance", False) else "none"


def planned_importance(
    option: ImportanceOption, method: Method, modules: Iterable[str]
) -> ChannelImportance | None:
    """The importance that an option stands for without a pass through the model; None where it takes one.

    Raises:
        QuantizationError: an unknown option, or given tensors that belong to none of ``modules``.
    """
    kind = resolve_importance(option, method)
    if kind == "random":
        return None
    if isinstance(option, str):
        return ChannelImportance(kind, columns=kind == "columns")
    names = list(modules)
    if option and not set(option) & set(names):
        raise QuantizationError(
            f"importance has tensors for {len(option)} modules, such as {next(iter(option))}, and none of "
            f"the {len(names)} modules to quantize, such as {names[0]}, is among them."
        )
    return ChannelImportance("given", dict(option))


def load_importance(path: str | Path) -> dict[str, Tensor]:
    """Importance from a ``.safetensors`` file with one ``[K]`` tensor for each module name.

    Raises:
        QuantizationError: the file cannot be read, or a tensor is no vector of floats.
    """
    from flute_quant.checkpoint.safetensors_reader import SafetensorsFile

    try:
        file = SafetensorsFile(Path(path))
        for name, stored in file.tensors.items():
            if len(stored.shape) != 1 or not stored.is_float:
                raise QuantizationError(
                    f"{name} in {path} is {stored.dtype} {list(stored.shape)}; expected a float [K]."
                )
        return {name: file.read(name).to(torch.float32) for name in file.tensors}
    except CheckpointError as error:
        raise QuantizationError(f"The importance cannot be read: {error}") from None
