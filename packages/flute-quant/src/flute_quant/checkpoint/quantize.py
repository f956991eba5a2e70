"""Quantize a checkpoint on disk, file by file and tensor by tensor."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.calibration.text import OUTSIDE, CalibrationText, check_calibration
from flute_quant.checkpoint.calibrate import (
    Calibrated,
    calibrate_folder,
    estimate_calibration,
    kept_bytes,
)
from flute_quant.checkpoint.fingerprint import calibration_print, file_print, folder_print, importance_print
from flute_quant.checkpoint.gguf import convert_gguf, find_gguf
from flute_quant.checkpoint.layout import CheckpointPlan, Coverage, Shard, plan_folder
from flute_quant.checkpoint.measure import (
    compute_dtype,
    measure_folder,
    read_measurement,
    write_measurement,
)
from flute_quant.checkpoint.output import (
    REPORT_NAME,
    Progress,
    Teller,
    write_files,
    write_index,
    write_json,
)
from flute_quant.checkpoint.safetensors_reader import DTYPES
from flute_quant.checkpoint.safetensors_writer import SafetensorsWriter
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.workfolder import WorkFolder, check_destination
from flute_quant.devices import checked_device
from flute_quant.errors import QuantizationError
from flute_quant.importance import (
    ChannelImportance,
    ImportanceOption,
    planned_importance,
    resolve_importance,
)
from flute_quant.importance.tokens import LENGTH, SEQUENCES
from flute_quant.methods import Method, data_free_method, resolve_method
from flute_quant.patterns import Override
from flute_quant.plan import PlannedLinear
from flute_quant.tensor import quantize_tensor
from flute_quant.version import package_version

__all__ = ["CheckpointReport", "estimate_seconds", "plan_checkpoint", "quantize_checkpoint"]

_DEFAULT_COVERAGE = 0.5


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`quantize_checkpoint` did.

    Args:
        path: the finished folder.
        method: name of the method.
        errors: module name to its squared error relative to its energy.
        notes: module name to what was changed for it, in words.
        coverage: where the parameters went.
        source_bytes, output_bytes: sizes of the weight files.
        bits_per_weight: of the quantized weights, with scales and tables.
        importance: where the importance of input channels came from: ``"random tokens"``,
            ``"columns"``, ``"given"``, ``"calibration text"`` or ``"none"``.
        importance_note: a sentence where less was measured than asked for, or None.
        calibration: module name to what calibration had to do differently for it, in words; None where
            nothing was calibrated.
        resumed: files, and calibrated layers, taken over from an interrupted run.
        seconds: wall-clock time.
    """

    path: Path
    method: str
    errors: dict[str, float]
    notes: dict[str, str]
    coverage: Coverage
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    importance: str
    importance_note: str | None
    calibration: dict[str, str] | None
    resumed: int
    seconds: float


