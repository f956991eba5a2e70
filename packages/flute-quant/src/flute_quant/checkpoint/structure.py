"""The module structure of a checkpoint: Transformers' own classes, built on the meta device.

No weights are allocated, no code of the checkpoint is run, and a config that would make Transformers
build more modules than the checkpoint has tensors is refused before Transformers sees it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flute_quant.errors import CheckpointError, one_line

__all__ = ["build_structure", "quiet_transformers"]

_COUNT = re.compile(r"(^|_)(num|n|nb)_|layers|depth|experts|blocks")
_DEPTH = re.compile(r"^(?!max_).*(layers?$|depth|blocks$)")
# Counts that no tensor witnesses (heads, labels, key-value groups) are small numbers.
_MAX_COUNT = 1 << 16
_FREE_DEPTH = 256  # layers that may be announced without tensors: defaults of parts that a checkpoint lacks
_MAX_NUMBER = 1 << 40
# An attention implementation may be the name of a kernel on the hub.
_CODE_KEYS = frozenset(
    f"{prefix}{key}"
    for key in ("quantization_config", "auto_map", "attn_implementation", "experts_implementation")
    for prefix in ("", "_")
) | {"_attn_implementation_internal", "_experts_implementation_internal"}


def build_structure(
    folder: Path, config: dict[str, Any], tensors: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model that ``config.json`` describes, on the meta device.

    Args:
        folder: where the config lies; nothing else of it is read.
        config: its content.
        tensors: how many tensors the checkpoint has, which bounds the number of layers.
        dtype: of parameters and buffers whose class does not insist on another.

    Raises:
        CheckpointError: Transformers does not know the model, or cannot build it.
    """
    _check_counts(folder, config, tensors)
    plain = _without_code(config)
    kind = plain.pop("model_type", None)
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder / 'config.json'} has model_type {kind!r}; expected a name.")
    with quiet_transformers():
        import transformers

        # A third party's code meets a config that nobody vouches for: whatever it raises is a refusal.
        try:
            built = transformers.AutoConfig.for_model(kind, **plain)
            with torch.device("meta"), _default_dtype(dtype):
                model = _model_class(transformers, config)(built)
        except Exception as error:
            raise CheckpointError(
                f"Transformers {transformers.__version__} cannot build the model of {folder / 'config.json'} "
                f"(model_type {kind!r}): {one_line(error)}"
            ) from None
    result: nn.Module = model
    return result


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' own log and progress bars off: what matters of them is in our messages."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what would make Transformers fetch or run code that is not its own."""
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CODE_KEYS
    }


def _model_class(transformers: Any, config: dict[str, Any]) -> Any:
    """The class that ``architectures`` names, if it is one of Transformers' models; else its causal one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and hasattr(found, "forward")
    ):
        return found
    return transformers.AutoModelForCausalLM.from_config


def _check_counts(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse numbers of modules that the checkpoint cannot fill: each is a loop inside Transformers."""
    stack: list[tuple[str, Any]] = [("", config)]
    while stack:
        path, value = stack.pop()
        key = path.rpartition(".")[2]
        if isinstance(value, dict):
            stack.extend((f"{path}.{k}" if path else str(k), v) for k, v in value.items())
        elif isinstance(value, list):
            stack.extend((path, v) for v in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            limit = _MAX_NUMBER
            if _DEPTH.search(key):
                limit = max(tensors, _FREE_DEPTH)
            elif _COUNT.search(key):
                limit = _MAX_COUNT
            if not -limit <= value <= limit:
                raise CheckpointError(
                    f"{folder / 'config.json'} has {path} = {value}; "
                    f"a checkpoint of {tensors} tensors can have at most {limit}."
                )
