"""Prompts that share a beginning, or come in pieces, are answered as others are."""

from __future__ import annotations

from collections.abc import Callable

from vllm import SamplingParams

from .models import Checkpoint
from .serving import Engine

LONG = [[(3 + 5 * i + 7 * j) % 96 for j in range(40)] for i in range(3)]
SHARED = [[*LONG[0][:34], token] for token in (5, 50, 95)]


def test_prefix_caching(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    model = checkpoint("llama")
    options = {"block_size": 32}  # that of CPUs is a multiple
    plain = engine.steps(engine.load(model.quantized, enable_prefix_caching=False, **options), SHARED)
    llm = engine.load(model.quantized, enable_prefix_caching=True, **options)
    engine.steps(llm, SHARED[:1])
    assert [[s.token for s in a] for a in engine.steps(llm, SHARED)] == [[s.token for s in a] for a in plain]
    greedy = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": SHARED[1]}], greedy, use_tqdm=False)
    assert answer.num_cached_tokens is not None
    assert answer.num_cached_tokens >= 32


def test_chunked_prefill(checkpoint: Callable[..., Checkpoint], engine: Engine) -> None:
    model = checkpoint("gemma2")
    whole = engine.steps(engine.load(model.quantized, enable_prefix_caching=False), LONG)
    pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    llm = engine.load(model.quantized, enable_prefix_caching=False, **pieces)
    assert [[s.token for s in a] for a in engine.steps(llm, LONG)] == [[s.token for s in a] for a in whole]
