"""A penalty on the critic's input gradient must reach the weights: on every backend, and with no more products than it needs.

A raw kernel called in a backward pass cuts the second-order graph without an exception; the penalty then trains nothing. The check
below fails on such an op, and is itself checked on one that is broken on purpose.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import gankern
from gankern.ops.spectral_norm import spectral_norm
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


# --- no more products than needed -------------------------------------------------------------------------------------------------

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


# --- whole critics made of each op on the path from input to output ---------------------------------------------------------------


class Features(nn.Module):
    """Minibatch discrimination in plain PyTorch, with the parameter of `gankern.nn.MinibatchDiscrimination`."""

    def __init__(self, inputs: int, features: int, kernel: int) -> None:
        super().__init__()
        self.T = nn.Parameter(torch.empty(inputs, features, kernel))

    def forward(self, x: Tensor) -> Tensor:
        m = (x @ self.T.flatten(1)).unflatten(1, self.T.shape[1:])
        similar = torch.exp(-(m.unsqueeze(1) - m).abs().sum(-1))
        return torch.cat([x, similar.sum(1) - 1], dim=1)


class Distance(nn.Module):
    """Mean squared distance to the others, in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        d = (x.unsqueeze(1) - x).square().sum(-1)
        return torch.cat([x, d.sum(1, keepdim=True) / (len(x) - 1)], dim=1)


def layers(norm: Callable[[nn.Module], nn.Module] = lambda m: m, *extra: nn.Module) -> nn.Sequential:
    """7-13-5-1, LeakyReLU between."""
    widths = 5 + sum(m.T.shape[1] if hasattr(m, "T") else 1 for m in extra)
    return nn.Sequential(
        norm(nn.Linear(7, 13)), nn.LeakyReLU(0.2), norm(nn.Linear(13, 5)), nn.LeakyReLU(0.2), *extra, norm(nn.Linear(widths, 1))
    )


def convolutions(norm: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Sequential:
    return nn.Sequential(
        norm(nn.Conv2d(1, 3, 3)), nn.LeakyReLU(0.2), norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1)
    )


def batchnorm(norm: type[nn.Module] = nn.BatchNorm1d, act: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2)) -> nn.Sequential:
    """The penalty of a critic that mixes samples: not what the paper means, but it must be its derivative."""
    first, second = [nn.Linear(7, 13, bias=False), norm(13), act()], [nn.Linear(13, 5, bias=False), norm(5), act()]
    return nn.Sequential(*first, *second, nn.Linear(5, 1))


def batchnorm_convolutions() -> nn.Sequential:
    first = [nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.2)]
    second = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16, 1))


def modules() -> nn.Sequential:
    linear = gankern.nn.LinearLeakyReLU
    return nn.Sequential(linear(7, 13), nn.Identity(), linear(13, 5), nn.Identity(), nn.Linear(5, 1))


