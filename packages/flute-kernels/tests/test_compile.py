"""torch.compile and torch.export take the product whole, for every batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flute_kernels import LutWeight, QuantSpec

from .helpers import Layer, assert_near, random_layer, reference
from .test_hadamard import rotated

N, K = 48, 96
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Linear(nn.Module):
    def __init__(self, weight: LutWeight) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.linspace(-1, 1, N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.weight.linear(x, self.bias)) * 2


def expected(layer: Layer, x: Tensor) -> Tensor:
    return torch.relu(reference(x, layer.dense, torch.linspace(-1, 1, N))) * 2


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def layer() -> Layer:
    return random_layer(QuantSpec(bits=3, group_size=32), N, K)


def test_one_graph_serves_every_batch(layer: Layer) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    module = Linear(layer.weight)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for rows in (2, 3, 17, 130):
        x = torch.randn(rows, K)
        assert_near(compiled(x), expected(layer, x))
    assert len(graphs) == 1


def test_gradients_flow_through_a_compiled_product(layer: Layer) -> None:
    module = Linear(layer.weight)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    assert_near(out.detach(), expected(layer, x.detach()))
    kept = (out.detach() > 0).double() * 2
    assert x.grad is not None
    assert module.bias.grad is not None
    assert_near(x.grad, kept @ layer.dense.double())
    assert_near(module.bias.grad, kept.sum(0))


def test_a_rotated_product_compiles() -> None:
    layer = random_layer(QuantSpec(bits=4, group_size=32, hadamard=32), N, K)
    compiled = torch.compile(layer.weight.linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    assert_near(compiled(x), rotated(x, layer.stored.signs(), 32) @ layer.dense.double().T)


def test_inductor(layer: Layer) -> None:
    compiled = torch.compile(Linear(layer.weight), fullgraph=True)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_near(compiled(x), expected(layer, x))


def test_an_exported_program_takes_another_batch(layer: Layer) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Linear(layer.weight), (torch.randn(4, K),), dynamic_shapes={"x": {0: batch}}, strict=True
    )
    x = torch.randn(9, K)
    assert_near(program.module()(x).detach(), expected(layer, x))
