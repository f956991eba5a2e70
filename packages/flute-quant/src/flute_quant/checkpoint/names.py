"""From the names of a checkpoint's tensors to the names of the model's parameters.

They are the same for most models. Where Transformers renames on loading (models older than their
class, or multi-modal ones), its own rules are asked; where it merges tensors (experts), the name of
the merged parameter comes out, which is how expert weights are recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["parameter_names"]


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
