"""Linear layers of a 16-bit checkpoint, quantized as soon as their weights have come."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)

from flute_kernels import FormatError, QuantSpec
from flute_quant import DEFAULT_IGNORE, fit_spec, quantize_tensor
from flute_quant.patterns import matches
from flute_vllm.linear import Partition, PartitionedLinearMethod, attach, loads_dummies, ready
from flute_vllm.parameters import WEIGHT_DTYPES, Loads, StackedParameter
from flute_vllm.weight import Matrix

__all__ = ["OnlineFluteLinearMethod", "OnlineOptions"]

_log = logging.getLogger("flute_vllm")
_NUMBERS = ("bits", "group_size", "vector_size", "hadamard", "hadamard_seed")


@dataclass(frozen=True)
class OnlineOptions:
    """How a 16-bit checkpoint is quantized: ``--hf-overrides '{"flute": {"bits": 3}}'`` or ``FLUTE_BITS=3``.

    Args:
        spec: bits, groups and tables; smaller groups where they do not divide a layer's K.
        method: of ``flute_quant``.
        ignore: modules that stay in 16 bits, by name, last part of the name, or pattern.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4, group_size=128))
    method: str = "default"
    ignore: tuple[str, ...] = tuple(DEFAULT_IGNORE)

    @classmethod
    def from_environment(cls) -> OnlineOptions:
        """``FLUTE_BITS``, ``FLUTE_GROUP_SIZE``, ``FLUTE_METHOD`` and so on."""
        given: dict[str, Any] = {}
        for name in (*_NUMBERS, "method"):
            text = os.environ.get(f"FLUTE_{name.upper()}")
            if text is not None:
                given[name] = text if name == "method" else _number(f"FLUTE_{name.upper()}", text)
        return cls().updated(given)

    def updated(self, given: Mapping[str, Any] | None) -> OnlineOptions:
        """With what a user says.

        Raises:
            FormatError: an unknown option, or a number that the format does not have.
        """
        if given is None:
            return self
        if not isinstance(given, Mapping):
            raise FormatError(f"flute's options are {given!r}; expected an object such as {{'bits': 4}}.")
        known = (*_NUMBERS, "method", "modules_to_not_convert")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise FormatError(f"flute has no option {unknown[0]!r}; it has {', '.join(known)}.")
        numbers = {name: given[name] for name in _NUMBERS if name in given}
        return OnlineOptions(
            QuantSpec(**{**asdict(self.spec), **numbers}),
            str(given.get("method", self.method)),
            (*self.ignore, *given.get("modules_to_not_convert", ())),
        )

    def spec_for(self, name: str) -> QuantSpec | None:
        """The spec of a layer, or None where it stays in 16 bits."""
        return None if any(matches(name, pattern) for pattern in self.ignore) else self.spec


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FormatError(f"{name} is {text!r}; expected an integer.") from None


class _Waiting(StackedParameter):
    """A 16-bit weight that takes memory from its first shard on until it is quantized."""

    data: Tensor

    def block(self, index: int) -> Tensor:
        if self.data.numel() == 0:
            self.data = torch.empty(self.full_size, dtype=self.data.dtype, device=self.data.device)
        return super().block(index)

    def release(self) -> None:
        """Give the memory back until the next shard comes."""
        self.data = self.data.new_empty(0)


@register_weight_loader_v2_supported_method
class OnlineFluteLinearMethod(PartitionedLinearMethod):
    """One layer: 16-bit parameters while it loads, products with quantized ones after.

    Args:
        spec: what is wanted; a layer takes what its K allows.
        method: of ``flute_quant``.
        name: of the layer.
    """

    def __init__(self, spec: QuantSpec, method: str, name: str) -> None:
        super().__init__(name)
        self._spec, self._method = spec, method
        self._loads: Loads

    def _register(self, layer: Any, part: Partition, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        self._spec, note = fit_spec(self._spec, part.columns)
        if note:
            _log.info("%s: %s", self._name, note)
        on_disk: list[tuple[int | None, ...]] = [(rows, part.all_columns) for rows in part.matrix_rows]
        self._loads = Loads(self._name, "weight", loader, on_disk, WEIGHT_DTYPES)

        def load(param: Any, loaded: Tensor, *shard: Any) -> None:
            self._loads(param, loaded, *shard)
            if len(self._loads.seen) == len(part.rows):
                self._quantize(layer)

        shapes = [(rows, part.columns) for rows in part.rows]
        weight = _Waiting(shapes, dtype, weight_loader=load)
        layer.register_parameter("weight", weight)
        if not isinstance(layer, ReplicatedLinear):
            weight.release()

    def _quantize(self, layer: Any) -> None:
        part, weight = self._partition, layer.weight
        matrices = []
        for i, all_rows in enumerate(part.matrix_rows):
            linear, _ = quantize_tensor(weight.block(i), self._spec, method=self._method, name=part.name)
            matrices.append(
                Matrix(
                    self._spec, linear.qweight, linear.scales, linear.codebook, part.first_row(i), all_rows
                )
            )
        # What is rotated here is this process's part, so the signs begin with it.
        attach(layer, ready(matrices, part, first_column=0, all_columns=part.columns))
        weight.release()

    def process_weights_after_loading(self, layer: Any) -> None:
        if "flute" not in layer._modules:
            if not loads_dummies():
                self._loads.check_complete()
            for i in range(len(self._partition.rows)):
                layer.weight.block(i).normal_(std=0.02)
            self._quantize(layer)
        del layer.weight
