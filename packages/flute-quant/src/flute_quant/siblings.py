"""Linear modules that see the same input, which engines run as one: q, k, v of an attention; gate and up."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["SIBLINGS", "sibling_groups"]

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # gate and up of an expert, as Mixtral's checkpoints call them
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's multi-head latent attention
)
"""Last parts of names of modules that vLLM merges, in its order."""

_LINE_OF = {part: line for line in SIBLINGS for part in line}


def sibling_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every name once: siblings of one parent together, others alone, in the order of each group's first."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        groups.setdefault((parent, _LINE_OF.get(last, name)), []).append(name)
    return [tuple(group) for group in groups.values()]
