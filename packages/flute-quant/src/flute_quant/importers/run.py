"""Import a checkpoint: linear by linear from the source's layout into ours, all else copied."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flute_kernels import FormatError, QuantizationConfig
from flute_quant.checkpoint.names import parameter_names
from flute_quant.checkpoint.output import (
    REPORT_NAME,
    Progress,
    Teller,
    write_files,
    write_index,
    write_json,
)
from flute_quant.checkpoint.safetensors_reader import DTYPES
from flute_quant.checkpoint.safetensors_writer import SafetensorsWriter, TensorSlot, file_size
from flute_quant.checkpoint.structure import build_structure
from flute_quant.checkpoint.workfolder import WorkFolder, check_destination
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Importer, PassedTensor, Source, SourceFile, SourceLinear
from flute_quant.importers.registry import candidate, find_importer
from flute_quant.version import package_version

__all__ = ["ImportReport", "import_checkpoint"]

_LEAST = 0.5
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ImportReport:
    """What :func:`import_checkpoint` did.

    Args:
        path: the finished folder.
        importer: its name.
        errors: module name to the squared difference from the source's dequantized weight, relative to that
            weight's energy; 0 where the two are equal.
        notes: module name to what is different from the source, in words.
        left: linear modules left in 16 bits, to the reason.
        remarks: what else a user should know, in sentences.
        source_bytes, output_bytes: sizes of the weight files.
        bits_per_weight: of the imported weights, with scales and tables.
        resumed: files taken over from an interrupted run.
        seconds: wall-clock time.
    """

    path: Path
    importer: str
    errors: dict[str, float]
    notes: dict[str, str]
    left: dict[str, str]
    remarks: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    resumed: int
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether every weight has the source's own values."""
        return not any(self.errors.values())


@dataclass(frozen=True)
class _Plan:
    source: Source
    importer: Importer
    files: tuple[SourceFile, ...]
    config: QuantizationConfig
    modules: dict[str, str]  # linear to its module's name in the model
    left: dict[str, str]

    @property
    def linears(self) -> list[SourceLinear]:
        return [linear for file in self.files for linear in file.linears]

    @property
    def output_bytes(self) -> int:
        return sum(file_size(_slots(file)) for file in self.files)


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    source: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ImportReport:
    """Turn a checkpoint that others quantized into a FLUTE checkpoint with the same weights.

    Nothing is quantized anew: codes are repacked, tables and scales are taken over. What the format cannot
    hold is refused; scales of 32 bits that are no 16-bit numbers (double quantization) are the one thing
    that is rounded, to float16, and the report says by how much. One tensor is in memory at a time, and the
    output appears and resumes as with :func:`~flute_quant.quantize_checkpoint`.

    Args:
        src: a Hugging Face folder, or a GGUF file (or a folder with one).
        dst: folder to create; its parent exists.
        source: a name from :func:`~flute_quant.importers.importer_names`; by default the source tells.
        dtype: of tensors that a GGUF file stores in blocks and that become no linears of ours, such as
            embeddings: bfloat16, float16, or float32, which is exact. Other sources' tensors keep theirs.
        overwrite: replace ``dst`` if it holds a FLUTE checkpoint.
        progress: called after every linear.
        say: receives one sentence when an earlier partial output is resumed or discarded.

    Raises:
        CheckpointError: the source or the destination cannot be read or written as asked.
        QuantizationError: the format cannot hold what is in the source.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    if dtype not in _DTYPES:
        raise QuantizationError(f"dtype is {dtype}; supported are bfloat16, float16 and float32.")
    found = candidate(src, dtype)
    importer = find_importer(found, source)
    check_destination(src, dst, overwrite)
    plan = _plan(importer.open(found), importer)
    fingerprint = {
        "version": f"flute-quant {package_version()}, torch {torch.__version__}",
        "source": plan.source.identity,
        "options": {"import": importer.name, "dtype": str(dtype)},
    }
    with WorkFolder(dst, fingerprint, say or (lambda message: None)) as work:
        needed = plan.output_bytes
        with work.disk_errors(needed):
            work.require_space(needed)
            errors, resumed = _write_files(plan, work, progress)
            _write_side_files(plan, work, errors)
            work.finish()
    weights = sum(linear.weights for linear in plan.linears)
    return ImportReport(
        path=dst,
        importer=importer.name,
        errors=errors,
        notes={x.name: x.note for x in plan.linears if x.note},
        left=plan.left,
        remarks=plan.source.notes,
        source_bytes=plan.source.nbytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=8 * sum(s.nbytes for x in plan.linears for s in x.slots) / weights,
        resumed=resumed,
        seconds=time.monotonic() - started,
    )


def _plan(source: Source, importer: Importer) -> _Plan:
    """Compare the source with its model's own structure."""
    linears = [linear for file in source.files for linear in file.linears]
    passed = {p.slot.name: p for file in source.files for p in file.passed}
    _check_unique(source, [s.name for x in linears for s in x.slots] + list(passed))
    model = build_structure(source.path, source.config, len(linears) + len(passed))
    weights = [f"{linear.name}.weight" for linear in linears]
    names = parameter_names(model, [*weights, *passed, *(f"{x.name}.bias" for x in linears)])
    modules = {x.name: _module(source, model, x, names[f"{x.name}.weight"]) for x in linears}
    left = _left(source, model, set(modules.values()), {names[t] for t in passed})
    _check_coverage(source, model, linears, left)
    spec = Counter(x.spec for x in linears).most_common(1)[0][0]
    overrides = {modules[x.name]: x.spec for x in linears if x.spec != spec}
    config = QuantizationConfig(spec, tuple(left), overrides, f"import {importer.name}")
    dropped = _needless_biases(linears, passed, names)
    files = tuple(
        SourceFile(f.name, f.linears, tuple(p for p in f.passed if p.slot.name not in dropped))
        for f in source.files
    )
    return _Plan(source, importer, files, config, modules, left)


