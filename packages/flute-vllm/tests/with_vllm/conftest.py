"""Tiny random models of the supported families, quantized, and with their values in 16-bit clothes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flute_kernels import QuantSpec
from flute_quant import quantize_checkpoint

from .models import Checkpoint, make_checkpoint
from .serving import ENVIRONMENT, Engine

os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def pytest_configure(config: pytest.Config) -> None:
    """vLLM warns of much that is its own matter."""
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("markers", "two_processes: shares a model, on GPUs if there are any")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``two_processes`` want a GPU for each, where there is any."""
    if item.get_closest_marker("two_processes") and torch.cuda.device_count() == 1:
        pytest.skip("each process takes a GPU, and torch sees one.")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Makes (once for the same arguments) a checkpoint; see :func:`make_checkpoint`."""
    made: dict[str, Checkpoint] = {}

    def make(family: str, **options: object) -> Checkpoint:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def freeze() -> Iterator[Callable[[], None]]:
    """Exempts whatever exists when it is called from garbage collection, for good.

    vLLM collects garbage nine times a model, and at a model's end thaws all that was frozen. To look through
    its imports each time takes ten times as long as the rest of a small model's life.
    """
    frozen = gc.freeze
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        gc.collect()
        frozen()
        yield frozen


@pytest.fixture
def engine(freeze: Callable[[], None]) -> Iterator[Engine]:
    """vLLM, in this process, one model at a time."""
    engine = Engine()
    yield engine
    engine.close()
    freeze()  # what the model made vLLM import


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Options with which two processes share a model; of CPUs, each has one of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this one has used threads, which forks lose
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # vLLM compiles a part of its embedding even if eager
    return {"tensor_parallel_size": 2}


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small real language model, in 4 bits."""
    source = os.environ.get("FLUTE_TEST_MODEL")
    if not source:
        pytest.skip("FLUTE_TEST_MODEL names no folder; nox sets it to the small real model.")
    folder = tmp_path_factory.mktemp("real") / "4bit"
    quantize_checkpoint(source, folder, QuantSpec(bits=4, group_size=64))
    return folder
