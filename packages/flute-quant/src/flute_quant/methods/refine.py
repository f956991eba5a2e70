"""Alternating least squares under a layer's Hessian: scales, table and codes, each the best given the others.

With ``D = W - W_hat`` the cost ``tr(D H D^T)`` is quadratic in the scales at fixed codes and table, and in
the table at fixed codes and scales. Every step here solves one of these exactly, or takes the best code of
one column given all others, and none raises the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flute_quant.methods.feedback import BLOCK, diagonal_blocks, table_for
from flute_quant.methods.recorded import recorded
from flute_quant.methods.scales import inverse_of

__all__ = ["Fitted", "cost", "refit_scales", "refit_table", "sweep_codes"]

# 16 values are exact after 16 steps of conjugate gradients; 512 of them, of which most hardly meet, to 1e-4.
_TABLE_STEPS = 16
_TABLE_TOLERANCE = 1e-8


@dataclass
class Fitted:
    """A weight in the making.

    Args:
        codes: int64 ``[N, K / p]``.
        scales: float32 ``[N, K / g]``, values that the scales' stored dtype has.
        table: float32 ``[E]`` or ``[E, 2]``, values that the table's stored dtype has.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor

    def looked_up(self) -> Tensor:
        """The table's values, ``[N, K]``."""
        return self.table[self.codes].reshape(len(self.codes), -1)

    def weight(self) -> Tensor:
        """What the codes stand for, ``[N, K]``."""
        values = self.looked_up().view(*self.scales.shape, -1)
        return (values * self.scales[..., None]).view(len(self.codes), -1)


def cost(weight: Tensor, fitted: Fitted, hessian: Tensor) -> float:
    """``tr(D H D^T)``."""
    difference = weight - fitted.weight()
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def refit_scales(weight: Tensor, fitted: Fitted, hessian: Tensor, dtype: torch.dtype) -> Fitted:
    """One scale after another, each the best given the row's others, rounded to ``dtype``.

    A group's values are one column of a least-squares problem in the row's scales; this is a sweep of
    Gauss-Seidel over its normal equations. A step that rounding would make one for the worse is not taken.
    """
    groups = fitted.scales.shape[1]
    size = weight.shape[1] // groups
    values = fitted.looked_up()
    scales = fitted.scales.clone()
    pull = (weight - fitted.weight()) @ hessian
    limit = torch.finfo(dtype).max
    for g in range(groups):
        here = slice(g * size, (g + 1) * size)
        own = values[:, here]
        under = ((own @ hessian[here, here]) * own).sum(1)
        over = (own * pull[:, here]).sum(1)
        before = scales[:, g]
        moved = before + torch.where(under > 0, over / under.clamp_min(1e-30), 0.0)
        moved = moved.clamp(-limit, limit).to(dtype).to(torch.float32)
        step = moved - before
        # The cost changes by step * (step * under - 2 * over).
        step = torch.where(step * (step * under - 2 * over) < 0, step, 0.0)
        scales[:, g] = torch.where(step != 0, moved, before)
        pull -= (own * step[:, None]) @ hessian[here]
    return Fitted(fitted.codes, scales, fitted.table)


def refit_table(weight: Tensor, fitted: Fitted, hessian: Tensor, dtype: torch.dtype) -> Fitted:
    """The best table given codes and scales: normal equations summed over all rows, rounded to ``dtype``.

    They are solved by conjugate gradients, of which a step costs one product with the Hessian, however many
    entries the table has. An entry that no code names stays. Where rounding makes the table worse than the
    old one, that stays.
    """
    unknown = fitted.table.numel()
    spread = _Spread(fitted, unknown)
    pull = spread.project((weight - fitted.weight()) @ hessian)
    # What a value costs alone: entries of few weights are on another scale than those of many.
    alone = spread.project(spread.scale * hessian.diagonal())
    inverse = torch.where(alone > 0, 1 / alone.clamp_min(1e-30), 0.0)
    moved, residual = torch.zeros_like(pull), pull
    direction = inverse * residual
    slope = residual @ direction
    start = float(slope)
    for _ in range(min(unknown, _TABLE_STEPS)):
        if float(slope) <= _TABLE_TOLERANCE * start:
            break
        image = spread.project(spread.expand(direction) @ hessian)
        curvature = direction @ image
        if float(curvature) <= 0:
            break
        length = slope / curvature
        moved = moved + length * direction
        residual = residual - length * image
        before, slope = slope, residual @ (inverse * residual)
        direction = inverse * residual + slope / before * direction
    table = (fitted.table.reshape(-1) + moved).to(dtype).to(torch.float32).view(fitted.table.shape)
    if not bool(torch.isfinite(table).all()):
        return fitted
    better = Fitted(fitted.codes, fitted.scales, table)
    return better if cost(weight, better, hessian) < cost(weight, fitted, hessian) else fitted


