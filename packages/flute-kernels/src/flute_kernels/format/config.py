"""The ``quantization_config`` that a quantized checkpoint carries in its ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flute_kernels.errors import FormatError
from flute_kernels.format.spec import QuantSpec

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "QuantizationConfig"]

QUANT_METHOD = "flute"
FORMAT_VERSION = 1
_SPEC_FIELDS = ("bits", "group_size", "vector_size", "hadamard", "hadamard_seed")


@dataclass(frozen=True)
class QuantizationConfig:
    """What a reader must know to load a quantized checkpoint.

    Args:
        spec: how a layer is quantized unless ``overrides`` says otherwise.
        modules_to_not_convert: names of linear modules left in 16 bits, as in the model
            (``lm_head``, ``model.layers.0.mlp.gate``).
        overrides: module name to its own spec (mixed precision, or a smaller group where the
            default does not divide K).
        method: how the codes were chosen; for people, no reader depends on it.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    modules_to_not_convert: tuple[str, ...] = ()
    overrides: Mapping[str, QuantSpec] = field(default_factory=dict)
    method: str = ""

    def spec_for(self, module: str) -> QuantSpec | None:
        """The spec of a module by its full name, or None where it is left in 16 bits."""
        if module in self.modules_to_not_convert:
            return None
        return self.overrides.get(module, self.spec)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: defaults at the top, and of every override only what differs."""
        base = asdict(self.spec)
        result: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            **base,
            "modules_to_not_convert": sorted(self.modules_to_not_convert),
            "overrides": {
                name: {k: v for k, v in asdict(spec).items() if v != base[k]}
                for name, spec in sorted(self.overrides.items())
                if spec != self.spec
            },
        }
        if self.method:
            result["method"] = self.method
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationConfig:
        """Read the JSON object; unknown keys are left alone, everything that is used is checked.

        Raises:
            FormatError: another ``quant_method``, an unknown ``format_version``, or a value of
                the wrong kind, named.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"quantization_config is a {type(data).__name__}; expected an object.")
        method = data.get("quant_method")
        if method != QUANT_METHOD:
            raise FormatError(f"quant_method is {method!r}; expected {QUANT_METHOD!r}.")
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise FormatError(
                f"format_version is {version!r}; this release reads {FORMAT_VERSION}. "
                "A newer flute-kernels may read it."
            )
        for name in ("bits", "group_size"):
            if name not in data:
                raise FormatError(f"quantization_config has no {name!r}.")
        spec = QuantSpec(**_pick(data))
        skipped = data.get("modules_to_not_convert") or ()
        if isinstance(skipped, str) or not _all_strings(skipped):
            raise FormatError(f"modules_to_not_convert is {skipped!r}; expected a list of names.")
        given = data.get("overrides") or {}
        if not isinstance(given, Mapping):
            raise FormatError(f"overrides is a {type(given).__name__}; expected an object.")
        overrides = {}
        for name, values in given.items():
            if not isinstance(values, Mapping):
                raise FormatError(f"overrides[{name!r}] is {values!r}; expected an object.")
            unknown = sorted(set(values) - set(_SPEC_FIELDS))
            if unknown:
                raise FormatError(
                    f"overrides[{name!r}] has unknown keys {unknown}; expected some of {list(_SPEC_FIELDS)}."
                )
            try:
                overrides[name] = QuantSpec(**{**asdict(spec), **values})
            except FormatError as error:
                raise FormatError(f"overrides[{name!r}]: {error}") from None
        return cls(spec, tuple(skipped), overrides, str(data.get("method") or ""))


def _pick(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in _SPEC_FIELDS if name in data}


def _all_strings(values: Any) -> bool:
    return isinstance(values, Iterable) and all(isinstance(v, str) for v in values)
