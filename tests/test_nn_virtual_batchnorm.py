"""gankern.nn.VirtualBatchNorm: each sample as in a BatchNorm of the reference batch and itself, alone or in a network."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.losses import GANLoss
from gankern.models import (
    CDCGANGenerator,
    ConvACGANDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    Packed,
    ResNetGenerator,
    sample_latent,
)
from gankern.nn import BatchNormLeakyReLU1d, VirtualBatchNorm
from gankern.training.critics import Autograd
from tests.networks import assert_fused_matches, assert_penalty_matches, assert_trains, leaves, made, on_parameters
from tests.support import DEVICE, assert_matches, derivatives, randn


def one_at_a_time(layers: list[nn.Module], reference: Tensor, x: Tensor) -> Tensor:
    """A chain of layers: where one is a BatchNorm, it sees the reference batch alone, and with each sample in turn."""
    for m in layers:
        if isinstance(m, nn.modules.batchnorm._BatchNorm):

            def norm(batch: Tensor, m: Any = m) -> Tensor:
                return F.batch_norm(batch, None, None, m.weight, m.bias, True, 0.0, m.eps)

            reference, x = norm(reference), torch.cat([norm(torch.cat([reference, x[i : i + 1]]))[-1:] for i in range(len(x))])
        else:
            reference, x = m(reference), m(x)
    return x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (3,)), (nn.BatchNorm1d, (3, 4)), (nn.BatchNorm2d, (3, 2, 2))])
def test_a_layer_is_a_batch_norm_of_reference_and_sample(kind: Any, shape: tuple[int, ...], affine: bool) -> None:
    reference, x = randn(4, *shape, seed=1) + 1, 2 * randn(3, *shape, seed=2)
    net = made(lambda: nn.Sequential(kind(3, eps=1e-3, affine=affine)))
    virtual = VirtualBatchNorm(copy.deepcopy(net), reference)

    def plain(x: Tensor, *values: Tensor) -> Tensor:
        m = copy.copy(net[0])
        m._parameters = dict(zip(("weight", "bias"), values, strict=True)) if affine else {"weight": None, "bias": None}  # type: ignore[assignment]
        return one_at_a_time([m], reference, x)

    assert_matches(on_parameters(virtual), plain, [x, *leaves(net)])


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_its_layers_one_at_a_time(training: bool) -> None:
    reference, x = randn(4, 1, 16, 16, seed=1), randn(3, 1, 16, 16, seed=2)
    net = made(DCGANDiscriminator, (1, 16, 16), 2)
    want = one_at_a_time(list(net), reference, x).squeeze(1)
    torch.testing.assert_close(VirtualBatchNorm(net, reference).train(training)(x), want)


def test_a_sample_is_judged_by_itself() -> None:
    critic = VirtualBatchNorm(made(DCGANDiscriminator, (1, 16, 16), 2), randn(4, 1, 16, 16, seed=1))
    x = randn(5, 1, 16, 16, seed=2)
    torch.testing.assert_close(critic(x)[:2], critic(x[:2]))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(critic(x)[0], x)
    assert (grad[0] != 0).any()
    assert not grad[1:].any()


def test_the_reference_batch_teaches_too() -> None:
    """The parameters' gradient is that of the definition, the reference batch's statistics not being constants."""
    reference, x = randn(4, 5, seed=1), randn(3, 5, seed=2)
    net = made(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    )
    virtual = VirtualBatchNorm(copy.deepcopy(net), reference)
    loss = (virtual(x).square().sum(), one_at_a_time(list(net), reference, x).square().sum())
    ours, theirs = (torch.autograd.grad(value, list(n.parameters())) for value, n in zip(loss, (virtual, net), strict=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_before_or_after(backend: str) -> None:
    reference, x, y = (randn(n, 1, 16, 16, seed=i) for i, n in enumerate((4, 3, 3)))
    critic = made(lambda: VirtualBatchNorm(DCGANDiscriminator((1, 16, 16), 2), reference))
    assert_fused_matches(critic, x, ops=["bias_lrelu"])
    assert_penalty_matches(critic, x, y)
    before = VirtualBatchNorm(gankern.fuse(made(DCGANDiscriminator, (1, 16, 16), 2)), reference)
    before.load_state_dict(critic.state_dict())
    torch.testing.assert_close(before(x), critic(x))


def test_second_derivatives_in_a_network() -> None:
    reference = randn(3, 4, seed=1)
    net = made(lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh()))
    virtual = VirtualBatchNorm(copy.deepcopy(net), reference)

    def plain(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        linear = nn.Linear(4, 3)
        linear._parameters = {"weight": weight, "bias": None}  # type: ignore[assignment]
        norm = nn.BatchNorm1d(3)
        norm._parameters = dict(zip(("weight", "bias"), values, strict=True))  # type: ignore[assignment]
        return one_at_a_time([linear, norm, nn.Tanh()], reference, x)

    assert_matches(on_parameters(virtual), plain, [randn(3, 4, seed=2), *leaves(net)])


def test_conditional_networks_and_several_results() -> None:
    labels = torch.tensor([0, 2, 1, 1], device=DEVICE)
    z, x = randn(4, 6, seed=1), randn(4, 1, 16, 16, seed=2)
    generator = VirtualBatchNorm(made(CDCGANGenerator, 6, 3, (1, 8, 8), 2), z, labels.flip(0))
    assert generator(z[:3], labels[:3]).shape == (3, 1, 8, 8)
    logits, classes = VirtualBatchNorm(made(ConvACGANDiscriminator, (1, 16, 16), 3, 2), randn(4, 1, 16, 16, seed=3))(
        randn(3, 1, 16, 16, seed=4)
    )
    assert (logits.shape, classes.shape) == ((3,), (3, 3))
    packed = Packed(VirtualBatchNorm(made(DCGANDiscriminator, (2, 16, 16), 2), randn(3, 2, 16, 16, seed=5)), 2)
    assert packed(x).shape == (2,)


def test_networks_train_in_one_pass_of_both_halves() -> None:
    torch.manual_seed(0)
    real, z = randn(4, 1, 28, 28, seed=1, dtype=torch.float32), randn(4, 6, seed=2, dtype=torch.float32)
    critic = VirtualBatchNorm(DCGANDiscriminator((1, 28, 28), 4), randn(5, 1, 28, 28, seed=3, dtype=torch.float32))
    generator = VirtualBatchNorm(ResNetGenerator(6, (1, 28, 28), 4), sample_latent(5, 6))
    assert_trains(generator, critic, real, z)
    assert Autograd(critic, GANLoss(), "none", 0.0, torch.Generator()).one_pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Statistics in float32: within one rounding of the result in float64, where squares overflow float16."""
    reference, x = 300 * randn(4, 3, 5, seed=1, dtype=dtype), 300 * randn(2, 3, 5, seed=2, dtype=dtype)
    y = VirtualBatchNorm(nn.Sequential(nn.BatchNorm1d(3)).to(DEVICE), reference)(x)
    want = one_at_a_time([nn.BatchNorm1d(3).double().to(DEVICE)], reference.double(), x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want.detach(), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_state() -> None:
    reference = randn(3, 4, seed=1, dtype=torch.float32)
    net = VirtualBatchNorm(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), reference)
    assert list(net.state_dict()) == ["reference0", "network.0.weight", "network.0.bias", "network.1.weight", "network.1.bias"]
    other = VirtualBatchNorm(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), 0 * reference)
    other.load_state_dict(net.state_dict())
    x = randn(2, 4, seed=2, dtype=torch.float32)
    assert torch.equal(other.to(DEVICE)(x), net.to(DEVICE)(x))
    copied = copy.deepcopy(net)
    reference.zero_()
    assert torch.equal(copied(x), net(x))
    assert len(derivatives(lambda t: net(t), [x], 1)) == 2


