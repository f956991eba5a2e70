"""A linear module of which the codes and the scales can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_kernels.format import unpack_codes
from flute_quant.methods.nearest import Nearest
from flute_quant.methods.scales import inverse_of
from flute_quant.rotation import rotate, unrotate
from flute_quant.stored import nearest_of

__all__ = ["RoundedLinear"]

# Halvings of a weight's distance to its value, after which it is the value itself.
_HALVINGS = 6


class RoundedLinear(nn.Module):
    """``x`` times a weight whose codes are the table's entries nearest to a trained position.

    A group's weights are ``scale * (1 + stretch) * table[nearest(position)]``. The derivative of the
    looked-up value by the position is taken as 1 (the straight-through estimator), that of the weight by the
    scale is the looked-up value. A position starts where the 16-bit weight is among the table's entries, or,
    where the stored code is not the nearest one (because error feedback chose it), as near to that place as
    the stored code allows. So training starts from the stored codes, and weights that are between two entries
    are the first to change.

    Args:
        linear: the module in 16 bits; its bias is used, its weight gives the positions and is not kept.
        quantized: its stored form, which gives spec, table, scales and first codes; on any device.
    """

    positions: nn.Parameter
    """Float32 ``[N, K]`` in units of the table, in the basis of the codes."""
    stretch: nn.Parameter
    """Float32 ``[N, K / g]``, relative to the stored scales."""

    def __init__(self, linear: nn.Linear, quantized: QuantizedLinear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        spec, device = quantized.spec, weight.device
        self.spec = spec
        self._quantized = quantized
        self._bias = linear.bias
        self._nearest = nearest_of(quantized, device)
        self._scales = quantized.scales.to(device, torch.float32)
        codes = unpack_codes(quantized.qweight.to(device), spec.bits, spec.vector_size)
        weight = weight.to(torch.float32)
        if spec.hadamard:
            weight = rotate(weight, spec.hadamard, spec.hadamard_seed)
        groups = weight.view(*self._scales.shape, -1)
        inverse = inverse_of(self._scales)
        values = self._nearest.lookup(codes.to(torch.int32).view(self._scales.numel(), -1)).view(groups.shape)
        positions = _inside(groups * inverse[..., None], values, self._nearest)
        self.positions = nn.Parameter(positions.view(weight.shape))
        self.stretch = nn.Parameter(torch.zeros_like(self._scales))

    @property
    def spacing(self) -> float:
        """Mean distance between neighbouring entries of the table."""
        table = self._nearest.table
        if table.ndim == 1:
            return float(table.unique().diff().mean())
        distances = torch.cdist(table, table)
        distances[distances == 0] = torch.inf
        return float(distances.amin(1).mean())

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear`` with the quantized weight."""
        scales = self._scales * (1 + self.stretch)
        weight: Tensor = _Rounded.apply(self.positions, scales, self._nearest)  # type: ignore[no-untyped-call]
        if self.spec.hadamard:
            weight = unrotate(weight, self.spec.hadamard, self.spec.hadamard_seed)
        return nn.functional.linear(input, weight.to(input.dtype), self._bias)

    def quantized(self) -> QuantizedLinear:
        """The stored form of what it computes now, scales rounded to the dtype that they had."""
        before = self._quantized
        limit = torch.finfo(before.scales.dtype).max
        scales = (self._scales * (1 + self.stretch.detach())).clamp(-limit, limit).to(before.scales.dtype)
        positions = self.positions.detach()
        codes = self._nearest.codes(positions.view(scales.numel(), -1)).view(len(positions), -1)
        return QuantizedLinear.from_codes(
            codes, scales, before.codebook.to(codes.device), before.spec, before.bias
        )


def _inside(positions: Tensor, values: Tensor, nearest: Nearest) -> Tensor:
    """Positions ``[N, G, g]`` drawn to the values of their codes until these are the nearest entries."""
    shape = positions.shape
    away = positions - values
    for halving in range(_HALVINGS + 1):
        found = nearest.lookup(nearest.codes((values + away).view(-1, shape[-1]))).view(shape)
        wrong = found != values
        if nearest.vector_size == 2:
            wrong = wrong.view(-1, 2).any(1, keepdim=True).expand(-1, 2).reshape(shape)
        away = torch.where(wrong, away * 0.5 if halving < _HALVINGS else torch.zeros_like(away), away)
    return values + away


class _Rounded(torch.autograd.Function):
    """``scales * table[nearest(positions)]``, of which only codes are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, scales: Tensor, nearest: Nearest) -> Tensor:
        codes = nearest.codes(positions.view(scales.numel(), -1)).to(torch.uint8)
        ctx.nearest = nearest
        ctx.save_for_backward(codes, scales)
        values = nearest.lookup(codes.to(torch.int32)).view(*scales.shape, -1)
        return (values * scales[..., None]).view(positions.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, scales = ctx.saved_tensors
        values = ctx.nearest.lookup(codes.to(torch.int32)).view(*scales.shape, -1)
        pull = gradient.to(torch.float32).reshape(values.shape)
        of_positions, of_scales, _ = ctx.needs_input_grad
        return (
            (pull * scales[..., None]).view(gradient.shape) if of_positions else None,
            (pull * values).sum(2) if of_scales else None,
            None,
        )
