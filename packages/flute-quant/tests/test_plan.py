"""Which modules are quantized, and what is said about the others."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from flute_kernels import QuantSpec
from flute_quant import Override, QuantizationError, plan_modules, quantize_model
from flute_quant.patterns import has_part, matches, parse_override
from flute_quant.siblings import sibling_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64, bias=True)
        self.down_proj = nn.Linear(96, 64, bias=False)
        self.odd = nn.Linear(100, 64)
        self.gate = nn.Linear(64, 4)
        self.attention = nn.MultiheadAttention(64, 2)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 128, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("proj", "model.layers.0.mlp.down_proj", False),
        ("*.layers.0.*", "model.layers.0.mlp.down_proj", True),
        ("layers.0.*", "model.layers.0.mlp.down_proj", True),
        ("layers.1.*", "model.layers.11.mlp.down_proj", False),
        ("layers.[01].*_proj", "model.layers.1.mlp.up_proj", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
    ],
)
def test_patterns_are_shell_patterns_or_the_last_parts_of_a_name(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(name, pattern) is expected


def test_a_part_of_a_name_is_one_component_or_some_in_a_row() -> None:
    name = "model.layers.0.mlp.gate.weight"
    assert all(has_part(name, [part]) for part in ("gate", "mlp.gate", "gate.weight", "model", "weight"))
    assert not any(has_part(name, [part]) for part in ("gat", "lp.gate", "mlp.weight", "layers.1"))
    assert has_part(name, ["other", "mlp"])
    assert not has_part(name, [])


def test_every_linear_is_planned_or_kept_with_a_reason() -> None:
    with torch.device("meta"):
        plan = plan_modules(Model(), QuantSpec(4, 64))
    assert [p.name for p in plan.linears] == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "down_proj")
    ]
    assert plan.kept == {
        "layers.0.odd": "K = 100 is no positive multiple of 32",
        "layers.0.gate": "a head or a router",
        "layers.1.odd": "K = 100 is no positive multiple of 32",
        "layers.1.gate": "a head or a router",
        "lm_head": "a head or a router",
    }
    down = plan.linears[1]
    assert (down.spec.group_size, down.note) == (32, "group size 32 instead of 64, because K = 96")


def test_the_plan_makes_the_checkpoints_config() -> None:
    config = plan_modules(Model(), QuantSpec(4, 64)).config("nf")
    assert config.spec_for("layers.0.q_proj") == QuantSpec(4, 64)
    assert config.spec_for("layers.0.down_proj") == QuantSpec(4, 32)
    assert config.spec_for("lm_head") is None
    assert config.method == "nf"


def test_include_wins_over_the_defaults_and_ignore_over_include() -> None:
    names = [p.name for p in plan_modules(Model(), QuantSpec(), include=["lm_head"]).linears]
    assert "lm_head" in names
    plan = plan_modules(Model(), QuantSpec(), include=["lm_head"], ignore=["lm_head", "layers.0.*"])
    assert [p.name for p in plan.linears] == ["layers.1.q_proj", "layers.1.down_proj"]
    assert plan.kept["lm_head"] == "ignored as asked"


def test_what_a_model_loads_in_32_bits_is_not_quantized_unless_it_is_included() -> None:
    config = transformers.T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=64)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    plan = plan_modules(model, QuantSpec())
    inner = [f"{side}.block.0.layer.{n}.DenseReluDense.wo" for side, n in (("encoder", 1), ("decoder", 2))]
    assert {name for name, why in plan.kept.items() if why == "too sensitive, as its model says"} == set(
        inner
    )
    assert "encoder.block.0.layer.1.DenseReluDense.wi" in [p.name for p in plan.linears]
    assert set(inner) <= {p.name for p in plan_modules(model, QuantSpec(), include=["wo"]).linears}


def test_a_tied_head_stays_with_its_embedding() -> None:
    assert plan_modules(Model(tied=True), QuantSpec()).kept["lm_head"] == "tied to the embedding"
    with pytest.raises(QuantizationError, match="lm_head, whose 8192 weights are tied"):
        plan_modules(Model(tied=True), QuantSpec(), include=["lm_head"])


def test_overrides_apply_in_order() -> None:
    overrides = [Override.of("layers.*", bits=3), parse_override("down_proj=bits:2,group_size:32")]
    specs = {p.name: p.spec for p in plan_modules(Model(), QuantSpec(), overrides=overrides).linears}
    assert specs["layers.0.q_proj"] == QuantSpec(3, 64)
    assert specs["layers.0.down_proj"] == QuantSpec(2, 32)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(96, n, bias=False) for n in (96, 32, 32))
        self.o_proj = nn.Linear(96, 96, bias=False)


def test_siblings_are_modules_of_one_parent_that_see_one_input() -> None:
    names = ["a.q_proj", "a.o_proj", "b.q_proj", "a.k_proj", "m.up_proj", "a.v_proj", "m.gate_proj", "e.3.w1"]
    assert sibling_groups([*names, "e.3.w3", "e.2.w3"]) == [
        ("a.q_proj", "a.k_proj", "a.v_proj"),
        ("a.o_proj",),
        ("b.q_proj",),
        ("m.up_proj", "m.gate_proj"),
        ("e.3.w1", "e.3.w3"),
        ("e.2.w3",),
    ]


def test_siblings_share_a_rotation() -> None:
    model = nn.Sequential(Attention())
    plan = plan_modules(model, QuantSpec(4, 32, hadamard=1024, hadamard_seed=7))
    assert {(p.spec.hadamard, p.spec.hadamard_seed) for p in plan.linears} == {(32, 7)}
    different = Override.of("k_proj", hadamard_seed=8)
    said = r"0\.q_proj would be rotated .* \(32, 7\) and 0\.k_proj with \(32, 8\)"
    with pytest.raises(QuantizationError, match=said):
        plan_modules(model, QuantSpec(4, 32, hadamard=1024, hadamard_seed=7), overrides=[different])
    # An o_proj has its own input, and a sibling in 16 bits has no rotation to differ in.
    plan_modules(
        model, QuantSpec(4, 32, hadamard=32), overrides=[Override.of("o_proj", hadamard=0)], ignore=["k_proj"]
    )


@pytest.mark.parametrize(
    "text", ["down_proj", "=bits:3", "x=bits", "x=bits:three", "x=size:3", "x=bits:3,", "x=bits:" + "9" * 30]
)
def test_an_override_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match="not of the form"):
        parse_override(text)


def test_an_override_outside_of_the_format_is_refused() -> None:
    with pytest.raises(QuantizationError, match="bits is 5; supported are 2, 3 and 4"):
        plan_modules(Model(), QuantSpec(), overrides=[Override.of("down_proj", bits=5)])


@pytest.mark.parametrize("option", ["ignore", "include"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(QuantizationError, match=r"'donw_proj' matches none of the model's 9 linear modules"):
        plan_modules(Model(), QuantSpec(), **{option: ["donw_proj"]})  # type: ignore[arg-type]


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(QuantizationError, match="0 linear modules"):
        plan_modules(nn.Sequential(nn.Conv1d(4, 4, 1)), QuantSpec())
    with pytest.raises(QuantizationError, match=r"1 linear modules .* K = 7"):
        plan_modules(nn.Sequential(nn.Linear(7, 4)), QuantSpec())


def test_quantize_model_gives_what_an_adapter_swaps_in() -> None:
    torch.manual_seed(0)
    model = Model()
    seen: list[str] = []
    linears, report = quantize_model(
        model, QuantSpec(4, 64), method="lloyd", progress=lambda planned, error: seen.append(planned.name)
    )
    assert list(linears) == seen == [p.name for p in report.plan.linears]
    q_proj = model.get_submodule("layers.0.q_proj")
    assert isinstance(q_proj, nn.Linear)
    stored = linears["layers.0.q_proj"]
    assert stored.bias is not None
    assert torch.equal(stored.bias, q_proj.bias)
    assert linears["layers.0.down_proj"].bias is None
    weight = q_proj.weight.detach()
    relative = float((stored.dequantize() - weight).square().sum() / weight.square().sum())
    assert report.errors["layers.0.q_proj"].relative == pytest.approx(relative, rel=1e-3)
    assert report.covered == 2 * (64 * 64 + 96 * 64)
    assert report.method == "lloyd"


def test_quantize_model_names_the_weight_that_is_not_finite() -> None:
    model = Model()
    with torch.no_grad():
        model.get_parameter("layers.1.q_proj.weight")[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers\.1\.q_proj\.weight has 1 of 4096"):
        quantize_model(model, QuantSpec())


def test_a_sibling_with_another_input_may_have_another_rotation() -> None:
    cross = nn.ModuleDict(
        {name: nn.Linear(k, 64) for name, k in (("q_proj", 96), ("k_proj", 64), ("v_proj", 64))}
    )
    made = plan_modules(cross, QuantSpec(bits=4, group_size=32, hadamard=64))
    assert {p.name: p.spec.hadamard for p in made.linears} == {"q_proj": 32, "k_proj": 64, "v_proj": 64}
