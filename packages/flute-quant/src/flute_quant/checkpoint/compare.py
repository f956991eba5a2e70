"""How much a quantized model differs from its source on a text. Needs no kernel: weights are dequantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_quant.checkpoint.inspect import inspect_checkpoint
from flute_quant.checkpoint.loading import load_model
from flute_quant.checkpoint.quantized import QuantizedFolder
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.devices import checked_device
from flute_quant.errors import CheckpointError
from flute_quant.evaluation import Distance, DistanceMeter, load_tokenizer, text_windows
from flute_quant.stored import dequantized

__all__ = ["Comparison", "compare_checkpoints", "load_dequantized"]

# Rows of a weight whose errors are summed at once: 1,024 rows of 8,192 float32 are 34 MB.
_ROWS = 1024


@dataclass(frozen=True)
class Comparison(Distance):
    """Two checkpoints, by their weights and by what they say on the same text.

    Args:
        windows, length: how many windows of how many tokens.
        bos: what each window begins with, in words.
        bits_per_weight: of the quantized weights, with scales and tables.
        layers: quantized module to the squared error of its weight relative to the weight's energy; modules
            whose weight the source stores under another name are missing.
    """

    windows: int
    length: int
    bos: str
    bits_per_weight: float
    layers: dict[str, float]


def load_dequantized(path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A quantized checkpoint as an ordinary Transformers model with 16-bit linears.

    Args:
        path: a folder that :func:`~flute_quant.quantize_checkpoint` wrote.
        dtype: of all weights.

    Raises:
        CheckpointError, FormatError: the folder is damaged, or Transformers cannot build its model.
    """
    quantized = QuantizedFolder.open(path)
    state: dict[str, Tensor] = {}
    parts = {f"{m}.{part}" for m in quantized.modules for part in ("qweight", "scales", "codebook")}
    for name in quantized.folder.location:
        if name not in parts:
            value = quantized.read(name)
            state[name] = value.to(dtype) if value.is_floating_point() else value
    for module in quantized.modules:
        state[f"{module}.weight"] = dequantized(quantized.linear(module)).to(dtype)
    return load_model(quantized.folder, dtype, state)


def compare_checkpoints(
    src: str | Path,
    dst: str | Path,
    text: str,
    *,
    windows: int = 16,
    length: int = 512,
    bos: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Perplexities, KL divergence and top-1 agreement on windows of a text, and the errors of weights.

    The windows are evenly spaced. Both models are in memory in ``dtype``; errors of weights are taken
    before that, one weight at a time.

    Args:
        src: the source folder; its tokenizer is used.
        dst: the quantized folder.
        text: at least ``length`` tokens.
        windows: how many; they overlap where the text is short.
        length: tokens of each, which is the context that the models see.
        bos: whether windows begin with the beginning-of-text token, one of
            :data:`~flute_quant.evaluation.BOS_POLICIES`.
        dtype, device: of both models.
        progress: called with windows done and in all.

    Raises:
        QuantizationError: the text is too short, or a number is not positive.
        CheckpointError, FormatError: a folder cannot be read.
    """
    device = checked_device(device)
    source_folder = CheckpointFolder.open(src)
    with quiet_transformers():
        chosen = text_windows(load_tokenizer(Path(src)), text, count=windows, length=length, bos=bos)
    inspection = inspect_checkpoint(dst)
    layers = _layer_errors(source_folder, QuantizedFolder.open(dst))
    quantized = load_dequantized(dst, dtype=dtype).to(device).eval()
    source = load_model(source_folder, dtype, None).to(device).eval()
    meter = DistanceMeter()
    with torch.inference_mode():
        for done, window in enumerate(chosen.tokens.to(device), 1):
            meter.add(source(window[None]).logits[0], quantized(window[None]).logits[0], window)
            if progress is not None:
                progress(done, windows)
    return Comparison(
        **vars(meter.result()),
        windows=windows,
        length=length,
        bos=chosen.bos,
        bits_per_weight=inspection.bits_per_weight,
        layers=layers,
    )


def _layer_errors(source: CheckpointFolder, quantized: QuantizedFolder) -> dict[str, float]:
    errors = {}
    for module in quantized.modules:
        name = f"{module}.weight"
        if name not in source.location:
            continue
        weight = source.files[source.location[name]].read(name)
        found = dequantized(quantized.linear(module))
        if found.shape != weight.shape:
            raise CheckpointError(
                f"{name} is {list(weight.shape)} in {source.path} and stands for {list(found.shape)} in "
                f"{quantized.folder.path}; expected a folder and what was made of it."
            )
        error = energy = 0.0
        for start in range(0, len(weight), _ROWS):
            rows = weight[start : start + _ROWS].double()
            error += float((found[start : start + _ROWS] - rows).square().sum())
            energy += float(rows.square().sum())
        errors[module] = error / energy if energy else 0.0
    return errors
