"""Methods that see a layer's inputs: a data-free start, then error feedback and alternating least squares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.errors import QuantizationError
from flute_quant.methods.base import Encoded, InputMoments, WeightRows
from flute_quant.methods.feedback import Factor, damped, factorized, feed_back, table_for
from flute_quant.methods.recipe import Recipe
from flute_quant.methods.refine import Fitted, refit_scales, refit_table, sweep_codes
from flute_quant.methods.table_method import LearnedTable, TableMethod
from flute_quant.rotation import rotate, unrotate

__all__ = ["CalibratedMethod"]


@dataclass(frozen=True)
class CalibratedMethod:
    """A recipe on top of a data-free method, which it also falls back to.

    Args:
        name: what ``--method`` calls it.
        summary: one line for ``--help``.
        start: gives tables and the first scales; what it minimizes is weighted with the inputs' mean squares.
        start_of_pairs: in its place where vectors have two weights, or None.
        recipe: what follows.
    """

    name: str
    summary: str
    start: TableMethod
    start_of_pairs: TableMethod | None = None
    recipe: Recipe = field(default_factory=Recipe)
    wants_importance: bool = True

    @property
    def identity(self) -> str:
        """See :class:`~flute_quant.methods.base.Method`."""
        starts = (self._adapted(s).identity for s in (self.start, self.start_of_pairs) if s is not None)
        return f"{self.name} {self.recipe!r} {' or '.join(starts)}"

    def table_dtype(self, spec: QuantSpec) -> torch.dtype:
        """See :class:`~flute_quant.methods.base.Method`."""
        return self._start(spec).table_dtype(spec)

    def encode(
        self, rows: WeightRows, spec: QuantSpec, *, scale_dtype: torch.dtype, importance: Tensor | None
    ) -> Encoded:
        """The data-free start alone."""
        return self._start(spec).encode(rows, spec, scale_dtype=scale_dtype, importance=importance)

    def encode_inputs(
        self, rows: WeightRows, spec: QuantSpec, inputs: InputMoments, *, scale_dtype: torch.dtype
    ) -> tuple[Encoded, str | None]:
        """Quantize a weight for the inputs that its layer had.

        Returns:
            The result, and a clause about what was done differently, or None.
        """
        recipe = self.recipe
        hessian = inputs.hessian.to(rows.device, torch.float32, copy=True)
        if tuple(hessian.shape) != (rows.columns, rows.columns):
            raise QuantizationError(
                f"The Hessian of {rows.name} has shape {list(hessian.shape)}; "
                f"expected [{rows.columns}, {rows.columns}]."
            )
        first = self.encode(rows, spec, scale_dtype=scale_dtype, importance=inputs.importance())
        if not (recipe.feedback or recipe.rounds):
            return first, None
        note = None
        size = _vector_size(first)
        hessian = _shrunk(hessian, recipe.shrink, spec)
        factor = factorized(hessian, damping=recipe.damping, by_activation=recipe.act_order, vector_size=size)
        if factor is None:
            return first, (
                f"its Hessian has no Cholesky factor, not even with {recipe.damping * 1000:g} times its mean "
                "diagonal added, so errors are only weighted by the inputs' mean squares"
            )
        if factor.damping > recipe.damping:
            note = (
                f"damping {factor.damping:g} instead of {recipe.damping:g}, because its Hessian is singular"
            )
        weight = torch.cat([rows.read(*chunk) for chunk in rows.chunks()])
        target = weight
        if recipe.correction and inputs.drift is not None:
            target = _corrected(weight, inputs.drift.to(weight.device), factor, recipe.correction)
        fitted = _fitted(first, spec)
        matrix = damped(hessian, factor.damping)
        if recipe.feedback:
            codes = feed_back(target, fitted.scales, table_for(fitted.table), factor)
            fitted = replace(fitted, codes=codes)
        for _ in range(recipe.rounds):
            if "scales" in recipe.refit:
                fitted = refit_scales(target, fitted, matrix, scale_dtype)
            if "table" in recipe.refit:
                fitted = refit_table(target, fitted, matrix, first.codebook.dtype)
            if "codes" in recipe.refit:
                fitted = sweep_codes(target, fitted, matrix, factor.order)
        return _encoded(fitted, weight, first, spec, scale_dtype), note

    def without_data(self, spec: QuantSpec) -> TableMethod:
        """What quantizes a weight of which no inputs are known."""
        return self._start(spec)

    def _start(self, spec: QuantSpec) -> TableMethod:
        of_pairs = self.start_of_pairs if spec.vector_size == 2 else None
        return self._adapted(self.start if of_pairs is None else of_pairs)

    def _adapted(self, start: TableMethod) -> TableMethod:
        if self.recipe.table == "kmeans" and not isinstance(start.table, LearnedTable):
            return replace(start, table=LearnedTable(start.table))
        return start


def _vector_size(encoded: Encoded) -> int:
    """2 where the stored pairs are no Cartesian square of scalars."""
    return 1 if _scalars(encoded.codebook[0]) is not None else 2


def _scalars(book: Tensor) -> Tensor | None:
    """The scalar table whose entries ``[E, 1]``, or whose Cartesian square ``[E * E, 2]``, this is."""
    if book.shape[1] == 1:
        return book[:, 0]
    side = round(len(book) ** 0.5)
    first = book[:side, 0]
    same = torch.equal(book, torch.stack([first.repeat(side), first.repeat_interleave(side)], 1))
    return first if same else None


def _fitted(first: Encoded, spec: QuantSpec) -> Fitted:
    book = first.codebook[0].to(torch.float32)
    scalars = _scalars(book)
    codes = first.codes.to(torch.int64)
    if scalars is not None and spec.vector_size == 2:
        entries = len(scalars)
        codes = torch.stack([codes % entries, codes // entries], 2).flatten(1)
    return Fitted(codes, first.scales.to(torch.float32), book if scalars is None else scalars)


def _encoded(
    fitted: Fitted, weight: Tensor, first: Encoded, spec: QuantSpec, scale_dtype: torch.dtype
) -> Encoded:
    codes, table = fitted.codes, fitted.table
    if spec.vector_size == 2 and table.ndim == 1:
        entries = len(table)
        codes = codes[:, ::2] + entries * codes[:, 1::2]
        table = torch.stack([table.repeat(entries), table.repeat_interleave(entries)], 1)
    difference = weight - fitted.weight()
    return Encoded(
        codes.to(torch.uint8),
        fitted.scales.to(scale_dtype),
        table.view(len(table), -1)[None].to(first.codebook.dtype),
        float(difference.square().sum(dtype=torch.float64)),
        float(weight.square().sum(dtype=torch.float64)),
    )


def _shrunk(hessian: Tensor, strength: float, spec: QuantSpec) -> Tensor:
    """Draw a matrix to its diagonal, in the basis of the inputs themselves; may overwrite its argument.

    A rotation mixes channels on purpose: what is known of each of them is off the diagonal behind it.
    """
    if not strength:
        return hessian
    rotation = (spec.hadamard, spec.hadamard_seed)
    if spec.hadamard:
        hessian = unrotate(unrotate(hessian, *rotation).T.contiguous(), *rotation)
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - strength).diagonal().copy_(diagonal)
    if spec.hadamard:
        hessian = rotate(rotate(hessian, *rotation).T.contiguous(), *rotation)
    return hessian


def _corrected(weight: Tensor, drift: Tensor, factor: Factor, strength: float) -> Tensor:
    """The weight that gives, on the inputs of the quantized model, the outputs of the 16-bit one.

    ``W + W C^T H^-1``, where ``C`` is the mean of ``x_hat (x - x_hat)^T``.
    """
    order, upper = factor.order, factor.upper
    moved = (weight @ drift.T.to(torch.float32))[:, order]
    solved = (moved @ upper.T) @ upper
    result = weight.clone()
    result[:, order] += strength * solved
    return result
