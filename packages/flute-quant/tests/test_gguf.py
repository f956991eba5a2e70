"""GGUF files go through Transformers; the result is a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flute_kernels import QuantizedLinear, QuantSpec
from flute_quant import CheckpointError, plan_checkpoint, quantize_checkpoint, quantize_tensor

gguf = pytest.importorskip("gguf")

SHAPES = {
    "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
    "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,),
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Llama of one layer as GGUF, and its tensors."""
    path = tmp_path / "source" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(128)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(64)),
        "▁",
        *(f"w{i}" for i in range(60)),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 128)
    writer.add_token_types([2, 3, 3, *[6] * 64, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)
    named = {"token_embd": (128, 64), "output_norm": (64,), "output": (128, 64)}
    named |= {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in named.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_or_its_folder_is_quantized_from_its_dequantized_weights(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, as_folder: bool
) -> None:
    path, tensors = model
    quantize_checkpoint(
        path.parent if as_folder else path, tmp_path / "out", QuantSpec(4, 64), method="lloyd"
    )
    after = load_file(tmp_path / "out/model.safetensors")
    stored = QuantizedLinear.from_tensors(after, QuantSpec(4, 64), prefix="model.layers.0.mlp.up_proj.")
    expected, _ = quantize_tensor(tensors["blk.0.ffn_up"], QuantSpec(4, 64), method="lloyd")
    assert torch.equal(stored.qweight, expected.qweight)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out/tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_plan_of_a_gguf_file_leaves_nothing_beside_it(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with plan_checkpoint(model[0], QuantSpec()) as plan:
        assert len(plan.modules.linears) == 7
        converted = plan.folder.path
    assert not converted.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_run_does_not_convert_again(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stop(event: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(model[0], tmp_path / "out", progress=stop)

    def fail(*arguments: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("flute_quant.checkpoint.quantize.convert_gguf", fail)
    quantize_checkpoint(model[0], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"GGUX" + b[4:], lambda b: b""])
def test_a_damaged_gguf_file_is_refused(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path, _ = model
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"cannot read .*tiny.gguf \(\d+ bytes\)"):
        quantize_checkpoint(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_folder_with_several_gguf_files_needs_a_choice(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    (model[0].parent / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files; name one"):
        quantize_checkpoint(model[0].parent, tmp_path / "out")
