"""Gradients of x and bias equal those of a dense linear layer; the weight has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flute_kernels import QuantSpec, hadamard

from .helpers import DTYPES, TOLERANCE, Layer, assert_near, random_layer
from .test_hadamard import random_signs, rotated

SPEC = QuantSpec(bits=3, group_size=32)
N, K = 48, 96


@pytest.fixture
def layer() -> Layer:
    return random_layer(SPEC, N, K)


def gradients(out: Tensor, seed: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, seed.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
def test_gradients_of_x_and_bias(
    layer: Layer, lead: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    x = torch.randn(*lead, K).to(dtype).requires_grad_()
    bias = torch.randn(N).to(bias_dtype).requires_grad_()
    seed = torch.randn(*lead, N).to(dtype)
    grad_x, grad_bias = gradients(layer.weight.linear(x, bias), seed, x, bias)
    assert (grad_x.dtype, grad_bias.dtype) == (dtype, bias_dtype)
    limit = 2 * TOLERANCE[dtype]  # W_hat is rounded, and so is the result
    assert_near(grad_x, seed.double() @ layer.dense.double(), limit)
    assert_near(grad_bias, seed.double().reshape(-1, N).sum(0))


@pytest.mark.parametrize("which", ["x", "bias"])
def test_only_what_asks_gets_a_gradient(layer: Layer, which: str) -> None:
    x = torch.randn(5, K, requires_grad=which == "x")
    bias = torch.randn(N, requires_grad=which == "bias")
    layer.weight.linear(x, bias).sum().backward()
    assert (x.grad is not None) == (which == "x")
    assert (bias.grad is not None) == (which == "bias")


def test_a_rotated_weight_has_the_gradient_of_the_rotated_product() -> None:
    layer = random_layer(QuantSpec(bits=4, group_size=32, hadamard=32, hadamard_seed=5), N, K)
    signs = layer.stored.signs()
    effective = rotated(layer.dense, signs, 32, transpose=True)
    x, seed = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    out = layer.weight.linear(x)
    assert_near(out, x.detach().double() @ effective.T)
    assert_near(gradients(out, seed, x)[0], seed.double() @ effective)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("with_signs", [False, True])
def test_the_gradient_of_a_rotation_is_its_transpose(transpose: bool, with_signs: bool) -> None:
    signs = random_signs(K) if with_signs else None
    x, seed = torch.randn(2, 3, K, requires_grad=True), torch.randn(2, 3, K)
    out = hadamard(x, signs, 32, transpose)
    # The rotation is orthonormal: <R x, s> = <x, R' s>, and R' is the other direction.
    assert_near(gradients(out, seed, x)[0], rotated(seed, signs, 32, not transpose))


def test_a_strided_x_and_an_expanded_gradient(layer: Layer) -> None:
    x = torch.randn(K, 7).T.requires_grad_()
    layer.weight.linear(x).sum().backward()
    assert x.grad is not None
    assert_near(x.grad, layer.dense.double().sum(0).expand(7, K))


def test_a_gradient_accumulates_through_two_uses(layer: Layer) -> None:
    x = torch.randn(3, K, requires_grad=True)
    (layer.weight.linear(x).sum() + layer.weight.linear(2 * x).sum()).backward()
    assert x.grad is not None
    assert_near(x.grad, 3 * layer.dense.double().sum(0).expand(3, K))


def test_without_grad_mode_there_is_no_graph(layer: Layer) -> None:
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    expected = layer.weight.linear(x.detach(), bias.detach())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = layer.weight.linear(x, bias)
        assert not out.requires_grad
        assert torch.equal(out, expected)
        assert out.is_inference() == (mode is torch.inference_mode)


def test_parameters_are_inputs_like_others(layer: Layer) -> None:
    bias = torch.nn.Parameter(torch.randn(N))
    frozen = torch.nn.Parameter(torch.randn(N), requires_grad=False)
    x = torch.randn(3, K)
    layer.weight.linear(x, bias).sum().backward()
    assert bias.grad is not None
    assert_near(bias.grad, torch.full((N,), 3.0).double())
    assert not layer.weight.linear(x, frozen).requires_grad


def test_a_directional_derivative_is_right_or_refused_but_never_dropped(layer: Layer) -> None:
    x, direction = torch.randn(3, K), torch.randn(3, K)
    expected = direction.double() @ layer.dense.double().T
    try:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer.weight.linear(forward_ad.make_dual(x, direction))).tangent
    except (NotImplementedError, RuntimeError):
        return
    assert tangent is not None
    assert_near(tangent, expected)


def test_jvp_is_right_or_refused_but_never_zero(layer: Layer) -> None:
    x, direction = torch.randn(3, K), torch.randn(3, K)
    try:
        _, tangent = torch.func.jvp(layer.weight.linear, (x,), (direction,))
    except (NotImplementedError, RuntimeError):
        return
    assert_near(tangent, direction.double() @ layer.dense.double().T)


def test_a_weight_made_between_forward_and_backward_disturbs_nothing(layer: Layer) -> None:
    # Weights may share memory; autograd must not take the new one's writes for changes of the first.
    x = torch.randn(3, K, requires_grad=True)
    out = layer.weight.linear(x).sum()
    random_layer(SPEC, N, K)
    out.backward()
    assert_near(x.grad, layer.dense.double().sum(0).expand(3, K))


def test_a_weight_laid_out_under_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        layer = random_layer(QuantSpec(bits=4, group_size=32, hadamard=32), N, K)
    x = torch.randn(3, K, requires_grad=True)
    layer.weight.linear(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
