"""How much a quantized model differs from its source on a text. Needs no kernel: weights are dequantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_quant.checkpoint.quantized import QuantizedFolder
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.errors import CheckpointError, QuantizationError, one_line
from flute_quant.rotation import unrotate

__all__ = ["Comparison", "compare_checkpoints", "load_dequantized", "tokenize"]

# Rows of logits turned into probabilities at once: 64 rows of 128,000 float32 are 33 MB.
_ROWS = 64


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text.

    Args:
        source_perplexity, quantized_perplexity: exp of the mean negative log likelihood of a token.
        kl: mean Kullback-Leibler divergence of the quantized from the source distribution, in nats a token.
        top1: fraction of positions with the same most likely token.
        windows, length: how many windows of how many tokens.
        tokens: predictions that were compared.
    """

    source_perplexity: float
    quantized_perplexity: float
    kl: float
    top1: float
    windows: int
    length: int
    tokens: int


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
        linear = quantized.linear(module)
        weight = linear.dequantize()
        if linear.spec.hadamard:
            weight = unrotate(weight, linear.spec.hadamard, linear.spec.hadamard_seed)
        state[f"{module}.weight"] = weight.to(dtype)
    return _load(quantized.folder, dtype, state)


def compare_checkpoints(
    src: str | Path,
    dst: str | Path,
    text: str,
    *,
    windows: int = 16,
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Perplexities, KL divergence and top-1 agreement on evenly spaced windows of a text.

    Both models are in memory in ``dtype``.

    Args:
        src: the source folder; its tokenizer is used.
        dst: the quantized folder.
        text: at least ``length`` tokens.
        windows: how many; they overlap where the text is short.
        length: tokens of each.
        progress: called with windows done and in all.

    Raises:
        QuantizationError: the text is too short, or a number is not positive.
        CheckpointError, FormatError: a folder cannot be read.
    """
    if windows < 1 or length < 2:
        raise QuantizationError(f"windows is {windows} and length {length}; expected at least 1 and 2.")
    source_folder = CheckpointFolder.open(src)
    tokens = tokenize(Path(src), text)
    if len(tokens) < length:
        raise QuantizationError(f"The text has {len(tokens)} tokens; one window needs {length}.")
    quantized = load_dequantized(dst, dtype=dtype).to(device).eval()
    source = _load(source_folder, dtype, None).to(device).eval()
    last = len(tokens) - length
    starts = [round(i * last / max(windows - 1, 1)) for i in range(windows)]
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode():
        for done, start in enumerate(starts, 1):
            window = tokens[start : start + length].to(device)[None]
            sums += _window(source(window).logits[0], quantized(window).logits[0], window[0])
            if progress is not None:
                progress(done, windows)
    count = windows * (length - 1)
    nll_source, nll_quantized, kl, same = (float(s) / count for s in sums)
    return Comparison(math.exp(nll_source), math.exp(nll_quantized), kl, same, windows, length, count)


def _window(source: Tensor, quantized: Tensor, tokens: Tensor) -> Tensor:
    """Sums over a window's predictions: both negative log likelihoods, divergence, agreement."""
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(tokens) - 1, _ROWS):
        stop = min(start + _ROWS, len(tokens) - 1)
        p, q = (x[start:stop].float().log_softmax(1) for x in (source, quantized))
        target = tokens[start + 1 : stop + 1, None]
        total += (
            torch.stack(
                [
                    -p.gather(1, target).sum(),
                    -q.gather(1, target).sum(),
                    (p.exp() * (p - q)).sum(),
                    (p.argmax(1) == q.argmax(1)).sum(),
                ]
            )
            .double()
            .cpu()
        )
    return total


def tokenize(folder: Path, text: str) -> Tensor:
    """Token ids ``[T]`` of a text, by the folder's tokenizer.

    Raises:
        CheckpointError: it has none that Transformers can load.
    """
    with quiet_transformers():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            # As text for a model, not as a chat; a beginning-of-text token belongs to the first window only.
            ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        except Exception as error:  # a third party's parsers on files that nobody vouches for
            raise CheckpointError(
                f"{folder} has no tokenizer that Transformers can load: {one_line(error)}"
            ) from None
    result: Tensor = ids
    return result


def _load(folder: CheckpointFolder, dtype: torch.dtype, state: dict[str, Tensor] | None) -> Any:
    """A model with Transformers' own loading rules, from its folder or from tensors in memory."""
    with quiet_transformers():
        import transformers

        plain = {k: v for k, v in folder.config.items() if k not in ("quantization_config", "auto_map")}
        named = plain.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        kind: Any = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModelForCausalLM
        try:
            config = transformers.AutoConfig.for_model(plain.pop("model_type", None), **plain)
            where = str(folder.path) if state is None else None
            return kind.from_pretrained(
                where,
                config=config,
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:
            raise CheckpointError(f"Transformers cannot load {folder.path}: {one_line(error)}") from None
