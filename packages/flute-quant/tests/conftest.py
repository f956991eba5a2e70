"""Tiny random checkpoints of real architectures, written once a session by Transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,  # the length of the random tokens that importance is measured with
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = [f"w{i}" for i in range(124)]


def _save(config: transformers.PretrainedConfig, folder: Path, dtype: torch.dtype, shard: str) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones otherwise, so that nothing would show that they are forgotten
                parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{w: i + 4 for i, w in enumerate(WORDS)}}
    model_part = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model_part,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint folder by name. Read only: tests that damage one take ``copy_of``."""
    root = tmp_path_factory.mktemp("checkpoints")
    llama = {**SMALL, "tie_word_embeddings": False}
    makers: dict[str, Callable[[], tuple[transformers.PretrainedConfig, torch.dtype, str]]] = {
        "llama": lambda: (transformers.LlamaConfig(**llama), torch.bfloat16, "5GB"),
        "llama-fp32": lambda: (transformers.LlamaConfig(**llama), torch.float32, "5GB"),
        "llama-tied": lambda: (
            transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
            torch.bfloat16,
            "5GB",
        ),
        "llama-sharded": lambda: (transformers.LlamaConfig(**llama), torch.float32, "60KB"),
        "qwen2": lambda: (transformers.Qwen2Config(**llama), torch.bfloat16, "5GB"),
        "qwen3": lambda: (transformers.Qwen3Config(**llama), torch.bfloat16, "5GB"),
        "gemma2": lambda: (transformers.Gemma2Config(**SMALL), torch.float32, "5GB"),
        "mamba": lambda: (
            transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8),
            torch.float32,
            "5GB",
        ),
        "gemma3": lambda: (transformers.Gemma3TextConfig(**SMALL), torch.bfloat16, "5GB"),
        "odd-k": lambda: (
            transformers.LlamaConfig(**{**llama, "intermediate_size": 100}),
            torch.bfloat16,
            "5GB",
        ),
        "mixtral": lambda: (
            transformers.MixtralConfig(**llama, num_local_experts=4),
            torch.bfloat16,
            "5GB",
        ),
        "qwen3-moe": lambda: (
            transformers.Qwen3MoeConfig(
                **llama, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
            ),
            torch.bfloat16,
            "5GB",
        ),
        "llama4": lambda: (
            transformers.Llama4TextConfig(**llama, num_local_experts=4, intermediate_size_mlp=96),
            torch.bfloat16,
            "5GB",
        ),
        "gpt-oss": lambda: (
            transformers.GptOssConfig(**llama, num_local_experts=4),
            torch.bfloat16,
            "5GB",
        ),
    }

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            _save(*(lambda made: (made[0], folder, made[1], made[2]))(makers[name]()))
        return folder

    return get


@pytest.fixture
def copy_of(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of the test's own, to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints(name), tmp_path / f"source-{name}"))

    return copy


@pytest.fixture
def leaves_nothing(tmp_path: Path) -> Callable[[], None]:
    """Call it after a refusal: no output and no partial folder may lie in the test's folder."""

    def check() -> None:
        found = [p.name for p in tmp_path.iterdir() if not p.name.startswith("source")]
        assert found == []

    return check
