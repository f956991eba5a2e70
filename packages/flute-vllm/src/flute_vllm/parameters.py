"""Parameters that vLLM's loaders fill: the stored tensors of a layer, shard by shard.

A layer of vLLM may be several matrices of the checkpoint on top of each other, and this process may have a
part of each: rows of column-parallel layers, columns of row-parallel ones. A :class:`StackedParameter` has a
block for each matrix. Blocks may differ in width, since matrices may be quantized with different bits.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter, PerTensorScaleParameter

from flute_kernels import FormatError

__all__ = [
    "STORED_DTYPES",
    "WEIGHT_DTYPES",
    "Loads",
    "StackedParameter",
    "TableParameter",
    "check_loaded",
]

STORED_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "qweight": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16),
    "codebook": (torch.float16, torch.float32),
}
"""Of the tensors that stand for a matrix on disk."""
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of a matrix before it is quantized."""


class StackedParameter(BasevLLMParameter):  # type: ignore[misc]
    """Blocks ``[rows, columns]``, one below the other where they are equally wide, else in one flat line.

    Args:
        shapes: of this process's part of every matrix.
        dtype: until a tensor of another comes.
        device: vLLM's for this process by default.
    """

    def __new__(
        cls,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> StackedParameter:
        widths = {columns for _, columns in shapes}
        size: tuple[int, ...] = (sum(rows * columns for rows, columns in shapes),)
        if len(widths) == 1:
            size = (sum(rows for rows, _ in shapes), widths.pop())
        made: StackedParameter = super().__new__(cls, data=torch.empty(size, dtype=dtype, device=device))
        return made

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        weight_loader: Callable[..., Any],
    ) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self.shapes = list(shapes)

    @property
    def output_dim(self) -> int:
        return 0

    def block(self, index: int) -> Tensor:
        """The part of matrix ``index``, a view."""
        rows, columns = self.shapes[index]
        start = sum(r * c for r, c in self.shapes[:index])
        data: Tensor = self.data
        return data.view(-1)[start : start + rows * columns].view(rows, columns)

    def _load(self, loaded: Tensor, index: int, rank: int) -> None:
        block = self.block(index)
        block.copy_(loaded.narrow(0, rank * len(block), len(block)))

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight, 0, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        block = self.block(0)
        # One scale a row serves all processes.
        first = 0 if loaded_weight.shape[1] == block.shape[1] else self.tp_rank * block.shape[1]
        block.copy_(loaded_weight.narrow(1, first, block.shape[1]))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, kwargs["shard_id"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        shard = self._shard_id_as_int(kwargs["shard_id"])
        # Each key and value head may be on several processes.
        self._load(loaded_weight, shard, self.tp_rank if shard == 0 else self.tp_rank // kwargs["num_heads"])


class TableParameter(PerTensorScaleParameter):  # type: ignore[misc]
    """Tables ``[matrices, entries, vector_size]``; a matrix that has several keeps them in :attr:`tables`.

    The base class makes vLLM fill every slot with the one table of matrices that are fused on disk.
    """

    def __init__(self, *, data: Tensor, weight_loader: Callable[..., Any]) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.tables: dict[int, Tensor] = {}

    def _load(self, loaded: Tensor, index: int = 0) -> None:
        if loaded.shape[1:] == self.data.shape[1:]:
            self.data[index].copy_(loaded[0])  # what vLLM counts where it reloads weights
        self.tables[index] = loaded.to(device=self.data.device, copy=True)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, kwargs["shard_id"])

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, self._shard_id_as_int(kwargs["shard_id"]))


@dataclass
class Loads:
    """What a layer's loader is given, checked, and what of it has come.

    Args:
        name: of the layer.
        tensor: ``qweight``, ``scales`` or ``codebook``.
        load: vLLM's loader. Where it is the layer's method, the layer is not kept: vLLM remembers loaders
            beyond a layer's life.
        shapes: of the layer's matrices on disk, where some may also be fused along the first extent. A first
            extent of None is any.
        dtypes: on disk.
    """

    name: str
    tensor: str
    load: Callable[..., Any]
    shapes: Sequence[tuple[int | None, ...]]
    dtypes: tuple[torch.dtype, ...]
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if inspect.ismethod(self.load):
            method = weakref.WeakMethod(self.load)

            def load(*arguments: Any) -> None:
                alive = method()
                assert alive is not None
                alive(*arguments)

            self.load = load

    def take(self, param: Any, loaded: Tensor, *shard: Any) -> None:
        """The ``weight_loader`` of ``param``, which vLLM also calls with meta tensors, only to count."""
        matrices = _matrices(shard[0] if shard else None, len(self.shapes))
        rows = [self.shapes[i][0] for i in matrices]
        known = [r for r in rows if r is not None]
        first = sum(known) if len(known) == len(rows) else None
        shape = (first, *self.shapes[matrices[0]][1:])
        check_loaded(f"{self.name}: {self.tensor}", loaded, shape, self.dtypes)
        if param.data.dtype != loaded.dtype:
            if self.seen and not isinstance(param, TableParameter):
                raise FormatError(
                    f"{self.name}: {self.tensor} is {_name(param.data.dtype)} in one of the layer's matrices "
                    f"and {_name(loaded.dtype)} in another."
                )
            param.data = param.data.to(loaded.dtype)
        self.load(param, loaded, *shard)
        if not param.is_meta:
            self.seen.update(matrices)

    @property
    def is_complete(self) -> bool:
        """Whether every matrix has come."""
        return len(self.seen) == len(self.shapes)

    def finish(self) -> None:
        """Begin anew; raise FormatError unless every matrix has come."""
        count = len(self.shapes)
        missing = count - len(self.seen)
        if missing:
            of = "" if count == 1 else f" of {missing} of its {count} matrices"
            raise FormatError(f"{self.name}: {self.tensor}{of} is missing from the checkpoint.")
        self.seen.clear()


def check_loaded(
    name: str, loaded: Tensor, shape: Sequence[int | None], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise FormatError unless a tensor of the checkpoint has the shape, of which None is any extent."""
    fits = loaded.ndim == len(shape) and all(
        e is None or e == f for e, f in zip(shape, loaded.shape, strict=True)
    )
    if not fits or loaded.dtype not in dtypes:
        wanted = ", ".join("T" if e is None else str(e) for e in shape)
        raise FormatError(
            f"{name} is {_name(loaded.dtype)} of shape {list(loaded.shape)}; "
            f"expected {' or '.join(map(_name, dtypes))} [{wanted}]."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matrices(shard: Any, count: int) -> list[int]:
    """Which matrices a loader's shard id stands for: one, several that are fused on disk, or all."""
    if shard is None:
        return list(range(count))
    if isinstance(shard, tuple):
        return list(shard)
    return [shard if isinstance(shard, int) else "qkv".index(shard)]
