"""What every test of this package may ask for: one CPU instruction set after the other, and order."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flute_kernels import _C

# torch's deterministic mode, which `poisoned` uses, wants it before the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shared machine stalls now and then: only a test that is about time may fail for time.
settings.register_profile("flute", deadline=None, max_examples=40)
settings.load_profile("flute")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """The same random numbers, and one thread: tests of threads take more, and on a shared machine a
    thread that waits for its turn makes every small call some twenty times slower."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set of this build that the processor has."""
    before = _C.isa()
    assert _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN: a result that a kernel forgot to write is then seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
