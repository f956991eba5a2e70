"""Tiny random models of the supported families, on disk as a user has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from .helpers import quantized

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,  # 128 does not divide it, 64 does
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_CONFIGS = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}
_EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a 32-bit model of a family."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"{family}-32bit"
        if not folder.exists():
            torch.manual_seed(0)
            config = getattr(transformers, _CONFIGS[family])(**_SHAPE, **_EXPERTS.get(family, {}))
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(std=0.1)  # Transformers starts them at zero, which would hide them
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(source: Callable[[str], Path]) -> Path:
    """Folder of a 32-bit Llama model."""
    return source("llama")


@pytest.fixture(scope="session")
def llama4bit(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same model, saved in 4 bits. Not to be written to."""
    folder = tmp_path_factory.mktemp("llama") / "4bit"
    quantized(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2_4bit(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with biases, saved in 4 bits. Not to be written to."""
    folder = tmp_path_factory.mktemp("qwen2") / "4bit"
    quantized(source("qwen2")).save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> Tensor:
    """Token ids ``[2, 7]``."""
    return torch.randint(2, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def real_model() -> Path:
    """Folder of the small real language model."""
    folder = os.environ.get("FLUTE_TEST_MODEL")
    if not folder:
        pytest.skip("FLUTE_TEST_MODEL names no folder; nox sets it to the small real model.")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """Transformers' progress bars stay out of the test log."""
    transformers.utils.logging.disable_progress_bar()
