"""What a quantized checkpoint will contain: every tensor of every file, before any weight is read."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flute_kernels import QuantizationConfig, QuantSpec
from flute_kernels.format import QUANT_METHOD
from flute_quant.checkpoint.names import parameter_names
from flute_quant.checkpoint.safetensors_reader import DTYPE_NAMES, DTYPES
from flute_quant.checkpoint.safetensors_writer import TensorSlot, file_size
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.structure import build_structure
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.methods import Method, resolve_method
from flute_quant.patterns import Override, matches
from flute_quant.plan import DEFAULT_IGNORE, PlannedLinear, QuantizationPlan, plan_modules

__all__ = ["DTYPE_OPTIONS", "CheckpointPlan", "Coverage", "Shard", "plan_folder"]

DTYPE_OPTIONS = ("auto", "keep", "bfloat16", "float16")
_FLOATS = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Shard:
    """One output file.

    Args:
        file: its name, as in the source.
        linears: source tensor name to the module that it is quantized as.
        passed: source tensor name to the dtype that it is written in.
        slots: all tensors of the output file.
        buffers: those of ``passed`` that are no parameters; they are copied as they are, infinities too.
    """

    file: str
    linears: dict[str, PlannedLinear]
    passed: dict[str, str]
    slots: tuple[TensorSlot, ...]
    buffers: frozenset[str]


@dataclass(frozen=True)
class Coverage:
    """Where a checkpoint's parameters went.

    Args:
        total: all floating-point parameters.
        quantized: those in quantized linears.
        embeddings: in embeddings and output heads, which stay in 16 bits.
        ignored: in linears that the user left out.
        kept: linears left in 16 bits to the reason.
        not_covered: weights of a layout that is not quantized (3-D experts, convolutions), as
            ``(pattern, tensors, parameters)``, numbers replaced by ``*``.
    """

    total: int
    quantized: int
    embeddings: int
    ignored: int
    kept: dict[str, str]
    not_covered: tuple[tuple[str, int, int], ...]

    @property
    def fraction(self) -> float:
        """Quantized parameters among those that are in no embedding and were not ignored on request."""
        rest = self.total - self.embeddings - self.ignored
        return self.quantized / rest if rest else 0.0

    def require(self, minimum: float) -> None:
        """Raise QuantizationError below a fraction, naming what is missing."""
        if self.fraction >= minimum:
            return
        missing = "; ".join(f"{n:,} parameters in {c} tensors {p}" for p, c, n in self.not_covered[:3])
        raise QuantizationError(
            f"Only {self.fraction:.1%} of the parameters outside of embeddings would be quantized, "
            f"below the minimum of {minimum:.0%}" + (f" (not covered: {missing})." if missing else ".")
        )


@dataclass(frozen=True)
class CheckpointPlan:
    """All that is known about a run before it begins.

    Args:
        folder: the source.
        method: how weights are quantized.
        modules: which modules are quantized.
        shards: the output files.
        coverage: where the parameters went.
        config: the content of the output's ``config.json``.
    """

    folder: CheckpointFolder
    method: Method
    modules: QuantizationPlan
    shards: tuple[Shard, ...]
    coverage: Coverage
    config: dict[str, Any]

    @property
    def quantization_config(self) -> QuantizationConfig:
        return self.modules.config(self.method.name)

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(p.weights for p in self.modules.linears)

    @property
    def source_bytes(self) -> int:
        return sum(f.size for f in self.folder.files.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file_size(s.slots) for s in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and tables of the quantized weights, in bits a weight."""
        names = {t.removesuffix("weight") for s in self.shards for t in s.linears}
        parts = {f"{n}{part}" for n in names for part in ("qweight", "scales", "codebook")}
        return sum(8 * t.nbytes for s in self.shards for t in s.slots if t.name in parts) / self.weights


