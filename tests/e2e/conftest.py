"""A tiny random Llama on disk, with a tokenizer and a chat template, as a user has a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
# The examples are programs, not a package: they import each other from their own folder.
sys.path.insert(0, str(ROOT / "examples"))

_SPECIAL = ["<unk>", "<s>", "</s>"]
_WORDS = [f"w{i}" for i in range(125)]
_CONFIG = {
    "vocab_size": len(_SPECIAL) + len(_WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # enough for clear winners among the logits
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(scope="session")
def write_tiny_model() -> Callable[[Path], None]:
    """Writes the model into a folder; always the same one."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_CONFIG))
        model.save_pretrained(folder)
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {
                "type": "WordLevel",
                "vocab": {word: i for i, word in enumerate([*_SPECIAL, *_WORDS])},
                "unk_token": "<unk>",
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "eos_token": "</s>",
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return write


@pytest.fixture(scope="session")
def tiny_model(write_tiny_model: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def words() -> str:
    """A text of 700 tokens."""
    numbers = torch.randint(len(_WORDS), (700,), generator=torch.Generator().manual_seed(0))
    return " ".join(_WORDS[n] for n in numbers.tolist())


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """Transformers' progress bars stay out of the test log."""
    transformers.utils.logging.disable_progress_bar()
