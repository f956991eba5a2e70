"""How the scale of a group is chosen: the largest weight, or a search under a loss.

Everything happens on normalized groups ``u = w / max|w|``, so that no weight is too small or too
large for float32's squares, and ``r`` is the scale in the same unit.

The search is cheap because its cost does not depend on the number of candidates. What a value u
costs under candidate r is a function of u and r alone; it is tabulated once for 2,048 values of u
and all candidates. A group's cost under every candidate is then one sum of table rows, which is
what ``embedding_bag`` computes. The winner is refined exactly afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flute_quant.methods.nearest import Nearest

__all__ = ["AbsMax", "Fit", "Loss", "Rounding", "Search"]

Rounding = Callable[[Tensor], Tensor]
"""A scale in units of its group's largest weight to the nearest one that can be stored."""

_BINS = 2048
_BINS_PAIR = 64  # along one axis
# Far below the square of float32's rounding of u, it only keeps a weight of 0 ** keep usable.
_TINY = 1e-6


@dataclass(frozen=True)
class Loss:
    """What an error costs: ``importance[k] * |u|**keep * |u - u_hat|**power``, summed over a group.

    Args:
        power: 2 for the squared error, below 2 to tolerate outliers, above 2 to keep them.
        keep: above 0, errors of large weights count more than those of small ones.
    """

    power: float = 2.0
    keep: float = 0.0

    @property
    def is_squared(self) -> bool:
        return self.power == 2.0 and self.keep == 0.0

    def weight(self, u: Tensor) -> Tensor | None:
        """The factor of every value, or None where all are 1."""
        return None if self.keep == 0.0 else (u.abs() + _TINY).pow_(self.keep)

    def of(self, difference: Tensor) -> Tensor:
        """``|difference| ** power``; may overwrite its argument."""
        return difference.square_() if self.power == 2.0 else difference.abs_().pow_(self.power)


@dataclass
class Fit:
    """Codes int32 ``[R, g / p]``, relative scales ``[R]`` and squared errors ``[R]`` in units of u."""

    codes: Tensor
    scales: Tensor
    squared_error: Tensor


@dataclass(frozen=True)
class AbsMax:
    """The smallest scale under which no weight lies outside of the table."""

    def fit(self, u: Tensor, nearest: Nearest, rounding: Rounding, importance: Tensor | None) -> Fit:
        """Scales and codes of normalized groups ``[R, g]``."""
        low, high = float(nearest.table.min()), float(nearest.table.max())
        if low < 0 < high:
            wanted = torch.maximum(u.amax(1) / high, u.amin(1) / low)
        else:
            wanted = u.abs().amax(1) / max(abs(low), abs(high))
        scales = rounding(wanted)
        codes, difference = _encode(u, scales, nearest)
        return Fit(codes, scales, difference.square_().sum(1).mul_(scales.square()))


