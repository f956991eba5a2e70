"""Modules of a model replaced for a while, and its own parameters without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["replaced", "without_gradients"]


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in place of the model's own inside of the context.

    Args:
        model: holds all of them, perhaps deep inside.
        modules: name, as ``get_submodule`` takes it, to what is there instead.
    """
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in modules.items():
            parent, _, key = name.rpartition(".")
            owner = model.get_submodule(parent)
            before.append((owner, key, model.get_submodule(name)))
            setattr(owner, key, module)
        yield
    finally:
        for owner, key, module in before:
            setattr(owner, key, module)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """None of the parameters that the model has on entry gets a gradient inside of the context."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