class _Spread:
    """From the values of a table to the weights that they are looked up for, and back: a linear map and its
    transpose.

    Args:
        fitted: whose codes and scales.
        unknown: values in the table.
    """

    def __init__(self, fitted: Fitted, unknown: int) -> None:
        n, size = len(fitted.codes), unknown // len(fitted.table)
        self.scale = fitted.scales.repeat_interleave(
            fitted.codes.shape[1] * size // fitted.scales.shape[1], 1
        )
        # The value's number for every weight: of a pair its first component, then its second.
        numbers = fitted.codes[..., None] * size + torch.arange(size, device=fitted.codes.device)
        self._number = numbers.view(n, -1)
        flat = self._number.view(-1)
        self._sorted = flat.argsort(stable=True)
        self._counts = torch.bincount(flat, minlength=unknown)

    def expand(self, values: Tensor) -> Tensor:
        """Float32 ``[N, K]`` of float64 ``[U]``."""
        return values.to(torch.float32)[self._number] * self.scale

    def project(self, weights: Tensor) -> Tensor:
        """Float64 ``[U]`` of ``[N, K]``: sums over the weights that have a value, times their scales."""
        # Sorted, because a GPU's bincount adds in no fixed order.
        sorted_ = (weights * self.scale).view(-1)[self._sorted].to(torch.float64)
        return torch.segment_reduce(sorted_, "sum", lengths=self._counts, initial=0.0)


def sweep_codes(
    weight: Tensor, fitted: Fitted, hessian: Tensor, order: Tensor, *, block: int = BLOCK
) -> Fitted:
    """The best code of every column given all others, one column (of a pair, two) after another.

    Source: Behdin et al., "QuantEase", arXiv 2309.01885, with any table.

    Args:
        order: int64 ``[K]``, the columns in the order of their visit; a pair's are side by side.
    """
    table = table_for(fitted.table)
    size = table.vector_size
    k = weight.shape[1]
    group = k // fitted.scales.shape[1]
    matrix = hessian[order][:, order]
    scale = fitted.scales.T.contiguous()
    inverse = inverse_of(scale)
    groups, places = order // group, order[::size] // size
    codes = fitted.codes.T.contiguous()
    difference = (weight - fitted.weight()).T[order].contiguous()
    pull = matrix @ difference
    blocks = diagonal_blocks(matrix, size)
    roots, inverses = torch.linalg.cholesky(blocks), torch.linalg.inv(blocks)
    for start in range(0, k, block):
        stop = min(start + block, k)
        mine, steps_of = groups[start:stop:size], slice(start // size, stop // size)
        codes[places[steps_of]], steps = recorded(
            _sweep_columns,
            pull[start:stop],
            matrix[start:stop, start:stop],
            roots[steps_of],
            inverses[steps_of],
            scale[mine],
            inverse[mine],
            codes[places[steps_of]],
            table.values,
        )
        if stop < k:
            pull[stop:].addmm_(matrix[stop:, start:stop], steps, alpha=-1)
    return Fitted(codes.T.contiguous(), fitted.scales, fitted.table)


def _sweep_columns(
    pull: Tensor,
    matrix: Tensor,
    roots: Tensor,
    inverses: Tensor,
    scale: Tensor,
    inverse: Tensor,
    codes: Tensor,
    entries: Tensor,
) -> tuple[Tensor, Tensor]:
    """A block of columns: their codes ``[B / p, N]``, and how far their weights moved, ``[B, N]``."""
    table = table_for(entries)
    size = table.vector_size
    found, steps = [], torch.empty_like(pull)
    for at, i in enumerate(range(0, len(pull), size)):
        root = roots[at]
        before = table.lookup(codes[at]) * scale[at]
        # Where these columns would be without a grid.
        target = before + inverses[at] @ pull[i : i + size]
        code = table.nearest(target * inverse[at], root)
        after = table.lookup(code) * scale[at]
        costs = [(root.T @ (target - value)).square().sum(0) for value in (before, after)]
        change = costs[1] < costs[0]  # ties, and groups of scale zero, stay
        step = torch.where(change, after - before, 0.0)
        found.append(torch.where(change, code, codes[at]))
        steps[i : i + size] = step
        pull.addmm_(matrix[:, i : i + size], step, alpha=-1)
    return torch.stack(found), steps
