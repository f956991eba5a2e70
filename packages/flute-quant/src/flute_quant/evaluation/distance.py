"""How far the predictions of one model are from those of another, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Distance", "DistanceMeter"]

# Rows of logits turned into probabilities at once: 64 rows of 128,000 float32 are 33 MB on a CPU; a GPU
# has room for more and needs it to be busy.
_ROWS_CPU = 64
_ROWS_GPU = 1024


@dataclass(frozen=True)
class Distance:
    """A quantized model's predictions against those of its source.

    Args:
        source_perplexity, quantized_perplexity: exp of the mean negative log likelihood of a token.
        kl: mean Kullback-Leibler divergence of the quantized from the source distribution,
            KL(source || quantized), in nats a token.
        kl_median, kl_p99: median and 99th percentile of the same over tokens.
        top1: fraction of positions with the same most likely token.
        tokens: predictions that were compared.
    """

    source_perplexity: float
    quantized_perplexity: float
    kl: float
    kl_median: float
    kl_p99: float
    top1: float
    tokens: int


class DistanceMeter:
    """Gathers predictions window by window; :meth:`result` is the distance over all of them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._divergences: list[Tensor] = []

    def add(self, source: Tensor, quantized: Tensor, tokens: Tensor) -> None:
        """Compare two models on one window.

        Args:
            source, quantized: logits ``[T - 1, vocabulary]``, or ``[T, vocabulary]`` of which the last row,
                which predicts nothing that is known, is left out.
            tokens: int64 ``[T]``.
        """
        count = len(tokens) - 1
        rows = _ROWS_CPU if source.device.type == "cpu" else _ROWS_GPU
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            p, q = (x[start:stop].float().log_softmax(1) for x in (source, quantized))
            target = tokens[start + 1 : stop + 1, None]
            sums = [
                -p.gather(1, target).sum(dtype=torch.float64),
                -q.gather(1, target).sum(dtype=torch.float64),
                (p.argmax(1) == q.argmax(1)).sum().double(),
            ]
            self._sums += torch.stack(sums).cpu()
            # Rounding makes the divergence of equal distributions some 1e-8 below zero.
            self._divergences.append((p.exp() * (p - q)).sum(1).clamp_min(0).cpu())

    def result(self) -> Distance:
        """The distance over all windows so far, of which there must be one."""
        divergences = torch.cat(self._divergences).double()
        count = len(divergences)
        source, quantized, same = (float(s) / count for s in self._sums)
        ordered = divergences.sort().values
        # Not torch.quantile, which takes 16 million values at most.
        median, p99 = (float(ordered[min(count - 1, int(count * part))]) for part in (0.5, 0.99))
        return Distance(
            math.exp(source), math.exp(quantized), float(divergences.mean()), median, p99, same, count
        )
