"""A 16-bit checkpoint, quantized while it loads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .models import Checkpoint
from .serving import Engine


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_it_is_what_the_quantizer_makes_on_disk(
    checkpoint: Callable[..., Checkpoint], engine: Engine, family: str
) -> None:
    model = checkpoint(family, method="lloyd", bits=3)
    options = {"bits": 3, "group_size": 32, "method": "lloyd"}
    online = engine.tokens(model.source, quantization="flute", hf_overrides={"flute": options})
    assert online == engine.tokens(model.quantized)


def test_options_from_the_environment(
    checkpoint: Callable[..., Checkpoint], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama", method="lloyd", bits=3)
    for name, value in (("BITS", "3"), ("GROUP_SIZE", "32"), ("METHOD", "lloyd")):
        monkeypatch.setenv(f"FLUTE_{name}", value)
    assert engine.tokens(model.source, quantization="flute") == engine.tokens(model.quantized)


def test_a_layer_that_the_format_cannot_hold_stays_in_16_bits(
    checkpoint: Callable[..., Checkpoint], engine: Engine
) -> None:
    odd = checkpoint("llama", shape=(("intermediate_size", 176),))
    llm = engine.load(odd.source, quantization="flute")
    (names,) = llm.apply_model(
        lambda model: {n.split(".")[-2] for n, _ in model.named_parameters() if "proj" in n}
    )
    assert names == {"down_proj"}


def test_no_16_bit_weight_is_left(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    llm = engine.load(checkpoint("llama").source, quantization="flute")
    (names,) = llm.apply_model(lambda model: [n for n, _ in model.named_parameters() if "proj" in n])
    assert names == []


@pytest.mark.parametrize("quantized", [False, True], ids=["16-bit", "quantized"])
def test_random_weights_for_measuring(
    checkpoint: Callable[..., Checkpoint], engine: Engine, quantized: bool
) -> None:
    model = checkpoint("llama")
    if quantized:
        said = engine.tokens(model.quantized, load_format="dummy")
    else:
        said = engine.tokens(model.source, load_format="dummy", quantization="flute")
    assert [len(tokens) for tokens in said] == [12, 12, 12]
