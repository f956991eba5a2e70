"""Layers that stay in 16 bits. vLLM does not ask of a quantized model whether all its weights have come."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from flute_kernels import FormatError

__all__ = ["PlainEmbeddingMethod", "PlainLinearMethod"]


class _Filled:
    """Before one of vLLM's methods: raises FormatError where a part of the weight has not come.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        super().create_weights(layer, *sizes, **more)  # type: ignore[misc]
        layer.weight.data.fill_(math.nan)

    def process_weights_after_loading(self, layer: Any) -> None:
        _check_filled(self._name, layer)
        super().process_weights_after_loading(layer)  # type: ignore[misc]


@register_weight_loader_v2_supported_method
class PlainLinearMethod(_Filled, UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's own, for a linear layer."""


class PlainEmbeddingMethod(_Filled, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """vLLM's own, for embeddings and heads."""


def _check_filled(name: str, layer: Any) -> None:
    # A sum, since it takes no memory.
    if bool(layer.weight.data.sum(dtype=torch.float32).isnan()):
        raise FormatError(f"{name}: weight is missing from the checkpoint, or a part of it, or not a number.")
