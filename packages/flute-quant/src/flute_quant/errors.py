"""The refusals of the quantizer. Each message is one sentence with the numbers that caused it."""

from __future__ import annotations

from flute_kernels import FluteError

__all__ = ["CheckpointError", "QuantizationError", "one_line"]


class QuantizationError(FluteError, ValueError):
    """Weights or options that cannot be quantized as asked."""


class CheckpointError(FluteError):
    """A source or destination folder that cannot be read or written as asked."""


def one_line(error: BaseException) -> str:
    """Somebody else's message as part of a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
