"""FluteConfig: the format's config in Transformers' clothes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from flute_hf import FluteConfig
from flute_kernels import FormatError, QuantizationConfig, QuantSpec


def test_defaults_and_fields() -> None:
    config = FluteConfig(bits=3, group_size=32, modules_to_not_convert=["lm_head"])
    assert isinstance(config, QuantizationConfigMixin)
    assert (config.quant_method, config.bits, config.group_size) == ("flute", 3, 32)
    assert (config.vector_size, config.hadamard, config.hadamard_seed) == (1, 0, 0)
    assert (config.method, config.modules_to_not_convert, config.overrides) == ("default", ["lm_head"], {})


def test_it_is_stored_as_the_format_says() -> None:
    config = FluteConfig(bits=3, overrides={"a": {"bits": 4}, "b": QuantSpec(bits=2, group_size=32)})
    stored = QuantizationConfig(
        QuantSpec(bits=3), (), {"a": QuantSpec(bits=4), "b": QuantSpec(bits=2, group_size=32)}, "default"
    )
    assert config.stored == stored
    assert config.to_dict() == stored.to_dict()
    assert json.loads(config.to_json_string()) == stored.to_dict()
    assert dict(config) == stored.to_dict()


def test_round_trip_through_transformers() -> None:
    config = FluteConfig(bits=2, hadamard=64, hadamard_seed=3, method="nf")
    for other in (
        FluteConfig.from_dict(config.to_dict()),
        AutoQuantizationConfig.from_dict(config.to_dict()),
        FluteConfig(**config.to_dict()),
        copy.deepcopy(config),
    ):
        assert other == config
        assert other is not config
    assert config != FluteConfig(bits=2)


def test_importance_is_an_option_of_quantizing_that_is_stored_by_name_only() -> None:
    assert FluteConfig().importance == "auto"
    assert "importance" not in FluteConfig().to_dict()
    named = FluteConfig(importance="none")
    assert FluteConfig.from_dict(named.to_dict()) == named != FluteConfig()
    given = FluteConfig(importance={"a": torch.ones(32)})
    assert json.loads(given.to_json_string()) == FluteConfig().to_dict()
    assert given == given
    assert given != FluteConfig()


def test_keys_of_a_later_release_are_left_alone() -> None:
    assert FluteConfig.from_dict({**FluteConfig().to_dict(), "colour": "red"}) == FluteConfig()


def test_single_fields_can_be_updated() -> None:
    config = FluteConfig()
    assert config.update(bits=3, colour="red") == {"colour": "red"}
    assert config == FluteConfig(bits=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is 5; supported are 2, 3 and 4."),
        (
            {"group_size": 48},
            "group_size is 48; supported are 32, 64, 128 and 256, and -1 for one scale a row.",
        ),
        ({"bits": "4"}, "bits is '4'; expected an integer."),
        (
            {"modules_to_not_convert": "lm_head"},
            "modules_to_not_convert is 'lm_head'; expected a list of names.",
        ),
        ({"overrides": {"a": {"bit": 3}}}, "overrides['a'] has unknown keys ['bit']"),
        ({"overrides": {"a": 3}}, "overrides['a'] is 3; expected an object."),
        ({"importance": "text"}, "importance is 'text'; expected one of auto, random, columns, none"),
        ({"importance": 3}, "importance is 3; expected one of auto"),
        ({"format_version": 2}, "format_version is 2; this release reads 1."),
        ({"quant_method": "awq"}, "quant_method is 'awq'; expected 'flute'."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        FluteConfig(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_dict_without_a_version_is_not_taken_for_a_stored_config() -> None:
    with pytest.raises(FormatError, match=r"has no 'format_version'.*pass a FluteConfig instead of a dict"):
        FluteConfig.from_dict({"quant_method": "flute", "bits": 4})


def test_a_misspelt_option_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="FluteConfig has no option 'groupsize'; it has bits, group_size"):
        FluteConfig(groupsize=64)
