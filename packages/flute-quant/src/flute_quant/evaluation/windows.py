"""Windows of a text for a model to read, and what each of them begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_quant.errors import CheckpointError, QuantizationError, one_line

__all__ = ["BOS_POLICIES", "TokenizedText", "Windows", "load_tokenizer", "text_windows", "tokenized"]

BOS_POLICIES = ("auto", "each", "none")
"""``each``: every window begins with the beginning-of-text token. ``none``: no window does. ``auto``:
``each`` where the tokenizer puts one before a text by itself. Models that were trained with one are much
worse without."""


@dataclass(frozen=True)
class Windows:
    """Evenly spaced pieces of a text.

    Args:
        tokens: int64 ``[count, length]``.
        bos: what they begin with, in words: ``"<s>"`` or ``"none"``.
    """

    tokens: Tensor
    bos: str


def text_windows(
    tokenizer: Any, text: str, *, count: int = 16, length: int = 512, bos: str = "auto"
) -> Windows:
    """``count`` windows of ``length`` tokens from the beginning of a text to its end.

    They overlap where the text is short. A beginning-of-text token is one of the ``length``.

    Args:
        tokenizer: of Transformers.
        text: at least one window long.
        count, length: of the windows.
        bos: one of :data:`BOS_POLICIES`.

    Raises:
        QuantizationError: a number that is not positive, an unknown policy, a tokenizer without the token
            that is asked for, or a text that is too short.
    """
    if count < 1 or length < 2:
        raise QuantizationError(f"windows is {count} and length {length}; expected at least 1 and 2.")
    tokens = tokenized(tokenizer, text, bos=bos)
    if len(tokens) < length:
        taken = length - (tokens.first is not None)
        raise QuantizationError(f"The text has {len(tokens.ids)} tokens; one window needs {taken}.")
    return tokens.windows(count, length)


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens, and what every window of them begins with.

    Args:
        ids: int64 ``[T]``, of the text alone.
        first: the beginning-of-text token, or None where windows begin with none.
        bos: the same in words, see :class:`Windows`.
    """

    ids: Tensor
    first: int | None
    bos: str

    def __len__(self) -> int:
        """Of the longest window."""
        return len(self.ids) + (self.first is not None)

    def windows(self, count: int, length: int) -> Windows:
        """``count`` windows of ``length`` tokens, at most as many as there are, evenly spaced."""
        taken = length - (self.first is not None)
        last = len(self.ids) - taken
        starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
        tokens = torch.stack([self.ids[start : start + taken] for start in starts])
        if self.first is not None:
            tokens = torch.cat([tokens.new_full((count, 1), self.first), tokens], 1)
        return Windows(tokens, self.bos)


def tokenized(tokenizer: Any, text: str, *, bos: str = "auto") -> TokenizedText:
    """A text to take windows from: the one place that decides what these begin with.

    Arguments and errors are those of :func:`text_windows`.
    """
    if bos not in BOS_POLICIES:
        raise QuantizationError(f"bos is {bos!r}; supported are {', '.join(BOS_POLICIES)}.")
    first = tokenizer.bos_token_id
    if bos == "auto":
        bos = "each" if first is not None and _begins_with(tokenizer, first) else "none"
    if bos == "each" and first is None:
        raise QuantizationError("bos is 'each', and the tokenizer has no beginning-of-text token.")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    if bos == "none":
        return TokenizedText(ids, None, "none")
    return TokenizedText(ids, first, str(tokenizer.bos_token))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: Transformers cannot load it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a third party's parsers on files that nobody vouches for
        raise CheckpointError(
            f"{folder} has no tokenizer that Transformers can load: {one_line(error)}"
        ) from None


def _begins_with(tokenizer: Any, token: int) -> bool:
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == token
