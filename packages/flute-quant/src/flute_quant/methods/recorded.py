"""Loops of small steps, which a GPU finishes faster than Python asks for them: recorded, then replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["recorded"]

# A model has few shapes; each recording keeps memory for its inputs and for all that it computes.
_KEPT = 8
_recordings: OrderedDict[Any, _Recording] = OrderedDict()


def recorded(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """``function(*inputs)``, on a GPU as a CUDA graph of its first call with inputs of these shapes.

    Args:
        function: of a module; computes with nothing but its inputs, which it may overwrite, and never waits
            for the device. What it does depends on their shapes, not on their values.
        inputs: all on one device.
    """
    device = inputs[0].device
    if device.type != "cuda":
        return function(*inputs)
    key = (function, device, *((tuple(x.shape), x.dtype) for x in inputs))
    with torch.cuda.device(device):
        found = _recordings.pop(key, None) or _Recording(function, inputs)
        _recordings[key] = found
        while len(_recordings) > _KEPT:
            _recordings.popitem(last=False)
        return found(inputs)


class _Recording:
    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [x.clone() for x in inputs]
            function(*self._inputs)  # what is made at a first call, such as workspaces, is made before
            self._graph = torch.cuda.CUDAGraph()
            # A stream of this GPU, as torch's own for this is one of whichever GPU was first. And other
            # threads go on with other GPUs meanwhile.
            stream = torch.cuda.Stream()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
