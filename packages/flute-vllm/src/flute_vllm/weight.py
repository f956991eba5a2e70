"""The weight of a layer, ready for the kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flute_kernels import FluteError, FormatError, LutWeight, QuantizedLinear, QuantSpec, hadamard, qgemm
from flute_kernels.format import hadamard_signs
from flute_kernels.packed import PackedWeight

__all__ = ["InPlace", "Matrix", "Packed", "ReadyWeight", "Rotation", "as_one", "made_ready"]

_SEGMENT = 16
"""Rows of one table come in multiples of this where a weight has several."""


@contextlib.contextmanager
def made_ready(name: str) -> Iterator[None]:
    """While the weights of layer ``name`` are quantized or laid out: its name is put before what goes wrong.

    vLLM loads under the GPU as default device, and in inference mode, neither of which is this code's matter.
    """
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            yield
    except FluteError as error:
        raise type(error)(f"{name}: {error}") from None


@dataclass
class Matrix:
    """This process's part of one matrix of the checkpoint.

    Args:
        spec: of the whole matrix.
        qweight, scales: of the part.
        tables: ``[T, entries, vector_size]`` of the whole matrix.
        first_row, all_rows: where the part lies in the whole.
    """

    spec: QuantSpec
    qweight: Tensor
    scales: Tensor
    tables: Tensor
    first_row: int
    all_rows: int

    @property
    def rows(self) -> int:
        return len(self.qweight)

    def segments(self) -> list[tuple[int, Tensor]]:
        """Numbers of rows and the table of each run of them that has one table."""
        count = len(self.tables)
        row = torch.arange(self.first_row, self.first_row + self.rows, device="cpu")
        of_row = (row * count // self.all_rows).clamp(max=count - 1)  # padding of a vocabulary lies beyond
        numbers, rows = torch.unique_consecutive(of_row, return_counts=True)
        return [(int(r), self.tables[int(n)]) for n, r in zip(numbers, rows, strict=True)]

    @property
    def plain_spec(self) -> QuantSpec:
        """The spec without its rotation, which is the input's matter; one scale a row stays one."""
        return replace(self.spec, hadamard=0, hadamard_seed=0)


