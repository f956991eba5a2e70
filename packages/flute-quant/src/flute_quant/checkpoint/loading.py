"""A whole checkpoint in memory, as Transformers would have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.errors import CheckpointError, one_line

__all__ = ["load_model"]


def load_model(folder: CheckpointFolder, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> Any:
    """A model with Transformers' own loading rules, from its folder or from tensors in memory.

    Args:
        folder: whose config it has.
        dtype: of its weights.
        state: its tensors by name, instead of those of the folder.

    Raises:
        CheckpointError: Transformers cannot load it.
    """
    with quiet_transformers():
        import transformers

        plain = {k: v for k, v in folder.config.items() if k not in ("quantization_config", "auto_map")}
        named = plain.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        kind: Any = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModelForCausalLM
        try:
            config = transformers.AutoConfig.for_model(plain.pop("model_type", None), **plain)
            where = str(folder.path) if state is None else None
            return kind.from_pretrained(
                where,
                config=config,
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:
            raise CheckpointError(f"Transformers cannot load {folder.path}: {one_line(error)}") from None
