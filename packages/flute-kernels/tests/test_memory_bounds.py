"""Kernels stay inside of their tensors: every operand ends where readable memory ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flute_kernels import QuantSpec

from .helpers import DTYPES, random_layer

# Runs in a process of its own, since one byte too many ends it.
_GUARDED = """
import ctypes, faulthandler, itertools, mmap, sys
import torch
import flute_kernels as fk

faulthandler.enable()
torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []

def at_the_end(t):
    \"\"\"A copy whose last byte is the last before a page that nobody may touch.\"\"\"
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(base + pages), PAGE, 0) == 0
    kept.append(memory)
    guarded = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size).view(t.shape)
    return guarded.copy_(t)

calls = 0
for isa in fk._C.available_isas():
    assert fk._C.select_isa(isa)
    for bits, p, (n, k, tables) in itertools.product(
        (2, 3, 4), (1, 2), ((1, 32, 1), (17, 96, 1), (33, 544, 1), (48, 64, 3))
    ):
        spec = fk.QuantSpec(bits=bits, group_size=32, vector_size=p)
        codes = torch.randint(0, spec.table_entries, (n, k // p))
        stored = fk.QuantizedLinear.from_codes(
            codes, torch.rand(n, k // 32).half(), torch.randn(tables, spec.table_entries, p), spec)
        weight = fk.LutWeight.from_linear(stored)
        packed = [at_the_end(t) if isinstance(t, torch.Tensor) else t for t in weight._packed]
        for m, dtype in itertools.product((1, 2, 3, 7, 19), (torch.float32, torch.float16, torch.bfloat16)):
            x, bias = at_the_end(torch.randn(m, k).to(dtype)), at_the_end(torch.randn(n).to(dtype))
            assert fk.qgemm(x, *packed, bias).isfinite().all()
            calls += 1
            if n % (16 * tables) == 0:
                counts = at_the_end(torch.tensor([m, *[0] * (tables - 1)], dtype=torch.int32).flip(0))
                assert fk.qgemm_grouped(x, counts, *packed).isfinite().all()
        fk.dequantize(*packed, torch.float16)
    for block, dtype in itertools.product((2, 8, 32), (torch.float32, torch.float16, torch.bfloat16)):
        x, signs = at_the_end(torch.randn(3, 96).to(dtype)), at_the_end(torch.ones(96))
        fk.hadamard(x, signs, block)
print(calls)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_nothing_is_read_beyond_an_operand() -> None:
    run = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) > 0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 19])
@pytest.mark.parametrize("n", [1, 15, 17, 33])
def test_nothing_is_written_beyond_the_output(
    n: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_layer(QuantSpec(bits=3, group_size=32), n, 96).weight
    buffers: list[Tensor] = []

    def between_guards(*size: object, dtype: torch.dtype, **_: object) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], tuple) else size)  # type: ignore[arg-type]
        buffers.append(torch.full((shape.numel() + 128,), 7.0, dtype=dtype))
        return buffers[-1][64:-64].view(shape)

    x = torch.randn(rows, 96).to(dtype)
    monkeypatch.setattr(torch, "empty", between_guards)
    outs = weight.linear(x), weight.dequantize(dtype)
    monkeypatch.undo()
    assert [out.numel() + 128 for out in outs] == [buffer.numel() for buffer in buffers]
    for buffer in buffers:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()
