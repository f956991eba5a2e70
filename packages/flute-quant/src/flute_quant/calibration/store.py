"""Where layers have their weights: in memory, or on disk until they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

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
