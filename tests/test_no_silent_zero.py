"""A penalty on the critic's input gradient must reach the weights: on every backend, and with no more products than it needs.

A raw kernel called in a backward pass cuts the second-order graph without an exception; the penalty then trains nothing. The check
below fails on such an op, and is itself checked on one that is broken on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import gankern
from tests.support import DEVICE, CountProducts, assert_matches, need, randn

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.linear(x, weight, bias), 0.2)


def critic_parameters(sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    parameters = []
    for i, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        parameters += [randn(out, fan_in, seed=2 * i, dtype=dtype, scale=fan_in**-0.5), randn(out, seed=2 * i + 1, dtype=dtype)]
    return [p.requires_grad_() for p in parameters]


def critic(layer: Layer, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    for i in range(0, len(parameters) - 2, 2):
        x = layer(x, parameters[i], parameters[i + 1])
    return F.linear(x, parameters[-2], parameters[-1])


def penalty(layer: Layer, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Gulrajani et al. 2017, eq. 3, with the gradient norm of each sample by itself."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(layer, parameters, x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def parameter_gradients(layer: Layer, dtype: torch.dtype, weight: float, plain_adversarial: bool = False) -> list[Tensor]:
    """Of adversarial loss + weight * penalty, for a 3-layer critic."""
    parameters = critic_parameters((7, 13, 5, 1), dtype)
    real, fake, eps = (
        randn(16, 7, seed=20, dtype=dtype),
        randn(16, 7, seed=21, dtype=dtype),
        randn(16, 1, seed=22, dtype=dtype).sigmoid(),
    )
    a_real, a_fake = critic(layer, parameters, real), critic(layer, parameters, fake)
    loss = F.softplus(-a_real).mean() + F.softplus(a_fake).mean() if plain_adversarial else gankern.gan_loss(a_real, a_fake).loss
    loss = loss + weight * penalty(layer, parameters, eps * real + (1 - eps) * fake)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def check_penalty_counts(layer: Layer, dtype: torch.dtype = torch.float64) -> None:
    """The gradient with a penalty differs from the one without, and both are those of float64 autograd, parameter by parameter."""
    got = {weight: parameter_gradients(layer, dtype, weight) for weight in (0.0, 10.0)}
    want = {weight: parameter_gradients(plain, torch.float64, weight, plain_adversarial=True) for weight in (0.0, 10.0)}
    for i, (with_penalty, without) in enumerate(zip(want[10.0], want[0.0], strict=True)):
        for weight in (0.0, 10.0):
            error = (got[weight][i].double() - want[weight][i]).abs().max().item()
            limit = TOLERANCE[dtype] * want[weight][i].abs().max().item()
            assert error <= limit, f"parameter {i}, penalty weight {weight}: error {error:.3g}, allowed {limit:.3g}"
        if with_penalty.dim() == 2:  # the penalty reaches every weight matrix, and no bias: a piecewise linear critic
            assert (with_penalty - without).abs().max() > 0.1 * without.abs().max()
            assert not torch.equal(got[10.0][i], got[0.0][i]), f"parameter {i}: the penalty contributes nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_penalty_reaches_every_weight(backend: str, dtype: torch.dtype) -> None:
    check_penalty_counts(gankern.linear_lrelu, dtype)


def test_penalty_reaches_every_weight_by_default() -> None:
    check_penalty_counts(gankern.linear_lrelu)


def test_penalty_through_modules(backend: str) -> None:
    """The same critic made of the drop-in modules."""
    module = torch.nn.Sequential(gankern.nn.LinearLeakyReLU(7, 13), gankern.nn.LinearLeakyReLU(13, 5), torch.nn.Linear(5, 1))
    module = module.to(DEVICE, torch.float64)
    parameters, x = list(module.parameters()), randn(16, 7, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    value = (grad.norm(2, dim=1) - 1).square().mean()
    want = penalty(plain, parameters, x)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    got = torch.autograd.grad(value, parameters[::2])
    for a, b in zip(got, torch.autograd.grad(want, parameters[::2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class RawKernelInBackward(torch.autograd.Function):
    """LeakyReLU whose backward calls a raw kernel: first derivatives are right, the second-order graph is cut in silence."""

    @staticmethod
    def forward(ctx, z):
        y = F.leaky_relu(z, 0.2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dy = dy.detach()  # a kernel sees data, not history
        return torch.where(y > 0, dy, 0.2 * dy)


class OnceDifferentiable(RawKernelInBackward):
    """The same, honest about it."""

    backward = staticmethod(once_differentiable(RawKernelInBackward.backward))


def with_activation(function: type[torch.autograd.Function]) -> Layer:
    return lambda x, w, b: function.apply(F.linear(x, w, b))


def test_the_check_catches_a_cut_graph() -> None:
    broken = with_activation(RawKernelInBackward)
    got, want = (parameter_gradients(layer, torch.float64, 0.0) for layer in (broken, plain))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True)), (
        "its first derivatives are meant to be right"
    )
    parameter_gradients(broken, torch.float64, 10.0)  # no exception, no warning: that is the danger
    with pytest.raises(AssertionError, match=r"parameter 2, penalty weight 10\.0: error"):
        check_penalty_counts(broken)


def test_the_comparison_of_the_op_tests_catches_it_too() -> None:
    inputs = (randn(5, 4, seed=0), randn(3, 4, seed=1), randn(3, seed=2))
    assert_matches(with_activation(RawKernelInBackward), plain, inputs, order=1)
    with pytest.raises(AssertionError, match="graphs differ in"):
        assert_matches(with_activation(RawKernelInBackward), plain, inputs, order=2)


def test_a_declared_first_order_op_raises() -> None:
    parameters = critic_parameters((7, 13, 5, 1), torch.float64)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(with_activation(OnceDifferentiable), parameters, randn(16, 7, seed=20)).backward()


# --- no more products than needed ---------------------------------------------------------------------------------------------

SIZES = {"3 layers": (784, 512, 256, 1), "4 layers": (784, 1024, 512, 256, 1)}


def products_of_penalty(layer: Layer, sizes: Sequence[int]) -> int:
    """Matrix products of the penalty with its backward pass to all parameters."""
    parameters, x = critic_parameters(sizes, torch.float32), randn(2, sizes[0], seed=30, dtype=torch.float32)
    with CountProducts() as products:
        penalty(layer, parameters, x).backward()
    return products.count


@pytest.mark.parametrize(("name", "eager", "ours"), [("3 layers", 15, 11), ("4 layers", 21, 15)])
def test_products_of_the_penalty(name: str, eager: int, ours: int) -> None:
    """4L - 1 for L layers; eager PyTorch multiplies zeros as well (6L - 3)."""
    assert products_of_penalty(plain, SIZES[name]) == eager
    need("compiled")
    with gankern.use_backend("compiled"):
        assert products_of_penalty(gankern.linear_lrelu, SIZES[name]) <= ours


def test_products_of_a_first_order_step() -> None:
    """No product for what nobody asked for: 3 a layer for all gradients, 2 where x or the weights are frozen."""
    need("compiled")
    x, w, b = randn(4, 6, seed=0), randn(5, 6, seed=1), randn(5, seed=2)
    for wanted, most in (((x, w, b), 3), ((x,), 2), ((w, b), 2), ((b,), 1)):
        leaves = [t.detach().requires_grad_(any(t is v for v in wanted)) for t in (x, w, b)]
        with gankern.use_backend("compiled"), CountProducts() as products:
            torch.autograd.grad(gankern.linear_lrelu(*leaves).sum(), [t for t in leaves if t.requires_grad])
        assert products.count <= most, f"{products.count} products for {len(wanted)} gradients"
