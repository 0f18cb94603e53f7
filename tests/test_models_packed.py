"""gankern.models: a packed critic is the critic inside on joined samples, with a penalty of packs, and in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gankern
from gankern.models import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator, Packed, TabularDiscriminator
from gankern.training import TrainConfig
from gankern.training.critics import Autograd, OnePass, choose
from tests.networks import assert_fused_matches, assert_penalty_matches, assert_trains, made, parameter_gradients
from tests.support import assert_equal_derivatives, randn


@pytest.mark.parametrize("pack", [1, 2, 3])
def test_consecutive_samples_are_joined_along_their_channels(pack: int) -> None:
    images, rows = randn(6, 2, 8, 8, seed=1), randn(6, 5, seed=2)
    conv, mlp = made(DCGANDiscriminator, (2 * pack, 8, 8), 2, norm="none"), made(MLPDiscriminator, (5 * pack,), (4,))
    for critic, x in ((conv, images), (mlp, rows)):
        packs = torch.stack([torch.cat(list(x[i : i + pack])) for i in range(0, 6, pack)])
        logits = Packed(critic, pack)(x)
        assert logits.shape == (6 // pack,)
        assert torch.equal(logits, critic(packs))


@pytest.mark.parametrize("shape", [(1, 2, 4), (7,)])
def test_same_as_the_packs_of_the_tabular_critic(shape: tuple[int, ...]) -> None:
    tabular, x = made(TabularDiscriminator, shape, (5, 3), 0.0, 3), randn(6, *shape, seed=1)
    critic = made(MLPDiscriminator, (3 * shape[0], *shape[1:]), (5, 3))
    critic.load_state_dict(dict(zip(critic.state_dict(), tabular.state_dict().values(), strict=True)))
    torch.testing.assert_close(Packed(critic, 3)(x), tabular(x))


def test_fused_packed_critics_are_the_plain_ones(backend: str) -> None:
    x, y = randn(4, 1, 16, 16, seed=1), randn(4, 1, 16, 16, seed=2)
    critic = made(lambda: Packed(DCGANDiscriminator((2, 16, 16), 2, norm="none"), 2))
    assert_fused_matches(critic, x, ops=["bias_lrelu"] * 2, order=2)
    assert_penalty_matches(critic.layers, critic.inputs(x), critic.inputs(y))


def test_penalty_has_one_norm_a_pack() -> None:
    """As the trainer asks for it: not one a sample."""
    critic = made(lambda: Packed(DCGANDiscriminator((2, 8, 8), 2, norm="none"), 2))
    real, fake = randn(4, 1, 8, 8, seed=1), randn(4, 1, 8, 8, seed=2)
    ours = choose(critic, TrainConfig(loss="wgan", penalty="0gp", penalty_weight=1.0), torch.Generator(real.device).manual_seed(0))
    assert isinstance(ours, Autograd)
    eps = torch.rand(2, device=real.device, dtype=real.dtype, generator=torch.Generator(real.device).manual_seed(0))
    x = torch.lerp(fake, real, eps.repeat_interleave(2).view(4, 1, 1, 1)).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x)
    value = critic(fake).mean() - critic(real).mean() + grad.view(2, -1).square().sum(1).mean()
    torch.testing.assert_close(ours.discriminator(real, fake).value, value.detach())


@pytest.mark.parametrize("fused", [False, True])
def test_packed_mlp_in_one_pass(fused: bool) -> None:
    critic = made(lambda: Packed(MLPDiscriminator((2 * 7,), (5, 3)), 2))
    if fused:
        critic = gankern.fuse(critic)
    real, fake, rng = randn(8, 7, seed=1), randn(8, 7, seed=2), torch.Generator().manual_seed(0)
    ours = choose(critic, TrainConfig(loss="lsgan", penalty="r1"), rng)
    assert isinstance(ours, OnePass)
    ours.discriminator(real, fake).backward()
    got = {name: p.grad for name, p in critic.named_parameters()}
    x = real.clone().requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    adversarial = (critic(real) - 1).square().mean() / 2 + critic(fake).square().mean() / 2
    want = parameter_gradients(adversarial + 10 * grad.view(4, 14).square().sum(1).mean(), critic)
    del want["y"]
    assert_equal_derivatives({name: g for name, g in got.items() if g is not None and bool((g != 0).any())}, want)


def test_keys_are_those_of_the_critic_inside() -> None:
    inside = MLPDiscriminator((4,), (3,))
    assert list(Packed(inside, 2).state_dict()) == [f"critic.{key}" for key in inside.state_dict()]


def test_networks_train() -> None:
    torch.manual_seed(0)
    z = randn(8, 6, seed=2, dtype=torch.float32)
    critic = Packed(DCGANDiscriminator((2, 28, 28), 4), 2)
    assert_trains(DCGANGenerator(6, (1, 28, 28), 4), critic, randn(8, 1, 28, 28, seed=1, dtype=torch.float32), z)
    mlp: nn.Module = Packed(MLPDiscriminator((4,), (16,)), 2)
    assert_trains(MLPGenerator(6, (16,), (2,), output="none"), mlp, randn(8, 2, seed=1, dtype=torch.float32), z)


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: Packed(nn.Identity(), 0), ValueError, "Packed: pack must be a finite number >= 1, got 0"),
        (lambda: Packed(nn.Identity(), 2.0), TypeError, "Packed: pack must be an int, got float"),  # type: ignore[arg-type]
        (lambda: Packed(nn.Identity(), 2)(torch.zeros(3, 4)), ValueError, "Packed: x must have a multiple of 2 samples, got 3"),
        (lambda: Packed(nn.Identity(), 2)(torch.zeros(4)), ValueError, "Packed: x must have two dimensions or more, got shape [4]"),
        (lambda: Packed(nn.Identity(), 2).inputs([1.0]), TypeError, "Packed: x must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
