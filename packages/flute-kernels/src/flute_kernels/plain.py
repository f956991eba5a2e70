"""When a product may skip torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flute_kernels.errors import UnsupportedError

__all__ = ["is_plain", "refuse_forward_mode"]


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's dispatcher has nothing to add: no gradient, tracing, mode, transform or subclass.

    A device's ``plain_qgemm`` is then called without it, which saves more time than a small matrix takes to
    multiply (some nine microseconds a call).
    """
    return (
        type(x) is Tensor
        and x.is_contiguous()
        and (bias is None or (type(bias) in (Tensor, torch.nn.Parameter) and bias.is_contiguous()))
        and not (_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and not _function_modes()
        and not _is_tracing()
        and _functorch_transform() is None
    )


def refuse_forward_mode(x: Tensor, bias: Tensor | None) -> None:
    """Raise UnsupportedError where forward-mode differentiation would silently find no tangent."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, bias)
    ):
        raise UnsupportedError("Forward-mode derivatives of a quantized product are not supported.")


_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing
_functorch_transform = torch._C._functorch.peek_interpreter_stack