def plan_folder(
    folder: CheckpointFolder,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    dtype: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    experts: bool = False,
) -> CheckpointPlan:
    """Lay out the quantized form of a checkpoint; reads its headers, none of its weights.

    Raises:
        CheckpointError: already quantized, unknown to Transformers, a tensor missing or of another shape.
        QuantizationError: nothing to quantize, an unknown option, no experts where they are asked for.
    """
    if dtype not in DTYPE_OPTIONS:
        raise QuantizationError(f"dtype is {dtype!r}; supported are {', '.join(DTYPE_OPTIONS)}.")
    given = folder.config.get("quantization_config")
    if given is not None:
        kind = given.get("quant_method") if isinstance(given, dict) else given
        what = "by FLUTE" if kind == QUANT_METHOD else f"by {kind!r}"
        raise CheckpointError(
            f"{folder.path} is already quantized {what}; expected a checkpoint of 16 or 32 bits."
        )
    chosen = resolve_method(method, spec)
    model = build_structure(folder.path, folder.config, len(folder.location))
    names = parameter_names(model, folder.location)
    matrices = _expert_matrices(folder, model, names) if experts else {}
    plan = plan_modules(
        model,
        spec,
        ignore=ignore,
        include=include,
        overrides=overrides,
        experts={t.removesuffix(".weight"): shape for t, shape in matrices.items()},
    )
    names.update({t: t for t in matrices})  # what the model calls the tensor that they are parts of is lost
    linears = _linear_tensors(folder, plan, names)
    cast = _cast_to(folder, dtype)
    buffers = set(model.state_dict()) - {n for n, _ in model.named_parameters(remove_duplicate=False)}
    shards = tuple(
        _shard(
            folder, file, chosen, linears, cast, {t for t, n in names.items() if n in buffers}, scale_dtype
        )
        for file in sorted(folder.files)
    )
    repeated = [n for n, c in Counter(s.name for shard in shards for s in shard.slots).items() if c > 1]
    if repeated:
        raise CheckpointError(
            f"{folder.path} already has a tensor {repeated[0]}, which quantization would write."
        )
    config = _output_config(folder.config, cast, plan.config(chosen.name))
    coverage = _coverage(folder, model, plan, names, linears, ignore)
    return CheckpointPlan(folder, chosen, plan, shards, coverage, config)


def _expert_matrices(
    folder: CheckpointFolder, model: nn.Module, names: dict[str, str | None]
) -> dict[str, tuple[int, int]]:
    """Weights of single experts ``[N, K]``, which the model merges into tensors of three dimensions."""
    merged = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 3}
    tensors = {t: folder.tensor(t) for t, name in names.items() if name in merged}
    found = {
        t: (stored.shape[0], stored.shape[1])
        for t, stored in tensors.items()
        if len(stored.shape) == 2 and stored.is_float and t.endswith(".weight")
    }
    if not found:
        why = (
            f"{next(iter(tensors))} holds those of a whole layer"
            if tensors
            else "its model has no merged ones"
        )
        raise QuantizationError(f"{folder.path} has no tensors of single experts to quantize: {why}.")
    return found


def _linear_tensors(
    folder: CheckpointFolder, plan: QuantizationPlan, names: dict[str, str | None]
) -> dict[str, PlannedLinear]:
    """Source tensor to the module that it is the weight of; every planned module must be found."""
    wanted = {f"{p.name}.weight": p for p in plan.linears}
    found = {t: wanted[n] for t, n in names.items() if n in wanted and t.endswith(".weight")}
    absent = sorted(set(wanted) - {f"{p.name}.weight" for p in found.values()})
    if absent:
        raise CheckpointError(
            f"{folder.path} has no tensor for {len(absent)} of the model's {len(wanted)} linear modules; "
            f"one of them is {absent[0]}."
        )
    if len(found) > len(wanted):
        names_of = [t for t, p in found.items() if sum(q is p for q in found.values()) > 1]
        raise CheckpointError(
            f"{folder.path} has {len(names_of)} tensors for one module: {', '.join(names_of)}."
        )
    for tensor, planned in found.items():
        stored = folder.tensor(tensor)
        expected = (planned.out_features, planned.in_features)
        if stored.shape != expected or not stored.is_float:
            raise CheckpointError(
                f"{tensor} is {stored.dtype} {list(stored.shape)}; "
                f"expected F64, F32, F16 or BF16 {list(expected)}."
            )
    return found


