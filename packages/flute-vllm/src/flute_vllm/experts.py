"""The experts of a layer, ready for the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from flute_kernels import FormatError, LutWeight, qgemm_grouped
from flute_vllm.routing import route
from flute_vllm.weight import InPlace, Matrix, Packed, Rotation, as_one

__all__ = ["ACTIVATIONS", "Experts", "StackedExperts"]

ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
"""Of the gate, between the two products."""


class StackedExperts(nn.Module):
    """Rows of x, sorted by expert, each times its own expert's matrix.

    Args:
        matrices: of one expert after the other, on top of each other.
        first_column, columns, all_columns: as for :class:`~flute_vllm.weight.Rotation`.

    Raises:
        FormatError: rotations or dtypes differ; a tensor is not as the format says.
    """

    def __init__(self, matrices: Sequence[Matrix], first_column: int, columns: int, all_columns: int) -> None:
        super().__init__()
        self.rotation = Rotation(matrices, first_column, columns, all_columns)
        one = as_one(matrices)
        if one is None:
            raise FormatError(_difference(matrices))
        self.packed = Packed(LutWeight.from_linear(one))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """``[rows, N]`` for ``x`` ``[rows, K]``, rotated already; zeros below the last expert's rows."""
        return qgemm_grouped(x, counts, *self.packed.operands)


def _difference(matrices: Sequence[Matrix]) -> str:
    """Why matrices are not one weight."""
    for what, kinds in (
        ("scales", {m.scales.dtype for m in matrices}),
        ("codebook", {m.tables.dtype for m in matrices}),
    ):
        if len(kinds) > 1:
            names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            return f"{what} of the experts are {names}; the experts of a layer are one weight, of one dtype."
    first = matrices[0]
    lengths = [rows for rows, _ in first.segments()]
    return (
        f"the {len(first.tables)} tables of {first.all_rows} rows serve {lengths} of this process's "
        f"{first.rows} rows; kernels need multiples of 16."
    )


class Experts(InPlace):
    """What the experts of this process add to each token.

    Args:
        gate_up: of every expert, its gate above its up projection.
        down: of every expert.
        count: experts of this process.
        activation: of the gate.
        weights_on_input: whether the router's weights multiply what an expert sees, not what it says.
    """

    def __init__(
        self,
        gate_up: StackedExperts,
        down: StackedExperts,
        count: int,
        activation: MoEActivation,
        weights_on_input: bool,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.count, self.activation, self.weights_on_input = count, activation, weights_on_input
        self._keep()

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None) -> Tensor:
        """``[tokens, hidden]`` for ``x`` of the same shape, and the router's choice ``[tokens, k]``."""
        pairs = route(ids, self.count, expert_map)
        rows = self.gate_up.rotation(x)[pairs.token]  # rotated once, though several experts see it
        if self.weights_on_input:
            rows = rows * weights.flatten()[pairs.token].unsqueeze(-1).to(rows.dtype)
            weights = torch.ones_like(weights)
        gate_up = self.gate_up(rows, pairs.counts)
        inner = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        apply_moe_activation(self.activation, inner, gate_up)
        return pairs.combine(self.down(self.down.rotation(inner), pairs.counts), weights)
