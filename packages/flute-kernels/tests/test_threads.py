"""Threads: as many as torch uses, from the pool that torch has, and callers beside each other."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from flute_kernels import LutWeight, QuantSpec

from .helpers import DTYPES, assert_near, random_layer, reference, same_bits

_TASKS = Path("/proc/self/task")

_COUNT_TASKS = """
import os, torch, flute_kernels as fk
torch.set_num_threads(1)
spec = fk.QuantSpec(bits=4, group_size=32)
codes = torch.randint(0, 16, (512, 512))
weight = fk.LutWeight.from_linear(
    fk.QuantizedLinear.from_codes(codes, torch.ones(512, 16).half(), torch.randn(16), spec))
many, one = torch.randn(64, 512), torch.randn(1, 512)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
for _ in range(3):
    weight.linear(one), weight.linear(many)
with_one = count() - before
torch.set_num_threads(3)
weight.linear(one), weight.linear(many)
with_three = count() - before
torch.randn(1 << 20).exp_()
print(with_one, with_three, count() - before)
"""


@pytest.mark.skipif(not _TASKS.exists(), reason="counts threads where Linux lists them")
def test_torch_decides_the_number_and_lends_its_threads() -> None:
    run = subprocess.run([sys.executable, "-c", _COUNT_TASKS], capture_output=True, text=True, check=True)
    # No thread for one; two beside the caller for three; and torch then needs no others of its own.
    assert run.stdout.split() == ["0", "2", "2"]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_callers_beside_each_other_get_their_own_results(rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    layers = [random_layer(QuantSpec(bits=bits, group_size=32), 256, 256) for bits in (2, 3, 4)]
    shared = [layer.weight for layer in layers]
    xs = [torch.randn(rows, 256).to(dtype) for dtype in DTYPES]
    expected = [[weight.linear(x) for x in xs] for weight in shared]
    wrong: list[tuple[int, int]] = []
    start = threading.Barrier(4)

    def call(caller: int) -> None:
        torch.set_num_threads(threads)
        start.wait()
        for turn in range(30):
            w, i = (caller + turn) % 3, (caller + turn // 3) % 3
            if not same_bits(shared[w].linear(xs[i]), expected[w][i]):
                wrong.append((caller, turn))

    callers = [threading.Thread(target=call, args=(c,)) for c in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_more_threads_than_work() -> None:
    torch.set_num_threads(16)
    layer = random_layer(QuantSpec(bits=4, group_size=32), 17, 96)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 96)
        assert_near(LutWeight.from_linear(layer.stored).linear(x), reference(x, layer.dense))
