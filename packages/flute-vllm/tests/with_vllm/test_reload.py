"""New weights in the place of those of a running model, where CUDA graphs look for them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import vllm.model_executor.layers.linear as linear_layers
import vllm.model_executor.parameter as parameters
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from flute_kernels import QuantizationConfig, QuantSpec
from flute_vllm.config import FluteConfig

from .models import Checkpoint
from .serving import Engine

ONLINE = {"quantization": "flute", "hf_overrides": {"flute": {"group_size": 32, "method": "lloyd"}}}


def addresses(model: torch.nn.Module) -> list[int]:
    return [b.data_ptr() for name, b in model.named_buffers() if ".flute." in name]


@pytest.mark.parametrize("online", [False, True], ids=["quantized", "16-bit"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_weights_of_another_checkpoint(
    checkpoint: Callable[..., Checkpoint], engine: Engine, family: str, online: bool
) -> None:
    options = {"method": "lloyd", "experts": True} if family == "qwen3_moe" else {"method": "lloyd"}
    first, second = (checkpoint(family, seed=seed, **options) for seed in (0, 1))
    llm = engine.load(first.source if online else first.quantized, **(ONLINE if online else {}))
    before, (places,) = engine.say(llm), llm.apply_model(addresses)
    path = str(second.source if online else second.quantized)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    after = engine.say(llm)
    assert llm.apply_model(addresses) == [places]
    assert len(places) > 0
    assert after == engine.tokens(second.twin)
    assert after != before


def test_the_same_weights_again(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    model = checkpoint("llama", hadamard=64, include=("lm_head",))
    llm = engine.load(model.quantized)
    before = engine.say(llm)
    for _ in range(2):
        llm.collective_rpc("reload_weights")
        assert engine.say(llm) == before


@pytest.mark.parametrize("method", ["learned", "default"], ids=["tables of each matrix", "one table"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_weights_in_the_place_of_random_ones(
    checkpoint: Callable[..., Checkpoint], engine: Engine, family: str, method: str
) -> None:
    model = checkpoint(family, method=method, experts=family == "qwen3_moe")
    llm = engine.load(model.quantized, load_format="dummy")
    engine.say(llm)
    llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
    llm.collective_rpc("reload_weights")
    after = engine.say(llm)
    assert after == engine.tokens(model.twin)


def test_weights_of_another_format_are_refused(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    # vLLM shares position embeddings among the models of a process, and a reload that ends half-way breaks
    # them: no other test has these.
    shape = (("max_position_embeddings", 96),)
    llm = engine.load(checkpoint("llama", shape=shape).quantized)
    path = str(checkpoint("llama", shape=shape, bits=3).quantized)
    with pytest.raises(Exception, match=r"down_proj: codebook is float16 .* expected"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the only process."""
    for module in (linear_layers, parameters):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("online", [False, True], ids=["quantized", "16-bit"])
def test_what_vllm_remembers_of_a_layer_does_not_keep_it(alone: None, online: bool) -> None:
    config = FluteConfig(None if online else QuantizationConfig(QuantSpec(bits=4, group_size=64)))
    layer = ReplicatedLinear(128, 64, bias=False, quant_config=config, prefix="a.proj")
    record_metadata_for_reloading(layer)
    remembered = weakref.ref(layer)
    del layer
    gc.collect()
    assert remembered() is None
