"""torch's modes, transforms and subclasses: they see the product, and it stays right."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flute_kernels import LutWeight, QuantSpec

from .helpers import DTYPES, Layer, assert_near, random_layer, reference

N, K = 48, 96


@pytest.fixture
def layer() -> Layer:
    return random_layer(QuantSpec(bits=3, group_size=32), N, K)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that torch carries through every operator."""


class Wrapped(Tensor):
    """A subclass without memory of its own, as distributed tensors are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[a.inner if isinstance(a, Wrapped) else a for a in args], **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator(layer: Layer) -> None:
    with Seen() as seen:
        layer.weight.linear(torch.randn(2, K))
    assert seen.calls["flute_kernels::qgemm"] == 1


def test_a_function_mode_sees_the_operator(layer: Layer) -> None:
    weight = layer.weight
    with SeenFunctions() as seen:
        weight.linear(torch.randn(2, K))
    assert seen.calls["flute_kernels.qgemm.default"] == 1


def test_a_subclass_stays_one(layer: Layer) -> None:
    x, bias = torch.randn(2, K), torch.randn(N)
    out = layer.weight.linear(x.as_subclass(Tagged), bias)
    assert type(out) is Tagged
    assert_near(out.as_subclass(Tensor), reference(x, layer.dense, bias))
    assert type(layer.weight.linear(x, bias.as_subclass(Tagged))) is Tagged


@pytest.mark.parametrize("wrapped", ["x", "bias"])
def test_a_wrapper_is_unwrapped(layer: Layer, wrapped: str) -> None:
    x, bias = torch.randn(2, K), torch.randn(N)
    given = {"x": x, "bias": bias}
    out = layer.weight.linear(**{**given, wrapped: Wrapped(given[wrapped])})
    assert_near(out, reference(x, layer.dense, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_leaves_the_dtype_of_x(layer: Layer, dtype: torch.dtype) -> None:
    x = torch.randn(5, K).to(dtype)
    expected = layer.weight.linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight.linear(x), expected)


@pytest.mark.parametrize("spec", [QuantSpec(group_size=32), QuantSpec(group_size=32, hadamard=32)])
@pytest.mark.parametrize("tables", [1, 3])
def test_another_default_device_is_not_taken(spec: QuantSpec, tables: int) -> None:
    """Models are built under ``torch.device("meta")``; weights that exist stay where they are."""
    layer, x = random_layer(spec, N, K, tables=tables), torch.randn(3, K)
    expected = layer.weight.linear(x)
    with torch.device("meta"):
        weight = LutWeight.from_linear(layer.stored)
        out, dense = weight.linear(x), weight.dequantize()
    assert torch.equal(out, expected)
    assert torch.equal(dense, layer.weight.dequantize())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_vmap_is_a_batch_dimension(layer: Layer, lead: tuple[int, ...]) -> None:
    x, bias = torch.randn(4, *lead, K), torch.randn(4, N)
    out = torch.vmap(layer.weight.linear)(x, bias)
    assert_near(out, reference(x, layer.dense) + bias.double().view(4, *[1] * len(lead), N))


def test_functional_gradients_are_right_or_refused(layer: Layer) -> None:
    x = torch.randn(3, K)
    try:
        grad = torch.func.grad(lambda x: layer.weight.linear(x).sum())(x)
    except (NotImplementedError, RuntimeError):
        return
    assert_near(grad, layer.dense.double().sum(0).expand(3, K))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_product_uses_the_next_x(layer: Layer) -> None:
    weight = layer.weight
    traced = torch.jit.trace(lambda x: weight.linear(x), torch.randn(2, K))
    x = torch.randn(7, K)
    assert_near(traced(x), reference(x, layer.dense))


def test_a_negated_view_is_resolved(layer: Layer) -> None:
    """A view of a conjugate's imaginary part holds numbers of the other sign."""
    pair = torch.randn(3, K, dtype=torch.complex64)
    x = pair.conj().imag
    assert x.is_neg()
    assert_near(layer.weight.linear(x), reference(-pair.imag, layer.dense))


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_tensors_of_other_layouts_are_refused(layer: Layer, layout: str) -> None:
    x = torch.randn(2, K)
    with pytest.raises((NotImplementedError, RuntimeError)):
        layer.weight.linear(x.to_sparse() if layout == "sparse" else x.to_mkldnn())
