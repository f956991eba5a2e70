"""Methods that are a table and a rule for scales: all of the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.codebooks import cartesian_square, stored_table
from flute_quant.errors import QuantizationError
from flute_quant.methods.base import Encoded, WeightRows
from flute_quant.methods.nearest import Nearest, nearest_for
from flute_quant.methods.parallel import map_chunks
from flute_quant.methods.scales import AbsMax, Fit, Search

# As for a weight's own chunks on a CPU.
_LEARN_CHUNK = 1 << 16

__all__ = ["LearnedTable", "TableMethod", "TableSource"]

TableSource = Callable[[QuantSpec], Tensor]
"""A spec to float32 ``[2**bits]`` scalars or ``[2**(2 * bits), 2]`` pairs."""


@dataclass(frozen=True)
class LearnedTable:
    """Fit the table to each tensor: Lloyd's algorithm over a sample of its rows, scales included.

    Args:
        start: the table that the iteration starts from.
        rounds: alternations between codes and scales on one side, entries on the other.
        sample: weights of a tensor that are looked at.
    """

    start: TableSource
    rounds: int = 12
    sample: int = 1 << 18


@dataclass(frozen=True)
class TableMethod:
    """A table (fixed, or learned for each tensor) and a rule that chooses the scale of each group.

    Args:
        name: what ``--method`` calls it.
        summary: one line for ``--help``.
        table: where the table comes from.
        scales: :class:`AbsMax` or :class:`Search`.
        exact: keep table values that float16 cannot hold, in float32.
        table_key: tells tables apart that share a name.
        wants_importance: see :class:`~flute_quant.methods.base.Method`.
    """

    name: str
    summary: str
    table: TableSource | LearnedTable
    scales: AbsMax | Search
    exact: bool = False
    table_key: str = ""
    wants_importance: bool = False

    @property
    def identity(self) -> str:
        """See :class:`~flute_quant.methods.base.Method`."""
        learned = ""
        if isinstance(self.table, LearnedTable):
            learned = f"learned in {self.table.rounds} rounds from {self.table.sample} weights"
        return f"{self.name} {self.scales!r} {learned} {self.table_key}"

    def table_dtype(self, spec: QuantSpec) -> torch.dtype:
        """See :class:`~flute_quant.methods.base.Method`. Also raises what the table has against the spec."""
        if isinstance(self.table, LearnedTable):
            return torch.float16
        return stored_table(self.table(spec), exact=self.exact).dtype

    def encode(
        self, rows: WeightRows, spec: QuantSpec, *, scale_dtype: torch.dtype, importance: Tensor | None
    ) -> Encoded:
        """See :class:`~flute_quant.methods.base.Method`."""
        spec.check_in_features(rows.columns)
        if importance is not None:
            importance = _checked_importance(importance, rows)
        source = self.table
        if isinstance(source, LearnedTable):
            table = self._learn(source, rows, spec, scale_dtype, importance)
            table = stored_table(table)
            nearest = nearest_for(table.to(rows.device, torch.float32))
        else:
            table, nearest = _prepared(source, spec.bits, spec.vector_size, self.exact, rows.device)
        return self._encode_with(table, nearest, rows, spec, scale_dtype, importance)

    def _encode_with(
        self,
        table: Tensor,
        nearest: Nearest,
        rows: WeightRows,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
        importance: Tensor | None,
    ) -> Encoded:
        n, k, device = rows.rows, rows.columns, rows.device
        group = spec.group_size_for(k)
        codes = torch.empty(n, k // spec.vector_size, dtype=torch.uint8, device=device)
        scales = torch.empty(n, k // group, dtype=scale_dtype, device=device)

        def work(start: int, stop: int) -> tuple[float, float]:
            groups = rows.read(start, stop).view(-1, group)
            largest = groups.abs().amax(1)
            _check_range(largest, float(nearest.table.abs().max()), scale_dtype, rows.name)
            unit = torch.where(largest > 0, largest, 1.0)
            u = groups / unit[:, None]
            spread = None if importance is None else _spread(importance, stop - start, group)
            fit = self.scales.fit(u, nearest, _rounding(unit, scale_dtype), spread)
            scales[start:stop] = (fit.scales * unit).to(scale_dtype).view(stop - start, -1)
            codes[start:stop] = _join(fit.codes, spec, nearest).view(stop - start, -1)
            # A scale that rounds to zero makes every weight of its group zero.
            squares = u.square().sum(1)
            lost = torch.where(fit.scales == 0, squares, fit.squared_error)
            scale2 = unit.double().square()
            return float((lost.double() * scale2).sum()), float((squares.double() * scale2).sum())

        if isinstance(self.scales, Search):
            self.scales.prepare(nearest)  # before the threads, which would each do it
        sums = map_chunks(work, rows.chunks(), device)
        error, energy = (sum(column) for column in zip(*sums, strict=True))
        _check_underflow(scales, energy, rows.name)
        if table.ndim == 1:
            table = cartesian_square(table) if spec.vector_size == 2 else table[:, None]
        # A copy: the table at hand is shared by every weight of this process.
        return Encoded(codes, scales, table[None].to(device, copy=True), error, energy)

    def _learn(
        self,
        source: LearnedTable,
        rows: WeightRows,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
        importance: Tensor | None,
    ) -> Tensor:
        group = spec.group_size_for(rows.columns)
        wanted = max(1, source.sample // rows.columns)
        step = max(1, rows.rows // wanted)
        sample = torch.cat([rows.read(i, i + 1) for i in range(0, rows.rows, step)][:wanted])
        # On the CPU whatever the device: a megabyte, and the same table everywhere.
        groups = sample.cpu().view(-1, group)
        unit = groups.abs().amax(1)
        unit = torch.where(unit > 0, unit, 1.0)
        u = groups / unit[:, None]
        spread = None if importance is None else _spread(importance.cpu(), len(sample), group)
        size = max(1, _LEARN_CHUNK // group)
        chunks = [(i, min(i + size, len(u))) for i in range(0, len(u), size)]
        table = source.start(spec)
        for _ in range(source.rounds):
            nearest = nearest_for(table)
            if isinstance(self.scales, Search):
                self.scales.prepare(nearest)

            def fit(start: int, stop: int, nearest: Nearest = nearest) -> Fit:
                weight = None if spread is None else spread[start:stop]
                return self.scales.fit(
                    u[start:stop], nearest, _rounding(unit[start:stop], scale_dtype), weight
                )

            fits = map_chunks(fit, chunks, u.device)
            codes, scales = torch.cat([f.codes for f in fits]), torch.cat([f.scales for f in fits])
            table = _centroids(u, codes, scales, spread, table)
        return table / table.abs().max()


def _centroids(u: Tensor, codes: Tensor, scales: Tensor, weight: Tensor | None, table: Tensor) -> Tensor:
    """Entries with the least squared error given codes and scales; an entry without weights stays."""
    entries, size = table.shape[0], 1 if table.ndim == 1 else 2
    gain = (scales.square()[:, None] * (torch.ones_like(u) if weight is None else weight)).view(-1, size)
    pull = (u * scales[:, None] * (1.0 if weight is None else weight)).view(-1, size)
    index = codes.reshape(-1)
    moved = table.reshape(entries, size).clone()
    for axis in range(size):
        under = torch.bincount(index, gain[:, axis].double(), entries)
        over = torch.bincount(index, pull[:, axis].double(), entries)
        moved[:, axis] = torch.where(under > 0, over / under.clamp_min(1e-30), moved[:, axis].double())
    return moved.view(table.shape)


@lru_cache(maxsize=32)
def _prepared(
    source: TableSource, bits: int, vector_size: int, exact: bool, device: torch.device
) -> tuple[Tensor, Nearest]:
    """The stored table and its encoder, which works on the values as they are stored."""
    table = stored_table(source(QuantSpec(bits=bits, vector_size=vector_size)), exact=exact)
    return table, nearest_for(table.to(device, torch.float32))


def _join(codes: Tensor, spec: QuantSpec, nearest: Nearest) -> Tensor:
    """Codes as the spec counts them: two scalar codes make one of a Cartesian square."""
    if spec.vector_size == 2 and nearest.vector_size == 1:
        return (codes[:, ::2] + (codes[:, 1::2] << spec.bits)).to(torch.uint8)
    return codes.to(torch.uint8)


def _rounding(unit: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Relative scales to those that ``dtype`` can hold once multiplied with their group's largest weight."""
    limit = torch.finfo(dtype).max

    def round_(relative: Tensor) -> Tensor:
        return (relative * unit).clamp_(-limit, limit).to(dtype).to(torch.float32) / unit

    return round_


