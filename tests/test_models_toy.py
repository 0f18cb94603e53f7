"""gankern.models: the networks of the 2-D experiments are the formulas of their papers, with the weights they start from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models import (
    MaxoutDiscriminator,
    MLPDiscriminator,
    Packed,
    ToyGenerator,
    UnrolledDiscriminator,
    pacgan_toy,
    unrolled_toy,
    wgan_gp_toy,
)
from gankern.nn import mlp_problem
from tests.networks import (
    assert_fused_matches,
    assert_penalty_matches,
    assert_trains,
    count,
    documented,
    leaves,
    made,
    on_parameters,
)
from tests.support import assert_matches, randn

Pair = tuple[nn.Module, nn.Module]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_generator_is_its_formula(norm: str) -> None:
    def formula(z: Tensor, *p: Tensor) -> Tensor:
        left = list(p)
        for _ in range(2):
            z = z @ left.pop(0).T
            z = F.batch_norm(z, None, None, left.pop(0), left.pop(0), training=True) if norm == "batch" else z + left.pop(0)
            z = z.clamp_min(0)
        return F.linear(z, *left)

    net = made(ToyGenerator, 3, (7, 5), (2,), norm)
    assert_matches(on_parameters(net), formula, [randn(6, 3, seed=1), *leaves(net)])


def test_maxout_discriminator_is_its_formula() -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        for i in range(2):
            x = F.linear(x, p[2 * i], p[2 * i + 1]).unflatten(1, (3, -1)).max(1).values
        return x @ p[4][0] + p[5]

    net = made(MaxoutDiscriminator, (2,), (4, 5), 3)
    assert_matches(on_parameters(net), formula, [randn(6, 2, seed=1), *leaves(net)])


def test_unrolled_discriminator_is_its_formula() -> None:
    def formula(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return F.linear(x / 4, w, b).clamp_min(0) @ v[0] + c

    net = made(UnrolledDiscriminator, (2,), 5)
    assert not hasattr(net, "inputs")
    assert_matches(on_parameters(net), formula, [randn(6, 2, seed=1), *leaves(net)])


def test_fused_networks_are_the_plain_ones(backend: str) -> None:
    x, y, z = randn(6, 2, seed=1), randn(6, 2, seed=2), randn(6, 3, seed=3)
    assert_fused_matches(made(ToyGenerator, 3, (7, 5)), z, ops=["bn_lrelu"] * 2)
    assert_fused_matches(made(ToyGenerator, 3, (7, 5), norm="none"), z, ops=["linear_lrelu"] * 2, order=2)
    for critic, ops in ((made(UnrolledDiscriminator), ["linear_lrelu"]), (made(MaxoutDiscriminator, (2,), (4, 5), 3), [])):
        assert_fused_matches(critic, x, ops=ops, order=2)
        assert_penalty_matches(critic, x, y)


@pytest.mark.parametrize("pair", [pacgan_toy(), pacgan_toy(pack=2), unrolled_toy(), wgan_gp_toy()])
def test_pairs_train(pair: Pair) -> None:
    torch.manual_seed(0)
    z_dim = pair[0].z_dim
    assert_trains(*pair, randn(16, 2, seed=1, dtype=torch.float32), randn(16, z_dim, seed=2, dtype=torch.float32))  # type: ignore[arg-type]


def test_parameter_counts() -> None:
    assert documented(ToyGenerator())
    assert documented(MaxoutDiscriminator())
    assert documented(MaxoutDiscriminator((4,)))
    assert documented(UnrolledDiscriminator())
    for make in (unrolled_toy, wgan_gp_toy):
        for net in make():
            assert isinstance(net, UnrolledDiscriminator) or f"{count(net):_}".replace("_", " ") in (make.__doc__ or "")
    # 2 (400) + 3 (400 x 400) + 4 BatchNorms + 2 x 400 + 2; maxout: 5 (2 x 200 + 200) + 10 (200 x 200 + 200) + 201
    assert count(ToyGenerator()) == 800 + 480_000 + 3200 + 802
    assert count(MaxoutDiscriminator()) == 3000 + 402_000 + 201


def test_packs() -> None:
    generator, critic = pacgan_toy(pack=3)
    assert isinstance(critic, Packed)
    assert critic.critic.in_shape == (6,)
    assert critic(generator(torch.randn(6, 2))).shape == (2,)
    assert isinstance(pacgan_toy()[1], MaxoutDiscriminator)
    assert pacgan_toy((1, 4, 4), 2)[1](torch.zeros(6, 1, 4, 4)).shape == (3,)


def linear(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def test_initial_weights() -> None:
    """N(0, 0.02); orthogonal rows or columns of length 0.8; uniform with variance 2 / inputs, or 2 / (inputs + outputs)."""
    torch.manual_seed(0)
    for net in pacgan_toy():
        for layer in linear(net):
            assert abs(layer.weight.std().item() / 0.02 - 1) < 5 / (2 * layer.weight.numel()) ** 0.5
    for net in unrolled_toy():
        for layer in linear(net):
            w = layer.weight if layer.out_features < layer.in_features else layer.weight.T
            torch.testing.assert_close(w @ w.T, 0.64 * torch.eye(len(w)), rtol=0, atol=1e-5)
    for net in wgan_gp_toy():
        *hidden, last = linear(net)
        for layer, variance in [*((m, 2 / m.in_features) for m in hidden), (last, 2 / (512 + last.out_features))]:
            w = layer.weight
            assert w.abs().max() <= (3 * variance) ** 0.5 * (1 + 1e-6)
            assert abs(w.var().item() / variance - 1) < 5 / w.numel() ** 0.5
    for pair in (pacgan_toy(), unrolled_toy(), wgan_gp_toy()):
        assert not any(layer.bias.any() for net in pair for layer in linear(net) if layer.bias is not None)


def test_wgan_gp_critic_gets_the_one_pass() -> None:
    critic = wgan_gp_toy()[1]
    assert isinstance(critic, MLPDiscriminator)
    assert not mlp_problem(critic.layers)


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: ToyGenerator(0), ValueError, "ToyGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: ToyGenerator(norm="layer"), ValueError, "ToyGenerator: norm must be one of none, batch, got 'layer'"),
        (lambda: ToyGenerator(out_shape=()), ValueError, "ToyGenerator: out_shape must have at least one dimension, got ()"),
        (lambda: ToyGenerator()(torch.zeros(3, 3)), ValueError, "ToyGenerator: z must have shape [B, 2], got [3, 3]"),
        (lambda: MaxoutDiscriminator(pieces=0), ValueError, "Maxout: pieces must be a finite number >= 1, got 0"),
        (
            lambda: MaxoutDiscriminator(widths=(0,)),
            ValueError,
            "MaxoutDiscriminator: each of widths must be a finite number >= 1, got 0",
        ),
        (
            lambda: MaxoutDiscriminator()(torch.zeros(3, 3)),
            ValueError,
            "MaxoutDiscriminator: x must have shape [B, 2], got [3, 3]",
        ),
        (
            lambda: UnrolledDiscriminator()(torch.zeros(3, 3)),
            ValueError,
            "UnrolledDiscriminator: x must have shape [B, 2], got [3, 3]",
        ),
        (lambda: pacgan_toy(pack=0), ValueError, "pacgan_toy: pack must be a finite number >= 1, got 0"),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
