"""A linear module whose weight is quantized in every forward pass, and whose scales have gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_kernels.format import unpack_codes
from flute_quant.methods.nearest import Nearest
from flute_quant.methods.scales import inverse_of
from flute_quant.rotation import rotate, unrotate
from flute_quant.stored import nearest_of

__all__ = ["LearnedLinear", "Teaching"]


@dataclass
class Teaching:
    """Shared by all modules of a model: whether they compute as the 16-bit model does.

    Args:
        on: True for the 16-bit model.
    """

    on: bool = False


class LearnedLinear(nn.Module):
    """``x`` times the quantized weight, of which only the scales are parameters.

    The gradient of a weight with respect to its scale is the looked-up value; that another scale may choose
    another code is passed over (the straight-through estimator).

    Args:
        linear: the module in 16 bits; its weight is shared, not copied.
        quantized: its stored form, which gives spec, table and first scales.
        nearest_codes: choose the nearest code in every pass; else the stored codes stay.
        teaching: see :class:`Teaching`.
    """

    def __init__(
        self, linear: nn.Linear, quantized: QuantizedLinear, nearest_codes: bool, teaching: Teaching
    ) -> None:
        super().__init__()
        self.spec = quantized.spec
        self._linear = [linear]  # in a list, so that it is no part of this module's state
        self._quantized = quantized
        self._teaching = teaching
        weight = linear.weight
        # Where they are unpacked in every pass.
        self._qweight = None if nearest_codes else quantized.qweight.to(weight.device)
        self._nearest = nearest_of(quantized, weight.device)
        self.scales = nn.Parameter(quantized.scales.to(weight.device, torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``, of the 16-bit weight while :class:`Teaching` is on."""
        linear = self._linear[0]
        if self._teaching.on:
            return nn.functional.linear(input, linear.weight, linear.bias)
        weight: Tensor = _Lookup.apply(self.scales, self)  # type: ignore[no-untyped-call]
        if self.spec.hadamard:
            weight = unrotate(weight, self.spec.hadamard, self.spec.hadamard_seed)
        return nn.functional.linear(input, weight.to(input.dtype), linear.bias)

    def codes(self, scales: Tensor) -> Tensor:
        """Integer codes ``[N, K / p]`` for scales ``[N, K / g]``."""
        if self._qweight is not None:
            return unpack_codes(self._qweight, self.spec.bits, self.spec.vector_size)
        weight = self._linear[0].weight.detach().to(torch.float32)
        if self.spec.hadamard:
            weight = rotate(weight, self.spec.hadamard, self.spec.hadamard_seed)
        groups = weight.view(scales.numel(), -1)
        inverse = inverse_of(scales).view(-1, 1)
        return self._nearest.codes(groups * inverse).view(len(weight), -1)

    def looked_up(self, scales: Tensor) -> Tensor:
        """The table's values ``[N, G, g]`` for scales ``[N, G]``."""
        nearest: Nearest = self._nearest
        return nearest.lookup(self.codes(scales).to(torch.int32)).reshape(*scales.shape, -1)

    def quantized(self) -> QuantizedLinear:
        """The stored form with the scales as they are now, rounded to the dtype that they had."""
        before = self._quantized
        scales = self.scales.detach().to(before.scales.dtype)
        codes = self.codes(scales.to(torch.float32))
        bias = None if before.bias is None else before.bias.cpu()
        return QuantizedLinear.from_codes(codes.cpu(), scales.cpu(), before.codebook.cpu(), before.spec, bias)


class _Lookup(torch.autograd.Function):
    """``scales * table[codes]``; the codes are found again for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, module: LearnedLinear) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(scales)
        return (module.looked_up(scales) * scales[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scales,) = ctx.saved_tensors
        values = ctx.module.looked_up(scales)
        return (gradient.view(values.shape).to(torch.float32) * values).sum(2), None
