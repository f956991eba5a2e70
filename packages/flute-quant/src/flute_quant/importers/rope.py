"""Llama 3's scaling of rotary frequencies, which GGUF files keep as a tensor of factors.

Transformers wants the four numbers that the factors were computed from; its reader of GGUF leaves them out.

Source: ``_compute_llama3_parameters`` in transformers/modeling_rope_utils.py, and ``generate_extra_tensors``
of ``LlamaModel`` in convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["llama3_scaling"]

_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # the same in all Llama 3.1, 3.2 and 3.3


def llama3_scaling(factors: Tensor, theta: float) -> dict[str, Any] | None:
    """The scaling that has these factors, or None where Llama 3's has others.

    Args:
        factors: float32 ``[head_dim / 2]``, by which frequencies are divided.
        theta: the base of the frequencies.
    """
    factor = float(factors.max())
    half = len(factors)
    wavelengths = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    smooth = (_ORIGINAL / wavelengths - _LOW) / (_HIGH - _LOW)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected[wavelengths < _ORIGINAL / _HIGH] = 1
    expected[wavelengths > _ORIGINAL / _LOW] = factor
    if not torch.allclose(factors.double(), expected, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }
