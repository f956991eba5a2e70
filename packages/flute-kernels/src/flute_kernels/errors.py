"""The exceptions that FLUTE raises on purpose. Each message is a sentence with the numbers that caused it."""

from __future__ import annotations

__all__ = ["FluteError", "FormatError", "UnsupportedError"]


class FluteError(Exception):
    """Base of every error that FLUTE raises on purpose."""


class FormatError(FluteError, ValueError):
    """Stored or given data does not follow FLUTE's weight format."""


class UnsupportedError(FluteError, NotImplementedError):
    """The request is valid, but no kernel of this build serves it on this device."""
