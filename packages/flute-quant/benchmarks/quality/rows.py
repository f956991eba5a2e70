"""The rows of the grid: what is quantized how, from ``grid.json`` to weights that a model can run with."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flute_kernels import QuantizedLinear, QuantSpec
from flute_quant import Recipe, quantize_model, recipe_method
from flute_quant.rotation import AUTO_HADAMARD, unrotate

__all__ = ["Made", "Row", "Workshop", "load_rows"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One way of quantizing the whole model.

    Args:
        name: of the row in ``grid.json``, which with ``bits`` and ``group_size`` says what it is.
        label: how tables call it.
        bits: bits a weight, or the average that bits are allocated for.
        group_size, vector_size, hadamard: of the spec.
        method, importance: of ours.
        recipe: steps of a calibrated method instead of ``method``, as a recipe file has them.
        arguments: more keyword arguments of ``quantize_model``; ``calibration`` comes with ``calibrated``.
        peer: script in ``peers/`` that does it instead, or None.
        options: of that script.
        calibrated: whether it reads the calibration text.
    """

    name: str
    label: str
    bits: float
    group_size: int = 64
    vector_size: int = 1
    hadamard: int = 0
    method: str = "default"
    importance: str = "auto"
    recipe: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    options: tuple[str, ...] = ()
    calibrated: bool = False

    @property
    def key(self) -> str:
        """``higgs-4-g64``: tells this row from all others."""
        return f"{self.name}-{self.bits:g}-g{self.group_size}"

    @property
    def is_allocated(self) -> bool:
        return self.bits not in (2, 3, 4)


@dataclass
class Made:
    """What a row made of a model.

    Args:
        weights: module name to its dequantized weight ``[N, K]``, one after another.
        bits_per_weight: with scales, zero points and tables.
        seconds: of quantizing, with all that was measured for it, loading aside.
        notes: for the record: method and versions.
    """

    weights: Iterator[tuple[str, Tensor]]
    bits_per_weight: float
    seconds: float
    notes: dict[str, Any]


def load_rows(patterns: list[str], file: Path = _HERE / "grid.json") -> list[Row]:
    """The rows whose name or key matches one of the patterns; all without patterns."""
    rows = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        given = dict(entry)
        name, label = given.pop("row"), given.pop("label")
        all_bits = given.pop("bits", None) or given.pop("average_bits")
        given.pop("average_bits", None)
        if given.get("hadamard") == "auto":
            given["hadamard"] = AUTO_HADAMARD
        given["options"] = tuple(given.get("options", ()))
        rows += [Row(name, label, bits, **given) for bits in all_bits]
    if not patterns:
        return rows
    return [r for r in rows if any(fnmatchcase(r.name, p) or fnmatchcase(r.key, p) for p in patterns)]


@dataclass
class Workshop:
    """Where rows are made.

    Args:
        device: ``cpu`` or ``cuda``; peers are told, too.
        calibration: the calibration text, or None.
        calibration_tokens: the same as windows int64 ``[S, L]``, or None.
        pythons: peer's script to the interpreter that has its package.
    """

    device: torch.device
    calibration: Path | None
    calibration_tokens: Tensor | None
    pythons: dict[str, Path]

    def missing(self, row: Row) -> str | None:
        """Why a row cannot be made here, or None."""
        if row.peer is not None and row.peer not in self.pythons:
            return f"no --peer {row.peer}=PYTHON was given"
        if row.calibrated and self.calibration is None:
            return "no --calibration was given"
        return None

    def make(self, row: Row, model: Any, folder: Path) -> Made:
        """Quantize ``model``, whose checkpoint is ``folder``, which is read by peers alone."""
        return self._peer(row, folder) if row.peer is not None else self._ours(row, model)

    def _ours(self, row: Row, model: Any) -> Made:
        arguments = dict(row.arguments)
        if row.calibrated:
            arguments["calibration"] = self.calibration_tokens
        allocated: dict[str, Any] = {}
        started = time.monotonic()
        bits = 4 if row.is_allocated else int(row.bits)
        spec = QuantSpec(bits, row.group_size, row.vector_size, row.hadamard)
        method: Any = row.method
        if row.recipe is not None:
            method = recipe_method(Recipe.from_dict(row.recipe), name=row.name)
        if row.is_allocated:
            from flute_quant.allocation import allocate_model

            tokens = arguments.pop("calibration", None)
            text = {} if tokens is None else {"tokens": tokens[:2], "held_out": tokens[2:4]}
            allocation = allocate_model(
                model,
                row.bits,
                spec,
                method=method,
                importance=row.importance,
                **text,
            )
            allocated = {"allocation": allocation.summary(), "checked": dict(allocation.checked)}
            arguments["overrides"] = allocation.overrides
        linears, report = quantize_model(model, spec, method=method, importance=row.importance, **arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        weights = sum(x.out_features * x.in_features for x in linears.values())
        bits_per_weight = 8 * sum(x.nbytes for x in linears.values()) / weights
        notes = {"method": report.method, "importance": report.importance.source, **allocated}
        if row.calibrated and self.calibration_tokens is not None:
            notes["calibration_tokens"] = list(self.calibration_tokens.shape)
        return Made(_dequantized(linears), bits_per_weight, seconds, notes)

    def _peer(self, row: Row, folder: Path) -> Made:
        scratch = tempfile.TemporaryDirectory(prefix="flute-quality-")
        out = Path(scratch.name) / "weights.safetensors"
        command = [
            str(self.pythons[row.peer or ""]), str(_HERE / "peers" / f"{row.peer}.py"), str(folder), str(out),
            "--bits", f"{row.bits:g}", "--group-size", str(row.group_size), "--device", self.device.type,
            *row.options,
        ]  # fmt: skip
        if row.calibrated:
            command += ["--calibration", str(self.calibration)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise RuntimeError(f"{row.key}: {row.peer} ended with {done.returncode}: {last}")
        with safe_open(out, framework="pt") as file:
            noted = json.loads(file.metadata()["peer"])
        seconds, bits = noted.pop("seconds"), noted.pop("bits_per_weight")

        def weights() -> Iterator[tuple[str, Tensor]]:
            with scratch, safe_open(out, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)

        return Made(weights(), bits, seconds, noted)


def _dequantized(linears: dict[str, QuantizedLinear]) -> Iterator[tuple[str, Tensor]]:
    for name, linear in linears.items():
        weight = linear.dequantize()
        if linear.spec.hadamard:
            weight = unrotate(weight, linear.spec.hadamard, linear.spec.hadamard_seed)
        yield name, weight
