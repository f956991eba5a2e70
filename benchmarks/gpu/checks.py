"""What every GPU benchmark does before it times something."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "TOLERANCE", "check"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
"""Relative errors, wide enough for all peers; FLUTE's own are the tests'."""


def check(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise where a result is not what it should be for inputs of ``dtype``.

    Raises:
        ValueError: with what was checked, the error and the tolerance.
    """
    difference = torch.linalg.vector_norm(found.float() - expected)
    error = (difference / torch.linalg.vector_norm(expected)).item()
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:
        raise ValueError(f"{what}: relative error {error:.1e} is above {tolerance:.1e}")
