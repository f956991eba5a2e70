"""The same models on a GPU: loading, generating, compiling, saving, training adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from .helpers import flute_layers, load, logits, quantized, tensors_of, twin
from .test_adapters import adapted, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    # What float32 is told here, and what torch.compile says of it.
    pytest.mark.filterwarnings("ignore:x is float32, which the GPU kernels do not multiply:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix:UserWarning"),
    # With a static cache, Transformers has torch.compile capture graphs, and the first of them is empty.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
# Of the logits' norm: the dtype rounds in every layer.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 5e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.float().cpu() - expected).norm() < tolerance * expected.norm()


@dtypes
@pytest.mark.parametrize("hadamard", [0, 32])
def test_logits(dtype: torch.dtype, hadamard: int, llama: Path, ids: Tensor, tmp_path: Path) -> None:
    model = quantized(llama, hadamard=hadamard)
    expected = logits(twin(model, llama), ids)
    model.save_pretrained(tmp_path)
    on_gpu = load(tmp_path, dtype, device_map="cuda")
    assert {p.device.type for p in on_gpu.parameters()} == {"cuda"}
    assert_close(logits(on_gpu, ids.cuda()), expected, TOLERANCE[dtype])
    assert_close(logits(model.to("cuda", dtype), ids.cuda()), expected, TOLERANCE[dtype])


def test_quantized_while_it_loads(llama: Path, tmp_path: Path) -> None:
    """The values are those that a CPU finds, but for weights between two entries."""
    quantized(llama).save_pretrained(tmp_path / "cpu")
    quantized(llama, device_map="cuda").save_pretrained(tmp_path / "cuda")
    on_cpu, on_gpu = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    assert on_gpu.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        assert on_gpu[name].dtype == expected.dtype
        assert float((on_gpu[name] == expected).float().mean()) > 0.99, name


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate(options: dict[str, object], llama: Path, llama4bit: Path, ids: Tensor) -> None:
    model = load(llama4bit, device_map="cuda")
    found = model.generate(ids.cuda(), max_new_tokens=6, do_sample=False, **options)
    expected = twin(load(llama4bit), llama).generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiles(dtype: torch.dtype, llama4bit: Path, ids: Tensor) -> None:
    model = load(llama4bit, dtype, device_map="cuda")
    expected = logits(model, ids.cuda()).float().cpu()
    compiled = torch.compile(model, fullgraph=True)
    assert_close(logits(compiled, ids.cuda()), expected, TOLERANCE[dtype])
    torch._dynamo.reset()


def test_saves_what_it_loaded(llama4bit: Path, tmp_path: Path) -> None:
    load(llama4bit, device_map="cuda").save_pretrained(tmp_path)
    stored, again = tensors_of(llama4bit), tensors_of(tmp_path)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_dequantize(llama: Path, llama4bit: Path, ids: Tensor) -> None:
    expected = logits(twin(load(llama4bit), llama), ids)
    plain = load(llama4bit, torch.bfloat16, device_map="cuda").dequantize()
    assert not flute_layers(plain)
    assert_close(logits(plain, ids.cuda()), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters(dtype: torch.dtype, llama4bit: Path, ids: Tensor) -> None:
    model = adapted(llama4bit, dtype).to("cuda")
    losses = train(model, ids.cuda())
    assert losses[-1] < 0.8 * losses[0]
