"""How good a language model is on a text, how fast it writes, how much room it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

__all__ = ["decode_speeds", "evenly_spaced", "folder_bytes", "perplexity"]


def evenly_spaced(tokens: Tensor, count: int, length: int) -> Tensor:
    """``count`` windows of a text, from its beginning to its end: ``[T]`` to ``[count, length]``.

    They overlap where the text is short.

    Raises:
        ValueError: the text is shorter than one window, or a number is not positive.
    """
    if count < 1 or not 2 <= length <= len(tokens):
        raise ValueError(
            f"{count} windows of {length} tokens from a text of {len(tokens)}; "
            "expected at least one window of 2 tokens or more, and no longer than the text."
        )
    starts = torch.linspace(0, len(tokens) - length, count, dtype=torch.float64).round().long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def perplexity(model: Any, windows: Tensor, progress: Callable[[], None] | None = None) -> float:
    """exp of the mean negative log-likelihood of a token, given those before it in its window.

    Args:
        model: a causal language model of Transformers.
        windows: token ids ``[count, length]``.
        progress: called after every window.
    """
    total = 0.0
    with torch.inference_mode():
        for window in windows.to(model.device):
            # One at a time: the logits of 512 tokens take 100 MB. The last token's predict nothing in here.
            logits = model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            if progress is not None:
                progress()
    return math.exp(total / windows[:, 1:].numel())


def decode_speeds(
    models: Mapping[str, Any], prompt: Tensor, tokens: int, rounds: int = 3
) -> dict[str, float]:
    """Tokens a second of greedy generation for one reader, the time to read the prompt left out.

    The models take turns, so that a machine that is busy for a while is busy for all of them; and of all
    steps the median counts, so that a pause is no property of a model.

    Args:
        models: causal language models of Transformers by name.
        prompt: token ids ``[1, T]``.
        tokens: how many to generate in a round, at least 2.
        rounds: how often each model's turn comes.
    """
    gaps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            clock = _Clock()
            model.generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # an early end of the text would leave little to measure
                do_sample=False,
                streamer=clock,
            )
            gaps[name] += [after - before for before, after in pairwise(clock.times)]
    return {name: 1 / statistics.median(seconds) for name, seconds in gaps.items()}


def folder_bytes(folder: Path) -> int:
    """Size of everything in a model's folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class _Clock(BaseStreamer):  # type: ignore[misc]  # Transformers is not typed for mypy
    """Notes when each generated token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True  # the first call hands over the prompt

    def end(self) -> None:
        pass
