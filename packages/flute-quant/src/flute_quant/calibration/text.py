"""The tokens that a model is calibrated with."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_quant.errors import QuantizationError
from flute_quant.evaluation import TokenizedText
from flute_quant.methods import CalibratedMethod, Method

__all__ = ["OUTSIDE", "CalibrationText", "check_calibration", "check_tokens", "parse_amount"]

OUTSIDE = "it is in no layer that tokens run through, so it was quantized without data"
"""Why a module has no calibration, as a clause."""


_MOST = 1 << 20  # sequences, and tokens of one


@dataclass(frozen=True)
class CalibrationText:
    """A text, and how much of it is read.

    Args:
        path: a UTF-8 file of running text, like what the model is for.
        sequences: windows of it, evenly spaced from its beginning to its end.
        length: tokens of each.
    """

    path: Path
    sequences: int = 128
    length: int = 2048

    def read(self) -> str:
        """The text.

        Raises:
            QuantizationError: the file cannot be read, or is not UTF-8.
        """
        try:
            return self.path.read_bytes().decode("utf-8")
        except OSError as error:
            raise QuantizationError(
                f"The calibration text {self.path} cannot be read: {error.strerror or error}."
            ) from None
        except UnicodeDecodeError as error:
            raise QuantizationError(
                f"The calibration text {self.path} is not UTF-8 at byte {error.start}."
            ) from None

    def digest(self) -> str:
        """Of the text and the amount: what decides about the tokens, given a tokenizer."""
        content = hashlib.sha256(self.read().encode()).hexdigest()
        return f"{content}, {self.sequences} x {self.length}"

    def windows(self, tokens: TokenizedText, longest: int | None) -> tuple[Tensor, str | None]:
        """Windows of the whole text, which do not overlap and begin as those of ``compare`` do.

        Args:
            tokens: of the text, with the beginning-of-text token of its windows.
            longest: tokens that the model takes at once, or None.

        Returns:
            int64 ``[S, L]``, and a sentence where there are fewer or shorter ones than asked for, or None.

        Raises:
            QuantizationError: the text is shorter than one window.
        """
        length = min(self.length, longest) if longest else self.length
        if len(tokens) < length:
            raise QuantizationError(
                f"The calibration text {self.path} has {len(tokens.ids)} tokens; one sequence takes {length}."
            )
        taken = length - (tokens.first is not None)
        sequences = min(self.sequences, len(tokens.ids) // taken)
        note = None
        if (sequences, length) != (self.sequences, self.length):
            reasons = []
            if length < self.length:
                reasons.append(f"the model takes {length} tokens at once")
            if sequences < self.sequences:
                reasons.append(f"the text has {len(tokens.ids)} tokens")
            note = (
                f"Calibrated with {sequences} x {length} tokens instead of {self.sequences} x {self.length}, "
                f"because {' and '.join(reasons)}."
            )
        return tokens.windows(sequences, length).tokens, note


def parse_amount(text: str) -> tuple[int, int]:
    """``128x2048`` as sequences and tokens of each.

    Raises:
        QuantizationError: not of that form, or a number out of range.
    """
    found = re.fullmatch(r"(\d{1,8})x(\d{1,8})", text.strip().lower())
    sequences, length = map(int, found.groups()) if found else (0, 0)
    if not (1 <= sequences <= _MOST and 2 <= length <= _MOST):
        raise QuantizationError(
            f"The number of calibration tokens is {text!r}; expected sequences and tokens of each, such as "
            f"128x2048, the first from 1 and the second from 2 to {_MOST}."
        )
    return sequences, length


def check_calibration(
    method: Method, calibration: CalibrationText | Tensor | None, importance: object
) -> None:
    """Refuse a method that is calibrated without tokens, and tokens beside another importance."""
    if calibration is None and isinstance(method, CalibratedMethod):
        raise QuantizationError(
            f"The method {method.name!r} is calibrated; it needs a text or tokens to calibrate with."
        )
    if calibration is not None and not (isinstance(importance, str) and importance == "auto"):
        given = repr(importance) if isinstance(importance, str) else "given as tensors"
        raise QuantizationError(
            f"importance is {given} and there is a calibration text, which measures it; expected one of them."
        )


def check_tokens(tokens: Any, vocabulary: int) -> Tensor:
    """Token ids ``[S, L]`` that the user brings, as int64 on the CPU.

    Raises:
        QuantizationError: another shape, or ids outside of the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        what = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise QuantizationError(f"The calibration tokens are {what}; expected integers [sequences, length].")
    ids = tokens.detach().to("cpu", torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise QuantizationError(
            f"The calibration tokens reach from {int(ids.min())} to {int(ids.max())}; "
            f"the model's vocabulary has {vocabulary}."
        )
    return ids
