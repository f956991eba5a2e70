"""Mixtures of experts, of a quantized checkpoint and of one that is quantized while it loads."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from flute_kernels import FormatError, QuantSpec, UnsupportedError
from flute_quant import fit_spec, quantize_tensor
from flute_vllm.dummies import loads_dummies, random_stored
from flute_vllm.experts import ACTIVATIONS, Experts, StackedExperts
from flute_vllm.linear import check_columns
from flute_vllm.parameters import STORED_DTYPES, WEIGHT_DTYPES, check_loaded
from flute_vllm.weight import Matrix, made_ready

__all__ = ["ExpertMatrix", "FluteMoEMethod", "OnlineFluteMoEMethod"]

_log = logging.getLogger("flute_vllm")
_STACKS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""What vLLM calls the parameters of the two products, to the matrices of an expert: gate and up, and down."""


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of every expert: its gate, its up or its down projection.

    Args:
        name: in the checkpoint.
        spec: of all experts.
        rows, columns: of this process's part of one expert.
        all_rows, all_columns: of the whole.
        tp_rank, tp_size: of this process among those that share each expert.
    """

    name: str
    spec: QuantSpec
    rows: int
    columns: int
    all_rows: int
    all_columns: int
    tp_rank: int
    tp_size: int

    @property
    def first_row(self) -> int:
        return 0 if self.rows == self.all_rows else self.tp_rank * self.rows

    def part(self, whole: Tensor, columns: int) -> Tensor:
        """This process's rows, and as many ``columns`` of its own: one scale a row serves all processes."""
        first = 0 if whole.shape[1] == columns else self.tp_rank * columns
        return whole[self.first_row : self.first_row + self.rows, first : first + columns]


