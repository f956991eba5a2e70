"""Random weights, with which speed is measured where there is no checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config

from flute_kernels import QuantSpec

__all__ = ["STANDARD_DEVIATION", "loads_dummies", "random_stored"]

STANDARD_DEVIATION = 0.02
"""Of the weights: about a language model's, so that nothing overflows."""


def loads_dummies() -> bool:
    """Whether vLLM fills weights with random numbers instead of a checkpoint's."""
    return str(get_current_vllm_config().load_config.load_format) == "dummy"


def random_stored(spec: QuantSpec, rows: int, columns: int, device: torch.device) -> dict[str, Tensor]:
    """``qweight``, ``scales`` and ``codebook`` of a matrix ``[rows, columns]``, made on the device."""
    shapes = spec.shapes(rows, columns)
    entries = torch.randn(shapes["codebook"], device=device)
    return {
        "qweight": torch.randint(-(2**31), 2**31, shapes["qweight"], dtype=torch.int32, device=device),
        "scales": torch.full(shapes["scales"], STANDARD_DEVIATION, dtype=torch.float16, device=device),
        "codebook": entries.sort(dim=1).values.half(),
    }
