"""gankern.models: CTGAN's networks are the formulas of the paper, fused, unfused and in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.models import TabularDiscriminator, TabularGenerator
from tests.networks import (
    assert_fused_matches,
    assert_penalty_matches,
    assert_trains,
    documented,
    leaves,
    made,
    on_parameters,
    parameter_gradients,
)
from tests.support import assert_equal_derivatives, assert_matches, randn


@pytest.mark.parametrize("widths", [(), (5, 3)])
@pytest.mark.parametrize("output", ["tanh", "none"])
def test_generator_is_the_paper_s(widths: tuple[int, ...], output: str) -> None:
    """h <- h + ReLU(BN(FC(h))), + being concatenation."""

    def formula(z: Tensor, *p: Tensor) -> Tensor:
        h = z
        for i in range(len(widths)):
            weight, scale, shift = p[3 * i : 3 * i + 3]
            h = torch.cat([h, F.relu(F.batch_norm(h @ weight.T, None, None, scale, shift, training=True))], 1)
        y = F.linear(h, *p[-2:])
        return torch.tanh(y) if output == "tanh" else y

    net = made(TabularGenerator, 7, 6, widths, output)
    assert_matches(on_parameters(net), formula, [randn(8, 6, seed=1), *leaves(net)])


@pytest.mark.parametrize("pack", [1, 3])
@pytest.mark.parametrize("shape", [7, (1, 2, 4)])
def test_discriminator_is_the_paper_s(pack: int, shape: Any) -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        h = torch.stack([torch.cat([x[pack * i + j].flatten() for j in range(pack)]) for i in range(len(x) // pack)])
        for i in range(2):
            h = F.leaky_relu(F.linear(h, p[2 * i], p[2 * i + 1]), 0.2)
        return h @ p[4][0] + p[5]

    net = made(TabularDiscriminator, shape, (5, 3), 0.0, pack)
    x = randn(6, *(shape if isinstance(shape, tuple) else (shape,)), seed=1)
    assert net(x).shape == (6 // pack,)
    assert_matches(on_parameters(net), formula, [x, *leaves(net)])


def test_fused_networks_are_the_plain_ones(backend: str) -> None:
    critic = made(TabularDiscriminator, 7, (5, 3), 0.0, 2)
    real, fake = randn(8, 7, seed=1), randn(8, 7, seed=2)
    assert_fused_matches(made(TabularGenerator, 7, 6, (5, 3)), randn(8, 6, seed=1), ops=["bn_lrelu"] * 2)
    assert_fused_matches(critic, real, ops=["linear_lrelu"] * 2, order=2)
    assert_penalty_matches(critic.layers, critic.inputs(real), critic.inputs(fake))


def test_penalty_of_the_size_of_the_closed_form() -> None:
    critic = made(TabularDiscriminator, 20, dropout=0.0)
    assert_penalty_matches(critic.layers, critic.inputs(randn(200, 20, seed=1)), critic.inputs(randn(200, 20, seed=2)))


def test_dropout_is_fused_and_only_while_training() -> None:
    critic = made(TabularDiscriminator, 7, (5, 3), pack=2)
    x = randn(8, 7, seed=1)
    assert [m.p for m in critic.layers if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert not torch.equal(critic(x), critic(x))
    report = gankern.fusion_report(gankern.fuse(critic))
    assert [row.calls for row in report.fused] == ["Linear + LeakyReLU(0.2) + Dropout"] * 2
    critic.eval()
    assert torch.equal(critic(x), critic(x))
    assert_fused_matches(critic, x, ops=["linear_lrelu"] * 2)


@pytest.mark.parametrize("fused", [False, True])
def test_critic_in_one_pass(fused: bool) -> None:
    """Least squares and a penalty by mlp_critic on `inputs` and `layers`, one norm and one eps a pack, against autograd."""
    critic = made(TabularDiscriminator, 7, (5, 3), 0.0, 2)
    real, fake, eps = randn(8, 7, seed=1), randn(8, 7, seed=2), randn(4, seed=3).sigmoid()
    share = eps.repeat_interleave(2)[:, None]
    x = (share * real + (1 - share) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    adversarial = (critic(real) - 1).square().mean() / 2 + critic(fake).square().mean() / 2
    loss = adversarial + 10 * (grad.reshape(4, 14).norm(dim=1) - 1).square().mean()
    ours = gankern.fuse(critic) if fused else critic
    layers = gankern.nn.mlp_layers(ours.layers)
    out = gankern.mlp_critic(ours.inputs(real), ours.inputs(fake), *layers, objective="lsgan", penalty_weight=10.0, eps=eps)
    assert_equal_derivatives(parameter_gradients(out.loss, ours), parameter_gradients(loss, critic))


@pytest.mark.parametrize("bf16", [False, True])
def test_networks_train(bf16: bool) -> None:
    torch.manual_seed(0)
    real, z = randn(40, 1, 2, 4, seed=1, dtype=torch.float32), randn(40, 6, seed=2, dtype=torch.float32)
    assert_trains(TabularGenerator((1, 2, 4), 6, (16, 16)), TabularDiscriminator((1, 2, 4), (32, 16)), real, z, bf16=bf16)


def test_samples_of_any_shape() -> None:
    generator, critic = TabularGenerator((1, 2, 4), 6, (5,)), TabularDiscriminator((1, 2, 4), (5,), pack=4)
    fake = generator(1000 * torch.randn(8, 6))
    assert fake.shape == (8, 1, 2, 4)
    assert 0 < fake.abs().max() <= 1
    assert critic(fake).shape == (2,)
    assert critic.inputs(fake).shape == (2, 32)
    assert TabularGenerator(7, 6)(torch.randn(8, 6)).shape == (8, 7)
    assert TabularGenerator(7, 6, output="none")(1000 * torch.randn(8, 6)).abs().max() > 1


def test_keys_and_parameter_counts() -> None:
    assert documented(TabularGenerator(100))
    assert documented(TabularDiscriminator(100))
    assert list(TabularDiscriminator(3).state_dict()) == [f"layers.{i}.{n}" for i in (0, 3, 6) for n in ("weight", "bias")]
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    want = ["0.0.weight", *(f"0.1.{n}" for n in buffers), "1.weight", "1.bias"]
    assert list(TabularGenerator(3, widths=(4,)).state_dict()) == want


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: TabularGenerator(0), ValueError, "TabularGenerator: features must be a finite number >= 1, got 0"),
        (lambda: TabularGenerator(2.0), TypeError, "TabularGenerator: features must be an int, got float"),  # type: ignore[arg-type]
        (lambda: TabularGenerator(()), ValueError, "TabularGenerator: features must have at least one dimension, got ()"),
        (lambda: TabularGenerator((2, 0)), ValueError, "TabularGenerator: each of features must be a finite number >= 1, got 0"),
        (lambda: TabularGenerator(3, 0), ValueError, "TabularGenerator: z_dim must be a finite number >= 1, got 0"),
        (
            lambda: TabularGenerator(3, widths=(0,)),
            ValueError,
            "TabularGenerator: each of widths must be a finite number >= 1, got 0",
        ),
        (
            lambda: TabularGenerator(3, output="softmax"),
            ValueError,
            "TabularGenerator: output must be one of tanh, none, got 'softmax'",
        ),
        (lambda: TabularDiscriminator(3, pack=0), ValueError, "TabularDiscriminator: pack must be a finite number >= 1, got 0"),
        (lambda: TabularDiscriminator(3, dropout=-0.1), ValueError, "TabularDiscriminator: dropout must be in [0, 1], got -0.1"),
        (
            lambda: TabularDiscriminator(3, negative_slope=-0.1),
            ValueError,
            "TabularDiscriminator: negative_slope must be a finite number >= 0, got -0.1",
        ),
        (lambda: TabularGenerator(3)(torch.zeros(2, 3)), ValueError, "TabularGenerator: z must have shape [B, 128], got [2, 3]"),
        (
            lambda: TabularDiscriminator(3)(torch.zeros(10, 4)),
            ValueError,
            "TabularDiscriminator: x must have shape [B, 3], got [10, 4]",
        ),
        (
            lambda: TabularDiscriminator(3)(torch.zeros(15, 3)),
            ValueError,
            "TabularDiscriminator: x must have a multiple of 10 samples, got 15",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
