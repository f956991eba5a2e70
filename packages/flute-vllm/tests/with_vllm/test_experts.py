"""Mixtures of experts say what their twins say, whose experts are the dequantized ones in 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .models import Checkpoint
from .serving import Engine

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(checkpoint: Callable[..., Checkpoint], engine: Engine, family: str) -> None:
    model = checkpoint(family, experts=())
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_left_in_16_bits(checkpoint: Callable[..., Checkpoint], engine: Engine, family: str) -> None:
    model = checkpoint(family)
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)
