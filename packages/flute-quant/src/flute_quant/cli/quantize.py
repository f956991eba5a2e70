"""``flute-quant quantize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flute_kernels import QuantSpec
from flute_quant.allocation import SENSITIVITIES, allocate_checkpoint
from flute_quant.calibration.text import CalibrationText, check_calibration, parse_amount
from flute_quant.checkpoint.layout import DTYPE_OPTIONS, Coverage
from flute_quant.checkpoint.quantize import (
    CheckpointReport,
    estimate_seconds,
    plan_checkpoint,
    quantize_checkpoint,
)
from flute_quant.checkpoint.workfolder import check_destination
from flute_quant.cli.progress import ProgressView
from flute_quant.cli.text import counted, duration, interrupted, read_text, size
from flute_quant.codebooks import load_table
from flute_quant.errors import QuantizationError
from flute_quant.evaluation import load_tokenizer, text_windows
from flute_quant.importance import IMPORTANCE_OPTIONS, load_importance
from flute_quant.methods import (
    ALIASES,
    Method,
    load_recipe,
    method_names,
    methods,
    recipe_method,
    resolve_method,
    table_method,
)
from flute_quant.patterns import Override, parse_override
from flute_quant.rotation import AUTO_HADAMARD

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    known = "\n".join(f"  {name:12} {method.summary}" for name, method in methods().items())
    alias = "\n".join(f"  {name:12} {target}" for name, target in ALIASES.items())
    p = commands.add_parser(
        "quantize",
        help="quantize a checkpoint folder",
        description="Quantize a Hugging Face checkpoint folder (or a GGUF file) into a new folder.",
        epilog=f"methods:\n{alias}\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "src", metavar="SRC", type=Path, help="folder with config.json and safetensors, or a GGUF file"
    )
    p.add_argument("dst", metavar="DST", type=Path, help="folder to create")
    p.add_argument(
        "--bits",
        type=float,
        default=4.0,
        help="bits per weight: 2, 3 or 4 (default 4), or an average with scales and tables, such as 3.25, "
        "for which every layer gets its own",
    )
    p.add_argument(
        "--sensitivity",
        default="kl",
        choices=SENSITIVITIES,
        help="what an average is allocated by: kl (each layer's part in the model's predictions on random "
        "tokens, with the model in memory; default) or error (of each layer's weights)",
    )
    p.add_argument(
        "--group-size",
        type=int,
        default=64,
        help="weights that share a scale: 32, 64, 128, 256, -1 for a row (default 64)",
    )
    p.add_argument(
        "--sensitivity-text",
        type=Path,
        metavar="FILE",
        help="measure kl on 6 windows of 128 tokens of this UTF-8 text (default: that of --calibration) "
        "instead of random tokens, and check the result on 6 others",
    )
    p.add_argument("--vector-size", type=int, default=1, help="weights that share a code: 1 or 2 (default 1)")
    p.add_argument(
        "--hadamard",
        type=_hadamard,
        metavar="BLOCK",
        help="rotate inputs in blocks of this power of two; auto is the largest that divides a layer's K, "
        f"up to {AUTO_HADAMARD} (default: auto with --method higgs, which is made for it, else none)",
    )
    p.add_argument(
        "--hadamard-seed", type=int, default=0, metavar="SEED", help="seed of the rotation's signs"
    )
    p.add_argument("--method", default="default", metavar="NAME", help="one of: " + ", ".join(method_names()))
    p.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="your own table (.json or .safetensors) instead of a method's",
    )
    p.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="your own steps of a calibrated method (.json, or .yaml with PyYAML) instead of a method",
    )
    p.add_argument(
        "--importance",
        default="auto",
        metavar="SOURCE",
        help="what errors of each input channel cost: random (measured with random tokens), columns "
        "(guessed from the weights), none, a .safetensors file of one tensor a module, or auto "
        "(random where the method is made for it; default)",
    )
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to calibrate with, for the methods that say so; others weight errors by it",
    )
    p.add_argument(
        "--calibration-tokens",
        default="128x2048",
        metavar="SxL",
        help="sequences, and tokens of each, that are read of it (default 128x2048)",
    )
    p.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=bits:3,group_size:32",
        help="another spec for modules that match; may be repeated",
    )
    p.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave modules in 16 bits; may be repeated",
    )
    p.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="quantize heads or routers after all; may be repeated",
    )
    p.add_argument(
        "--experts",
        action="store_true",
        help="quantize the experts of a mixture, too: for vLLM, Transformers cannot load the result",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPE_OPTIONS,
        help="of tensors that are not quantized (auto: 32 bits become bfloat16)",
    )
    p.add_argument("--scale-dtype", default="float16", choices=("float16", "bfloat16"))
    p.add_argument("--device", default="cpu", help="where to quantize: cpu or cuda (default cpu)")
    p.add_argument(
        "--min-coverage",
        type=float,
        default=0.5,
        metavar="F",
        help="least fraction of the parameters outside of embeddings to be quantized (default 0.5)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace DST if it holds a FLUTE checkpoint")
    p.add_argument("--dry-run", action="store_true", help="print sizes and a time estimate, write nothing")
    p.set_defaults(run=_run, interrupted=interrupted)


def _hadamard(text: str) -> int:
    return AUTO_HADAMARD if text == "auto" else int(text)


def _run(options: argparse.Namespace) -> int:
    block = options.hadamard
    if block is None:
        block = AUTO_HADAMARD if options.method == "higgs" and not options.table else 0
    average = None if options.bits.is_integer() else options.bits
    # An average's layers are listed as what differs from the nearest number of bits.
    bits = int(options.bits) if average is None else round(max(2, min(4, average)))
    spec = QuantSpec(bits, options.group_size, options.vector_size, block, options.hadamard_seed)
    choices: dict[str, Any] = {
        "method": _method(options),
        "ignore": options.ignore,
        "include": options.include,
        "overrides": [parse_override(text) for text in options.override],
        "dtype": options.dtype,
        "scale_dtype": getattr(torch, options.scale_dtype),
        "experts": options.experts,
    }
    calibration = None
    if options.calibration is not None:
        calibration = CalibrationText(options.calibration, *parse_amount(options.calibration_tokens))
    importance = options.importance
    if importance not in IMPORTANCE_OPTIONS and importance.endswith(".safetensors"):
        importance = load_importance(importance)
    if average is not None:
        # What quantizing would refuse is refused before minutes of measuring.
        check_destination(options.src, options.dst, options.overwrite)
        check_calibration(resolve_method(choices["method"], spec), calibration, importance)
        choices["overrides"] += _allocated(options, spec, average, importance, choices)
    if options.dry_run:
        with plan_checkpoint(options.src, spec, **choices) as plan:
            plan.coverage.require(options.min_coverage)
            seconds = estimate_seconds(plan, options.device, importance, calibration)
            _print_notes({p.name: p.note for p in plan.modules.linears if p.note}, plan.coverage)
            print(
                f"Would write {size(plan.output_bytes)} ({size(plan.source_bytes)} before), "
                f"{plan.bits_per_weight:.3f} bits a quantized weight with scales and tables, "
                f"{counted(len(plan.modules.linears), 'linear')}, method {plan.method.name}, "
                f"estimated time {duration(seconds)}."
            )
        return 0
    with ProgressView("reading") as view:
        report = quantize_checkpoint(
            options.src,
            options.dst,
            spec,
            **choices,
            device=options.device,
            min_coverage=options.min_coverage,
            overwrite=options.overwrite,
            importance=importance,
            calibration=calibration,
            measuring=view.measuring,
            progress=view.quantized,
            learning=view.learning,
            say=view.say,
        )
    _print_report(report)
    return 0


def _allocated(
    options: argparse.Namespace, spec: QuantSpec, average: float, importance: Any, choices: dict[str, Any]
) -> tuple[Override, ...]:
    """The overrides that give every layer its bits."""
    given = {name: value for name, value in choices.items() if name != "dtype"}
    file = options.sensitivity_text
    if file is None and options.sensitivity == "kl":
        file = options.calibration
    if file is not None:
        text = read_text(file)
        windows = text_windows(load_tokenizer(options.src), text, count=12, length=128).tokens
        given["tokens"], given["held_out"] = windows[::2], windows[1::2]
    with ProgressView("reading") as view:
        allocation = allocate_checkpoint(
            options.src,
            average,
            spec,
            **given,
            device=options.device,
            importance=importance,
            sensitivity=options.sensitivity,
            progress=view.stage,
        )
    verdict = allocation.verdict()
    if verdict is not None:
        print(verdict)
    print(f"Allocated {allocation.bits_per_weight:.3f} bits a weight: {allocation.summary()}.")
    return allocation.overrides


def _method(options: argparse.Namespace) -> str | Method:
    """What ``--method`` stands for, or ``--table`` or ``--recipe`` in its place."""
    given = [name for name in ("table", "recipe") if getattr(options, name) is not None]
    if len(given) > 1:
        raise QuantizationError(f"There are --{given[0]} and --{given[1]}; expected one of them.")
    if options.table is not None:
        return table_method(load_table(options.table))
    if options.recipe is not None:
        return recipe_method(load_recipe(options.recipe), name=options.recipe.stem)
    return str(options.method)


def _print_report(report: CheckpointReport) -> None:
    _print_notes(report.notes, report.coverage)
    if report.importance_note is not None:
        print(report.importance_note)
    notes: dict[str, list[str]] = {}
    for name, note in (report.calibration or {}).items():
        notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        print(f"{counted(len(names), 'linear')}, such as {names[0]}: {note}.")
    worst = max(report.errors, key=lambda name: report.errors[name])
    method = report.method + _weighting(report)
    print(
        f"Wrote {report.path}: {size(report.output_bytes)} ({size(report.source_bytes)} before), "
        f"{report.bits_per_weight:.3f} bits a quantized weight with scales and tables, "
        f"{counted(len(report.errors), 'linear')}, method {method}, in {duration(report.seconds)}."
    )
    mean = sum(report.errors.values()) / len(report.errors)
    print(f"Relative squared error: {mean:.4f} in the mean, {report.errors[worst]:.4f} at most ({worst}).")


def _weighting(report: CheckpointReport) -> str:
    """Where importance came from, for the end of "method signed"."""
    known = {"random tokens": "random tokens", "columns": "columns", "given": "the importance given"}
    known["calibration text"] = "the calibration text"
    return f" weighted by {known[report.importance]}" if report.importance in known else ""


def _print_notes(notes: dict[str, str], coverage: Coverage) -> None:
    changes: dict[str, list[str]] = {}
    for name, note in notes.items():
        changes.setdefault(note, []).append(name)
    for note, names in changes.items():
        print(f"{counted(len(names), 'linear')} with {note} (such as {names[0]}).")
    reasons: dict[str, list[str]] = {}
    for name, why in coverage.kept.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        print(f"{counted(len(names), 'linear')} left in 16 bits, {why} (such as {names[0]}).")
    for pattern, count, parameters in coverage.not_covered:
        print(f"Not covered: {parameters:,} parameters in {counted(count, 'tensor')} {pattern}.")
    print(
        f"Quantized {coverage.quantized:,} of {coverage.total:,} parameters, "
        f"{coverage.fraction:.1%} of those outside of embeddings."
    )
