"""The layers of a model as a sequence of calls, found by running the model with its layers taken out.

Every layer is replaced with one that passes its input on and notes how it was called. One such pass costs an
embedding, and tells what each layer is given beside the hidden states (masks, positions), whatever the
model's class. Afterwards the layers can be run one by one, each when its weights are at hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flute_quant.errors import QuantizationError
from flute_quant.importance.tokens import (
    Finished,
    NoPassError,
    evaluating,
    input_embedding,
    output_head,
    stopping_at,
    token_arguments,
)
from flute_quant.methods.parallel import ordinary_tensors

__all__ = ["LayerCall", "outermost_layers", "trace_layers"]


@dataclass
class LayerCall:
    """One layer and how the model calls it.

    Args:
        name: of the module.
        module: the layer.
        args, kwargs: what it is given beside the hidden states.
        keyword: the argument's name where the hidden states are passed by name, else None.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden states behind the layer."""
        if self.keyword is None:
            result = self.module(hidden, *self.args, **self.kwargs)
        else:
            result = self.module(*self.args, **{self.keyword: hidden}, **self.kwargs)
        found: Tensor = result if isinstance(result, Tensor) else result[0]
        return found


def outermost_layers(model: nn.Module, linears: Sequence[str]) -> dict[str, nn.Module]:
    """Members of the outermost lists of modules that hold some of ``linears``: name to module."""
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        for key, child in module.named_children():
            full = f"{name}.{key}" if name else key
            if not isinstance(child, nn.ModuleList):
                visit(full, child)
                continue
            members = {f"{full}.{i}": member for i, member in enumerate(child)}
            if any(linear.startswith(f"{member}.") for member in members for linear in linears):
                found.update(members)

    visit("", model)
    return found


def trace_layers(
    model: nn.Module, batches: Sequence[Tensor], linears: Sequence[str], device: torch.device
) -> tuple[list[LayerCall], list[Tensor]]:
    """Run the model without its layers.

    Args:
        model: a causal language model of Transformers.
        batches: token ids ``[B, L]``, all of one shape.
        linears: names of the modules to quantize, which tell what its layers are.
        device: where its embedding is.

    Returns:
        The layers in the order of their calls, and the hidden states ``[B, L, D]`` that the first one is
        given, of every batch, on the CPU.

    Raises:
        QuantizationError: the model is not a sequence of layers.
    """
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or input_embedding(model) is None or getattr(config, "is_encoder_decoder", False):
        raise QuantizationError(
            f"{kind} cannot be calibrated layer by layer: "
            "it is no decoder of Transformers with a token embedding."
        )
    runner: nn.Module = getattr(model, "base_model", model)
    try:
        takes_tokens, others = token_arguments(runner, config)
    except NoPassError as error:
        raise QuantizationError(f"{kind} cannot be calibrated layer by layer: {error}.") from None
    layers = outermost_layers(model, linears)
    hidden: list[Tensor] = []
    first: list[LayerCall] = []
    for number, batch in enumerate(batches):
        for as_tuple in (False, True):
            recorder = _Recorder(as_tuple)
            try:
                with (
                    evaluating(model),
                    recorder.attached(layers),
                    stopping_at(output_head(model)),
                    ordinary_tensors(),
                    warnings.catch_warnings(),
                    suppress(Finished),
                ):
                    warnings.simplefilter("ignore")
                    runner(**dict.fromkeys(takes_tokens, batch.to(device)), **others)
                break
            except _TupleExpectedError:
                if as_tuple:
                    raise QuantizationError(
                        f"{kind} cannot be calibrated layer by layer: {recorder.wrong}."
                    ) from None
        if recorder.wrong is not None or not recorder.calls:
            why = recorder.wrong or "its layers are not called"
            raise QuantizationError(f"{kind} cannot be calibrated layer by layer: {why}.")
        hidden.append(recorder.inputs.cpu())
        if number == 0:
            first = recorder.calls
        elif number == 1 and not _alike(first, recorder.calls):
            raise QuantizationError(
                f"{kind} cannot be calibrated layer by layer: "
                "its layers are given more of the tokens than hidden states."
            )
    return first, hidden


class _TupleExpectedError(Exception):
    """A layer was given something else than what the one before returned."""


class _Recorder:
    """Stands in for layers.

    Args:
        as_tuple: return what was given in a tuple, as layers of older classes do.
    """

    def __init__(self, as_tuple: bool) -> None:
        self._as_tuple = as_tuple
        self.calls: list[LayerCall] = []
        self.inputs: Tensor = torch.empty(0)
        self.wrong: str | None = None
        self._last: Tensor | None = None

    @contextmanager
    def attached(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Replace the layers' computation inside of the context."""
        try:
            for name, layer in layers.items():
                layer.forward = self._stand_in(name, layer)
            yield
        finally:
            for layer in layers.values():
                layer.__dict__.pop("forward", None)

    def _stand_in(self, name: str, layer: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            keyword = None
            if args:
                hidden, *rest = args
            else:
                keyword, rest = "hidden_states", []
                hidden = kwargs.pop(keyword, None)
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                self.wrong = f"{name} is not given hidden states [B, L, D]"
                if self._last is not None:
                    raise _TupleExpectedError
            elif self._last is None:
                self.inputs = hidden
            elif hidden is not self._last and not torch.equal(hidden, self._last):
                self.wrong = f"the model computes something before {name}"
                raise _TupleExpectedError
            self._last = hidden
            self.calls.append(LayerCall(name, layer, tuple(rest), kwargs, keyword))
            return (hidden,) if self._as_tuple else hidden

        return forward


def _alike(first: Sequence[LayerCall], second: Sequence[LayerCall]) -> bool:
    """Whether the layers were given the same beside the hidden states."""
    return len(first) == len(second) and all(
        a.name == b.name and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
        for a, b in zip(first, second, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return True  # configurations and caches, which say nothing about the tokens
