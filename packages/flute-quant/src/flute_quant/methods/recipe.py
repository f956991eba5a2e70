"""What a calibrated method does after its data-free start."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    table: str = "fixed"
    feedback: bool = True
    act_order: bool = True
    damping: float = 0.01
    rounds: int = 0
    refit_scales: bool = True
    refit_table: bool = True
    sweep: bool = True
    propagate: bool = True
    correction: float = 0.0
