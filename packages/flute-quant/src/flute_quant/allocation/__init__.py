"""Bits by layer: more for the layers whose errors a model feels most, under an average for all of them."""

from flute_quant.allocation.allocate import (
    SENSITIVITIES,
    Allocation,
    allocate_checkpoint,
    allocate_model,
    default_choices,
)
from flute_quant.allocation.knapsack import least_loss

__all__ = [
    "SENSITIVITIES",
    "Allocation",
    "allocate_checkpoint",
    "allocate_model",
    "default_choices",
    "least_loss",
]
