"""How much a model's predictions change when single units of it are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flute_quant.errors import QuantizationError
from flute_quant.importance.tokens import NoPassError, evaluating, random_tokens_for
from flute_quant.methods.parallel import ordinary_tensors

__all__ = ["held_out_tokens", "measured_divergences"]

# Six sequences of random tokens: of each unit one number is wanted, not one for every channel.
_LENGTH = 128
# Tokens that run through the model at once: their logits over a vocabulary of 128,000 take 524 MB.
_BATCH_TOKENS = 1024
# Rows of logits turned into probabilities at once.
_ROWS = 256


def measured_divergences(
    model: Any,
    units: Sequence[tuple[str, ...]],
    quantized: Callable[[str], Tensor],
    tokens: Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """KL(model || model with one unit quantized) in nats a token, for every unit.

    A pass through the whole model for each of them. The model is as it was afterwards; meanwhile the weights
    of one unit are held twice.

    Args:
        model: a causal language model of Transformers, in memory.
        units: names of the linear modules of each.
        quantized: module name to its weight ``[N, K]`` with the errors of quantization.
        tokens: int64 ``[S, L]``; by default 6 sequences of 128 random tokens.
        progress: called with units done and in all.

    Raises:
        QuantizationError: predictions are NaN or infinite, or the model takes no tokens alone.
    """
    config = getattr(model, "config", None)
    try:
        if getattr(config, "is_encoder_decoder", False):
            raise NoPassError(f"{type(model).__name__} is no causal language model")
        if tokens is None:
            tokens = random_tokens_for(model, _LENGTH)
    except NoPassError as error:
        raise QuantizationError(
            f"What each layer changes in predictions cannot be measured: {error}; "
            "sensitivity 'error' needs none."
        ) from None
    device = next(model.parameters()).device
    batches = tokens.to(device).split(max(1, _BATCH_TOKENS // tokens.shape[1]))
    divergences = []
    with evaluating(model), ordinary_tensors():
        before = [_log_probabilities(model, batch) for batch in batches]
        if not all(bool(torch.isfinite(p).all()) for p in before):
            raise QuantizationError(
                f"The model's predictions on {tokens.numel()} tokens are not finite, so that no layer's part "
                "in them can be measured; sensitivity 'error' needs no predictions."
            )
        for done, unit in enumerate(units, 1):
            with _replaced(model, {name: quantized(name) for name in unit}):
                total = sum(
                    _divergence(p, _log_probabilities(model, batch))
                    for p, batch in zip(before, batches, strict=True)
                )
            divergences.append(total / tokens.numel())
            if progress is not None:
                progress(done, len(units))
    return divergences


def held_out_tokens(model: Any) -> Tensor:
    """As many random tokens as :func:`measured_divergences` takes by default, but others: ``[S, L]``."""
    both = random_tokens_for(model, 2 * _LENGTH)
    return both[:, both.shape[1] // 2 :]


class _replaced:
    """Other weights for some modules inside of the context."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._model, self._weights = model, weights
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for name, weight in self._weights.items():
            parameter = self._model.get_submodule(name).get_parameter("weight")
            self._before[name] = parameter.data
            parameter.data = weight.to(parameter.device, parameter.dtype)

    def __exit__(self, *error: object) -> None:
        for name, weight in self._before.items():
            self._model.get_submodule(name).get_parameter("weight").data = weight


def _log_probabilities(model: Any, batch: Tensor) -> Tensor:
    """Float32 ``[S * L, vocabulary]`` of ``[S, L]`` tokens."""
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.float().flatten(0, 1).log_softmax(1)


def _divergence(before: Tensor, after: Tensor) -> float:
    total = 0.0
    for start in range(0, len(before), _ROWS):
        p, q = before[start : start + _ROWS], after[start : start + _ROWS]
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(total, 0.0)
