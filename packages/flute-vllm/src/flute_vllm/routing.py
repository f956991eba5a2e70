"""From the experts that each token goes to, to rows sorted by expert, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Route", "route"]


class Route(NamedTuple):
    """Pairs of a token and an expert, sorted by expert; those of experts elsewhere come last.

    Every shape follows from the numbers of tokens and experts alone, so that a CUDA graph holds it.

    Args:
        token: ``[pairs]``, of each sorted pair.
        counts: int32 ``[experts]``, pairs of each expert of this process.
        place: ``[tokens, k]``, where the pairs of a token are among the sorted ones.
    """

    token: Tensor
    counts: Tensor
    place: Tensor

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Each token's rows, weighted and added in float32, always in the order of its experts.

        Args:
            rows: ``[pairs, N]``, sorted.
            weights: ``[tokens, k]``.

        Returns:
            ``[tokens, N]`` in the dtype of ``rows``.
        """
        return (rows[self.place] * weights.float().unsqueeze(-1)).sum(1).to(rows.dtype)


def route(ids: Tensor, experts: int, expert_map: Tensor | None = None) -> Route:
    """Sort pairs by expert.

    Args:
        ids: ``[tokens, k]``, the experts of each token; negative where there is none.
        experts: of this process.
        expert_map: this process's number of every expert, -1 for one elsewhere; None where all are here.
    """
    flat = ids.flatten()
    if expert_map is not None:
        flat = torch.where(flat < 0, flat, expert_map[flat])
    flat = torch.where(flat < 0, experts, flat)
    expert, order = flat.sort(stable=True)
    # Not bincount, which asks the device how much it found.
    numbers = torch.arange(experts + 1, dtype=expert.dtype, device=ids.device)
    borders = torch.searchsorted(expert, numbers)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=ids.device)
    return Route(order // ids.shape[1], borders.diff().to(torch.int32), place.view(ids.shape))