def _spread(importance: Tensor, rows: int, group: int) -> Tensor:
    return importance.expand(rows, -1).reshape(-1, group)


def _checked_importance(importance: Tensor, rows: WeightRows) -> Tensor:
    if tuple(importance.shape) != (rows.columns,) or not bool(
        (torch.isfinite(importance) & (importance >= 0)).all()
    ):
        raise QuantizationError(
            f"The importance of {rows.name} has shape {list(importance.shape)} and values from "
            f"{float(importance.min()):.3g}; expected [{rows.columns}], finite and not negative."
        )
    importance = importance.to(rows.device, torch.float32)
    return importance / importance.mean().clamp_min(1e-30)


def _check_range(largest: Tensor, top: float, dtype: torch.dtype, name: str) -> None:
    limit = torch.finfo(dtype).max
    most = float(largest.max())
    if most / top > limit:
        raise QuantizationError(
            f"{name} has a weight of {most:.6g}, whose scale {most / top:.6g} is above the largest "
            f"{str(dtype).removeprefix('torch.')} {limit:.6g}; "
            f"bfloat16 scales reach {torch.finfo(torch.bfloat16).max:.3g}."
        )


def _check_underflow(scales: Tensor, energy: float, name: str) -> None:
    """Single groups may round to zero; a whole weight that does is a model that was not meant for 16 bits."""
    smallest = torch.finfo(scales.dtype).smallest_normal
    most = float(scales.abs().max())
    if energy > 0 and most < smallest:
        raise QuantizationError(
            f"The largest scale of {name} is {most:.3g}, below the smallest normal "
            f"{str(scales.dtype).removeprefix('torch.')} {smallest:.3g}; "
            f"bfloat16 scales reach down to {torch.finfo(torch.bfloat16).smallest_normal:.3g}."
        )
