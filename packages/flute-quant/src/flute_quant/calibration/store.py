"""Where layers have their weights: in memory, or on disk until they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["InMemory", "LayerStore"]


class LayerStore(Protocol):
    """A model of which one layer at a time can be run and changed."""

    @property
    def model(self) -> nn.Module:
        """The model, or its structure."""

    @property
    def device(self) -> torch.device:
        """Where its embedding is and its layers run."""

    def running(self) -> AbstractContextManager[None]:
        """Inside of the context everything outside of the layers can be called."""

    def loaded(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Inside of the context the layer has its weights; what is changed there is forgotten afterwards."""

    def slice_of(self, name: str) -> tuple[str, int] | None:
        """The parameter, and the index in it, that holds an expert's matrix; None where there is none."""

    def matrix(self, name: str) -> Tensor:
        """An expert's matrix ``[N, K]``."""

    def put_matrices(self, values: Mapping[str, Tensor]) -> None:
        """Change matrices of experts inside of a layer that is loaded; name to ``[N, K]``."""


class InMemory:
    """A model that has its weights, and keeps them.

    Args:
        model: on one device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def running(self) -> AbstractContextManager[None]:
        """See :class:`LayerStore`."""
        return nullcontext()

    @contextmanager
    def loaded(self, layer: nn.Module) -> Iterator[None]:
        """See :class:`LayerStore`."""
        before = [(module, dict(module._parameters)) for module in layer.modules()]
        try:
            yield
        finally:
            for module, parameters in before:
                module._parameters.update(parameters)

    def slice_of(self, name: str) -> tuple[str, int] | None:
        """None: of a model in memory no expert is quantized by itself."""
        return None

    def matrix(self, name: str) -> Tensor:
        """See :class:`LayerStore`."""
        raise KeyError(name)

    def put_matrices(self, values: Mapping[str, Tensor]) -> None:
        """See :class:`LayerStore`."""
        if values:
            raise KeyError(next(iter(values)))
