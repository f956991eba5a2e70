"""A checkpoint folder, quantized: what is written, for every layout of names and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flute_kernels import QuantizationConfig, QuantizedLinear, QuantSpec
from flute_quant import (
    CheckpointError,
    Override,
    Progress,
    QuantizationError,
    estimate_seconds,
    load_dequantized,
    plan_checkpoint,
    quantize_checkpoint,
    quantize_tensor,
)

from .stored import tensors_of

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("method", ["nf", "lloyd", "nf-keep", "int", "learned"])
@pytest.mark.parametrize("bits", [4, 3])
def test_every_linear_reads_back_as_quantize_tensor_made_it(
    checkpoints: Checkpoints, tmp_path: Path, method: str, bits: int
) -> None:
    source = checkpoints("llama")
    report = quantize_checkpoint(source, tmp_path / "out", QuantSpec(bits, 64), method=method)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    config = QuantizationConfig.from_dict(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    assert config.method == report.method == method
    assert len(report.errors) == 14
    for module, error in report.errors.items():
        weight = before[f"{module}.weight"]
        spec = config.spec_for(module)
        assert spec is not None
        stored = QuantizedLinear.from_tensors(
            after, spec, prefix=f"{module}.", out_features=weight.shape[0], in_features=weight.shape[1]
        )
        expected, stats = quantize_tensor(weight, spec, method=method)
        assert torch.equal(stored.qweight, expected.qweight)
        assert torch.equal(stored.scales, expected.scales)
        assert error == pytest.approx(stats.relative, rel=1e-4)
        assert f"{module}.weight" not in after


def test_other_tensors_and_files_are_passed_on_unchanged(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama")
    quantize_checkpoint(source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [p.name for p in source.iterdir()] + ["flute_report.json"]
    )


def test_shards_keep_their_names_and_the_index_fits(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama-sharded")
    seen: list[Progress] = []
    quantize_checkpoint(source, tmp_path / "out", progress=seen.append)
    names = [p.name for p in sorted(source.glob("*.safetensors"))]
    assert len(names) > 3
    assert [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))] == names
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = 0
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert all(index["weight_map"][t] == name for t in tensors)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert seen[-1].done == seen[-1].total == sum(64 * n for n in 2 * (64, 32, 32, 64, 96, 96, 96))


@pytest.mark.parametrize(
    ("source", "option", "expected"),
    [
        ("llama-fp32", "auto", torch.bfloat16),
        ("llama-fp32", "keep", torch.float32),
        ("llama-fp32", "float16", torch.float16),
        ("llama", "auto", torch.bfloat16),
        ("llama", "float16", torch.float16),
    ],
)
def test_tensors_that_are_not_quantized_get_the_dtype_that_the_config_says(
    checkpoints: Checkpoints, tmp_path: Path, source: str, option: str, expected: torch.dtype
) -> None:
    quantize_checkpoint(checkpoints(source), tmp_path / "out", dtype=option)
    after = tensors_of(tmp_path / "out")
    before = tensors_of(checkpoints(source))
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"].to(expected))
    assert after["model.embed_tokens.weight"].dtype == expected
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_tied_embeddings_stay_tied(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    assert "lm_head.weight" not in tensors_of(checkpoints(name))
    report = quantize_checkpoint(checkpoints(name), tmp_path / "out")
    assert not [t for t in tensors_of(tmp_path / "out") if "lm_head" in t]
    assert report.coverage.kept["lm_head"] == "tied to the embedding"
    model = load_dequantized(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "qwen2", "gemma3", "odd-k"])
def test_the_dequantized_model_computes_nearly_the_same(
    checkpoints: Checkpoints, tmp_path: Path, name: str
) -> None:
    source = checkpoints(name)
    quantize_checkpoint(source, tmp_path / "out", QuantSpec(4, 32), method="lloyd", min_coverage=0.3)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        found = load_dequantized(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.3


def test_a_bias_goes_along(checkpoints: Checkpoints, tmp_path: Path) -> None:
    quantize_checkpoint(checkpoints("qwen2"), tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    stored = QuantizedLinear.from_tensors(after, QuantSpec(), prefix="model.layers.0.self_attn.q_proj.")
    assert stored.bias is not None


def test_a_rotated_checkpoint_dequantizes_to_the_model(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama")
    report = quantize_checkpoint(source, tmp_path / "out", QuantSpec(4, 64, hadamard=64, hadamard_seed=3))
    assert "Hadamard block 32" in report.notes["model.layers.0.mlp.down_proj"]
    name = "model.layers.0.mlp.up_proj"
    weight = tensors_of(source)[f"{name}.weight"].float()
    found = load_dequantized(tmp_path / "out", dtype=torch.float32).get_submodule(name).weight.detach()
    assert float((found - weight).square().sum() / weight.square().sum()) == pytest.approx(
        report.errors[name], rel=1e-2
    )


def test_layers_that_do_not_fit_are_adapted_or_kept_and_reported(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    report = quantize_checkpoint(checkpoints("odd-k"), tmp_path / "out")
    assert report.coverage.kept["model.layers.0.mlp.down_proj"] == "K = 100 is no positive multiple of 32"
    assert "model.layers.0.mlp.down_proj.weight" in tensors_of(tmp_path / "out")
    report = quantize_checkpoint(checkpoints("llama"), tmp_path / "out2", QuantSpec(4, 128))
    assert report.notes["model.layers.0.mlp.down_proj"] == "group size 32 instead of 128, because K = 96"
    config = json.loads((tmp_path / "out2/config.json").read_text())["quantization_config"]
    assert config["overrides"]["model.layers.0.mlp.down_proj"] == {"group_size": 32}


def test_mixed_precision_by_pattern(checkpoints: Checkpoints, tmp_path: Path) -> None:
    quantize_checkpoint(
        checkpoints("llama"),
        tmp_path / "out",
        overrides=[Override.of("down_proj", bits=3, group_size=32)],
        ignore=["layers.1.self_attn.*"],
    )
    after = tensors_of(tmp_path / "out")
    assert after["model.layers.0.mlp.down_proj.qweight"].shape == (64, 96 * 3 // 32)
    assert after["model.layers.0.mlp.up_proj.qweight"].shape == (96, 64 * 4 // 32)
    assert "model.layers.1.self_attn.q_proj.weight" in after
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.q_proj" in config["modules_to_not_convert"]


# Parameters of the experts: layers x experts x projections x hidden x intermediate.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mixtral", 2 * 4 * 3 * 64 * 96),
        ("qwen3-moe", 2 * 4 * 3 * 64 * 32),
        ("llama4", 2 * 4 * 3 * 64 * 96),
        ("gpt-oss", 2 * 4 * (3 * 64 * 96 + 2 * 96 + 64)),
    ],
)
def test_experts_are_reported_as_not_covered_and_count_against_the_coverage(
    checkpoints: Checkpoints, tmp_path: Path, name: str, parameters: int
) -> None:
    source = checkpoints(name)
    with pytest.raises(QuantizationError, match=r"Only \d+\.\d% .*not covered: .*experts"):
        quantize_checkpoint(source, tmp_path / "out", min_coverage=0.9)
    assert not (tmp_path / "out").exists()
    report = quantize_checkpoint(source, tmp_path / "out", min_coverage=0)
    assert sum(n for pattern, _, n in report.coverage.not_covered if "expert" in pattern) == parameters
    assert not [p for p, _, _ in report.coverage.not_covered if "gate.weight" in p or "router" in p]
    noted = json.loads((tmp_path / "out/flute_report.json").read_text())
    assert sum(entry["parameters"] for entry in noted["not_covered"]) >= parameters
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for tensor in before:
        if "expert" in tensor and "shared" not in tensor:
            assert torch.equal(before[tensor], after[tensor])


def test_a_legacy_name_is_found_by_transformers_own_rules(
    checkpoints: Checkpoints, copy_of: Checkpoints, tmp_path: Path
) -> None:
    """A checkpoint of the base model alone lacks the prefix ``model.``."""
    source = copy_of("llama-tied")
    file = source / "model.safetensors"
    save_file(
        {n.removeprefix("model."): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    report = quantize_checkpoint(source, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in report.errors
    assert "layers.0.mlp.up_proj.qweight" in tensors_of(tmp_path / "out")
    load_dequantized(tmp_path / "out")


def test_bits_per_weight_count_scales_and_tables(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with plan_checkpoint(checkpoints("llama"), QuantSpec(4, 32)) as plan:
        tables = 14 * 16 * 16 / plan.weights
        assert plan.bits_per_weight == pytest.approx(4 + 16 / 32 + tables)
        assert estimate_seconds(plan) > 0
        report = quantize_checkpoint(checkpoints("llama"), tmp_path / "out", QuantSpec(4, 32))
        assert report.output_bytes == plan.output_bytes
        assert report.output_bytes == (tmp_path / "out/model.safetensors").stat().st_size
        assert report.bits_per_weight == plan.bits_per_weight


def test_an_existing_output_is_kept_unless_it_may_be_overwritten(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = checkpoints("llama"), tmp_path / "out"
    quantize_checkpoint(source, out, QuantSpec(4))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(source, out, QuantSpec(3))
    assert (out / "model.safetensors").read_bytes() == before
    quantize_checkpoint(source, out, QuantSpec(3), overwrite=True)
    assert (out / "model.safetensors").stat().st_size < len(before)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not delete")
    with pytest.raises(CheckpointError, match="no FLUTE checkpoint"):
        quantize_checkpoint(source, foreign, overwrite=True)
    assert (foreign / "thesis.txt").exists()


def test_importance_by_module_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    importance = {name: torch.linspace(0, 4, 64)}
    quantize_checkpoint(checkpoints("llama"), tmp_path / "a", method="lloyd")
    quantize_checkpoint(checkpoints("llama"), tmp_path / "b", method="lloyd", importance=importance)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    changed = {n for n in a if not torch.equal(a[n], b[n])}
    assert changed == {f"{name}.qweight", f"{name}.scales"}


@pytest.mark.parametrize(
    ("name", "experts", "matrix"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}", "w2"),
        ("qwen3-moe", "model.layers.{}.mlp.experts.{}", "down_proj"),
    ],
)
def test_experts_on_request_one_matrix_after_the_other(
    checkpoints: Checkpoints, tmp_path: Path, name: str, experts: str, matrix: str
) -> None:
    report = quantize_checkpoint(
        checkpoints(name),
        tmp_path / "out",
        QuantSpec(4, 32),
        experts=True,
        overrides=[Override.of(f"experts.1.{matrix}", bits=3)],
        ignore=[f"layers.1.*.experts.*.{matrix}"],
    )
    assert report.coverage.fraction > 0.95
    assert report.coverage.not_covered == ()
    assert report.coverage.kept[f"{experts.format(1, 3)}.{matrix}"] == "ignored as asked"
    after = tensors_of(tmp_path / "out")
    assert f"{experts.format(1, 3)}.{matrix}.weight" in after
    assert f"{experts.format(0, 3)}.{matrix}.weight" not in after
    n, k = tensors_of(checkpoints(name))[f"{experts.format(0, 1)}.{matrix}.weight"].shape
    assert after[f"{experts.format(0, 0)}.{matrix}.qweight"].shape == (n, k * 4 // 32)
    assert after[f"{experts.format(0, 1)}.{matrix}.qweight"].shape == (n, k * 3 // 32)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["overrides"] == {f"{experts.format(0, 1)}.{matrix}": {"bits": 3}}
    again = load_dequantized(tmp_path / "out", dtype=torch.float32).state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(checkpoints(name), dtype=torch.float32)
    merged = {n: p for n, p in before.state_dict().items() if ".experts." in n}
    assert len(merged) == 4
    for parameter, values in merged.items():
        error = (again[parameter] - values).square().sum() / values.square().sum()
        assert error < 0.02
        assert (error == 0) == parameter.endswith("layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize(
    ("name", "words"),
    [("llama", "has no merged ones"), ("llama4", "model.layers.0.feed_forward.experts.down_proj")],
)
def test_experts_that_are_not_stored_one_by_one(
    checkpoints: Checkpoints, tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(QuantizationError, match=words):
        quantize_checkpoint(checkpoints(name), tmp_path / "out", experts=True)