def _check_unique(source: Source, names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise CheckpointError(
            f"{source.path} already has a tensor {repeated[0]}, which the import would write."
        )


def _module(source: Source, model: nn.Module, linear: SourceLinear, parameter: str | None) -> str:
    """The name of a linear's module in the model; of an expert's matrix, which is none, the linear's own."""
    if parameter is None:
        raise CheckpointError(
            f"{source.path} has quantized weights for {linear.name}, which is no module of its model, "
            f"{type(model).__name__}."
        )
    name = parameter.removesuffix(".weight")
    shape = tuple(model.get_parameter(parameter).shape)
    if len(shape) == 3:
        return linear.name
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise QuantizationError(f"{linear.name} is a {type(module).__name__}; FLUTE replaces nn.Linear.")
    if shape != (linear.out_features, linear.in_features):
        raise CheckpointError(
            f"{linear.name} holds {linear.out_features} x {linear.in_features} weights; "
            f"its module in the model has {' x '.join(map(str, shape))}."
        )
    return name


def _left(source: Source, model: nn.Module, taken: set[str], stored: set[str | None]) -> dict[str, str]:
    """Linears that the source itself keeps in 16 bits, to the reason."""
    left = {}
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in taken:
            continue
        parameter = f"{name}.weight"
        if parameter not in stored and parameter not in tied:
            raise CheckpointError(f"{source.path} has no tensor for {parameter}, quantized or not.")
        left[name] = source.left.get(name, "not quantized in the source")
    return left


def _check_coverage(
    source: Source, model: nn.Module, linears: list[SourceLinear], left: dict[str, str]
) -> None:
    """Refuse a source of which little can be kept quantized: its output would be many times larger."""
    unheld = [name for name in left if name in source.unheld]
    others = sum(model.get_parameter(f"{name}.weight").numel() for name in unheld)
    total = others + sum(linear.weights for linear in linears)
    if others > (1 - _LEAST) * total:
        raise QuantizationError(
            f"{source.path} has {others:,} of {total:,} weights of linears in types that the format cannot "
            f"hold, such as {unheld[0]}, {left[unheld[0]]}; expected at most {1 - _LEAST:.0%}."
        )


def _needless_biases(
    linears: list[SourceLinear], passed: dict[str, PassedTensor], names: dict[str, str | None]
) -> set[str]:
    """Biases of modules that have none in the model. Some writers store zeros for all."""
    dropped = set()
    for linear in linears:
        name = f"{linear.name}.bias"
        if name not in passed or names[name] is not None:
            continue
        slot = passed[name].slot
        data = b"".join(bytes(block) for block in passed[name].blocks())
        values = torch.frombuffer(bytearray(data), dtype=DTYPES[slot.dtype]).float()
        if bool(values.any()):
            raise CheckpointError(
                f"{name} has {int((values != 0).sum())} of {slot.shape[0]} values that are not zero, and its "
                "module in the model has no bias."
            )
        dropped.add(name)
    return dropped


def _slots(file: SourceFile) -> tuple[TensorSlot, ...]:
    return (*(s for x in file.linears for s in x.slots), *(p.slot for p in file.passed))


def _write_files(
    plan: _Plan, work: WorkFolder, progress: Callable[[Progress], None] | None
) -> tuple[dict[str, float], int]:
    files = {file.name: file for file in plan.files}
    tell = Teller(sum(linear.weights for linear in plan.linears), progress)

    def write(name: str, writer: SafetensorsWriter) -> dict[str, float]:
        report: dict[str, float] = {}
        for linear in files[name].linears:
            report[plan.modules[linear.name]] = _write_linear(linear, writer)
            tell(linear.name, report[plan.modules[linear.name]], linear.weights)
        for passed in files[name].passed:
            writer.write_blocks(passed.slot.name, passed.blocks())
        return report

    def taken_over(name: str) -> None:
        tell(name, None, sum(x.weights for x in files[name].linears))

    return write_files(work, {name: _slots(file) for name, file in files.items()}, write, taken_over)


def _write_linear(linear: SourceLinear, writer: SafetensorsWriter) -> float:
    try:
        imported = linear.read()
        imported.linear.validate(f"{linear.name}.")
    except FormatError as error:
        raise QuantizationError(f"{linear.name} does not fit the format: {error}") from None
    for name, value in imported.linear.to_tensors(f"{linear.name}.").items():
        writer.write(name, value)
    return float(f"{imported.error:.6g}")


def _write_side_files(plan: _Plan, work: WorkFolder, errors: dict[str, float]) -> None:
    plan.source.side_files(work.out)
    if plan.source.sharded:
        write_index(work.out, {file.name: _slots(file) for file in plan.files})
    report = {
        "flute_quant": package_version(),
        "method": plan.config.method,
        "kept": plan.left,
        "layers": {
            plan.modules[x.name]: {
                "relative_squared_error": errors[plan.modules[x.name]],
                **({"note": x.note} if x.note else {}),
            }
            for x in plan.linears
        },
    }
    write_json(work.out / REPORT_NAME, report)
    config = copy.deepcopy(plan.source.config)
    config["quantization_config"] = plan.config.to_dict()
    write_json(work.out / "config.json", config)
