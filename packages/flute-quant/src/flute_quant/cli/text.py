"""Numbers as people read them, and the files that commands read and write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flute_quant.checkpoint.workfolder import partial_path
from flute_quant.errors import QuantizationError

__all__ = ["counted", "duration", "interrupted", "read_text", "size", "write_json"]


def interrupted(options: argparse.Namespace) -> str:
    """What is left of a command that writes ``options.dst`` and was stopped."""
    partial = partial_path(options.dst)
    if partial.exists():
        return f"Interrupted; {options.dst} was not written, and the same command resumes from {partial}."
    return f"Interrupted; {options.dst} was not written."


def counted(number: int, noun: str) -> str:
    """``1 linear``, ``210 linears``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(nbytes: float) -> str:
    """``1.5 GB``: powers of 1000, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """``4 s``, ``2 min 05 s``, ``1 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else "under 1 s" if seconds < 0.5 else "1 s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        QuantizationError: it is something else.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{path} is not UTF-8 at byte {error.start}.") from None


def write_json(value: Any, path: str) -> None:
    """To a file, or to standard output where ``path`` is ``-``."""
    text = json.dumps(value, indent=2)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")
