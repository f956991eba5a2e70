"""Models as servers run them: workers in processes of their own, compiled, answering over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .models import ONE_LAYER, Checkpoint
from .serving import Engine, server, tokens_of_another_process


@pytest.mark.two_processes
def test_two_processes_share_a_model(
    checkpoint: Callable[..., Checkpoint], engine: Engine, two_processes: dict[str, int]
) -> None:
    model = checkpoint("llama")
    assert engine.tokens(model.quantized, **two_processes) == engine.tokens(model.twin, **two_processes)


def test_compiled_once_and_found_again(
    checkpoint: Callable[..., Checkpoint], engine: Engine, tmp_path: Path
) -> None:
    """As vLLM does by default: what has been compiled is on disk, and serves the next process."""
    model = checkpoint("llama", hadamard=64, shape=ONE_LAYER)
    cached = {"VLLM_DISABLE_COMPILE_CACHE": "0", "VLLM_CACHE_ROOT": str(tmp_path)}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # with no worker, which takes as long as to compile
    said = [
        tokens_of_another_process(model.quantized, {**cached, **alone}, enforce_eager=False) for _ in range(2)
    ]
    assert any(tmp_path.rglob("*compile*"))
    assert said == [engine.tokens(model.quantized)] * 2


def test_served(real_model: Path) -> None:
    """A real model, and a question as a user asks it."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with server(real_model, "--dtype", "bfloat16", "--max-model-len", "128") as client:
        (model,) = client.models.list()
        answer = client.chat.completions.create(
            model=model.id, messages=question, temperature=0, max_tokens=24
        )
    text = answer.choices[0].message.content
    assert text is not None
    assert "Paris" in text
