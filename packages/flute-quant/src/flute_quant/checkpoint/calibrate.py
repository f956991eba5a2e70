"""Calibrate a checkpoint: layer by layer into the work folder, from which its files are put together.

A finished layer is one file there. A resumed run reads those instead of quantizing, and runs the calibration
tokens through them to where it goes on: activations are not kept. Where scales are then learned on the whole
model, all that was learned is one more file, which takes the place of the layers' own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flute_kernels import FormatError, QuantizedLinear
from flute_quant.calibration.run import LayerResult, calibrate_layers
from flute_quant.calibration.text import CalibrationText, check_tokens
from flute_quant.checkpoint.layout import CheckpointPlan
from flute_quant.checkpoint.loading import load_model
from flute_quant.checkpoint.measure import compute_dtype
from flute_quant.checkpoint.streaming import StreamedModel
from flute_quant.checkpoint.structure import build_structure, quiet_transformers
from flute_quant.checkpoint.workfolder import write_synced
from flute_quant.errors import QuantizationError
from flute_quant.evaluation import load_tokenizer, tokenized
from flute_quant.importance.tokens import NoPassError, input_embedding
from flute_quant.learning.finish import NOT_LEARNED, finish_scales, learns
from flute_quant.methods import CalibratedMethod, InputMoments
from flute_quant.plan import PlannedLinear
from flute_quant.tensor import ErrorStats, fit_spec, quantize_tensor

__all__ = ["Calibrated", "calibrate_folder", "estimate_calibration", "kept_bytes"]

_LAYERS = "calibrated"
_LEARNED = "learned"
# The matrix that the estimate is made with.
_ROWS, _COLUMNS = 256, 1024


@dataclass
class Calibrated:
    """What calibration quantized; the tensors stay on disk.

    Args:
        errors: module name to its squared error relative to its energy.
        notes: module name to a clause about what was done differently for it.
        tokens: sequences and length.
        note: a sentence where there were fewer tokens than asked for, or None.
        resumed: layers taken over from an interrupted run.
    """

    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    tokens: tuple[int, int] = (0, 0)
    note: str | None = None
    resumed: int = 0
    _files: dict[str, Path] = field(default_factory=dict)

    def tensors(self, planned: PlannedLinear) -> dict[str, Tensor]:
        """The stored tensors of a module by their last name: ``qweight`` and its siblings."""
        with safe_open(self._files[planned.name], framework="pt") as file:
            parts = ("qweight", "scales", "codebook")
            return {part: file.get_tensor(f"{planned.name}.{part}") for part in parts}

    def add(self, result: LayerResult, file: Path) -> None:
        """A layer, which ``file`` holds."""
        for name, error in result.errors.items():
            # Rounded, so that the order in which threads add never shows in a file.
            self.errors[name] = float(f"{error.relative:.6g}")
            self._files[name] = file
        self.notes |= result.notes


def calibrate_folder(
    plan: CheckpointPlan,
    work: Path,
    text: CalibrationText | Tensor,
    *,
    device: torch.device,
    devices: Sequence[torch.device] = (),
    scale_dtype: torch.dtype,
    progress: Callable[[str, float | None, int], None] | None = None,
    learning: Callable[[int, int, float], None] | None = None,
) -> Calibrated:
    """Quantize the linear modules of a checkpoint's layers for the inputs that tokens give them.

    Args:
        plan: of the checkpoint.
        work: the work folder; layers go to ``calibrated`` in it.
        text: what to calibrate with, or token ids ``[S, L]``.
        device: where layers run.
        devices: where modules are quantized, by default there.
        progress: called with name, relative error and weights of every module, or with a layer taken over,
            None and its weights.
        learning: called after every step that learns scales on the whole model.

    Raises:
        QuantizationError: the model cannot be run layer by layer, the text is too short, inputs are not
            finite.
    """
    folder = work / _LAYERS
    folder.mkdir(exist_ok=True)
    linears = {p.name: p for p in plan.modules.linears}
    with quiet_transformers(), torch.device("cpu"):
        dtype = compute_dtype(plan.folder, device)
        model = build_structure(plan.folder.path, plan.folder.config, len(plan.folder.location), dtype)
        _watchable(model)
        tokens, note = _tokens(plan, model, text)
        calibrated = Calibrated(tokens=(tokens.shape[0], tokens.shape[1]), note=note)

        def finished(layer: str) -> LayerResult | None:
            found = _read_layer(folder / f"{layer}.safetensors", layer, linears)
            if found is not None:
                calibrated.resumed += 1
                if progress is not None:
                    progress(layer, None, sum(linears[name].weights for name in found.linears))
            return found

        def tell(planned: PlannedLinear, error: ErrorStats) -> None:
            if progress is not None:
                progress(planned.name, error.relative, planned.weights)

        try:
            store = StreamedModel(plan.folder, model, device)
            for result in calibrate_layers(
                store,
                plan.modules.linears,
                tokens,
                plan.method,
                scale_dtype=scale_dtype,
                devices=devices,
                finished=finished,
                progress=tell,
            ):
                file = folder / f"{result.name}.safetensors"
                if not file.exists():
                    _write_layer(file, result)
                calibrated.add(result, file)
        except NoPassError as error:
            raise QuantizationError(f"{plan.folder.path} cannot be calibrated: {error}.") from None
    if learns(plan.method):
        file = folder / f"{_LEARNED}.safetensors"
        found = _read_layer(file, _LEARNED, linears)
        if found is None:
            found = _learned(plan, calibrated, tokens, plan.method, device, learning)
            _write_layer(file, found)
        calibrated.add(found, file)
    return calibrated


def _learned(
    plan: CheckpointPlan,
    calibrated: Calibrated,
    tokens: Tensor,
    method: CalibratedMethod,
    device: torch.device,
    progress: Callable[[int, int, float], None] | None,
) -> LayerResult:
    """Scales learned on the whole model, which is in memory for it."""
    stored = {
        p.name: QuantizedLinear.from_tensors(
            {f"{p.name}.{part}": value for part, value in calibrated.tensors(p).items()},
            p.spec,
            prefix=f"{p.name}.",
        )
        for p in plan.modules.linears
        if p.name in calibrated.errors
    }
    with torch.inference_mode(False), torch.device("cpu"):
        model = load_model(plan.folder, compute_dtype(plan.folder, device)).to(device).eval()
    linears, errors = finish_scales(model, stored, tokens, method, progress)
    notes = {name: NOT_LEARNED for name in stored if name not in linears and name not in calibrated.notes}
    return LayerResult(_LEARNED, linears, errors, notes)


def kept_bytes(plan: CheckpointPlan, work: Path) -> int:
    """Bytes that finished layers will take in the work folder beside those that are there."""
    there = sum(file.stat().st_size for file in (work / _LAYERS).glob("*.safetensors"))
    copies = 2 if learns(plan.method) else 1
    return max(0, round(copies * plan.bits_per_weight * plan.weights / 8) - there)


def estimate_calibration(plan: CheckpointPlan, text: CalibrationText, device: torch.device) -> float:
    """Seconds that :func:`calibrate_folder` will take, from one matrix of 256 x 1024 and one product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator).to(device)
    x = torch.randn(2 * _COLUMNS, _COLUMNS, generator=generator).to(device)
    spec, _ = fit_spec(plan.modules.linears[0].spec, _COLUMNS)
    inputs = InputMoments(x.T @ x / len(x), None, len(x))
    quantize_tensor(weight[:32], spec, method=plan.method, inputs=inputs)
    started = time.monotonic()
    quantize_tensor(weight, spec, method=plan.method, inputs=inputs)
    once = time.monotonic() - started
    # On a CPU the products with the Hessian count; on a GPU the columns, which follow one another.
    if device.type == "cpu":
        size = sum(p.weights * p.in_features for p in plan.modules.linears) / (_ROWS * _COLUMNS**2)
    else:
        size = sum(p.in_features for p in plan.modules.linears) / _COLUMNS
    x = x.to(compute_dtype(plan.folder, device))
    weight = weight.to(x.dtype)
    float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for a GPU
    started = time.monotonic()
    float(torch.nn.functional.linear(x, weight)[0, 0])
    product = (time.monotonic() - started) / (len(x) * _ROWS * _COLUMNS)
    recipe = plan.method.recipe if isinstance(plan.method, CalibratedMethod) else None
    passes = 1.0 + (recipe is None or recipe.propagate)
    whole = 0
    if recipe is not None:
        passes += recipe.correction > 0 or (recipe.epochs > 0 and recipe.propagate)
        # Of training, before and after it one pass each; of a step, one forward and two backward.
        passes += 2 * (recipe.epochs > 0) + 3 * recipe.epochs
        # Forward as the model is and as it will be, once more of the latter, and two backward.
        whole = 5 * recipe.learn_epochs if recipe.learn != "none" else 0
    tokens = text.sequences * text.length
    # A module's inputs are multiplied with themselves as well.
    squares = sum(p.in_features**2 for p in plan.modules.linears)
    others = plan.coverage.total - plan.coverage.embeddings
    return once * size + product * tokens * (passes * others + squares + whole * plan.coverage.total)


