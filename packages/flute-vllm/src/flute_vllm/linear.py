"""Linear layers of a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from flute_kernels import FormatError, QuantSpec
from flute_kernels.format import PER_ROW
from flute_vllm.dummies import loads_dummies, random_stored
from flute_vllm.parameters import STORED_DTYPES, Loads, StackedParameter, TableParameter
from flute_vllm.weight import Matrix, ReadyWeight, made_ready

__all__ = [
    "FluteLinearMethod",
    "Partition",
    "PartitionedLinearMethod",
    "attach",
    "check_columns",
]


class Partition:
    """Which part of its matrices a layer of vLLM has. The layer itself is not kept.

    Args:
        layer: being made.
        name: for messages.
        rows: of this process, for every matrix.
        columns, all_columns: of this process, and of the matrices.
        all_rows: of the layer on all processes.

    Attributes:
        matrix_rows: of every matrix on disk.
        first_column: of this process.
        tp_size: processes that share the layer.
        is_vocabulary: whether its rows are a vocabulary's.
    """

    def __init__(
        self, layer: Any, name: str, rows: Sequence[int], columns: int, all_columns: int, all_rows: int
    ) -> None:
        self.name, self.rows = name, list(rows)
        self.columns, self.all_columns = columns, all_columns
        self.tp_size = int(getattr(layer, "tp_size", 1))
        self._tp_rank = int(getattr(layer, "tp_rank", 0))
        self._kv_replicas = int(getattr(layer, "num_kv_head_replicas", 1))
        self.first_column = 0 if columns == all_columns else self._tp_rank * columns
        self.is_vocabulary = hasattr(layer, "org_vocab_size")
        self._first_word = layer.shard_indices.org_vocab_start_index if self.is_vocabulary else 0
        if hasattr(layer, "total_num_kv_heads"):  # q, k, v
            values = getattr(layer, "v_head_size", layer.head_size)
            kv_heads = layer.total_num_kv_heads
            self.matrix_rows = [
                layer.total_num_heads * layer.head_size,
                kv_heads * layer.head_size,
                kv_heads * values,
            ]
        elif self.is_vocabulary:
            self.matrix_rows = [layer.org_vocab_size]
        else:
            self.matrix_rows = list(getattr(layer, "output_sizes", [all_rows]))

    def first_row(self, index: int) -> int:
        """Of this process in matrix ``index``."""
        if self.is_vocabulary:
            return int(self._first_word)
        if self.rows[index] == self.matrix_rows[index]:
            return 0
        rank = self._tp_rank if index == 0 else self._tp_rank // self._kv_replicas
        return rank * self.rows[index]

    def check(self, spec: QuantSpec) -> None:
        """Raise FormatError unless this process's columns are whole groups, rotations and words."""
        check_columns(self.name, spec, self.columns, self.all_columns, self.tp_size)


def check_columns(name: str, spec: QuantSpec, columns: int, all_columns: int, tp_size: int) -> None:
    """Raise FormatError unless one process's columns are whole groups, rotations and words."""
    spec.check_in_features(all_columns)
    group = 32 if spec.group_size == PER_ROW else spec.group_size
    for size, what in ((group, "group"), (spec.hadamard or 1, "Hadamard block"), (32, "run of whole words")):
        if columns % size:
            raise FormatError(
                f"{name}: K = {all_columns} over tp = {tp_size} processes is {columns} each, "
                f"which the {what} of g = {size} does not divide."
            )


class PartitionedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What vLLM calls of one layer, in terms of its :class:`Partition` and of its ready weight.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._partition: Partition
        self._dtype: torch.dtype
        self._is_dummy: bool

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self._partition = Partition(
            layer, self._name, output_partition_sizes, input_size_per_partition, input_size, output_size
        )
        self._dtype, self._is_dummy = params_dtype, loads_dummies()
        self._register(layer, self._partition, params_dtype, extra["weight_loader"])

    def _register(self, layer: Any, part: Partition, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        """Give the layer the parameters that vLLM's ``loader`` fills."""
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer.flute(x, bias)
        return out


@register_weight_loader_v2_supported_method
class FluteLinearMethod(PartitionedLinearMethod):
    """One layer: its parameters while it loads, its products after.

    Args:
        specs: of the checkpoint's matrices that the layer is made of, in their order.
        name: of the layer.
    """

    def __init__(self, specs: Sequence[QuantSpec], name: str) -> None:
        super().__init__(name)
        self._specs = list(specs)
        self._loads: dict[str, Loads] = {}

    def _register(self, layer: Any, part: Partition, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        count = len(part.rows)
        if len(self._specs) == 1:
            self._specs *= count  # fused on disk
        if len(self._specs) != count or len(part.matrix_rows) != count:
            raise FormatError(
                f"{self._name}: vLLM makes {count} matrices of {len(self._specs)} in the checkpoint; "
                "flute-vllm does not know this kind of layer."
            )
        for spec in set(self._specs):
            part.check(spec)

        shapes: dict[str, list[tuple[int, int]]] = {"qweight": [], "scales": []}
        on_disk: dict[str, list[tuple[int | None, ...]]] = {"qweight": [], "scales": [], "codebook": []}
        for spec, rows, all_rows in zip(self._specs, part.rows, part.matrix_rows, strict=True):
            mine, whole = spec.shapes(rows, part.columns), spec.shapes(all_rows, part.all_columns)
            for name, of_kind in shapes.items():
                of_kind.append((mine[name][0], mine[name][1]))
                on_disk[name].append(whole[name])
            on_disk["codebook"].append((None, *whole["codebook"][1:]))
        for name, of_matrices in on_disk.items():
            # vLLM's loader of vocabularies knows tensors of their rows alone.
            load = _load_table if name == "codebook" and part.is_vocabulary else loader
            self._loads[name] = Loads(self._name, name, load, of_matrices, STORED_DTYPES[name])
        loaders = {name: loads.take for name, loads in self._loads.items()}
        layer.register_parameter(
            "qweight", StackedParameter(shapes["qweight"], torch.int32, weight_loader=loaders["qweight"])
        )
        layer.register_parameter(
            "scales", StackedParameter(shapes["scales"], torch.float16, weight_loader=loaders["scales"])
        )
        table = self._specs[0].shapes(1, part.columns)["codebook"][1:]
        layer.register_parameter(
            "codebook",
            TableParameter(
                data=torch.empty(count, *table, dtype=torch.float16), weight_loader=loaders["codebook"]
            ),
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        if "qweight" not in layer._parameters:
            return  # done already
        part = self._partition
        if self._is_dummy and "flute" not in layer._modules:
            self._fill(layer)
        else:
            for loads in self._loads.values():
                loads.finish()
        matrices = [
            Matrix(
                spec,
                layer.qweight.block(i),
                layer.scales.block(i),
                layer.codebook.tables.get(i, layer.codebook.data[i : i + 1]),
                part.first_row(i),
                part.matrix_rows[i],
            )
            for i, spec in enumerate(self._specs)
        ]
        with made_ready(part.name):
            weight = ReadyWeight(matrices, part.first_column, part.columns, part.all_columns)
        del layer.qweight, layer.scales, layer.codebook
        attach(layer, weight, part.name)
        if part.is_vocabulary:
            # Where vLLM's adapters look for the dtype and device of a head.
            nothing = torch.empty(0, dtype=self._dtype, device=layer.qweight.device)
            layer.register_buffer("weight", nothing, persistent=False)

    def _fill(self, layer: Any) -> None:
        """Give the parameters random values; every matrix has a table of its own."""
        for i, (spec, rows) in enumerate(zip(self._specs, self._partition.rows, strict=True)):
            tensors = random_stored(spec, rows, self._partition.columns, layer.qweight.device)
            layer.qweight.block(i).copy_(tensors["qweight"])
            layer.scales.block(i).copy_(tensors["scales"])
            layer.codebook.load_merged_column_weight(tensors["codebook"], shard_id=i)


def _load_table(param: TableParameter, loaded: Tensor) -> None:
    param.load_column_parallel_weight(loaded)


def attach(layer: Any, weight: ReadyWeight, name: str) -> None:
    """Give a layer its weight, or new values to the one that it has.

    vLLM's adapters read its device off an attribute of the name ``qweight``.

    Args:
        layer: of vLLM.
        weight: of all its matrices.
        name: of the layer, for messages.

    Raises:
        FormatError: the layer has a weight of another format.
    """
    if "flute" in layer._modules:
        layer.flute.overwrite(weight, name)
    else:
        layer.flute = weight
    layer.register_buffer("qweight", layer.flute.codes, persistent=False)
