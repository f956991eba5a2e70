"""GGUF files: what Transformers dequantizes is, weight by weight, what the imported codes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from flute_quant import (
    CheckpointError,
    QuantizationError,
    import_checkpoint,
    inspect_checkpoint,
    load_dequantized,
)
from flute_quant.checkpoint.quantized import QuantizedFolder
from flute_quant.importers import gguf as importer
from flute_quant.importers.ggml import BLOCK_TYPES

gguf = pytest.importorskip("gguf")

_BYTES = {"Q4_0": 18, "IQ4_NL": 18, "MXFP4": 17, "Q8_0": 34, "Q4_1": 20}
_LINEARS = {
    "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
    "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
}  # fmt: skip
# Transformers knows heads of 128 alone for this one.
_QWEN3 = {"attn_q": (512, 64), "attn_k": (256, 64), "attn_v": (256, 64), "attn_output": (64, 512)}
_NORMS = {
    "llama": ("attn_norm", "ffn_norm"),
    "qwen2": ("attn_norm", "ffn_norm"),
    "qwen3": ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
    "gemma2": ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"),
    "gemma3": (
        "attn_norm",
        "ffn_norm",
        "attn_q_norm",
        "attn_k_norm",
        "post_attention_norm",
        "post_ffw_norm",
    ),
}


def blocks(random: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Random bytes of a block type, with scales that are ordinary numbers."""
    data = random.integers(0, 256, (rows, columns // 32, _BYTES[kind]), dtype=np.uint8)
    if kind == "MXFP4":
        data[..., 0] = random.integers(118, 124, data.shape[:2])
    else:
        scale = random.uniform(0.002, 0.02, data.shape[:2]).astype(np.float16)
        scale *= random.choice([-1, 1], data.shape[:2]).astype(np.float16)  # Q4_0 has signed ones
        data[..., :2] = scale[..., None].view(np.uint8)
        if kind == "Q4_1":
            data[..., 2:4] = scale[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, architecture: str = "llama", kind: str = "Q4_0", **others: Any) -> Path:
    """A model of two layers.

    Args:
        others: tensor names (without ``.weight``), or parts of them, to their types, and ``extra`` tensors.
    """
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(128)
    if "scaling" in others:
        writer.add_string(f"{architecture}.rope.scaling.type", others.pop("scaling"))
    if architecture.startswith("qwen"):
        pairs = [f"{a}{b}" for a in "abcde" for b in "abcdefghij"]
        letters = [chr(ord("!") + i) for i in range(75) if chr(ord("!") + i) not in "<>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<unk>", "<s>", "</s>", *letters, *pairs, "Ġ", "Ċ"])
        writer.add_token_merges([" ".join(pair) for pair in pairs])
        writer.add_token_types([3, 3, 3, *[1] * 125])
    else:
        words = ["▁", *(f"w{i}" for i in range(60))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(64)), *words])
        writer.add_token_scores([0.0] * 128)
        writer.add_token_types([2, 3, 3, *[6] * 64, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)
    layers = [f"blk.{i}." for i in range(2)]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (128, 64), "output": (128, 64)}
    if architecture.startswith("gemma"):
        del shapes["output"]  # always tied
    linears = {**_LINEARS, **(_QWEN3 if architecture == "qwen3" else {})}
    shapes |= {layer + name: shape for layer in layers for name, shape in linears.items()}
    norms = ["output_norm", *(layer + name for layer in layers for name in _NORMS[architecture])]
    for name, shape in shapes.items():
        found = [of for part, of in others.items() if part in name]
        type_ = found[0] if found else "Q8_0" if name in ("token_embd", "output") else kind
        if type_ == "F32":
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
            continue
        data = blocks(random, type_, *shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[type_])
    for name in norms:
        size = 64
        if "_q_norm" in name or "_k_norm" in name:
            size = 128 if architecture == "qwen3" else 16
        writer.add_tensor(f"{name}.weight", 1 + random.standard_normal(size).astype(np.float32) / 8)
    if architecture == "qwen2":
        for layer in layers:
            for name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(
                    f"{layer}{name}.bias", random.standard_normal(_LINEARS[name][0], np.float32)
                )
    for name, value in others.get("extra", {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_transformers_reads(path: Path) -> dict[str, torch.Tensor]:
    """The file's weights in float32, by Transformers' own loader."""
    from transformers.utils.quantization_config import GgufConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL"])
@pytest.mark.parametrize("architecture", list(_NORMS))
def test_the_model_is_the_one_that_transformers_dequantizes(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    path = write(tmp_path / "source/tiny.gguf", architecture, kind)
    report = import_checkpoint(path, tmp_path / "out", dtype=torch.float32)
    assert report.importer == "gguf"
    assert report.exact
    assert len(report.errors) == 14
    expected = as_transformers_reads(path)
    found = load_dequantized(tmp_path / "out", dtype=torch.float32).state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", list(BLOCK_TYPES))
def test_block_types_have_the_values_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "source/tiny.gguf", kind=kind)
    import_checkpoint(path, tmp_path / "out")
    linear = QuantizedFolder.open(tmp_path / "out").linear("model.layers.1.mlp.down_proj")
    tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == "blk.1.ffn_down.weight")
    assert torch.equal(
        linear.dequantize(), torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    )


def test_every_exponent_of_a_power_of_two_scale_is_exact() -> None:
    data = torch.zeros(1, 255 * 17, dtype=torch.uint8)
    data.view(255, 17)[:, 0] = torch.arange(255)
    data.view(255, 17)[:, 1:] = 0x21  # the values 1 and 2 of the table of halves
    codes, scales = BLOCK_TYPES["MXFP4"].split(data)
    assert codes[0, :32].tolist() == [1] * 16 + [2] * 16
    assert torch.equal(scales[0].double(), 2.0 ** (torch.arange(255, dtype=torch.float64) - 128))


def test_the_folder_has_a_config_and_a_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "source/tiny.gguf")
    report = import_checkpoint(path.parent, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["num_key_value_heads"] == 2
    assert config["quantization_config"]["group_size"] == 32
    assert (tmp_path / "out/tokenizer.json").exists()
    assert report.left == {"lm_head": "a head or a router"}
    assert report.remarks == (
        "2 other tensors of the types Q8_0 are dequantized and rounded to bfloat16 "
        "(such as model.embed_tokens.weight).",
    )
    assert all(layer.error == 0 for layer in inspect_checkpoint(tmp_path / "out").layers)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path: Path, factor: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    plain = 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    factors = plain / LlamaRotaryEmbedding(config).inv_freq
    assert float(factors[0]) == 1
    assert float(factors[-1]) == pytest.approx(factor)
    path = write(tmp_path / "source/tiny.gguf", extra={"rope_freqs.weight": factors.numpy()})
    import_checkpoint(path, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert written.pop("factor") == pytest.approx(factor)
    scaling.pop("factor")
    assert written == scaling


def test_linears_of_other_types_stay_in_16_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "source/tiny.gguf", attn_v="Q8_0", ffn_down="F32")
    report = import_checkpoint(path, tmp_path / "out", dtype=torch.float32)
    assert report.left["model.layers.1.self_attn.v_proj"] == "stored as Q8_0, which is no table of 16"
    assert report.left["model.layers.0.mlp.down_proj"] == "stored as F32, which is no table of 16"
    assert len(report.errors) == 10
    expected = as_transformers_reads(path)
    found = load_dequantized(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_large_file_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "source/tiny.gguf")
    import_checkpoint(path, tmp_path / "whole")
    monkeypatch.setattr(importer, "_MAX_FILE", 20_000)
    monkeypatch.setattr(importer, "_VALUES", 1000)  # and dequantized in many pieces
    import_checkpoint(path, tmp_path / "out")
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    parts = {name: t for f in files for name, t in load_file(tmp_path / "out" / f).items()}
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    QuantizedFolder.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "Q4_1"}, r"no linear in a block type that is a table; its tensors are F32, Q4_1, Q8_0"),
        ({"ffn": "Q8_0"}, r"has 36,864 of 61,440 weights of linears in types .* stored as Q8_0"),
        (
            {"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}},
            r"rope_freqs.weight in .* has 8 factors from 1 to 8 for theta 10000, which are not Llama 3's",
        ),
        (
            {"extra": {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}},
            r"has 1 tensors that its model, .* no parameter for; one is blk.0.attn_sinks.weight \[4\]",
        ),
        (
            {"scaling": "yarn"},
            r"scales rotary frequencies by 'yarn', which Transformers does not read",
        ),
    ],
)
def test_files_that_cannot_be_kept_are_refused(
    tmp_path: Path, options: dict[str, Any], match: str, leaves_nothing: Callable[[], None]
) -> None:
    path = write(tmp_path / "source/tiny.gguf", **options)
    with pytest.raises(QuantizationError, match=match):
        import_checkpoint(path, tmp_path / "out")
    leaves_nothing()


def test_an_unknown_architecture_is_refused(tmp_path: Path, leaves_nothing: Callable[[], None]) -> None:
    path = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(str(path), "rwkv6")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QuantizationError, match="architecture 'rwkv6'; supported are llama, qwen2"):
        import_checkpoint(path, tmp_path / "out")
    leaves_nothing()


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"GGUX" + b[4:], lambda b: b[:-5000]])
def test_a_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], leaves_nothing: Callable[[], None]
) -> None:
    path = write(tmp_path / "source/tiny.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"tiny.gguf \(\d+ bytes\) cannot be read as GGUF"):
        import_checkpoint(path, tmp_path / "out")
    leaves_nothing()