def test_a_layer_used_twice() -> None:
    norm = nn.BatchNorm1d(3)
    net = VirtualBatchNorm(nn.Sequential(norm, nn.ReLU(), norm), randn(4, 3, seed=1, dtype=torch.float32)).to(DEVICE)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in net.modules())
    assert [p.shape for p in net.parameters()] == [(3,), (3,)]


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (
            lambda: VirtualBatchNorm(DCGANGenerator()),
            ValueError,
            "VirtualBatchNorm: reference must be one tensor or more, got none",
        ),
        (lambda: VirtualBatchNorm(DCGANGenerator(), 3), TypeError, "VirtualBatchNorm: reference0 must be a torch.Tensor, got int"),  # type: ignore[arg-type]
        (
            lambda: VirtualBatchNorm(DCGANGenerator(), torch.zeros(1, 100)),
            ValueError,
            "VirtualBatchNorm: reference0 must have two rows or more, as many as the others, got shape [1, 100]",
        ),
        (
            lambda: VirtualBatchNorm(DCGANGenerator(), torch.zeros(3, 100), torch.zeros(2)),
            ValueError,
            "VirtualBatchNorm: reference1 must have two rows or more, as many as the others, got shape [2]",
        ),
        (
            lambda: VirtualBatchNorm(MLPDiscriminator(), torch.zeros(3, 2)),
            ValueError,
            "VirtualBatchNorm: network must have a BatchNorm layer in it, got MLPDiscriminator",
        ),
        (
            lambda: VirtualBatchNorm(nn.Sequential(BatchNormLeakyReLU1d(3)), torch.zeros(3, 3)),
            ValueError,
            "VirtualBatchNorm: network must have plain nn.BatchNorm1d, 2d or 3d only, got BatchNormLeakyReLU1d",
        ),
        (
            lambda: VirtualBatchNorm(nn.Sequential(nn.BatchNorm1d(3)), torch.zeros(3, 3))(),
            TypeError,
            "VirtualBatchNorm: inputs must be 1 tensors, as the reference, got 0",
        ),
        (
            lambda: VirtualBatchNorm(Packed(DCGANDiscriminator((2, 16, 16), 2), 2), torch.zeros(4, 1, 16, 16))(
                torch.zeros(2, 1, 16, 16)
            ),
            ValueError,
            "VirtualBatchNorm: network must give 6 rows for 6 inputs, got 3",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