def _cast_to(folder: CheckpointFolder, option: str) -> str | None:
    """The dtype that floating-point tensors are cast to, or None where they stay as they are."""
    if option in _FLOATS:
        return _FLOATS[option]
    # A model stored in 32 bits becomes one of 16; one of 16 bits has its reasons for what it keeps in 32.
    return "BF16" if option == "auto" and folder.main_dtype() in ("F32", "F64") else None


def _shard(
    folder: CheckpointFolder,
    file: str,
    method: Method,
    linears: dict[str, PlannedLinear],
    cast: str | None,
    buffers: set[str],
    scale_dtype: torch.dtype,
) -> Shard:
    mine = [t for t in folder.files[file].tensors if folder.location[t] == file]
    slots: list[TensorSlot] = []
    passed = {}
    for name in mine:
        stored = folder.tensor(name)
        if name in linears:
            planned = linears[name]
            shapes = planned.spec.shapes(planned.out_features, planned.in_features)
            dtypes = {
                "qweight": torch.int32,
                "scales": scale_dtype,
                "codebook": method.table_dtype(planned.spec),
            }
            prefix = name.removesuffix("weight")
            slots += [TensorSlot(prefix + part, DTYPE_NAMES[d], shapes[part]) for part, d in dtypes.items()]
        else:
            keep = cast is None or not stored.is_float or name in buffers or name.endswith("inv_freq")
            passed[name] = stored.dtype if keep or cast is None else cast
            slots.append(TensorSlot(name, passed[name], stored.shape))
    return Shard(
        file, {t: linears[t] for t in mine if t in linears}, passed, tuple(slots), frozenset(passed) & buffers
    )


def _output_config(
    source: dict[str, Any], cast: str | None, quantization: QuantizationConfig
) -> dict[str, Any]:
    config = copy.deepcopy(source)
    if cast is not None:
        value = str(DTYPES[cast]).removeprefix("torch.")
        parts = [config, *(v for v in config.values() if isinstance(v, dict))]
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = value
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = value
    config["quantization_config"] = quantization.to_dict()
    return config


def _coverage(
    folder: CheckpointFolder,
    model: nn.Module,
    plan: QuantizationPlan,
    names: dict[str, str | None],
    linears: dict[str, PlannedLinear],
    ignore: Sequence[str],
) -> Coverage:
    modules = dict(model.named_modules())
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    total = quantized = embeddings = ignored = 0
    others: dict[str, list[int]] = {}
    for tensor, parameter in names.items():
        stored = folder.tensor(tensor)
        if not stored.is_float:
            continue
        total += stored.numel
        owner_name = (parameter or tensor).rpartition(".")[0]
        owner = modules.get(owner_name)
        if tensor in linears:
            quantized += stored.numel
        elif isinstance(owner, nn.Embedding) or (owner is not None and owner is head):
            embeddings += stored.numel
        elif owner_name in plan.kept:
            ignored += stored.numel if any(matches(owner_name, p) for p in ignore) else 0
        elif len(stored.shape) >= 2 and not any(matches(owner_name, p) for p in DEFAULT_IGNORE):
            count = others.setdefault(re.sub(r"\d+", "*", tensor), [0, 0])
            count[0] += 1
            count[1] += stored.numel
    missed = sorted(((p, c, n) for p, (c, n) in others.items()), key=lambda item: -item[2])
    return Coverage(total, quantized, embeddings, ignored, dict(plan.kept), tuple(missed))
