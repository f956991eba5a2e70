"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["counted", "duration", "size"]


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
