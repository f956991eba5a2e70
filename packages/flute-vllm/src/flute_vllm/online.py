"""Linear layers of a 16-bit checkpoint, quantized as soon as their weights have come."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from flute_kernels import FormatError, QuantSpec
from flute_quant import DEFAULT_IGNORE, fit_spec, quantize_tensor, resolve_data_free_method
from flute_quant.patterns import matches
from flute_vllm.dummies import STANDARD_DEVIATION
from flute_vllm.linear import Partition, PartitionedLinearMethod, attach
from flute_vllm.parameters import WEIGHT_DTYPES, Loads, StackedParameter
from flute_vllm.weight import Matrix, ReadyWeight, made_ready

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
            QuantizationError: a method that is unknown or needs a text.
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
        spec, method = QuantSpec(**{**asdict(self.spec), **numbers}), str(given.get("method", self.method))
        resolve_data_free_method(method, spec)
        return OnlineOptions(
            spec,
            method,
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


@register_weight_loader_v2_supported_method
class OnlineFluteLinearMethod(PartitionedLinearMethod):
    """One layer: what comes of its 16-bit matrices while it loads, products with quantized ones after.

    The layer's parameter is a meta tensor, which takes no memory. The first matrix that comes takes memory
    for all of the layer's, until the last one has come and they are quantized.

    Args:
        spec: what is wanted; a layer takes what its K allows.
        method: of ``flute_quant``.
        name: of the layer.
    """

    def __init__(self, spec: QuantSpec, method: str, name: str) -> None:
        super().__init__(name)
        self._spec, self._method = spec, method
        self._loads: Loads
        self._device: torch.device
        self._waiting: StackedParameter | None = None

    def _register(self, layer: Any, part: Partition, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        self._spec, note = fit_spec(self._spec, part.columns)
        if note:
            _log.info("%s: %s", self._name, note)
        self._device = torch.get_default_device()
        on_disk: list[tuple[int | None, ...]] = [(rows, part.all_columns) for rows in part.matrix_rows]
        self._loads = Loads(self._name, "weight", loader, on_disk, WEIGHT_DTYPES)
        this, of_layer = weakref.ref(self), weakref.ref(layer)  # vLLM keeps loaders beyond a layer's life

        def load(param: Any, loaded: Tensor, *shard: Any) -> None:
            method, owner = this(), of_layer()
            assert method is not None
            method._take(owner, param, loaded, *shard)

        shapes = [(rows, part.columns) for rows in part.rows]
        place = StackedParameter(shapes, dtype, torch.device("meta"), weight_loader=load)
        layer.register_parameter("weight", place)

    def _take(self, layer: Any, param: StackedParameter, loaded: Tensor, *shard: Any) -> None:
        if param.is_meta and "flute" not in layer._modules:  # else vLLM reloads, and makes room itself
            if self._waiting is None:
                self._waiting = self._room(param)
            param = self._waiting
        self._loads.take(param, loaded, *shard)
        if self._loads.is_complete:
            self._quantize(layer, param)

    def _room(self, place: StackedParameter) -> StackedParameter:
        """Memory for all of the layer's matrices."""
        room = StackedParameter(place.shapes, place.dtype, self._device, weight_loader=place.weight_loader)
        room.tp_rank, room.tp_size = place.tp_rank, place.tp_size
        return room

    def _quantize(self, layer: Any, weight: StackedParameter) -> None:
        part, spec = self._partition, self._spec
        with made_ready(part.name):
            matrices = []
            for i, all_rows in enumerate(part.matrix_rows):
                linear, _ = quantize_tensor(weight.block(i), spec, method=self._method, name="weight")
                stored = (linear.qweight, linear.scales, linear.codebook)
                matrices.append(Matrix(spec, *stored, part.first_row(i), all_rows))
            # What is rotated here is this process's part, so the signs begin with it.
            ready = ReadyWeight(matrices, 0, part.columns, part.columns)
        attach(layer, ready, part.name)
        self._loads.seen.clear()
        self._waiting = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if "weight" not in layer._parameters:
            return  # done already
        if self._is_dummy and "flute" not in layer._modules:
            room = self._room(layer.weight)
            room.data.normal_(std=STANDARD_DEVIATION)
            self._quantize(layer, room)
        if self._loads.seen or "flute" not in layer._modules:
            self._loads.finish()
        del layer.weight
