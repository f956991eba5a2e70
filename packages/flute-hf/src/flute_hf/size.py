"""The size of a model with its quantized weights, which are no parameters and, once prepared, no buffers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from flute_hf.modules import flute_linears

__all__ = ["count_quantized", "get_memory_footprint", "num_parameters", "stop_counting"]


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Weights of the model, quantized ones counted as one each.

    Args:
        only_trainable: leave out frozen parameters, among which all quantized weights are.
        exclude_embeddings: leave out embeddings.
    """
    plain = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return plain
    return plain + sum(m.in_features * m.out_features for _, m in flute_linears(model))


def get_memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Bytes of parameters and quantized weights, and of the other buffers unless told otherwise."""
    plain = int(type(model).get_memory_footprint(model, return_buffers=return_buffers))
    held = [m for _, m in flute_linears(model) if m.is_prepared or not return_buffers]
    return plain + sum(m.nbytes for m in held)


def count_quantized(model: nn.Module) -> None:
    """Let a Transformers model's own methods of those names count quantized weights."""
    model.num_parameters = partial(num_parameters, model)  # type: ignore[assignment]
    model.get_memory_footprint = partial(get_memory_footprint, model)  # type: ignore[assignment]


def stop_counting(model: nn.Module) -> None:
    """Undo :func:`count_quantized`."""
    for name in ("num_parameters", "get_memory_footprint"):
        model.__dict__.pop(name, None)
