"""A loaded model in use: generation, compilation, conversion, copies, dequantization."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from .helpers import effective_weight, flute_layers, load, logits, quantized, tensors_of, twin


def assert_untouched(model: nn.Module, folder: Path) -> None:
    """Codes, scales and tables are those on disk."""
    stored = tensors_of(folder)
    for name, layer in flute_layers(model).items():
        for part in ("qweight", "scales", "codebook"):
            assert getattr(layer, part).dtype == stored[f"{name}.{part}"].dtype
            assert torch.equal(getattr(layer, part), stored[f"{name}.{part}"])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate(options: dict[str, object], llama: Path, ids: Tensor) -> None:
    model = quantized(llama)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
    expected = twin(model, llama).generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_compiles_as_one_graph(family: str, source: Callable[[str], Path], ids: Tensor) -> None:
    model = quantized(source(family), hadamard=32)
    expected = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    model.to(torch.bfloat16)
    assert logits(compiled, ids).dtype == torch.bfloat16
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_conversion(dtype: torch.dtype, qwen2_4bit: Path, ids: Tensor) -> None:
    model = load(qwen2_4bit)
    expected = logits(model, ids)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_untouched(model, qwen2_4bit)
    found = logits(model, ids)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.06 * expected.norm()
    assert_untouched(model.to(torch.float32), qwen2_4bit)


def test_bfloat16_and_half_methods(qwen2_4bit: Path) -> None:
    """Transformers allows the one on quantized models and refuses the other; neither corrupts anything."""
    model = load(qwen2_4bit)
    assert_untouched(model.bfloat16(), qwen2_4bit)
    with pytest.raises(ValueError, match=r"`\.half\(\)` is not supported for quantized model"):
        model.half()
    nn.Sequential(model).half()
    assert model.dtype == torch.float16
    assert_untouched(model, qwen2_4bit)


def test_autocast(llama4bit: Path, ids: Tensor) -> None:
    model = load(llama4bit)
    expected = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, ids)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"hadamard": 32}], ids=["plain", "rotated"])
def test_dequantize(
    options: dict[str, int], source: Callable[[str], Path], ids: Tensor, tmp_path: Path
) -> None:
    folder = source("qwen2")
    model = quantized(folder, **options)
    weights = {name: effective_weight(layer) for name, layer in flute_layers(model).items()}
    expected = logits(model, ids)
    plain = model.dequantize()
    assert plain is model
    assert not flute_layers(plain)
    for name, weight in weights.items():
        module = plain.get_submodule(name)
        assert type(module) is nn.Linear
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.num_parameters() == load(folder).num_parameters()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain"), ids), logits(plain, ids))


def test_dequantize_to_another_dtype(llama4bit: Path) -> None:
    model = load(llama4bit).dequantize(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_models_of_their_own(
    duplicate: Callable[[nn.Module], nn.Module], llama4bit: Path, ids: Tensor, tmp_path: Path
) -> None:
    model = load(llama4bit)
    other = duplicate(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert other.num_parameters() == model.num_parameters()
    with torch.no_grad():
        other.model.norm.weight.fill_(2)
    other.model.layers = other.model.layers[:1]
    assert other.num_parameters() < model.num_parameters()
    other.save_pretrained(tmp_path / "copy")
    assert_untouched(model, llama4bit)


def test_sizes_of_a_loaded_model(llama: Path, llama4bit: Path) -> None:
    model, plain = load(llama4bit), load(llama)
    assert model.num_parameters() == plain.num_parameters()
    held = sum(t.nbytes for t in tensors_of(llama4bit).values())
    tables = 64 * len(flute_layers(model))  # once more, in the kernels' float32
    buffers = sum(b.nbytes for b in model.buffers())
    assert model.get_memory_footprint() == held + tables + buffers
    assert model.get_memory_footprint(return_buffers=False) == held + tables


def test_offloading_to_disk_keeps_quantized_weights_in_memory(
    llama4bit: Path, ids: Tensor, tmp_path: Path
) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(llama4bit, device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(model, ids), logits(load(llama4bit), ids))


def test_training_and_evaluation_modes_survive(llama4bit: Path) -> None:
    model = load(llama4bit)
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())
    assert not any(m.training for m in model.eval().dequantize().modules())
