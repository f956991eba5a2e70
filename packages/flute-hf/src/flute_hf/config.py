"""The ``quantization_config`` of a model, as Transformers wants to see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from flute_kernels import FormatError, QuantizationConfig, QuantSpec
from flute_kernels.format import FORMAT_VERSION, QUANT_METHOD
from flute_quant import IMPORTANCE_OPTIONS

__all__ = ["FluteConfig"]


@register_quantization_config(QUANT_METHOD)
class FluteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize a model while it loads, and how a loaded one is quantized.

    Args:
        bits: bits per weight, 2, 3 or 4.
        group_size: neighbouring weights that share a scale: 32, 64, 128, 256, or -1 for a whole row. Layers
            whose width it does not divide take the next smaller one.
        vector_size: 1 for scalar tables, 2 for tables of pairs.
        hadamard: 0, or the block size of a Hadamard rotation of each layer's input.
        hadamard_seed: seed of that rotation's signs.
        method: how codes are chosen, see ``flute_quant``.
        modules_to_not_convert: linear modules to leave in 16 bits: names, their last parts, or patterns
            with ``*``. Heads and routers are left anyway.
        overrides: module name (or pattern) to a :class:`~flute_kernels.QuantSpec`, or to the fields of it
            that differ: ``{"down_proj": {"group_size": 32}}``.
        importance: what errors in each input channel cost while a model is quantized: ``"random"``
            (measured with random tokens before the weights are loaded), ``"columns"`` (guessed from the
            weights), ``"none"``, module name to float32 ``[K]``, or ``"auto"``, which is ``"random"`` for
            methods that are made for it. It is no part of a saved model.
        kwargs: ``quant_method`` and ``format_version``, as a stored config has them.

    Raises:
        FormatError: a number that the format does not have, or an unknown ``importance``.
        TypeError: an unknown option.
    """

    quant_method = QUANT_METHOD

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        vector_size: int = 1,
        hadamard: int = 0,
        hadamard_seed: int = 0,
        method: str = "default",
        modules_to_not_convert: Iterable[str] | None = None,
        overrides: Mapping[str, QuantSpec | Mapping[str, int]] | None = None,
        importance: str | Mapping[str, Tensor] = "auto",
        **kwargs: Any,
    ) -> None:
        options = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": bits,
            "group_size": group_size,
            "vector_size": vector_size,
            "hadamard": hadamard,
            "hadamard_seed": hadamard_seed,
            "method": method,
            "modules_to_not_convert": modules_to_not_convert,
            "overrides": {
                name: asdict(spec) if isinstance(spec, QuantSpec) else spec
                for name, spec in (overrides or {}).items()
            },
        }
        unknown = sorted(set(kwargs) - set(options))
        if unknown:
            known = ", ".join([*list(options)[2:], "importance"])
            raise TypeError(f"FluteConfig has no option {unknown[0]!r}; it has {known}.")
        self.importance = _checked(importance)
        self._stored = QuantizationConfig.from_dict({**options, **kwargs})

    @classmethod
    def of(cls, stored: QuantizationConfig) -> FluteConfig:
        """The same config in Transformers' terms."""
        config = cls()
        config._stored = stored
        return config

    def like(self, stored: QuantizationConfig) -> FluteConfig:
        """Another stored config with this one's options of quantization."""
        config = type(self).of(stored)
        config.importance = self.importance
        return config

    @property
    def stored(self) -> QuantizationConfig:
        """The config in the format's own terms."""
        return self._stored

    @property
    def bits(self) -> int:
        return self._stored.spec.bits

    @property
    def group_size(self) -> int:
        return self._stored.spec.group_size

    @property
    def vector_size(self) -> int:
        return self._stored.spec.vector_size

    @property
    def hadamard(self) -> int:
        return self._stored.spec.hadamard

    @property
    def hadamard_seed(self) -> int:
        return self._stored.spec.hadamard_seed

    @property
    def method(self) -> str:
        return self._stored.method

    @property
    def modules_to_not_convert(self) -> list[str]:
        return list(self._stored.modules_to_not_convert)

    @property
    def overrides(self) -> dict[str, QuantSpec]:
        return dict(self._stored.overrides)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what ``config.json`` holds; keys that this release does not know are left alone.

        Raises:
            FormatError: no or an unknown ``format_version``, or a value of the wrong kind.
        """
        if "format_version" not in config_dict:
            raise FormatError(
                "quantization_config has no 'format_version', which a stored one has. To quantize, pass a "
                "FluteConfig instead of a dict."
            )
        config = cls.of(QuantizationConfig.from_dict(config_dict))
        config.importance = _checked(config_dict.get("importance", "auto"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` stores."""
        stored = self._stored.to_dict()
        if isinstance(self.importance, str) and self.importance != "auto":
            stored["importance"] = self.importance
        return stored

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Transformers' way to change single fields; the unknown ones are returned."""
        known = self._stored.to_dict()
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        self._stored = QuantizationConfig.from_dict({**known, **given})
        return kwargs

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FluteConfig) or self._stored != other._stored:
            return False
        # Tensors have no one truth value: given importance is equal to itself.
        same = self.importance is other.importance
        return same or (isinstance(self.importance, str) and self.importance == other.importance)

    __hash__ = None  # type: ignore[assignment]


def _checked(importance: Any) -> str | Mapping[str, Tensor]:
    if importance in IMPORTANCE_OPTIONS if isinstance(importance, str) else isinstance(importance, Mapping):
        found: str | Mapping[str, Tensor] = importance
        return found
    raise FormatError(
        f"importance is {importance!r}; expected one of {', '.join(IMPORTANCE_OPTIONS)}, "
        "or tensors by module name."
    )
