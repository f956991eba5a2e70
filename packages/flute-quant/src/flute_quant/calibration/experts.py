"""What the experts of a mixture are given, where a model holds a layer's experts in one parameter.

Such experts are no modules that a hook could watch. But each is a slice of the parameter, and Transformers'
own (eager) code multiplies its tokens with that slice: torch says so to whoever asks, whatever the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ExpertWatch"]


class ExpertWatch(TorchFunctionMode):
    """Inside of the context, sees every product with a slice of some parameters.

    Args:
        parameters: name to ``[E, N, K]``.
        seen: called with the parameter's name, the index of the slice and the inputs ``[T, K]``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self._names = {value.untyped_storage().data_ptr(): name for name, value in parameters.items()}
        self._parameters = dict(parameters)
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and len(args) >= 2:
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, weight: Tensor) -> None:
        name = self._names.get(weight.untyped_storage().data_ptr())
        if name is None or x.numel() == 0:
            return
        whole = self._parameters[name]
        if weight.shape == whole.shape[1:] and weight.is_contiguous():
            self._seen(name, weight.storage_offset() // weight.numel(), x.detach())
