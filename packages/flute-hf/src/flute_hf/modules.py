"""The linear modules of a model: found, replaced, described."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from flute_hf.linear import FluteLinear
from flute_kernels import QuantizationConfig

__all__ = ["Replacer", "describe", "flute_linears", "fused_experts", "plain_linears"]


def flute_linears(model: nn.Module) -> Iterator[tuple[str, FluteLinear]]:
    """Quantized layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, FluteLinear):
            yield name, module


def plain_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers of 16 or 32 bits by name."""
    for name, module in model.named_modules():
        # Attention reads the weight of that subclass itself instead of calling the module.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
            yield name, module


class Replacer:
    """Puts modules in the place of others, at every place where the model holds them.

    Args:
        model: searched once, so replace modules only through this object while it is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    self._places[child].append((parent, key))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` where ``old`` is; it takes over whether it is being trained."""
        new.train(old.training)
        places = self._places.pop(old)
        for parent, key in places:
            parent._modules[key] = new
        self._places[new] = places


def describe(model: nn.Module, like: QuantizationConfig) -> QuantizationConfig:
    """The config of the model as it is now, with the default spec and the method of ``like``.

    Modules change: a merged adapter leaves a 16-bit layer where a quantized one was.
    """
    overrides = {name: module.spec for name, module in flute_linears(model) if module.spec != like.spec}
    kept = tuple(name for name, _ in plain_linears(model))
    return QuantizationConfig(like.spec, kept, overrides, like.method)


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Parameters that hold one matrix for each expert ``[E, N, K]``, to their number of weights.

    They are known by their shape: models call them by many names. What else has three dimensions is a
    convolution, or has an extent of 1 (learned queries, position embeddings).
    """
    found = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd):
                found[f"{name}.{key}" if name else key] = parameter.numel()
    return found