@dataclass(frozen=True)
class Search:
    """The best of many scales under a loss, then least-squares refits of the scale given the codes.

    Args:
        loss: what an error costs.
        candidates: scales that are tried (of each sign).
        span: smallest and largest candidate, 1 being the scale that maps the largest weight
            to the table's largest entry.
        refits: how often the scale is fitted to the codes and the codes to the scale; a step that
            does not lower the loss is not taken.
        signed: try negative scales as well, which mirror an asymmetric table.
    """

    loss: Loss = Loss()
    candidates: int = 32
    span: tuple[float, float] = (0.2, 1.15)
    refits: int = 2
    signed: bool = False

    def factors(self, table: Tensor) -> Tensor:
        """The candidates as scales ``r``, for groups whose largest magnitude is 1."""
        low, high = self.span
        steps = torch.linspace(0, 1, self.candidates, dtype=torch.float64)
        factors = (low * (high / low) ** steps).to(torch.float32) / table.abs().max().cpu()
        return torch.cat([factors, -factors]) if self.signed else factors

    def fit(self, u: Tensor, nearest: Nearest, rounding: Rounding, importance: Tensor | None) -> Fit:
        """Scales and codes of normalized groups ``[R, g]``; ``importance`` is ``[R, g]`` or None."""
        loss = self.loss
        scales = rounding(self.choose(u, nearest, importance))
        weight = loss.weight(u)
        if importance is not None:
            weight = importance if weight is None else weight * importance
        codes, difference = _encode(u, scales, nearest)
        cost = self._cost(difference, scales, weight)
        for _ in range(self.refits):
            moved = rounding(self._refit(u, scales, codes, difference, weight, nearest))
            new_codes, new_difference = _encode(u, moved, nearest)
            new_cost = self._cost(new_difference, moved, weight)
            better = new_cost < cost
            scales = torch.where(better, moved, scales)
            cost = torch.where(better, new_cost, cost)
            codes = torch.where(better[:, None], new_codes, codes)
            difference = torch.where(better[:, None], new_difference, difference)
        return Fit(codes, scales, difference.square_().sum(1).mul_(scales.square()))

    def choose(self, u: Tensor, nearest: Nearest, importance: Tensor | None) -> Tensor:
        """The candidate with the least tabulated cost for every group: ``[R]``."""
        factors, costs = self.prepare(nearest)
        per_sample = importance
        if nearest.vector_size == 1:
            bins = (u + 1).mul_(_BINS / 2).clamp_(0, _BINS - 1).to(torch.int32)
        else:
            axes = (u + 1).mul_(_BINS_PAIR / 2).clamp_(0, _BINS_PAIR - 1).to(torch.int32)
            bins = axes[:, ::2] * _BINS_PAIR + axes[:, 1::2]
            # One weight a pair: its two channels' importances differ, the search takes their mean.
            per_sample = None if importance is None else (importance[:, ::2] + importance[:, 1::2]) / 2
        total = torch.nn.functional.embedding_bag(
            bins,
            costs,
            mode="sum",
            per_sample_weights=None if per_sample is None else per_sample.contiguous(),
        )
        return factors[total.argmin(1)]

    def prepare(self, nearest: Nearest) -> tuple[Tensor, Tensor]:
        """Candidates ``[C]`` and the cost of every bin under each of them ``[bins, C]``."""
        # The tables live and die with the encoder that they were made from, one for every tensor or method.
        cache = nearest.__dict__.setdefault("_cost_tables", {})
        if self not in cache:
            cache[self] = self._tabulate(nearest)
        found: tuple[Tensor, Tensor] = cache[self]
        return found

    def _tabulate(self, nearest: Nearest) -> tuple[Tensor, Tensor]:
        device = nearest.table.device
        factors = self.factors(nearest.table).to(device)
        bins = _BINS if nearest.vector_size == 1 else _BINS_PAIR
        centres = (torch.arange(bins, dtype=torch.float32, device=device) + 0.5) * (2 / bins) - 1
        if nearest.vector_size == 2:
            centres = torch.cartesian_prod(centres, centres)
        values = centres.reshape(1, -1)
        weight = self.loss.weight(values)
        costs = []
        for factor in factors:
            _, difference = _encode(values, factor.reshape(1), nearest)
            cost = self.loss.of(difference).mul_(factor.abs() ** self.loss.power)
            costs.append((cost if weight is None else cost * weight).view(-1, nearest.vector_size).sum(1))
        return factors, torch.stack(costs, 1).contiguous()

    def _cost(self, difference: Tensor, scales: Tensor, weight: Tensor | None) -> Tensor:
        cost = self.loss.of(difference.clone())
        if weight is not None:
            cost.mul_(weight)
        return cost.sum(1).mul_(scales.abs().pow(self.loss.power))

    def _refit(
        self,
        u: Tensor,
        scales: Tensor,
        codes: Tensor,
        difference: Tensor,
        weight: Tensor | None,
        nearest: Nearest,
    ) -> Tensor:
        """The scale that minimizes the loss at fixed codes; one step of reweighting where power is not 2."""
        values = nearest.lookup(codes)
        if self.loss.power != 2.0:
            # |d|**p = |d|**(p - 2) * d**2; the floor keeps p < 2 from dividing by an error of zero.
            pull = difference.abs().clamp_min_(1e-3).pow_(self.loss.power - 2)
            weight = pull if weight is None else weight * pull
        weighted = values if weight is None else values * weight
        over = (weighted * u).sum(1)
        under = weighted.mul_(values).sum(1) if weight is not None else values.square().sum(1)
        return torch.where(under > 0, over / under.clamp_min(1e-30), scales)


def inverse_of(scales: Tensor) -> Tensor:
    """``1 / scales``, and zero for zero: such a group is all zero."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def _encode(u: Tensor, scales: Tensor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """Codes, and ``u / r - table[code]``. A scale of zero makes every value zero."""
    values = u * inverse_of(scales)[:, None]
    codes = nearest.codes(values)
    return codes, values.sub_(nearest.lookup(codes))
