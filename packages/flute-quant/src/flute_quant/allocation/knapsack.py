"""One choice for every unit, with the least sum of losses under a budget: a dynamic program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["least_loss"]

# Steps that the budget is counted in. With 300 units and 9 choices each that is half a second. Where costs
# have no common divisor as coarse as a step, they are rounded up, and what that leaves is spent afterwards.
_STEPS = 1 << 17


def least_loss(units: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """The index of each unit's choice.

    Exact where costs above each unit's least have a common divisor of at least 1 / 131,072 of what those
    leave of the budget. Otherwise at most that much a unit is not in the program's reach; it is spent
    afterwards on whatever lowers the loss most.

    Args:
        units: the choices of each, as ``(cost, loss)``, costs not negative.
        budget: that the sum of costs may reach.

    Raises:
        ValueError: even the cheapest choices cost more than the budget.
    """
    offered = [_undominated(choices) for choices in units]
    least = [choices[kept[0]][0] for choices, kept in zip(units, offered, strict=True)]
    slack = budget - sum(least)
    if slack < 0:
        raise ValueError(f"the cheapest choices cost {sum(least)}, more than the budget of {budget}")
    extra = [
        [choices[i][0] - low for i in kept] for choices, kept, low in zip(units, offered, least, strict=True)
    ]
    step = max(1, math.gcd(*(e for costs in extra for e in costs)), -(-slack // _STEPS))
    picked = _program(
        [[-(-e // step) for e in costs] for costs in extra],
        [[choices[i][1] for i in kept] for choices, kept in zip(units, offered, strict=True)],
        slack // step,
    )
    left = slack - sum(costs[i] for costs, i in zip(extra, picked, strict=True))
    _spend(picked, extra, [[c[i][1] for i in k] for c, k in zip(units, offered, strict=True)], left)
    return [kept[i] for kept, i in zip(offered, picked, strict=True)]


def _undominated(choices: Sequence[tuple[int, float]]) -> list[int]:
    """Indices by rising cost and falling loss, without choices that another one betters in both."""
    kept: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: choices[i]):
        if not kept or choices[i][1] < choices[kept[-1]][1]:
            kept.append(i)
    return kept


def _program(costs: list[list[int]], losses: list[list[float]], steps: int) -> list[int]:
    """``total[s]`` is the least loss of the units so far for at most ``s`` steps."""
    total: NDArray[np.float64] = np.zeros(steps + 1)
    taken = np.zeros((len(costs), steps + 1), dtype=np.uint8)
    for unit, (cost_of, loss_of) in enumerate(zip(costs, losses, strict=True)):
        best: NDArray[np.float64] = np.full(steps + 1, np.inf)
        for choice, (cost, loss) in enumerate(zip(cost_of, loss_of, strict=True)):
            if cost > steps:
                break
            found = total[: steps + 1 - cost] + loss
            better = found < best[cost:]
            best[cost:][better] = found[better]
            taken[unit, cost:][better] = choice
        total = best
    picked, at = [0] * len(costs), steps
    for unit in reversed(range(len(costs))):
        picked[unit] = int(taken[unit, at])
        at -= costs[unit][picked[unit]]
    return picked


def _spend(picked: list[int], extra: list[list[int]], losses: list[list[float]], left: int) -> None:
    """Better choices while any is within what is left, the one that lowers the loss most first."""
    while True:
        offers = [
            (losses[u][i] - losses[u][picked[u]], u, i)
            for u in range(len(picked))
            for i in range(picked[u] + 1, len(extra[u]))
            if extra[u][i] - extra[u][picked[u]] <= left
        ]
        if not offers:
            return
        _, unit, choice = min(offers)
        left -= extra[unit][choice] - extra[unit][picked[unit]]
        picked[unit] = choice
