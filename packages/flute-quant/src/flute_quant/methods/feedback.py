"""Layer-wise error feedback: columns are rounded one after another, and what one loses the next ones make up.

A weight's error costs ``tr(D H D^T)`` with ``D = W - W_hat`` and ``H`` the mean of ``x x^T`` over a layer's
inputs. Once a column is rounded, the columns that are still free move to where the cost is least given that
error, which the Cholesky factor of the inverse of ``H`` tells for all of them at once.

Source: Frantar et al., "GPTQ", arXiv 2210.17323; that it is LDLQ, Chee et al., "QuIP", arXiv 2307.13304. Here
the grid is any table, of scalars or of pairs, and a pair's two columns are rounded together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flute_quant.methods.recorded import recorded
from flute_quant.methods.scales import inverse_of

__all__ = ["BLOCK", "Factor", "Table", "damped", "diagonal_blocks", "factorized", "feed_back", "table_for"]

BLOCK = 128
"""Columns that are rounded before the columns behind them are updated, in one product."""

# Ten times more each time: from the one percent that papers take to a diagonal that is doubled.
_DAMPINGS = 4


@dataclass(frozen=True)
class Factor:
    """What :func:`feed_back` needs of a Hessian.

    Args:
        upper: float32 ``[K, K]``, upper triangular, with ``upper.T @ upper`` the inverse of the damped and
            reordered Hessian.
        order: int64 ``[K]``, the columns in the order of their visit.
        damping: the fraction of the mean diagonal that was added to the diagonal.
    """

    upper: Tensor
    order: Tensor
    damping: float


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` with ``damping`` times its mean diagonal on top of the diagonal: float32 ``[K, K]``.

    A channel that no input ever used has the mean itself, so that its weights are rounded as any others.
    """
    result = hessian.to(torch.float32, copy=True)
    diagonal = result.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + damping * mean)
    return result


def factorized(hessian: Tensor, *, damping: float, by_activation: bool, vector_size: int) -> Factor | None:
    """The factor of a Hessian ``[K, K]``, with more damping where it is singular; None where that fails, too.

    Args:
        hessian: symmetric, finite.
        damping: the first to try, then 10, 100 and 1,000 times as much.
        by_activation: visit the columns of the largest inputs first, while most columns are left to make up
            for them (GPTQ's ``act_order``). Groups stay where the format has them.
        vector_size: 2 keeps the two columns of a pair side by side.
    """
    order = _order(hessian.diagonal(), by_activation, vector_size)
    for attempt in range(_DAMPINGS):
        strength = damping * 10**attempt
        matrix = damped(hessian, strength)[order][:, order]
        # With the order reversed, Cholesky's lower factor turns into an upper one: H = V V^T, so that
        # V^-1 is the factor of the inverse, which never has to be formed.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(failed) == 0:
            upper = torch.linalg.solve_triangular(
                lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
            ).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return Factor(upper.contiguous(), order, strength)
    return None


def _order(diagonal: Tensor, by_activation: bool, vector_size: int) -> Tensor:
    columns = torch.arange(len(diagonal), device=diagonal.device)
    if not by_activation:
        return columns
    pairs = columns.view(-1, vector_size)
    # Stable, so that equal channels (or none at all) give the same order on every machine.
    return pairs[diagonal.view(-1, vector_size).sum(1).argsort(descending=True, stable=True)].reshape(-1)


class Table:
    """Nearest entries of a table, for the few columns that one step rounds.

    Columns are rows here: values come as ``[p, N]``.
    """

    vector_size: int
    values: Tensor
    """Float32 ``[E]`` or ``[E, 2]``."""

    def nearest(self, values: Tensor, factor: Tensor) -> Tensor:
        """int64 ``[N]``: the entry with the least ``|(values - entry) * factor|``.

        Args:
            values: float32 ``[p, N]`` in units of their scales.
            factor: ``[p, p]``, the root of what an error costs.
        """
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """float32 ``[p, N]``."""
        raise NotImplementedError


class _ScalarTable(Table):
    """A table ``[E]`` of float32, in any order."""

    vector_size = 1

    def __init__(self, values: Tensor) -> None:
        self.values = values
        ascending, self._index = values.sort(stable=True)
        self._borders = (ascending[1:] + ascending[:-1]) / 2

    def nearest(self, values: Tensor, factor: Tensor) -> Tensor:
        return self._index[torch.bucketize(values[0], self._borders)]

    def lookup(self, codes: Tensor) -> Tensor:
        return self.values[codes][None]


class _PairTable(Table):
    """A table ``[E, 2]`` of float32. Every entry is tried: a step's metric makes any of them the nearest."""

    vector_size = 2

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def nearest(self, values: Tensor, factor: Tensor) -> Tensor:
        entries = self.values @ factor
        points = values.T @ factor
        return (entries.square().sum(1) - 2 * points @ entries.T).argmin(1)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.values[codes].T


def table_for(values: Tensor) -> Table:
    """The encoder of a table, float32 ``[E]`` or ``[E, 2]``."""
    return _ScalarTable(values) if values.ndim == 1 else _PairTable(values)


def feed_back(weight: Tensor, scales: Tensor, table: Table, factor: Factor, *, block: int = BLOCK) -> Tensor:
    """Codes of a weight, each column's error made up for by the columns after it.

    Args:
        weight: float32 ``[N, K]``.
        scales: float32 ``[N, K / g]``, as they are stored.
        table: of scalars or of pairs.
        factor: of the layer's Hessian.
        block: columns between two updates of all that is behind them. It does not change the result but by
            rounding.

    Returns:
        int64 ``[N, K / p]``.
    """
    n, k = weight.shape
    size = table.vector_size
    group = k // scales.shape[1]
    order, upper = factor.order, factor.upper
    # Columns as rows: every step works on contiguous memory.
    waiting = weight.T[order].contiguous()
    scale = scales.T.contiguous()
    inverse = inverse_of(scale)
    groups, places = order // group, order[::size] // size
    codes = torch.empty(k // size, n, dtype=torch.int64, device=weight.device)
    # An error e of a step costs |e R^-1|^2, where all that follows is free and R is the factor's block.
    backs = torch.linalg.inv(diagonal_blocks(upper, size))
    for start in range(0, k, block):
        stop = min(start + block, k)
        first, last = start // size, stop // size
        mine = groups[start:stop:size]
        codes[places[first:last]], errors = recorded(
            _round_columns,
            waiting[start:stop],
            upper[start:stop, start:stop],
            backs[first:last],
            scale[mine],
            inverse[mine],
            table.values,
        )
        if stop < k:
            waiting[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _round_columns(
    waiting: Tensor, upper: Tensor, backs: Tensor, scale: Tensor, inverse: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a block of columns ``[B, N]``: codes ``[B / p, N]``, and errors for the columns behind it."""
    table = table_for(entries)
    size = table.vector_size
    codes, errors = [], torch.empty_like(waiting)
    for step, i in enumerate(range(0, len(waiting), size)):
        values = waiting[i : i + size]
        code = table.nearest(values * inverse[step], backs[step])
        codes.append(code)
        error = backs[step].T @ (values - table.lookup(code) * scale[step])
        errors[i : i + size] = error
        waiting[i + size :].addmm_(upper[i : i + size, i + size :].T, error, alpha=-1)
    return torch.stack(codes), errors


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks ``[K / size, size, size]`` on the diagonal of ``[K, K]``."""
    count = len(matrix) // size
    steps = torch.arange(count, device=matrix.device)
    return matrix.view(count, size, count, size)[steps, :, steps]