def _watchable(model: torch.nn.Module) -> None:
    """Have experts computed one by one: in grouped products nobody sees what each of them is given."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"


def _tokens(plan: CheckpointPlan, model: Any, text: CalibrationText | Tensor) -> tuple[Tensor, str | None]:
    embedding = input_embedding(model)
    vocabulary = 0 if embedding is None else embedding.num_embeddings
    if isinstance(text, Tensor):
        return check_tokens(text, vocabulary), None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    longest = getattr(config, "max_position_embeddings", None)
    with quiet_transformers():
        words = tokenized(load_tokenizer(plan.folder.path), text.read())
    ids, note = text.windows(
        words,
        longest if isinstance(longest, int) and longest > 0 else None,
    )
    return check_tokens(ids, vocabulary), note


def _write_layer(file: Path, result: LayerResult) -> None:
    tensors: dict[str, Tensor] = {}
    for name, linear in result.linears.items():
        # The bias is passed on from the source like any other tensor.
        stored = QuantizedLinear(linear.spec, linear.qweight, linear.scales, linear.codebook)
        tensors |= {key: value.cpu() for key, value in stored.to_tensors(f"{name}.").items()}
    errors = {n: [e.weights, e.squared_error, e.energy] for n, e in result.errors.items()}
    metadata = {"errors": json.dumps(errors), "notes": json.dumps(result.notes)}
    write_synced(file, safetensors.torch.save(tensors, metadata))


def _read_layer(file: Path, layer: str, linears: dict[str, PlannedLinear]) -> LayerResult | None:
    """What :func:`_write_layer` wrote, or None where there is nothing whole."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
        errors = {n: ErrorStats(*e) for n, e in json.loads(metadata["errors"]).items()}
        found = {
            name: QuantizedLinear.from_tensors(tensors, linears[name].spec, prefix=f"{name}.")
            for name in errors
        }
        return LayerResult(layer, found, errors, json.loads(metadata["notes"]))
    except (OSError, SafetensorError, FormatError, KeyError, TypeError, ValueError):
        return None  # not there, or not ours: the layer is made again
