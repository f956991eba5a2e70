"""Mixtures of experts say what their twins say, whose experts are the dequantized ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flute_quant import Override

from .models import ONE_LAYER, Checkpoint
from .serving import Engine

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(checkpoint: Callable[..., Checkpoint], engine: Engine, family: str) -> None:
    model = checkpoint(family, experts=True)
    said = engine.tokens(model.quantized)
    assert said == engine.tokens(model.twin)
    assert said != engine.tokens(checkpoint(family).quantized)  # whose experts have 16 bits: they matter


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_left_in_16_bits(checkpoint: Callable[..., Checkpoint], engine: Engine, family: str) -> None:
    model = checkpoint(family)
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group_size": 64},
        {"bits": 2, "vector_size": 2, "method": "lloyd-pairs"},
        {"hadamard": 32, "hadamard_seed": 5},
        {
            "overrides": (
                Override.of("layers.0.*.w2", bits=3, hadamard=64),
                Override.of("layers.1.*", group_size=64),
            )
        },
    ],
    ids=["3 bits", "pairs", "rotated", "mixed"],
)
def test_formats(checkpoint: Callable[..., Checkpoint], engine: Engine, options: dict[str, Any]) -> None:
    model = checkpoint("mixtral", **{"experts": True, **options})
    assert engine.tokens(model.quantized) == engine.tokens(model.twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_while_they_load(
    checkpoint: Callable[..., Checkpoint], engine: Engine, family: str
) -> None:
    model = checkpoint(family, method="lloyd", bits=3, experts=True)
    options = {"bits": 3, "group_size": 32, "method": "lloyd"}
    online = engine.tokens(model.source, quantization="flute", hf_overrides={"flute": options})
    assert online == engine.tokens(model.quantized)


def test_no_16_bit_expert_is_left(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    llm = engine.load(checkpoint("qwen3_moe").source, quantization="flute")
    (names,) = llm.apply_model(lambda model: [n for n, _ in model.named_parameters() if "experts" in n])
    assert names == []


def test_experts_that_a_user_leaves_out(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    left = {"flute": {"modules_to_not_convert": ["experts"]}}
    llm = engine.load(checkpoint("qwen3_moe").source, quantization="flute", hf_overrides=left)
    (names,) = llm.apply_model(lambda model: [n for n, _ in model.named_parameters() if "experts" in n])
    assert {name.rpartition(".")[2] for name in names} == {"w13_weight", "w2_weight"}


@pytest.mark.parametrize("quantized", [False, True], ids=["16-bit", "quantized"])
def test_random_weights_for_measuring(
    checkpoint: Callable[..., Checkpoint], engine: Engine, quantized: bool
) -> None:
    model = checkpoint("mixtral", experts=True)
    if quantized:
        said = engine.tokens(model.quantized, load_format="dummy")
    else:
        said = engine.tokens(model.source, load_format="dummy", quantization="flute")
    assert [len(tokens) for tokens in said] == [12, 12, 12]


@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("family", "expert_parallel"),
    [("qwen2_moe", False), ("qwen3_moe", True)],
    ids=["shared experts", "experts elsewhere"],
)
def test_two_processes_share_a_model(
    checkpoint: Callable[..., Checkpoint],
    engine: Engine,
    two_processes: dict[str, int],
    family: str,
    expert_parallel: bool,
) -> None:
    model = checkpoint(family, experts=True)
    said = engine.tokens(model.quantized, enable_expert_parallel=expert_parallel, **two_processes)
    assert said == engine.tokens(model.twin)


def test_compiled(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    model = checkpoint("qwen2_moe", hadamard=32, experts=True, shape=ONE_LAYER)
    assert engine.tokens(model.quantized, enforce_eager=False) == engine.tokens(model.quantized)
