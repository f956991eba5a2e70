"""Layers that see one input rotate it once, and what they compute is what each would compute alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flute_hf import prepare_model
from flute_hf.rotation import RotatedOnce

from .helpers import flute_layers, load, logits, quantized

SIBLINGS = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}


class Counter(TorchDispatchMode):
    """How often an input is rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.rotations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.rotations += func is torch.ops.flute_kernels.hadamard.default
        return func(*args, **(kwargs or {}))


@contextmanager
def each_alone(model: nn.Module) -> Iterator[None]:
    layers = flute_layers(model).values()
    shared = [layer.shared_input for layer in layers]
    for layer in layers:
        layer.shared_input = None
    yield
    for layer, before in zip(layers, shared, strict=True):
        layer.shared_input = before


def counted(model: nn.Module, ids: Tensor) -> int:
    with Counter() as counter:
        logits(model, ids)
    return counter.rotations


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_input_is_rotated_once(family: str, source: Callable[[str], Path], ids: Tensor) -> None:
    model = quantized(source(family), hadamard=32)
    layers = flute_layers(model)
    blocks = len(layers) // 7
    found = logits(model, ids)
    assert counted(model, ids) == 4 * blocks
    with each_alone(model):
        assert counted(model, ids) == 7 * blocks
        assert torch.equal(logits(model, ids), found)
    for name, layer in layers.items():
        assert (layer.shared_input is not None) is (name.rpartition(".")[2] in SIBLINGS)


def test_nothing_is_shared_without_a_rotation(source: Callable[[str], Path], ids: Tensor) -> None:
    model = quantized(source("llama"))
    assert all(layer.shared_input is None for layer in flute_layers(model).values())
    assert counted(model, ids) == 0


def test_a_stored_model_and_copies_of_it_share_among_themselves(
    source: Callable[[str], Path], ids: Tensor, tmp_path: Path
) -> None:
    model = quantized(source("llama"), hadamard=32)
    expected, least = logits(model, ids), counted(model, ids)
    model.save_pretrained(tmp_path / "saved")
    for other in (load(tmp_path / "saved"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        assert counted(other, ids) == least
        own = {id(x.shared_input) for x in flute_layers(other).values() if x.shared_input is not None}
        assert not own & {id(x.shared_input) for x in flute_layers(model).values()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(x) * self.up_proj(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    prepare_model(net, hadamard=64, method="lloyd")
    return net


def test_gradients_are_those_of_layers_that_share_nothing(net: Net) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    net(x).sum().backward()
    shared, x.grad = x.grad, None
    with each_alone(net):
        net(x).sum().backward()
    assert shared is not None
    assert x.grad is not None
    torch.testing.assert_close(shared, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_activations_computed_again(net: Net, reentrant: bool) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    net(x).sum().backward()
    plain, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    assert plain is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, plain, rtol=1e-5, atol=1e-6)


def test_a_pass_without_gradients_leaves_nothing_for_one_with_them(net: Net) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        net.gate_proj(x)
    out = net.up_proj(x)
    assert out.requires_grad
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_into_is_rotated_again(net: Net, mode: Callable[[], object]) -> None:
    with mode():  # type: ignore[attr-defined]
        x = torch.randn(5, 64)
        net.gate_proj(x)
        x.mul_(2)
        found = net.up_proj(x)
        assert torch.equal(found, net.up_proj(x.clone()))


def test_what_is_kept_goes_with_the_last_layer_or_with_the_input(net: Net) -> None:
    shared = net.gate_proj.shared_input
    assert isinstance(shared, RotatedOnce)
    x = torch.randn(5, 64)
    with torch.no_grad():
        net.gate_proj(x)
        assert shared._last is not None
        net.up_proj(x)
        assert shared._last is None
        net.gate_proj(x)
        assert shared._last is not None
        del x
        assert shared._last is None


def test_an_input_of_another_width_is_refused_as_by_any_layer(net: Net) -> None:
    with pytest.raises(ValueError, match="32"):
        net(torch.randn(5, 32))


def test_layers_with_other_rotations_share_nothing() -> None:
    net = Net()
    prepare_model(net, hadamard=64, ignore=["up_proj"])
    assert net.gate_proj.shared_input is None
