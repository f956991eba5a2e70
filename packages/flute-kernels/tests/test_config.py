"""QuantizationConfig: what ``config.json`` of a quantized checkpoint says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flute_kernels import FormatError, QuantizationConfig, QuantSpec

from .helpers import refusal

specs = st.builds(
    QuantSpec,
    bits=st.sampled_from((2, 3, 4)),
    group_size=st.sampled_from((32, 64, 128, 256, -1)),
    vector_size=st.sampled_from((1, 2)),
    hadamard=st.sampled_from((0, 2, 128, 4096)),
    hadamard_seed=st.integers(-1, 2**64 - 1),
)
names = st.text(min_size=1, max_size=8)
configs = st.builds(
    QuantizationConfig,
    spec=specs,
    modules_to_not_convert=st.lists(names, max_size=3).map(tuple),
    overrides=st.dictionaries(names, specs, max_size=3),
    method=st.text(max_size=5),
)


def document(**changes: Any) -> dict[str, Any]:
    return {**QuantizationConfig().to_dict(), **changes}


@given(configs)
def test_json_and_back_says_the_same_of_every_module(config: QuantizationConfig) -> None:
    read = QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read.spec == config.spec
    assert read.method == config.method
    assert sorted(read.modules_to_not_convert) == sorted(config.modules_to_not_convert)
    for name in ("another", *config.modules_to_not_convert, *config.overrides):
        assert read.spec_for(name) == config.spec_for(name)


def test_the_json_object() -> None:
    config = QuantizationConfig(
        QuantSpec(bits=3, group_size=128),
        ("lm_head",),
        {"b": QuantSpec(bits=4, group_size=128), "a": QuantSpec(bits=3, group_size=128)},
    )
    assert config.to_dict() == {
        "quant_method": "flute",
        "format_version": 1,
        "bits": 3,
        "group_size": 128,
        "vector_size": 1,
        "hadamard": 0,
        "hadamard_seed": 0,
        "modules_to_not_convert": ["lm_head"],
        "overrides": {"b": {"bits": 4}},
    }


def test_an_override_wins_over_the_default_and_16_bits_over_both() -> None:
    config = QuantizationConfig(QuantSpec(), ("a",), {"a": QuantSpec(bits=2), "b": QuantSpec(bits=2)})
    assert config.spec_for("a") is None
    assert config.spec_for("b") == QuantSpec(bits=2)
    assert config.spec_for("c") == QuantSpec()


def test_unknown_keys_at_the_top_are_left_alone() -> None:
    assert QuantizationConfig.from_dict(document(written_by="a tool")) == QuantizationConfig()


def test_optional_keys_may_be_absent() -> None:
    least = {"quant_method": "flute", "format_version": 1, "bits": 2, "group_size": 32}
    assert QuantizationConfig.from_dict(least) == QuantizationConfig(QuantSpec(bits=2, group_size=32))


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_another_format_version_is_refused(version: object) -> None:
    with refusal(FormatError, "format_version", repr(version), "reads 1"):
        QuantizationConfig.from_dict(document(format_version=version))


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_a_missing_number_is_named(key: str) -> None:
    data = document()
    del data[key]
    with refusal(FormatError, key):
        QuantizationConfig.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"quant_method": "gptq"}, ("quant_method", "'gptq'", "'flute'")),
        ({"bits": 8}, ("bits", "8")),
        ({"bits": "4"}, ("bits", "'4'")),
        ({"group_size": None}, ("group_size", "None")),
        ({"modules_to_not_convert": "lm_head"}, ("modules_to_not_convert", "lm_head")),
        ({"modules_to_not_convert": [1]}, ("modules_to_not_convert", "[1]")),
        ({"modules_to_not_convert": 7}, ("modules_to_not_convert", "7")),
        ({"overrides": ["a"]}, ("overrides", "list")),
        ({"overrides": {"a": 3}}, ("overrides['a']", "3")),
        ({"overrides": {"a": {"bit": 3}}}, ("overrides['a']", "bit", "bits")),
        ({"overrides": {"a": {"bits": 7}}}, ("overrides['a']", "bits is 7")),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refusal(FormatError, *parts):
        QuantizationConfig.from_dict(document(**changes))


def test_the_document_is_an_object() -> None:
    with refusal(FormatError, "list"):
        QuantizationConfig.from_dict([])  # type: ignore[arg-type]