def as_one(matrices: Sequence[Matrix]) -> QuantizedLinear | None:
    """Matrices on top of each other as one weight, or None where kernels could not tell the tables apart."""
    specs = {m.plain_spec for m in matrices}
    alike = {(m.scales.dtype, m.tables.dtype) for m in matrices}
    if len(specs) > 1 or len(alike) > 1:
        return None
    segments = [segment for m in matrices for segment in m.segments()]
    tables = [table for _, table in segments]
    codebook = tables[0][None]
    if any(not torch.equal(table, tables[0]) for table in tables[1:]):
        unit = math.gcd(*(rows for rows, _ in segments))
        if unit % _SEGMENT:
            return None
        codebook = torch.stack([table for rows, table in segments for _ in range(rows // unit)])
    qweight = torch.cat([m.qweight for m in matrices])
    scales = torch.cat([m.scales for m in matrices])
    return QuantizedLinear(specs.pop(), qweight, scales, codebook)


class Rotation(nn.Module):
    """The rotation of the input that matrices share, in this process's columns; none where the block is 0.

    Args:
        matrices: all see the same input, so that their rotations must be the same.
        first_column, columns: which columns of the whole matrices the parts have.
        all_columns: of the whole.

    Raises:
        FormatError: rotations differ.
    """

    signs: Tensor | None

    def __init__(self, matrices: Sequence[Matrix], first_column: int, columns: int, all_columns: int) -> None:
        super().__init__()
        rotations = {(m.spec.hadamard, m.spec.hadamard_seed) for m in matrices}
        if len(rotations) > 1:
            raise FormatError(
                f"matrices that vLLM runs as one layer have rotations (block, seed) {sorted(rotations)}; "
                "they see the same input, so these must be the same."
            )
        self.block, seed = rotations.pop()
        signs = None
        if self.block:
            signs = hadamard_signs(all_columns, seed)[first_column : first_column + columns]
            signs = signs.to(matrices[0].qweight.device)
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs, self.block) if self.block else x


class InPlace(nn.Module):
    """A module into whose tensors new weights can be written: CUDA graphs know them by their addresses.

    vLLM takes a module's buffers away while it reloads weights and gives them back after, so that they are
    kept under another name, too.
    """

    _kept: dict[str, Tensor]

    def _keep(self) -> None:
        """Remember the tensors; to be called when all are there."""
        self._kept = dict(self.named_buffers())

    def overwrite(self, new: InPlace, name: str) -> None:
        """Take the values of another such module.

        Raises:
            FormatError: its tensors do not fit into this one's; ``name`` is in the message.
        """
        theirs = dict(new._kept)
        for key, mine in self._kept.items():
            place, _, kind = key.rpartition(".")
            tables = theirs.get(f"{place}.tables")
            if kind == "table_of_block" and key not in theirs and tables is not None and len(tables) == 1:
                # All rows of the new weight have the same table, whichever of the old ones was theirs.
                theirs[key] = mine
                theirs[f"{place}.tables"] = tables.expand(
                    len(self._kept[f"{place}.tables"]), *tables.shape[1:]
                )
        for key in {**self._kept, **theirs}:
            mine_is, theirs_is = _described(self._kept.get(key)), _described(theirs.get(key))
            if mine_is != theirs_is:
                raise FormatError(
                    f"{name}: {key.rpartition('.')[2]} of the new weights is {theirs_is}, of those in use "
                    f"{mine_is}; new weights are to be of the same format."
                )
        with torch.no_grad():
            for key, mine in self._kept.items():
                mine.copy_(theirs[key])


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class ReadyWeight(InPlace):
    """``x @ W_hat.T + bias`` for the matrices of a layer, in the kernels' layout.

    They are one weight if they can be, else one each, whose results are put side by side.

    Args:
        matrices: on top of each other.
        first_column, columns, all_columns: as for :class:`Rotation`.

    Raises:
        FormatError: rotations differ; a tensor is not as the format says.
    """

    def __init__(self, matrices: Sequence[Matrix], first_column: int, columns: int, all_columns: int) -> None:
        super().__init__()
        self.rotation = Rotation(matrices, first_column, columns, all_columns)
        one = as_one(matrices)
        linears = [one] if one is not None else [_alone(m) for m in matrices]
        self.parts = [Packed(LutWeight.from_linear(linear)) for linear in linears]
        self.weights = nn.ModuleList(self.parts)
        self._codes = self.parts[0].codes
        self._keep()

    @property
    def codes(self) -> Tensor:
        """Of the first weight."""
        return self._codes

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.rotation(x)
        if len(self.parts) == 1:
            return self.parts[0].multiply(x, bias)
        biases: Sequence[Tensor | None] = [None] * len(self.parts)
        if bias is not None:
            biases = bias.split([part.out_features for part in self.parts])
        return torch.cat([p.multiply(x, b) for p, b in zip(self.parts, biases, strict=True)], dim=-1)


def _alone(matrix: Matrix) -> QuantizedLinear:
    linear = as_one([matrix])
    if linear is None:
        lengths = [rows for rows, _ in matrix.segments()]
        raise FormatError(
            f"the {len(matrix.tables)} tables of {matrix.all_rows} rows serve {lengths} of this process's "
            f"{matrix.rows} rows; kernels need multiples of {_SEGMENT}."
        )
    return linear


class Packed(nn.Module):
    """One weight's tensors, as buffers, so that compiled code and graphs know them as inputs."""

    codes: Tensor
    scales: Tensor
    tables: Tensor
    table_of_block: Tensor | None

    def __init__(self, weight: LutWeight) -> None:
        super().__init__()
        packed = weight.packed
        for name in ("codes", "scales", "tables", "table_of_block"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.bits, self.vector_size = packed.bits, packed.vector_size
        self.group_size = packed.group_size

    @property
    def operands(self) -> PackedWeight:
        """What the operators take of a weight."""
        return PackedWeight(
            self.codes,
            self.scales,
            self.tables,
            self.table_of_block,
            self.out_features,
            self.in_features,
            self.bits,
            self.vector_size,
            self.group_size,
        )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return qgemm(x, *self.operands, bias)