@contextmanager
def plan_checkpoint(
    src: str | Path,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    dtype: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    experts: bool = False,
) -> Iterator[CheckpointPlan]:
    """What :func:`quantize_checkpoint` would do, as a context; arguments and errors as there.

    A GGUF file is converted into a temporary folder, which lives as long as the context.
    """
    gguf = find_gguf(Path(src))
    with tempfile.TemporaryDirectory(prefix="flute-quant-") if gguf else _nothing() as scratch:
        folder = Path(src)
        if gguf is not None and scratch is not None:
            folder = Path(scratch) / "converted"
            convert_gguf(gguf, folder)
        yield plan_folder(
            CheckpointFolder.open(folder),
            spec,
            method=method,
            ignore=ignore,
            include=include,
            overrides=overrides,
            dtype=dtype,
            scale_dtype=scale_dtype,
            experts=experts,
        )


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    spec: QuantSpec | None = None,
    *,
    method: str | Method = "default",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    dtype: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    experts: bool = False,
    device: str | torch.device = "cpu",
    min_coverage: float = _DEFAULT_COVERAGE,
    overwrite: bool = False,
    importance: ImportanceOption = "auto",
    calibration: CalibrationText | Tensor | None = None,
    measuring: Callable[[int, int], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    learning: Callable[[int, int, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> CheckpointReport:
    """Quantize a Hugging Face checkpoint folder (or a GGUF file) into another folder.

    One tensor is in memory at a time, or with ``calibration`` one layer and its inputs. The output
    appears under its name when it is complete; an error leaves nothing behind; a run that was killed or
    interrupted leaves ``.DST.partial``, from which the same call resumes at the first unfinished file or
    layer and gives the same bytes.

    Args:
        src: folder with ``config.json`` and safetensors, or a GGUF file (or a folder with one).
        dst: folder to create; its parent exists.
        spec: 4 bits in groups of 64 by default.
        method: a name from :func:`~flute_quant.methods.method_names`, or a method.
        ignore, include, overrides: see :func:`~flute_quant.plan.plan_modules`.
        dtype: of the tensors that are not quantized. ``"auto"`` keeps a 16-bit model as it is and
            casts a 32-bit model to bfloat16, ``"keep"`` casts nothing, ``"bfloat16"`` and
            ``"float16"`` cast all floating-point parameters.
        scale_dtype: float16 or bfloat16.
        experts: whether to quantize the experts of a mixture, too, each of their matrices by itself. vLLM
            runs them; Transformers, which merges them, does not.
        device: where weights are quantized; ``"cuda"`` is one GPU, or with ``calibration`` all of them.
        min_coverage: least fraction of the parameters outside of embeddings that must be quantized.
        overwrite: replace ``dst`` if it holds a FLUTE checkpoint.
        importance: what errors in each input channel cost, one of
            :data:`~flute_quant.importance.IMPORTANCE_OPTIONS` or module name to float32 ``[K]`` for the
            modules that have one. To measure it, 3,072 random tokens run through the model, whose
            weights are read one by one; what cannot be measured is guessed from the weights' columns.
        calibration: a text, or token ids ``[S, L]``, whose inputs to every linear module are what it is
            quantized for. Methods made for it need it; for others it measures the importance of channels.
        measuring: called during that pass with the modules reached so far, and in all.
        progress: called after every module.
        learning: called after every step that learns scales on the whole model, where the method does, with
            steps done, steps in all and the loss.
        say: receives one sentence when an earlier partial output is resumed or discarded.

    Raises:
        CheckpointError: the source or the destination cannot be read or written as asked.
        QuantizationError: the weights or options cannot be served.
        FormatError: the spec is outside of what the format has.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    spec = spec or QuantSpec()
    if not 0 <= min_coverage <= 1:
        raise QuantizationError(f"min_coverage is {min_coverage}; expected a fraction from 0 to 1.")
    device, devices = _checked_devices(device)
    gguf = find_gguf(src)
    check_destination(src, dst, overwrite)
    chosen = resolve_method(method, spec)
    check_calibration(chosen, calibration, importance)
    options: dict[str, Any] = {
        "method": chosen,
        "ignore": tuple(ignore),
        "include": tuple(include),
        "overrides": tuple(overrides),
        "dtype": dtype,
        "scale_dtype": scale_dtype,
        "experts": experts,
    }
    kind = "none" if calibration is not None else resolve_importance(importance, chosen)
    plan: CheckpointPlan | None = None
    if gguf is None:  # checked as far as headers go before anything is written
        plan = plan_folder(CheckpointFolder.open(src), spec, **options)
        plan.coverage.require(min_coverage)
        source = folder_print(plan.folder)
    else:
        source = [file_print(gguf)]
    fingerprint = {
        "version": f"flute-quant {package_version()}, torch {torch.__version__}",
        "source": source,
        "options": {
            "spec": repr(spec),
            "device": device.type,
            **{name: repr(value) for name, value in options.items()},
            "method": chosen.identity,
        },
        "importance": importance_print(kind, importance),
        "calibration": None if calibration is None else calibration_print(calibration),
    }
    with WorkFolder(dst, fingerprint, say or _silent) as work:
        if plan is None:
            assert gguf is not None
            converted = work.path / "converted"
            if not converted.exists():
                with work.disk_errors(0):
                    convert_gguf(gguf, converted)
            plan = plan_folder(CheckpointFolder.open(converted), spec, **options)
            plan.coverage.require(min_coverage)
        needed = plan.output_bytes + sum(f.stat().st_size for f in plan.folder.side_files())
        if calibration is not None:  # its layers lie beside the output until that is whole
            needed += kept_bytes(plan, work.path)
        with work.disk_errors(needed):
            work.require_space(needed)
            tell = Teller(plan.weights, progress)
            calibrated = Calibrated()
            if calibration is not None:
                calibrated = calibrate_folder(
                    plan,
                    work.path,
                    calibration,
                    device=device,
                    devices=devices,
                    scale_dtype=scale_dtype,
                    progress=tell,
                    learning=learning,
                )
                if calibrated.note is not None and say is not None:
                    say(calibrated.note)
                weighting = ChannelImportance("calibration text", columns=True)
            else:
                weighting = _importance(plan, work, device, importance, measuring)
            errors, resumed = _write_shards(plan, work, device, scale_dtype, weighting, calibrated, tell)
            notes = _calibration_notes(plan, calibrated) if calibration is not None else None
            _write_side_files(plan, work, errors, weighting, calibrated, notes)
            work.finish()
    return CheckpointReport(
        path=dst,
        method=chosen.name,
        errors=errors,
        notes={p.name: p.note for p in plan.modules.linears if p.note},
        coverage=plan.coverage,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        importance=weighting.source,
        importance_note=weighting.note,
        calibration=notes,
        resumed=resumed + calibrated.resumed,
        seconds=time.monotonic() - started,
    )


def estimate_seconds(
    plan: CheckpointPlan,
    device: str | torch.device = "cpu",
    importance: ImportanceOption = "auto",
    calibration: CalibrationText | None = None,
) -> float:
    """Time that quantizing will take, reading and writing aside, from the speed on two million weights.

    Where the importance of input channels is measured, that pass is a part of it; so are calibration's.

    Raises:
        QuantizationError: a method that is calibrated, without a text.
    """
    device = checked_device(device)
    check_calibration(plan.method, calibration, importance)
    if calibration is not None:
        return estimate_calibration(plan, calibration, device)
    rows, columns = 512, 4096
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    specs = {p.spec for p in plan.modules.linears}
    spec = min(specs, key=lambda s: -sum(p.weights for p in plan.modules.linears if p.spec == s))
    quantize_tensor(weight[:32], spec, method=plan.method)
    started = time.monotonic()
    quantize_tensor(weight, spec, method=plan.method)
    seconds = (time.monotonic() - started) * plan.weights / (rows * columns)
    if resolve_importance(importance, plan.method) == "random":
        x = torch.ones(LENGTH, columns, device=device, dtype=compute_dtype(plan.folder, device))
        weight = weight.to(x.dtype)
        torch.nn.functional.linear(x, weight)
        started = time.monotonic()
        float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for a GPU
        # Whatever is no embedding takes part in the pass, quantized or not.
        weights = plan.coverage.total - plan.coverage.embeddings
        seconds += (time.monotonic() - started) * SEQUENCES * weights / (rows * columns)
    return seconds


def _importance(
    plan: CheckpointPlan,
    work: WorkFolder,
    device: torch.device,
    option: ImportanceOption,
    measuring: Callable[[int, int], None] | None,
) -> ChannelImportance:
    """The importance of input channels; a measurement is kept for a resumed run, whatever it found."""
    specs = {p.name: p.spec for p in plan.modules.linears}
    planned = planned_importance(option, plan.method, specs)
    if planned is not None:
        return planned
    kept = read_measurement(work.path)
    if kept is not None:
        return kept

    def seen(modules: int) -> None:
        if measuring is not None:
            measuring(modules, len(specs))

    measured = measure_folder(plan.folder, specs, device=device, seen=seen)
    write_measurement(work.path, measured)
    return measured


def _write_shards(
    plan: CheckpointPlan,
    work: WorkFolder,
    device: torch.device,
    scale_dtype: torch.dtype,
    importance: ChannelImportance,
    calibrated: Calibrated,
    tell: Teller,
) -> tuple[dict[str, float], int]:
    shards = {shard.file: shard for shard in plan.shards}

    def write(file: str, writer: SafetensorsWriter) -> dict[str, float]:
        shard, report = shards[file], {}
        for tensor, planned in shard.linears.items():
            if planned.name in calibrated.errors:
                for part, value in calibrated.tensors(planned).items():
                    writer.write(tensor.removesuffix("weight") + part, value)
                report[planned.name] = calibrated.errors[planned.name]
                continue
            error = _write_linear(plan, shard, tensor, planned, writer, device, scale_dtype, importance)
            report[planned.name] = error
            tell(planned.name, error, planned.weights)
        for tensor, dtype in shard.passed.items():
            _pass_tensor(plan, shard, tensor, dtype, writer)
        return report

    def taken_over(file: str) -> None:
        counted = [p for p in shards[file].linears.values() if p.name not in calibrated.errors]
        tell(file, None, sum(p.weights for p in counted))

    files = {shard.file: shard.slots for shard in plan.shards}
    errors, resumed = write_files(work, files, write, taken_over)
    order = [p.name for p in plan.modules.linears]
    return {name: errors[name] for name in order}, resumed


def _write_linear(
    plan: CheckpointPlan,
    shard: Shard,
    tensor: str,
    planned: PlannedLinear,
    writer: SafetensorsWriter,
    device: torch.device,
    scale_dtype: torch.dtype,
    importance: ChannelImportance,
) -> float:
    weight = plan.folder.files[shard.file].read(tensor).to(device)
    linear, error = quantize_tensor(
        weight,
        planned.spec,
        method=data_free_method(plan.method, planned.spec),
        name=tensor,
        scale_dtype=scale_dtype,
        importance=importance.of(planned.name, weight, planned.spec),
    )
    for name, value in linear.to_tensors(tensor.removesuffix("weight")).items():
        writer.write(name, value)
    # Rounded, so that the order in which threads add never shows in a file.
    return float(f"{error.relative:.6g}")


def _pass_tensor(
    plan: CheckpointPlan, shard: Shard, tensor: str, dtype: str, writer: SafetensorsWriter
) -> None:
    """Copy or cast a tensor block by block; a value that is not finite, or no longer is, is refused."""
    file = plan.folder.files[shard.file]
    stored = file.tensors[tensor]
    if not stored.is_float or tensor in shard.buffers:
        writer.write_blocks(tensor, file.blocks(tensor))
        return

    def blocks() -> Iterator[bytes | memoryview]:
        for block in file.blocks(tensor):
            values = torch.frombuffer(bytearray(block), dtype=DTYPES[stored.dtype])
            cast = values.to(DTYPES[dtype])
            if not bool(torch.isfinite(cast).all()):
                bad = int((~torch.isfinite(cast)).sum())
                where = "" if bool(torch.isfinite(values).all()) else " in the source already"
                raise QuantizationError(
                    f"{tensor} has {bad} of {stored.numel} values that are NaN or infinite "
                    f"as {dtype}{where}; expected none."
                )
            yield cast.view(torch.uint8).numpy().data

    writer.write_blocks(tensor, blocks())


def _write_side_files(
    plan: CheckpointPlan,
    work: WorkFolder,
    errors: dict[str, float],
    importance: ChannelImportance,
    calibrated: Calibrated,
    notes: dict[str, str] | None,
) -> None:
    for file in plan.folder.side_files():
        shutil.copyfile(file, work.out / file.name)
    if plan.folder.sharded:
        write_index(work.out, {shard.file: shard.slots for shard in plan.shards})
    coverage = plan.coverage
    report = {
        "flute_quant": package_version(),
        "method": plan.method.name,
        "importance": {"source": importance.source, "note": importance.note},
        "coverage": round(coverage.fraction, 6),
        "not_covered": [{"tensors": p, "count": c, "parameters": n} for p, c, n in coverage.not_covered],
        "kept": coverage.kept,
        "layers": {
            p.name: {"relative_squared_error": errors[p.name], **({"note": p.note} if p.note else {})}
            for p in plan.modules.linears
        },
    }
    if notes is not None:
        sequences, length = calibrated.tokens
        report["calibration"] = {"sequences": sequences, "length": length, "notes": notes}
    write_json(work.out / REPORT_NAME, report)
    write_json(work.out / "config.json", plan.config)


def _calibration_notes(plan: CheckpointPlan, calibrated: Calibrated) -> dict[str, str]:
    """What was done differently, module by module in the model's order."""
    return {
        p.name: calibrated.notes.get(p.name, OUTSIDE)
        for p in plan.modules.linears
        if p.name in calibrated.notes or p.name not in calibrated.errors
    }


def _checked_devices(device: str | torch.device) -> tuple[torch.device, list[torch.device]]:
    """Where to work, and all devices that take part where the work is shared."""
    chosen = checked_device(device)
    if chosen == torch.device("cuda"):  # no number: all of them
        return torch.device("cuda:0"), [torch.device(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    return chosen, [chosen]


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _silent(message: str) -> None:
    return None
