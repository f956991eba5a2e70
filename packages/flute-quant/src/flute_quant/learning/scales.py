"""Learned NormalFloat: the table stays, the scales of all groups are learned on the whole model.

Source: Guo et al., "Fast Matrix Multiplications for Lookup Table-Quantized LLMs", arXiv 2407.10960: gradients
through the straight-through estimator, Adam with a rate of 1e-4, one pass over 128 x 2048 tokens. There the
loss is that of the next token. Here it is by default the divergence from the 16-bit model, which knows more
about the text than the text does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flute_kernels import QuantizedLinear
from flute_quant.calibration.layers import outermost_layers
from flute_quant.calibration.replaced import replaced, without_gradients
from flute_quant.calibration.text import check_tokens
from flute_quant.errors import QuantizationError
from flute_quant.importance.tokens import evaluating, input_embedding
from flute_quant.learning.linear import LearnedLinear, Teaching

__all__ = ["LOSSES", "learn_scales"]

LOSSES = ("kl", "nll")
"""``kl``: Kullback-Leibler divergence of the quantized from the 16-bit model. ``nll``: the next token's."""


def learn_scales(
    model: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    tokens: Tensor,
    *,
    loss: str = "kl",
    nearest_codes: bool = True,
    learning_rate: float = 1e-4,
    epochs: int = 1,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, QuantizedLinear]:
    """Learn the scales of a model's quantized modules from what the whole model says.

    The model stays where it is and as it is. Beside it are held: scales in float32, with a gradient and two
    numbers of Adam's each; one layer's activations at a time (the others' are computed again); the logits of
    one sequence, twice.

    Args:
        model: a causal language model of Transformers in 16 or 32 bits, all of it on one device.
        linears: module name to stored tensors, as :func:`~flute_quant.quantize_model` gives them.
        tokens: int64 ``[S, L]``; a step is one sequence.
        loss: one of :data:`LOSSES`.
        nearest_codes: choose codes anew in every step, each weight's nearest, as the paper does. Without it
            the codes stay, which is for those that took part in error feedback.
        learning_rate: of Adam.
        epochs: passes over the tokens.
        progress: called after every step with steps done, steps in all and the loss.

    Returns:
        Module name to stored tensors, on the CPU, with the same tables.

    Raises:
        QuantizationError: an unknown loss, a number that is not positive, a loss that is not finite.
    """
    if loss not in LOSSES:
        raise QuantizationError(f"loss is {loss!r}; supported are {', '.join(LOSSES)}.")
    if not (learning_rate > 0 and epochs >= 1):
        raise QuantizationError(
            f"learning_rate is {learning_rate} and epochs {epochs}; expected more than 0 and at least 1."
        )
    embedding = input_embedding(model)
    if embedding is None:
        raise QuantizationError(f"{type(model).__name__} is no model of Transformers with a token embedding.")
    ids = check_tokens(tokens, embedding.num_embeddings)
    if ids.shape[1] < 2:
        raise QuantizationError(f"The calibration tokens are {list(ids.shape)}; a step needs two tokens.")
    teaching = Teaching()
    steps = epochs * len(ids)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(without_gradients(model))
        modules = _modules(model, linears, nearest_codes, teaching)
        stack.enter_context(replaced(model, modules))
        stack.enter_context(_checkpointed(model, list(linears)))
        optimizer = torch.optim.Adam([m.scales for m in modules.values()], lr=learning_rate)
        for step in range(steps):
            window = ids[step % len(ids)][None].to(embedding.weight.device)
            value = _loss(model, window, loss, teaching)
            if not bool(torch.isfinite(value)):
                found = float(value.detach())
                raise QuantizationError(
                    f"The loss of step {step + 1} of {steps} is {found}; expected a finite number."
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, float(value.detach()))
        return {name: module.quantized() for name, module in modules.items()}


def _loss(model: nn.Module, window: Tensor, loss: str, teaching: Teaching) -> Tensor:
    if loss == "kl":
        teaching.on = True
        with torch.no_grad():
            wanted = model(window, use_cache=False).logits[0, :-1].float().log_softmax(1)
        teaching.on = False
    logits = model(window, use_cache=False).logits[0, :-1].float()
    if loss == "nll":
        return nn.functional.cross_entropy(logits, window[0, 1:])
    return nn.functional.kl_div(logits.log_softmax(1), wanted, log_target=True, reduction="batchmean")


def _modules(
    model: nn.Module, linears: Mapping[str, QuantizedLinear], nearest_codes: bool, teaching: Teaching
) -> dict[str, LearnedLinear]:
    modules = {}
    for name, quantized in linears.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise QuantizationError(f"{name} is a {type(linear).__name__}; expected a linear module.")
        modules[name] = LearnedLinear(linear, quantized, nearest_codes, teaching)
    return modules


@contextmanager
def _checkpointed(model: nn.Module, linears: list[str]) -> Iterator[None]:
    """Layers keep their input alone for the backward pass, and compute the rest again."""
    layers = list(outermost_layers(model, linears).values())
    try:
        for layer in layers:
            whole: Any = layer.forward
            layer.forward = partial(checkpoint, whole, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
