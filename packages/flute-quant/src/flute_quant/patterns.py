"""Naming modules: patterns on the command line and in Python, and specs by pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from flute_kernels import QuantSpec
from flute_quant.errors import QuantizationError

__all__ = ["Override", "check_patterns", "has_part", "matches", "parse_override", "spec_for"]


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches: ``*``, ``?`` and ``[]`` as in file names, or the last parts of the name.

    ``down_proj`` and ``mlp.down_proj`` match ``model.layers.0.mlp.down_proj``; so does ``*.layers.0.*``.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Whether one of ``parts`` (``wo``, ``mlp.gate``) is a whole part of a dotted name, or some in a row."""
    return any(f".{part}." in f".{name}." for part in parts)


def check_patterns(patterns: Iterable[str], names: Sequence[str], option: str) -> None:
    """Raise QuantizationError for a pattern that matches none of ``names``: most likely a typing error."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            example = f", such as {names[0]}" if names else ""
            raise QuantizationError(
                f"{option} {pattern!r} matches none of the model's {len(names)} linear modules{example}."
            )


@dataclass(frozen=True)
class Override:
    """Another spec for the modules that match: mixed precision.

    Args:
        pattern: see :func:`matches`.
        changes: fields of QuantSpec to their values.
    """

    pattern: str
    changes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, pattern: str, **changes: int) -> Override:
        """``Override.of("down_proj", bits=4, group_size=32)``."""
        return cls(pattern, tuple(changes.items()))

    def apply(self, spec: QuantSpec) -> QuantSpec:
        """``spec`` with the changes."""
        return replace(spec, **dict(self.changes))


def parse_override(text: str) -> Override:
    """``PATTERN=bits:3,group_size:32``, as on the command line.

    Raises:
        QuantizationError: not of that form, or no field of QuantSpec.
    """
    pattern, found, changes = text.rpartition("=")
    fields: dict[str, Any] = asdict(QuantSpec())
    result = []
    for part in changes.split(","):
        key, colon, value = part.partition(":")
        digits = value.removeprefix("-")
        if not (found and pattern and colon and digits.isdecimal() and len(digits) < 20) or key not in fields:
            raise QuantizationError(
                f"The override {text!r} is not of the form PATTERN=bits:3,group_size:32 "
                f"with fields among {', '.join(fields)}."
            )
        result.append((key, int(value)))
    return Override(pattern, tuple(result))


def spec_for(name: str, spec: QuantSpec, overrides: Iterable[Override]) -> QuantSpec:
    """The spec of a module: every override that matches is applied, in order."""
    for override in overrides:
        if matches(name, override.pattern):
            spec = override.apply(spec)
    return spec
