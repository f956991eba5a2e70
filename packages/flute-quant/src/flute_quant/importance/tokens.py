"""A forward pass of tokens drawn at random, through any Transformers model that takes ``input_ids``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from flute_quant.methods.parallel import ordinary_tensors

__all__ = [
    "LENGTH",
    "SEED",
    "SEQUENCES",
    "Finished",
    "NoPassError",
    "evaluating",
    "input_embedding",
    "output_head",
    "random_tokens",
    "random_tokens_for",
    "run_random_tokens",
    "stopping_at",
    "token_arguments",
]

# As many as in the measurements of benchmarks/results.
SEQUENCES = 6
LENGTH = 512
SEED = 0
# What the activations of one batch may take. A model of 70 billion weights runs whole in it.
_ACTIVATION_BYTES = 4 << 30


class NoPassError(Exception):
    """Why a model cannot be run on random tokens, as a clause without a full stop."""


class Finished(Exception):
    """The output head was reached; what it would compute is not needed."""


def run_random_tokens(model: nn.Module, device: torch.device) -> None:
    """Run a model, up to its output head, on 6 sequences of 512 tokens (of its context, if that is shorter).

    The tokens are uniform over the vocabulary without the special ones, and the same every time.
    Hooks see the inputs; nothing is returned. The model is in evaluation mode meanwhile.

    Args:
        model: a Transformers model; an encoder-decoder gets the tokens on both sides.
        device: where its embedding is.

    Raises:
        NoPassError: it takes no tokens, or its activations would be too large.
        Exception: whatever the model raises.
    """
    tokens = random_tokens_for(model, LENGTH).to(device)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    runner = getattr(model, "base_model", model)
    takes_tokens, others = token_arguments(runner, config)
    head = output_head(model)
    layers = [m for m in runner.modules() if type(m) is nn.Linear and m is not head]
    batch = _batch(layers, text, tokens.shape[1])
    with evaluating(model), stopping_at(head), ordinary_tensors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(0, SEQUENCES, batch):
            ids = tokens[start : start + batch]
            with suppress(Finished):
                runner(**dict.fromkeys(takes_tokens, ids), **others)


def random_tokens(vocabulary: int, special: set[int], length: int) -> Tensor:
    """Token ids ``[6, length]`` in int64, uniform over ``range(vocabulary)`` without ``special``."""
    skipped = sorted(token for token in special if 0 <= token < vocabulary)
    usable = vocabulary - len(skipped)
    if usable == 0:
        raise NoPassError(f"its vocabulary of {vocabulary} has special tokens only")
    ids = torch.randint(usable, (SEQUENCES, length), generator=torch.Generator().manual_seed(SEED))
    # No list of the usable ones: the size of the vocabulary is what a config claims.
    for token in skipped:
        ids += ids >= token
    return ids


def random_tokens_for(model: nn.Module, length: int) -> Tensor:
    """:func:`random_tokens` of a Transformers model's vocabulary, no longer than its context.

    Raises:
        NoPassError: it takes no tokens.
    """
    config: Any = getattr(model, "config", None)
    embedding = input_embedding(model)
    if config is None or embedding is None:
        raise NoPassError(f"{type(model).__name__} is no Transformers model with a token embedding")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    length = min(length, longest) if isinstance(longest, int) and longest > 0 else length
    return random_tokens(embedding.num_embeddings, _special_tokens(config, text), length)


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """The table of a Transformers model's tokens, or None where it has none or is no such model."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _special_tokens(*configs: Any) -> set[int]:
    """Ids that configs name: padding and ends of texts, and the placeholders of images and sounds."""
    found: set[int] = set()
    for key, value in [item for config in configs for item in config.to_dict().items()]:
        if key.endswith(("_token_id", "_token_index")):
            values = value if isinstance(value, list) else [value]
            found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    return found


def token_arguments(runner: nn.Module, config: Any) -> tuple[list[str], dict[str, Any]]:
    """The arguments that take the tokens, and the others."""
    known = inspect.signature(runner.forward).parameters
    tokens = ["input_ids"]
    if getattr(config, "is_encoder_decoder", False):
        tokens.append("decoder_input_ids")
    missing = [name for name in tokens if name not in known]
    if missing:
        raise NoPassError(f"{type(runner).__name__} takes no {' and no '.join(missing)}")
    return tokens, {"use_cache": False} if "use_cache" in known else {}


def _batch(layers: list[nn.Linear], text: Any, length: int) -> int:
    """Sequences that run at once: all, or fewer where activations are large.

    Raises:
        NoPassError: one is too large.
    """
    widest = max((max(layer.weight.shape) for layer in layers), default=1)
    heads = getattr(text, "num_attention_heads", 1)
    heads = heads if isinstance(heads, int) else max(heads, default=1)
    # Eight activations as wide as the widest layer and two matrices of attention scores, all in float32.
    each = 4 * length * (8 * widest + 2 * heads * length)
    if each > _ACTIVATION_BYTES:
        raise NoPassError(
            f"one sequence of {length} tokens would take {each:,} bytes of activations "
            f"({widest} channels, {heads} heads), more than {_ACTIVATION_BYTES:,}"
        )
    return max(1, min(SEQUENCES, _ACTIVATION_BYTES // each))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def stopping_at(head: nn.Module | None) -> Iterator[None]:
    """Where no base model can be run by itself, the head raises :class:`Finished` instead of computing."""

    def stop(module: nn.Module, args: object) -> None:
        raise Finished

    hook = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
