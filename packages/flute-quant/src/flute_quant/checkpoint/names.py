"""From the names of a checkpoint's tensors to the names of the model's parameters.

They are the same for most models. Where Transformers renames on loading (models older than their
class, or multi-modal ones), its own rules are asked; where it merges tensors (experts), the name of
the merged parameter comes out, which is how expert weights are recognised, and :class:`MergeRules`
makes the merged parameter itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from torch import Tensor, nn

__all__ = ["MergeRules", "parameter_names"]


def parameter_names(model: nn.Module, tensors: Iterable[str]) -> dict[str, str | None]:
    """Tensor name to the name of the parameter or buffer that it becomes, or None where there is none."""
    known = set(model.state_dict())
    prefix = getattr(model, "base_model_prefix", "") or ""
    rename = _transformers_rules(model)

    def resolve(tensor: str) -> str | None:
        for name in (tensor, rename(tensor)):
            for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if candidate in known:
                    return candidate
        return None

    return {tensor: resolve(tensor) for tensor in tensors}


def _transformers_rules(model: nn.Module) -> Callable[[str], str]:
    # Not a public interface of Transformers: without it, or where it fails, names are taken as they are.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules: list[Any] = list(get_model_conversion_mapping(model))
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
    except Exception:
        return lambda name: name

    def rename(name: str) -> str:
        try:
            return str(rename_source_key(name, renamings, converters)[0])
        except Exception:
            return name

    return rename


class MergeRules:
    """Transformers' own rules for parameters that it makes of several tensors (experts of a layer).

    Args:
        model: whose rules.

    Raises:
        Exception: this release of Transformers keeps its rules elsewhere.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        rules: list[Any] = list(get_model_conversion_mapping(model))
        self._renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, WeightConverter)]

    def is_merged(self, tensor: str) -> bool:
        """Whether a tensor of a checkpoint is only a part of a parameter, or not its parameter's values."""
        return self._rename(tensor)[1] is not None

    def merge(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The one parameter that these tensors of a checkpoint become.

        Raises:
            ValueError: they become several.
            Exception: whatever Transformers raises.
        """
        from transformers.core_model_loading import dot_natural_key

        converter: Any = None
        parameter = ""
        for name in sorted(tensors, key=dot_natural_key):
            parameter, pattern = self._rename(name)
            if converter is None:
                found = next(c for c in self._converters if pattern in c.source_patterns)
                converter = copy.deepcopy(found)
            arrived: Future[Tensor] = Future()
            arrived.set_result(tensors[name])
            converter.add_tensor(parameter, name, pattern, arrived)
        merged = converter.convert(parameter, model=self._model, config=getattr(self._model, "config", None))
        if len(merged) != 1:
            raise ValueError(f"{next(iter(tensors))} becomes {len(merged)} parameters; expected one")
        (value,) = merged.values()
        result: Tensor = value[0] if isinstance(value, list) else value
        return result

    def _rename(self, tensor: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(tensor, self._renamings, self._converters)
        return str(name), pattern
