"""Mean squares of the inputs that linear modules see, by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_quant.methods.base import CHANNEL_FLOOR
from flute_quant.rotation import rotate

__all__ = ["ChannelMeter"]

# Rows squared at once: a few megabytes of float32 whatever the number of tokens.
_ROWS = 256


class ChannelMeter:
    """Adds up the squares of all inputs of some modules, in float64 and in the basis of their codes.

    Args:
        linears: module name to its spec, whose rotation is applied to the inputs.
        seen: called at every module's first input, with the number of modules seen so far.
        places: module name to its name in the model that is run, for those that it has; by default
            the same names.
    """

    def __init__(
        self,
        linears: Mapping[str, QuantSpec],
        seen: Callable[[int], None] | None = None,
        *,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self._linears = dict(linears)
        self._seen = seen
        self._places = {name: name for name in linears} if places is None else dict(places)
        self._sums: dict[str, Tensor] = {}
        # The modules that share an input (q, k, v; gate, up) see it one after another.
        self._last: tuple[weakref.ref[Tensor], int, int, int, Tensor] | None = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Measure all that runs through ``model`` inside of the context."""
        hooks = []
        try:
            for name, place in self._places.items():
                hook = self._hook(name)
                hooks.append(model.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self._last = None

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite, or too large to be squared."""
        return all(bool(torch.isfinite(total).all()) for total in self._sums.values())

    def importance(self) -> dict[str, Tensor]:
        """Float32 ``[K]`` on the CPU, of mean 1.001, where inputs were finite and not all zero."""
        result = {}
        for name, total in self._sums.items():
            mean = total.mean()
            if bool(torch.isfinite(mean)) and bool(mean > 0):
                result[name] = (total / mean + CHANNEL_FLOOR).to("cpu", torch.float32)
        return result

    def _hook(self, name: str) -> Callable[..., None]:
        spec = self._linears[name]

        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel() == 0:
                return
            squares = self._squares(x.detach(), spec)
            if name in self._sums:
                self._sums[name] += squares
                return
            self._sums[name] = squares.clone()
            if self._seen is not None:
                self._seen(len(self._sums))

        return measure

    def _squares(self, x: Tensor, spec: QuantSpec) -> Tensor:
        rotation = (spec.hadamard, spec.hadamard_seed)
        if self._last is not None:
            tensor, version, block, seed, squares = self._last
            # Inference tensors, which have no version, are never asked for: the pass runs without that mode.
            if tensor() is x and version == x._version and (block, seed) == rotation:
                return squares
        squares = _sum_of_squares(x.reshape(-1, x.shape[-1]), *rotation)
        self._last = (weakref.ref(x), x._version, *rotation, squares)
        return squares


def _sum_of_squares(x: Tensor, block: int, seed: int) -> Tensor:
    """Float64 ``[K]`` of ``[M, K]``."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], _ROWS):
        rows = x[start : start + _ROWS].to(torch.float32)
        if block:
            rows = rotate(rows, block, seed)
        total += rows.square().sum(0, dtype=torch.float64)
    return total
