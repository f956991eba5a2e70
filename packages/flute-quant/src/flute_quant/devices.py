"""The device that a caller names."""

from __future__ import annotations

import torch

from flute_quant.errors import QuantizationError

__all__ = ["checked_device"]


def checked_device(device: str | torch.device) -> torch.device:
    """``device``, if it is a CPU or a GPU that torch finds.

    Raises:
        QuantizationError: it is another.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise QuantizationError(f"device is {device!r}; supported are cpu and cuda.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise QuantizationError(f"device is {device!r}; supported are cpu and cuda.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise QuantizationError(
            f"device is {str(device)!r}, but torch {torch.__version__} finds no CUDA GPU."
        )
    return chosen
