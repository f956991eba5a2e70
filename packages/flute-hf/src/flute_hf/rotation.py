"""The rotation of an input that several layers see, made once for all of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flute_hf.linear import FluteLinear, SharedInput
from flute_hf.modules import flute_linears
from flute_kernels import LutWeight
from flute_quant.siblings import sibling_groups

__all__ = ["RotatedOnce", "share_rotations"]


@dataclass
class _Rotated:
    """An input in its rotated form, and which layers have had it.

    ``grad`` is whether it was rotated with gradients; ``version`` changes when the input is written into.
    """

    source: weakref.ref[Tensor]
    version: int
    grad: bool
    value: Tensor
    taken: set[int] = field(default_factory=set)


class RotatedOnce(SharedInput):
    """Keeps an input's rotated form from the first layer that asks to the last.

    A layer that asks twice, as one does whose activations are computed again for a backward pass, begins
    anew, so that each pass of a layer finds the same work as the first. The form goes with its input, or
    once every layer has had it.

    Args:
        layers: how many there are.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._last: _Rotated | None = None

    def rotated(self, x: Tensor, layer: nn.Module, weight: LutWeight) -> Tensor:
        """``weight.rotate(x)``."""
        # A compiler finds the common work itself, or not at all; tensors of inference mode do not say
        # when they are written into.
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_inference():
            return weight.rotate(x)
        last = self._last  # of which another thread may make another one at any time
        if (
            last is None
            or last.source() is not x
            or last.version != x._version
            or last.grad != torch.is_grad_enabled()
            or id(layer) in last.taken
        ):
            source = weakref.ref(x, self._forget)
            last = _Rotated(source, x._version, torch.is_grad_enabled(), weight.rotate(x))
            self._last = last
        last.taken.add(id(layer))
        if len(last.taken) == self._layers and self._last is last:
            self._last = None
        return last.value

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last.source is source:
            self._last = None

    def __reduce__(self) -> tuple[type[RotatedOnce], tuple[int]]:
        return RotatedOnce, (self._layers,)  # copies begin with nothing


def share_rotations(model: nn.Module) -> None:
    """Let layers of one parent that see the same input, and rotate it in the same way, do so once."""
    linears: dict[str, FluteLinear] = dict(flute_linears(model))
    for group in sibling_groups(linears):
        layers = [linears[name] for name in group]
        rotations = {(x.in_features, x.spec.hadamard, x.spec.hadamard_seed) for x in layers}
        if len(layers) > 1 and len(rotations) == 1 and layers[0].spec.hadamard:
            shared = RotatedOnce(len(layers))
            for layer in layers:
                layer.shared_input = shared