def fused(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: gankern.fuse(make())


torch_norm, our_norm = nn.utils.parametrizations.spectral_norm, gankern.nn.spectral_norm
CRITICS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {  # ours, and plain PyTorch with the same keys
    "linear_lrelu": (modules, layers),
    "linear_lrelu, fused": (fused(layers), layers),
    "bias_lrelu, fused": (fused(convolutions), convolutions),
    "bn_lrelu": (lambda: batchnorm(gankern.nn.BatchNormLeakyReLU1d, nn.Identity), batchnorm),
    "bn_lrelu, fused": (fused(batchnorm), batchnorm),
    "bn_lrelu of convolutions, fused": (fused(batchnorm_convolutions), batchnorm_convolutions),
    "spectral_norm": (lambda: layers(our_norm), lambda: layers(torch_norm)),
    "spectral_norm, fused": (fused(lambda: layers(our_norm)), lambda: layers(torch_norm)),
    "spectral_norm, all at once": (lambda: gankern.nn.spectral_norm_(layers()), lambda: layers(torch_norm)),
    "spectral_norm of convolutions": (fused(lambda: convolutions(our_norm)), lambda: convolutions(torch_norm)),
    "minibatch_features": (
        lambda: layers(lambda m: m, gankern.nn.MinibatchDiscrimination(5, 4, 3)),
        lambda: layers(lambda m: m, Features(5, 4, 3)),
    ),
    "minibatch_distance": (
        lambda: layers(lambda m: m, gankern.nn.MinibatchDistance()),
        lambda: layers(lambda m: m, Distance()),
    ),
}


def combined(critic: nn.Module, dtype: torch.dtype, weight: float, ours: bool, shape: Sequence[int]) -> dict[str, Tensor]:
    """Gradients of adversarial loss + weight * penalty in every parameter, of our ops or of plain PyTorch."""
    real, fake = randn(16, *shape, seed=50, dtype=dtype), randn(16, *shape, seed=51, dtype=dtype)
    eps = randn(16, seed=52, dtype=dtype).sigmoid()
    a_real, a_fake = critic(real), critic(fake)
    if ours:
        loss = gankern.gan_loss(a_real, a_fake).loss + gankern.gradient_penalty(critic, real, fake, weight=weight, eps=eps)
    else:
        e = eps.reshape(-1, *(1,) * len(shape))
        x = (e * real + (1 - e) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        loss = F.softplus(-a_real).mean() + F.softplus(a_fake).mean()
        loss = loss + weight * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()
    names, parameters = zip(*critic.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def check_critic(name: str, dtype: torch.dtype, weight: float = 10.0, training: bool = True) -> None:
    """Our gradients are those of float64 autograd, and the penalty counts in that of every matrix."""
    make, make_plain = CRITICS[name]
    torch.manual_seed(0)
    critic, plain = make().to(DEVICE, dtype), make_plain().to(DEVICE, torch.float64)
    with torch.no_grad():
        for i, p in enumerate(critic.parameters()):
            p.copy_(randn(*p.shape, seed=60 + i, scale=p[0].numel() ** -0.5 if p.dim() > 1 else 1.0))
    plain.load_state_dict(critic.state_dict())
    shape = (1, 6, 6) if "conv" in name or "bias" in name else (7,)
    state = copy.deepcopy(plain.state_dict())
    got = combined(critic.train(training), dtype, weight, True, shape)
    want = combined(plain.train(training), torch.float64, 10.0, False, shape)
    plain.load_state_dict(state)
    without = combined(plain, torch.float64, 0.0, False, shape)
    assert got.keys() == want.keys()
    for key, w in want.items():
        error, limit = (got[key].double() - w).abs().max().item(), TOLERANCE[dtype] * w.abs().max().item()
        assert error <= limit, f"{key}: error {error:.3g}, allowed {limit:.3g}"
        if w.dim() > 1:
            assert (w - without[key]).abs().max() > 1000 * limit, f"{key}: the penalty does not count"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CRITICS)
def test_weight_gradients_of_the_combined_loss(name: str, dtype: torch.dtype, backend: str) -> None:
    check_critic(name, dtype)


@pytest.mark.parametrize("name", CRITICS)
def test_weight_gradients_of_the_combined_loss_by_default(name: str) -> None:
    check_critic(name, torch.float32)
    check_critic(name, torch.float64, training=False)


@pytest.mark.parametrize("name", CRITICS)
def test_the_check_fails_without_the_penalty(name: str) -> None:
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check_critic(name, torch.float32, weight=0.0)


@pytest.mark.parametrize("objective", ["wgan", "non-saturating"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weight_gradients_of_the_one_pass_critic(backend: str, dtype: torch.dtype, objective: str) -> None:
    parameters = critic_parameters((7, 13, 5, 1), dtype)
    real, fake = (randn(16, 7, seed=seed, dtype=dtype) for seed in (70, 71))
    eps = randn(16, seed=72, dtype=dtype).sigmoid()
    exact = [p.detach().double().requires_grad_() for p in parameters]

    def autograd(weight: float) -> list[Tensor]:
        a_real, a_fake = (critic(plain, exact, x.double()) for x in (real, fake))
        e = eps.double()[:, None]
        loss = a_fake.mean() - a_real.mean() if objective == "wgan" else F.softplus(-a_real).mean() + F.softplus(a_fake).mean()
        loss = loss + weight * penalty(plain, exact, e * real.double() + (1 - e) * fake.double())
        grads = torch.autograd.grad(loss, exact, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(exact, grads, strict=True)]

    def ours(weight: float) -> list[Tensor]:
        found = gankern.mlp_critic(
            real, fake, parameters[::2], parameters[1::2], objective=objective, penalty_weight=weight, eps=eps
        )
        return list(torch.autograd.grad(found.loss, parameters))

    want, without, got, mutant = autograd(10.0), autograd(0.0), ours(10.0), ours(0.0)
    for w, base, g, m in zip(want, without, got, mutant, strict=True):
        limit = TOLERANCE[dtype] * max(w.abs().max().item(), 1e-3)
        assert (g.double() - w).abs().max() <= limit
        if w.dim() == 2:
            assert (w - base).abs().max() > 1000 * limit
            assert (m.double() - w).abs().max() > limit


# --- forward mode: right, or an exception -----------------------------------------------------------------------------------------


def mlp_problem(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda w1, w2, *x: function(*x, [w1, w2], [None, None])


FORWARD: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {  # function and the shapes of its arguments
    "linear_lrelu": (gankern.linear_lrelu, [(4, 3), (5, 3), (5,)]),
    "bias_lrelu": (gankern.bias_lrelu, [(4, 3, 2), (3,)]),
    "bn_lrelu": (lambda x, w, b: gankern.bn_lrelu(x, None, None, w, b, True), [(4, 3, 2), (3,), (3,)]),
    "bn_lrelu in evaluation": (
        lambda x, w, b: gankern.bn_lrelu(x, randn(3, seed=7), randn(3, seed=8).exp(), w, b),
        [(4, 3, 2), (3,), (3,)],
    ),
    "gan_loss": (lambda r, f: gankern.gan_loss(r, f).loss, [(4, 1), (5, 1)]),
    "gan_loss of a generator": (lambda f: gankern.gan_loss(None, f, "lsgan", "generator").loss, [(5, 1)]),
    "gan_loss, relativistic": (lambda r, f: gankern.gan_loss(r, f, "relativistic-average").loss, [(5, 1), (5, 1)]),
    "interpolate": (lambda a, b: gankern.interpolate(a, b, torch.full((4,), 0.3, dtype=a.dtype)), [(4, 3), (4, 3)]),
    "gradient_norm_penalty": (lambda g: gankern.gradient_norm_penalty(g).value, [(4, 3)]),
    "gradient_penalty": (
        lambda w, r, f: gankern.gradient_penalty(lambda x: F.leaky_relu(x @ w).sum(1), r, f, eps=torch.full((4,), 0.3).double()),
        [(3, 5), (4, 3), (4, 3)],
    ),
    "mlp_critic": (mlp_problem(lambda r, f, w, b: gankern.mlp_critic(r, f, w, b).loss), [(5, 3), (1, 5), (4, 3), (4, 3)]),
    "mlp_critic_penalty": (mlp_problem(lambda x, w, b: gankern.mlp_critic_penalty(x, w, b).loss), [(5, 3), (1, 5), (4, 3)]),
    "mlp_critic_generator": (
        lambda f: gankern.mlp_critic_generator(f, [randn(5, 3, seed=7), randn(1, 5, seed=8)], [None, None]).loss,
        [(4, 3)],
    ),
    "minibatch_features": (gankern.minibatch_features, [(4, 3, 2)]),
    "minibatch_distance": (gankern.minibatch_distance, [(4, 3)]),
    "mmd2": (gankern.mmd2, [(4, 3), (5, 3)]),
    "pulling_away": (gankern.pulling_away, [(4, 3)]),
    "spectral_norm": (
        lambda w: spectral_norm([w], [randn(4, seed=7)], [randn(3, seed=8)], [0], 0)[0],
        [(4, 3)],
    ),
}
DETACHED = {"gradient_penalty": 1, "mlp_critic": 2, "mlp_critic_penalty": 2}  # from this argument on: samples, which do not move


@pytest.mark.parametrize("of_gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_right_or_raises(name: str, of_gradient: bool, backend: str) -> None:
    check_forward(name, of_gradient)


@pytest.mark.parametrize("of_gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_right_or_raises_by_default(name: str, of_gradient: bool) -> None:
    check_forward(name, of_gradient)


def check_forward(name: str, of_gradient: bool) -> None:
    """torch.func.jvp of the value, or of the gradient, against central differences."""
    function, shapes = FORWARD[name]
    inputs = [randn(*shape, seed=80 + i) for i, shape in enumerate(shapes)]
    moved = len(inputs) if name not in DETACHED else DETACHED[name]
    tangents = [randn(*shape, seed=90 + i) for i, shape in enumerate(shapes)][:moved]

    def of(*args: Tensor) -> Tensor:
        if not of_gradient:
            return function(*args, *inputs[moved:])
        grads = torch.func.grad(lambda *a: function(*a, *inputs[moved:]).sin().sum(), tuple(range(moved)))(*args)
        return torch.cat([g.flatten() for g in grads])

    try:
        value, got = torch.func.jvp(of, tuple(inputs[:moved]), tuple(tangents))
    except NotImplementedError as refusal:  # what PyTorch raises for an autograd Function that has no forward mode
        if "jvp" not in str(refusal):
            raise
        return
    h = 1e-5
    plus, minus = (of(*(x + s * h * t for x, t in zip(inputs, tangents, strict=False))) for s in (1, -1))
    want = (plus - minus) / (2 * h)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, want.abs().max().item()))
    torch.testing.assert_close(value, of(*inputs[:moved]))