class _MoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What vLLM calls of the experts of one layer.

    Of what comes for an expert, this process's part waits, quantized, until all are here, as one weight.

    Args:
        layer: being made.
        specs: of the gate and up projections, ``w13``, and of the down projections, ``w2``.
        name: of the layer.

    Raises:
        UnsupportedError: the layer has something that is not implemented.
    """

    on_disk: ClassVar[Mapping[str, tuple[torch.dtype, ...]]]
    """The tensors of each matrix in the checkpoint, and their dtypes."""

    def __init__(self, layer: Any, specs: Mapping[str, QuantSpec], name: str) -> None:
        super().__init__(layer.moe_config)
        _refuse_what_is_not_implemented(layer, name)
        self._specs, self._name = dict(specs), name
        self._matrices: dict[str, ExpertMatrix] = {}
        self._waiting: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._device: torch.device
        self._is_dummy = loads_dummies()
        self._dtype: torch.dtype

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: it is for vLLM's own kernels."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        config, inner = layer.moe_config, intermediate_size_per_partition
        hidden = int(extra.get("unpadded_hidden_size", hidden_size))
        if hidden != hidden_size:
            raise UnsupportedError(
                f"{self._name}: this kind of expert parallelism pads K = {hidden} to {hidden_size}, "
                "which groups of weights cannot follow."
            )
        for shard, name, rows, columns, all_rows, all_columns in (
            ("w1", layer.ckpt_gate_proj_name, inner, hidden, config.intermediate_size, hidden),
            ("w3", layer.ckpt_up_proj_name, inner, hidden, config.intermediate_size, hidden),
            ("w2", layer.ckpt_down_proj_name, hidden, inner, hidden, config.intermediate_size),
        ):
            spec = self._specs["w2" if shard == "w2" else "w13"]
            whole = (all_rows, all_columns, config.tp_rank, config.tp_size)
            self._matrices[shard] = self._fitted(ExpertMatrix(name, spec, rows, columns, *whole))
        self._device, self._dtype = torch.get_default_device(), params_dtype
        for stack, shards in _STACKS.items():
            for tensor in self.on_disk:
                # Nothing lies in it: it is where vLLM looks for the loader of a tensor, and for how much
                # is to come.
                part = self._part_shape(self._matrices[shards[0]], tensor)
                shape = (num_experts, len(shards), *part)
                empty = torch.empty(shape, dtype=params_dtype, device="meta")
                place = nn.Parameter(empty, requires_grad=False)
                set_weight_attrs(place, {"weight_loader": self._loader(layer, tensor)})
                layer.register_parameter(f"{stack}_{tensor}", place)

    def _loader(self, layer: Any, tensor: str) -> Callable[..., bool | None]:
        """What vLLM calls with each expert's ``tensor``; it keeps loaders beyond a layer's life."""
        this, of_layer = weakref.ref(self), weakref.ref(layer)

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            method, owner = this(), of_layer()
            assert method is not None
            loaded = method._load(owner, tensor, param, loaded_weight, shard_id, expert_id)
            return loaded if return_success else None

        return load

    def _load(
        self,
        layer: Any,
        tensor: str,
        param: nn.Parameter,
        loaded: Tensor,
        shard_id: str,
        expert_id: int,
    ) -> bool:
        """Take one tensor of one expert; False where another process has it."""
        local = layer.expert_map_manager.map_global_to_local(expert_id)
        if local >= 0:
            matrix = self._matrices[shard_id]
            name = f"{self._name}.{expert_id}.{matrix.name}"
            if param.is_meta and "flute" in layer._modules:  # vLLM reloads, and counts what will come
                part = param[local, 1 if shard_id == "w3" else 0]
                part.copy_(torch.empty_like(part))
            else:
                waiting = self._waiting.setdefault((shard_id, local), {})
                waiting.update(self._stored(matrix, name, tensor, loaded))
        return bool(local >= 0)

    def process_weights_after_loading(self, layer: Any) -> None:
        places = [f"{stack}_{tensor}" for stack in _STACKS for tensor in self.on_disk]
        if places[0] not in layer._parameters:
            return  # done already
        count = layer.local_num_experts
        if self._is_dummy and "flute" not in layer._modules:
            self._waiting = _random(self._matrices, count, self._device)
        self._check_complete(layer)
        with made_ready(self._name):
            gate_up, down = (self._stacked(shards, count) for shards in _STACKS.values())
            on_input = bool(layer.apply_router_weight_on_input)
            experts = Experts(gate_up, down, count, layer.activation, on_input)
        for place in places:
            delattr(layer, place)
        if "flute" in layer._modules:
            layer.flute.overwrite(experts, self._name)
        else:
            layer.flute = experts

    def _check_complete(self, layer: Any) -> None:
        for number in range(layer.global_num_experts):
            local = layer.expert_map_manager.map_global_to_local(number)
            for shard, matrix in self._matrices.items():
                waiting = self._waiting.get((shard, local), {})
                missing = [tensor for tensor in STORED_DTYPES if tensor not in waiting]
                if local >= 0 and missing:
                    tensor = missing[0] if missing[0] in self.on_disk else next(iter(self.on_disk))
                    raise FormatError(
                        f"{self._name}.{number}.{matrix.name}: {tensor} is missing from the checkpoint."
                    )

    def _stacked(self, shards: tuple[str, ...], count: int) -> StackedExperts:
        matrices = []
        for local in range(count):
            for shard in shards:
                matrix, tensors = self._matrices[shard], self._waiting.pop((shard, local))
                matrices.append(
                    Matrix(
                        matrix.spec,
                        tensors["qweight"],
                        tensors["scales"],
                        tensors["codebook"],
                        matrix.first_row,
                        matrix.all_rows,
                    )
                )
        first, whole = self._signs(matrix)
        return StackedExperts(matrices, first, matrix.columns, whole)

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **more: Any
    ) -> Tensor:
        """The routed experts alone: vLLM runs shared ones beside them."""
        out: Tensor = layer.flute(x, topk_weights, topk_ids, layer.expert_map)
        return out

    def _fitted(self, matrix: ExpertMatrix) -> ExpertMatrix:
        """With the spec that this process's part can have; raises FormatError where there is none."""
        raise NotImplementedError

    def _part_shape(self, matrix: ExpertMatrix, tensor: str) -> tuple[int, ...]:
        """Of this process's part of one expert's tensor."""
        raise NotImplementedError

    def _stored(self, matrix: ExpertMatrix, name: str, tensor: str, loaded: Tensor) -> dict[str, Tensor]:
        """Of one expert's tensor, what is to wait: this process's part, quantized, on its device."""
        raise NotImplementedError

    def _signs(self, matrix: ExpertMatrix) -> tuple[int, int]:
        """Where this process's columns begin, and how many there are, as a rotation's signs count them."""
        raise NotImplementedError


