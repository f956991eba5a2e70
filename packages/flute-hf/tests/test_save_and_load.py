"""Folders: what ``save_pretrained`` writes, ``from_pretrained`` reads, and flute_quant writes as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
)

from flute_hf import FluteConfig
from flute_kernels import QuantSpec
from flute_quant import quantize_checkpoint

from .helpers import FAMILIES, flute_layers, load, logits, quantized, rewrite, tensors_of


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_a_saved_model_is_the_same_model(
    family: str, source: Callable[[str], Path], ids: Tensor, tmp_path: Path
) -> None:
    model = quantized(source(family), group_size=128)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert torch.equal(logits(again, ids), logits(model, ids))
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again_writes_the_same_bytes(
    family: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    quantized(source(family), group_size=128).save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_is_what_quantize_checkpoint_writes(
    family: str, source: Callable[[str], Path], ids: Tensor, tmp_path: Path
) -> None:
    quantize_checkpoint(source(family), tmp_path / "streamed", QuantSpec(bits=3, group_size=128))
    model = quantized(source(family), bits=3, group_size=128)
    model.save_pretrained(tmp_path / "saved")
    streamed, saved = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "saved")
    assert streamed.keys() == saved.keys()
    for name, tensor in saved.items():
        if name.rpartition(".")[2] in ("qweight", "scales", "codebook"):
            assert streamed[name].dtype == tensor.dtype
            assert torch.equal(streamed[name], tensor)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("streamed", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert flute_layers(load(tmp_path / "streamed")).keys() == flute_layers(model).keys()


def test_tensor_names_and_config(qwen2_4bit: Path) -> None:
    prefix = "model.layers.0.self_attn.q_proj."
    names = {n.removeprefix(prefix) for n in tensors_of(qwen2_4bit) if n.startswith(prefix)}
    assert names == {"qweight", "scales", "codebook", "bias"}
    config = json.loads((qwen2_4bit / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "flute",
        "format_version": 1,
        "bits": 4,
        "group_size": 64,
        "vector_size": 1,
        "hadamard": 0,
        "hadamard_seed": 0,
        "modules_to_not_convert": ["lm_head"],
        "overrides": {},
        "method": FluteConfig.from_dict(config).method,
    }
    assert config["method"] not in ("", "default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_any_dtype_changes_neither_scales_nor_tables(
    keyword: str, dtype: torch.dtype | str, qwen2_4bit: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen2_4bit, **{keyword: dtype})
    expected = torch.float32 if dtype == "auto" else dtype
    assert model.dtype == expected
    stored = tensors_of(qwen2_4bit)
    for name, layer in flute_layers(model).items():
        assert layer.dtype == expected
        for part in ("qweight", "scales", "codebook"):
            assert torch.equal(getattr(layer, part), stored[f"{name}.{part}"])
            assert getattr(layer, part).dtype == stored[f"{name}.{part}"].dtype
        assert layer.bias is None or layer.bias.dtype == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_scales_and_float32_tables_stay_what_they_are(
    dtype: torch.dtype, llama: Path, tmp_path: Path, ids: Tensor
) -> None:
    quantize_checkpoint(llama, tmp_path / "q", QuantSpec(), scale_dtype=torch.bfloat16)
    rewrite(
        tmp_path / "q", lambda t: t.update({n: v.float() for n, v in t.items() if n.endswith("codebook")})
    )
    stored = tensors_of(tmp_path / "q")
    model = load(tmp_path / "q", dtype)
    for name, layer in flute_layers(model).items():
        for part in ("scales", "codebook"):
            found = getattr(layer, part)
            assert found.dtype == {"scales": torch.bfloat16, "codebook": torch.float32}[part]
            assert torch.equal(found, stored[f"{name}.{part}"])


def test_several_tables_a_layer(llama4bit: Path, tmp_path: Path, ids: Tensor) -> None:
    folder = shutil.copytree(llama4bit, tmp_path / "q")
    rewrite(
        folder, lambda t: t.update({n: v.repeat(2, 1, 1) for n, v in t.items() if n.endswith("codebook")})
    )
    model = load(folder)
    assert model.model.layers[0].mlp.up_proj.codebook.shape == (2, 16, 1)
    assert torch.equal(logits(model, ids), logits(load(llama4bit), ids))


def test_shards(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    model = quantized(llama)
    model.save_pretrained(tmp_path / "q", max_shard_size="50KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "q"), ids), logits(model, ids))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map: object, llama4bit: Path, ids: Tensor) -> None:
    model = load(llama4bit, device_map=device_map)
    assert torch.equal(logits(model, ids), logits(load(llama4bit), ids))
    assert all(layer.is_prepared for layer in flute_layers(model).values())


def test_the_base_model_alone_and_back(llama4bit: Path, ids: Tensor, tmp_path: Path) -> None:
    """Names with and without the prefix ``model.``, in tensors and in the config."""
    base = AutoModel.from_pretrained(llama4bit, dtype=torch.float32)
    assert len(flute_layers(base)) == 14
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
    whole = load(llama4bit)
    torch.testing.assert_close(whole.lm_head(hidden), logits(whole, ids))
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)(ids)[0], hidden)


def test_overrides_follow_the_prefix(llama: Path, tmp_path: Path) -> None:
    quantized(llama, group_size=128, modules_to_not_convert=["o_proj"]).save_pretrained(tmp_path / "q")
    base = AutoModel.from_pretrained(tmp_path / "q")
    assert base.layers[0].mlp.down_proj.spec.group_size == 64
    assert type(base.layers[0].self_attn.o_proj) is nn.Linear
    base.save_pretrained(tmp_path / "base")
    whole = load(tmp_path / "base")
    assert whole.model.layers[0].mlp.down_proj.spec.group_size == 64


def test_a_new_head_on_a_quantized_base(llama4bit: Path, ids: Tensor, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama4bit, num_labels=3, dtype=torch.float32)
    assert type(model.score) is nn.Linear
    assert len(flute_layers(model)) == 14
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", dtype=torch.float32)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_multimodal_models(tmp_path: Path) -> None:
    """Their checkpoints name modules in other ways than the model, and their parents initialise children."""
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**vision).to_dict(), mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "streamed", QuantSpec(group_size=32))
    flute = FluteConfig(group_size=32)
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "source", quantization_config=flute)
    assert len(flute_layers(model)) == 15
    model.save_pretrained(tmp_path / "saved")
    expected = model.state_dict()
    for folder in ("streamed", "saved"):
        found = Gemma3ForConditionalGeneration.from_pretrained(
            tmp_path / folder, dtype=torch.float32
        ).state_dict()
        assert found.keys() == expected.keys()
        parts = [n for n in found if n.rpartition(".")[2] in ("qweight", "scales", "codebook")]
        assert len(parts) == 45
        assert all(torch.equal(found[n], expected[n]) for n in parts)


def test_the_folders_config_wins_over_one_that_is_passed(llama4bit: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        model = AutoModelForCausalLM.from_pretrained(llama4bit, quantization_config=FluteConfig(bits=2))
    assert {layer.spec.bits for layer in flute_layers(model).values()} == {4}


def test_tied_embeddings_stay_tied(source: Callable[[str], Path], tmp_path: Path) -> None:
    model = quantized(source("gemma2"))
    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(tmp_path / "q")


def test_a_layer_made_dense_by_hand_is_saved_as_that(llama4bit: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load(llama4bit)
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.dequantize()
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert len(flute_layers(again)) == 13
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_state_dict_goes_into_a_loaded_model(llama: Path, llama4bit: Path, ids: Tensor) -> None:
    model, other = load(llama4bit), quantized(llama, method="lloyd")
    assert not torch.equal(logits(other, ids), logits(model, ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
