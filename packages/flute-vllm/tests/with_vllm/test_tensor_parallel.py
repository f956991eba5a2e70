"""What each process of a tensor-parallel group has: vLLM's layers and loaders, one rank after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear as linear_layers
import vllm.model_executor.parameter as parameters
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from flute_kernels import FormatError, QuantizationConfig, QuantizedLinear, QuantSpec
from flute_quant import quantize_tensor
from flute_vllm.config import FluteConfig

from .models import dequantized as dense

HIDDEN = 256


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def make(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    size: int,
    spec: QuantSpec | None,
    kind: type,
    *arguments: Any,
    **options: Any,
) -> nn.Module:
    """A layer as process ``rank`` of ``size`` makes it; of a 16-bit checkpoint where ``spec`` is None."""
    for module in (linear_layers, parameters):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    config = FluteConfig(QuantizationConfig(spec) if spec is not None else None)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate", "up"],
    }
    layer: nn.Module = kind(*arguments, bias=False, quant_config=config, return_bias=False, **options)
    return layer


@functools.cache
def stored(rows: int, columns: int, spec: QuantSpec, seed: int) -> QuantizedLinear:
    """A matrix with a table of its own."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_tensor(weight, spec, method="learned")[0]


def load(layer: nn.Module, linear: QuantizedLinear, *shard: Any) -> None:
    for name in ("qweight", "scales", "codebook"):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, getattr(linear, name), *shard)


def run(layer: nn.Module, x: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    out: Tensor = layer.quant_method.apply(layer, x)
    return out


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [3, 4])
def test_query_key_value(monkeypatch: pytest.MonkeyPatch, size: int, bits: int) -> None:
    """8 query heads and 2 of keys and values, which 4 and 8 processes have more than once."""
    spec, head = QuantSpec(bits=bits, group_size=32), 32
    q, k, v = (stored(heads * head, HIDDEN, spec, seed) for seed, heads in enumerate((8, 2, 2)))
    x = torch.randn(3, HIDDEN)
    queries = []
    for rank in range(size):
        layer = make(
            monkeypatch, rank, size, spec, QKVParallelLinear, HIDDEN, head, 8, 2, prefix="a.qkv_proj"
        )
        for linear, shard in ((q, "q"), (k, "k"), (v, "v")):
            load(layer, linear, shard)
        own_heads, kv_heads = 8 // size, max(1, 2 // size)
        mine, key, value = run(layer, x).split([own_heads * head, kv_heads * head, kv_heads * head], dim=-1)
        queries.append(mine)
        first = rank * kv_heads if size <= 2 else rank // (size // 2)
        rows = slice(first * head, (first + kv_heads) * head)
        torch.testing.assert_close(key, x @ dense(k)[rows].T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, x @ dense(v)[rows].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(queries, -1), x @ dense(q).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["apart on disk", "fused on disk"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gate_and_up(monkeypatch: pytest.MonkeyPatch, size: int, fused: bool) -> None:
    spec, rows = QuantSpec(bits=2, group_size=64), 192
    both = stored(2 * rows, HIDDEN, spec, 0)
    parts = [stored(rows, HIDDEN, spec, seed) for seed in (1, 2)]
    x = torch.randn(3, HIDDEN)
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rank in range(size):
        prefix = "m.fused_proj" if fused else "m.gate_up_proj"
        layer = make(
            monkeypatch, rank, size, spec, MergedColumnParallelLinear, HIDDEN, [rows, rows], prefix=prefix
        )
        if fused:
            load(layer, both)
        else:
            load(layer, parts[0], 0)
            load(layer, parts[1], 1)
        for part, out in zip(run(layer, x).chunk(2, -1), results, strict=True):
            out.append(part)
    wanted = dense(both).split(rows) if fused else [dense(p) for p in parts]
    for out, weight in zip(results, wanted, strict=True):
        torch.testing.assert_close(torch.cat(out, -1), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_tables_of_one_matrix_go_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(bits=4, group_size=64)
    halves = [stored(64, HIDDEN, spec, seed) for seed in (1, 2)]
    linear = QuantizedLinear(
        spec, *(torch.cat([getattr(h, name) for h in halves]) for name in ("qweight", "scales", "codebook"))
    )
    x = torch.randn(3, HIDDEN)
    out = []
    for rank in range(4):
        layer = make(monkeypatch, rank, 4, spec, ColumnParallelLinear, HIDDEN, 128, prefix="a.proj")
        load(layer, linear)
        out.append(run(layer, x))
    torch.testing.assert_close(torch.cat(out, -1), x @ dense(linear).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=3, group_size=32),
        QuantSpec(bits=4, group_size=-1),
        QuantSpec(bits=4, group_size=64, hadamard=64, hadamard_seed=3),
    ],
    ids=["3 bits", "a scale a row", "rotated"],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_parts_add_up(monkeypatch: pytest.MonkeyPatch, size: int, spec: QuantSpec) -> None:
    linear = stored(96, HIDDEN, spec, 0)
    x = torch.randn(3, HIDDEN)
    total = torch.zeros(3, 96)
    for rank in range(size):
        layer = make(monkeypatch, rank, size, spec, RowParallelLinear, HIDDEN, 96, prefix="m.down_proj")
        load(layer, linear)
        columns = HIDDEN // size
        total += run(layer, x[:, rank * columns : (rank + 1) * columns].contiguous())
    torch.testing.assert_close(total, x @ dense(linear).T, rtol=1e-4, atol=1e-4)


def test_columns_that_groups_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(bits=4, group_size=128)
    with pytest.raises(FormatError, match=r"m\.down_proj: K = 256 over tp = 4 .* 64 each.* g = 128"):
        make(monkeypatch, 0, 4, spec, RowParallelLinear, HIDDEN, 96, prefix="m.down_proj")


def test_vllm_loads_under_the_device_that_it_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here under one on which no tensor has values, as a GPU that this machine need not have."""
    spec = QuantSpec(bits=3, group_size=64, hadamard=64, hadamard_seed=3)
    linear = stored(96, HIDDEN, spec, 0)
    layer = make(monkeypatch, 0, 1, spec, RowParallelLinear, HIDDEN, 96, prefix="m.down_proj")
    with torch.device("meta"):
        load(layer, linear)
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ dense(linear).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "vector_size"), [("default", 1), ("learned", 1), ("nf", 1), ("lloyd-pairs", 2)]
)
def test_vllm_quantizes_under_the_device_that_it_serves_on(
    monkeypatch: pytest.MonkeyPatch, method: str, vector_size: int
) -> None:
    spec = QuantSpec(bits=2, group_size=64, vector_size=vector_size, hadamard=64)
    for name in ("bits", "group_size", "vector_size", "hadamard"):
        monkeypatch.setenv(f"FLUTE_{name.upper()}", str(getattr(spec, name)))
    monkeypatch.setenv("FLUTE_METHOD", method)
    weight = torch.randn(96, HIDDEN, generator=torch.Generator().manual_seed(0))
    layer = make(monkeypatch, 0, 1, None, RowParallelLinear, HIDDEN, 96, prefix="m.down_proj")
    with torch.device("meta"):
        layer.weight.weight_loader(layer.weight, weight)
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    wanted = x @ dense(quantize_tensor(weight, spec, method=method)[0]).T
    torch.testing.assert_close(layer.quant_method.apply(layer, x), wanted, rtol=1e-4, atol=1e-4)
