"""The version of this package, from its metadata or, in a source tree, from the file that holds it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["package_version"]


def package_version() -> str:
    """Such as ``0.1.0``."""
    try:
        return version("flute-quant")
    except PackageNotFoundError:
        return (Path(__file__).parents[2] / "VERSION").read_text(encoding="utf-8").strip()
