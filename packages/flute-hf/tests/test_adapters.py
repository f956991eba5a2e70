"""LoRA over quantized layers, with PEFT's ordinary calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import PreTrainedModel

from flute_hf import FluteLinear, adapters, prepare_model
from flute_hf.adapters import FluteLoraLinear
from flute_kernels import FormatError, UnsupportedError

from .helpers import flute_layers, load, logits, tensors_of

# Transformers 5.23 has new names; PEFT 0.21 and Transformers 5.17 know the old ones only.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def adapted(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(load(folder, dtype), config)


def train(model: nn.Module, ids: Tensor, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_base_is(folder: Path, model: PeftModel) -> None:
    stored = tensors_of(folder)
    layers = flute_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for part in ("qweight", "scales", "codebook"):
            assert torch.equal(getattr(layer, part), stored[f"{plain}.{part}"])


def test_training_lowers_the_loss_and_leaves_the_base(llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit)
    assert all(layer.is_prepared for layer in flute_layers(model).values())
    before = logits(model, ids)
    assert torch.equal(before, logits(load(llama4bit), ids))  # a new adapter does nothing
    losses = train(model, ids)
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(logits(model, ids), before)
    assert_base_is(llama4bit, model)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("layers", ["all-linear", r".*_proj"])
def test_every_linear_layer_can_be_adapted(layers: str, qwen2_4bit: Path, ids: Tensor) -> None:
    model = get_peft_model(load(qwen2_4bit), LoraConfig(r=2, target_modules=layers))
    found = [m for m in model.modules() if isinstance(m, FluteLoraLinear)]
    assert len(found) == 14
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    model.add_adapter("second", LoraConfig(r=1, target_modules=layers))
    assert all(set(adapter.lora_A) == {"default", "second"} for adapter in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, llama4bit: Path, ids: Tensor) -> None:
    torch.manual_seed(0)
    plain = train(adapted(llama4bit), ids, steps=3)
    torch.manual_seed(0)
    model = adapted(llama4bit)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert train(model, ids, steps=3) == pytest.approx(plain, rel=1e-5)


def test_training_in_bfloat16(llama4bit: Path, ids: Tensor) -> None:
    losses = train(adapted(llama4bit, torch.bfloat16), ids)
    assert losses[-1] < losses[0]


def test_after_prepare_model_for_kbit_training(llama4bit: Path, ids: Tensor) -> None:
    model = prepare_model_for_kbit_training(load(llama4bit, torch.bfloat16))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert_base_is(llama4bit, model)


def test_adapters_are_saved_alone_and_loaded(llama4bit: Path, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(llama4bit)
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path)
    assert all("lora_" in name for name in tensors_of(tmp_path))
    again = PeftModel.from_pretrained(load(llama4bit), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_transformers_own_adapter_calls(llama4bit: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load(llama4bit)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path)
    again = load(llama4bit)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


def test_two_adapters(llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit)
    train(model, ids, steps=2)
    first = logits(model, ids)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert not torch.equal(logits(model, ids), first)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_unload_gives_the_quantized_model_back(llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit)
    train(model, ids, steps=2)
    plain = model.unload()
    assert len(flute_layers(plain)) == 14
    assert torch.equal(logits(plain, ids), logits(load(llama4bit), ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_keeps_the_adapter(
    safe: bool, dtype: torch.dtype, llama4bit: Path, ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(llama4bit, dtype)
    train(model, ids)
    expected = logits(model, ids)
    merged = model.merge_and_unload(safe_merge=safe)
    found = logits(merged, ids)
    assert (found - expected).norm() < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * expected.norm()
    assert len(flute_layers(merged)) == 10
    dense = merged.model.layers[0].self_attn.q_proj
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == dtype
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, dtype)
    assert len(flute_layers(again)) == 10
    assert torch.equal(logits(again, ids), found)


def test_what_merging_does_is_said_once(
    llama4bit: Path, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    adapters._say_what_merging_does.cache_clear()
    adapted(llama4bit).merge_and_unload()
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "those layers become torch.float32" in message


def test_merging_is_undone_bit_for_bit(llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit)
    train(model, ids, steps=3)
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    assert_base_is(llama4bit, model)


def test_a_model_with_adapters_does_not_save_itself_as_quantized(llama4bit: Path, tmp_path: Path) -> None:
    base: PreTrainedModel = adapted(llama4bit).get_base_model()
    with pytest.raises(
        FormatError, match=r"4 quantized layers, such as model\.layers\.0\.self_attn\.q_proj, carry"
    ):
        base.save_pretrained(tmp_path / "q")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused(init: str, llama4bit: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=f"init_lora_weights is '{init}', which changes the base weight"
    ):
        adapted(llama4bit, init_lora_weights=init)


def test_variants_that_compute_with_the_base_weight_are_refused(llama4bit: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"combination: \('use_dora',\)\. Quantized layers take plain LoRA"
    ):
        adapted(llama4bit, use_dora=True)


def test_any_torch_module(ids: Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    prepare_model(model, group_size=32)
    adapted_model = get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    assert isinstance(adapted_model.base_model.model[0].base_layer, FluteLinear)
    adapted_model(torch.randn(2, 64)).sum().backward()


def test_a_compiled_adapted_model_is_one_graph(llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit)
    expected = logits(model, ids)
    compiled: Callable[..., nn.Module] = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