class FluteMoEMethod(_MoEMethod):
    """The experts of one layer of a quantized checkpoint."""

    on_disk: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = STORED_DTYPES

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        super().create_weights(layer, *sizes, **more)
        layer.load_weights = partial(_load_weights, layer.load_weights)

    def _fitted(self, matrix: ExpertMatrix) -> ExpertMatrix:
        name = f"{self._name}.*.{matrix.name}"
        check_columns(name, matrix.spec, matrix.columns, matrix.all_columns, matrix.tp_size)
        return matrix

    def _part_shape(self, matrix: ExpertMatrix, tensor: str) -> tuple[int, ...]:
        return matrix.spec.shapes(matrix.rows, matrix.columns)[tensor]

    def _stored(self, matrix: ExpertMatrix, name: str, tensor: str, loaded: Tensor) -> dict[str, Tensor]:
        whole = matrix.spec.shapes(matrix.all_rows, matrix.all_columns)[tensor]
        if tensor == "codebook":
            entries = whole[1]
            if loaded.ndim == 2 and len(loaded) % entries == 0:
                loaded = loaded.unflatten(0, (-1, entries))
            check_loaded(f"{name}: {tensor}", loaded, (None, *whole[1:]), self.on_disk[tensor])
        else:
            check_loaded(f"{name}: {tensor}", loaded, whole, self.on_disk[tensor])
            loaded = matrix.part(loaded, self._part_shape(matrix, tensor)[1])
        if tensor != "qweight" and not loaded.isfinite().all():
            bad = int((~loaded.isfinite()).sum())
            raise FormatError(
                f"{name}: {tensor} has {bad} of {loaded.numel()} values that are NaN or infinite; "
                "expected none."
            )
        return {tensor: loaded.to(self._device, copy=True).contiguous()}

    def _signs(self, matrix: ExpertMatrix) -> tuple[int, int]:
        first = 0 if matrix.columns == matrix.all_columns else matrix.tp_rank * matrix.columns
        return first, matrix.all_columns


class OnlineFluteMoEMethod(_MoEMethod):
    """The experts of one layer of a 16-bit checkpoint: each matrix is quantized when it comes.

    Args:
        layer, specs, name: as for the base; a layer takes what its K allows of the specs.
        method: of ``flute_quant``.
    """

    on_disk: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"weight": WEIGHT_DTYPES}

    def __init__(self, layer: Any, specs: Mapping[str, QuantSpec], name: str, method: str) -> None:
        super().__init__(layer, specs, name)
        self._method = method

    def _fitted(self, matrix: ExpertMatrix) -> ExpertMatrix:
        spec, note = fit_spec(matrix.spec, matrix.columns)
        if note:
            _log.info("%s.*.%s: %s", self._name, matrix.name, note)
        return replace(matrix, spec=spec)

    def _part_shape(self, matrix: ExpertMatrix, tensor: str) -> tuple[int, ...]:
        return matrix.rows, matrix.columns

    def _stored(self, matrix: ExpertMatrix, name: str, tensor: str, loaded: Tensor) -> dict[str, Tensor]:
        whole = (matrix.all_rows, matrix.all_columns)
        check_loaded(f"{name}: {tensor}", loaded, whole, self.on_disk[tensor])
        weight = matrix.part(loaded, matrix.columns).to(self._device, self._dtype)
        with made_ready(name):
            linear, _ = quantize_tensor(weight, matrix.spec, method=self._method, name="weight")
        return {"qweight": linear.qweight, "scales": linear.scales, "codebook": linear.codebook}

    def _signs(self, matrix: ExpertMatrix) -> tuple[int, int]:
        return 0, matrix.columns  # what is rotated is this process's part


def _refuse_what_is_not_implemented(layer: Any, name: str) -> None:
    has = []
    if layer.activation not in ACTIVATIONS:
        known = ", ".join(kind.value for kind in ACTIVATIONS)
        has.append(f"the activation {layer.activation.value} (there are {known})")
    if layer.moe_config.has_bias:
        has.append("biases")
    if get_current_vllm_config().lora_config is not None:
        has.append("LoRA adapters")  # vLLM would put them on the experts, whatever their targets
    for limit in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
        if getattr(layer, limit) is not None:
            has.append(f"{limit} = {getattr(layer, limit)}")
    if layer.apply_router_weight_on_input and layer.top_k != 1:
        has.append(f"router weights on the input of {layer.top_k} experts at once (1 can be)")
    if has:
        raise UnsupportedError(
            f"{name} is a mixture of experts with {' and '.join(has)}, which flute-vllm does not have."
        )


def _load_weights(
    load: Callable[[Iterable[tuple[str, Tensor]]], Iterable[str]], weights: Iterable[tuple[str, Tensor]]
) -> Iterable[str]:
    """vLLM's loader of a layer, which takes whatever has three dimensions for all experts in one tensor."""
    return load((name, t.flatten(0, 1) if name.endswith(".codebook") else t) for name, t in weights)


def _random(
    matrices: Mapping[str, ExpertMatrix], experts: int, device: torch.device
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Random weights for measuring; every expert has the same codes, and tables of its own."""
    made = {}
    for shard, matrix in matrices.items():
        tensors = random_stored(matrix.spec, matrix.rows, matrix.columns, device)
        for local in range(experts):
            own = torch.randn_like(tensors["codebook"]).sort(dim=1).values
            made[shard, local] = {**tensors, "codebook": own}
    return made
