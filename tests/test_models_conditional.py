"""gankern.models: the conditional MLP GAN is the plain network on [input, label's vector], fused, unfused and in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.models import CGANDiscriminator, CGANGenerator
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
from tests.support import DEVICE, assert_equal_derivatives, assert_matches, randn

LABELS = torch.tensor([2, 0, 1, 2], device=DEVICE)
SHAPE = (1, 2, 4)


@pytest.mark.parametrize("embed", [0, 5])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("output", ["tanh", "none"])
def test_generator_is_its_formula(embed: int, norm: str, output: str) -> None:
    def formula(z: Tensor, *p: Tensor) -> Tensor:
        left = list(p)
        h = torch.cat([z, left.pop(0)[LABELS] if embed else F.one_hot(LABELS, 3).to(z.dtype)], 1)
        for _ in range(2):
            h = h @ left.pop(0).T
            h = F.batch_norm(h, None, None, left.pop(0), left.pop(0), training=True) if norm == "batch" else h + left.pop(0)
            h = F.leaky_relu(h, 0.1)
        y = F.linear(h, *left).view(-1, *SHAPE)
        return torch.tanh(y) if output == "tanh" else y

    net = made(CGANGenerator, 6, 3, (7, 9), SHAPE, embed, norm, 0.0, 0.1, output)
    assert_matches(on_parameters(net, LABELS), formula, [randn(4, 6, seed=1), *leaves(net)])


@pytest.mark.parametrize("embed", [0, 5])
@pytest.mark.parametrize("widths", [(), (5,), (9, 7)])
def test_discriminator_is_its_formula(embed: int, widths: tuple[int, ...]) -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        left = list(p)
        h = torch.cat([x.flatten(1), left.pop(0)[LABELS] if embed else F.one_hot(LABELS, 3).to(x.dtype)], 1)
        for _ in widths:
            h = F.leaky_relu(F.linear(h, left.pop(0), left.pop(0)), 0.1)
        weight, bias = left
        return h @ weight[0] + bias

    net = made(CGANDiscriminator, SHAPE, 3, widths, embed, 0.0, 0.1)
    assert_matches(on_parameters(net, LABELS), formula, [randn(4, *SHAPE, seed=1), *leaves(net)])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_fused_networks_are_the_plain_ones(backend: str, norm: str) -> None:
    generator = made(CGANGenerator, 6, 3, (7, 9), SHAPE, 5, norm)
    critic = made(CGANDiscriminator, SHAPE, 3, (9, 7), 5, 0.0)
    x, y = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    assert_fused_matches(generator, randn(4, 6, seed=1), LABELS, ops=["linear_lrelu" if norm == "none" else "bn_lrelu"] * 2)
    assert_fused_matches(critic, x, LABELS, ops=["linear_lrelu"] * 2, order=2)
    assert_penalty_matches(critic, x, y, LABELS)


def test_dropout_is_fused_and_only_while_training() -> None:
    critic = made(CGANDiscriminator, SHAPE, 3, (9, 7))
    x = randn(4, *SHAPE, seed=1)
    assert [m.p for m in critic.layers if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    assert not torch.equal(critic(x, LABELS), critic(x, LABELS))
    report = gankern.fusion_report(gankern.fuse(critic))
    assert [row.calls for row in report.fused] == ["Linear + LeakyReLU(0.2) + Dropout"] * 2
    critic.eval()
    assert torch.equal(critic(x, LABELS), critic(x, LABELS))
    assert_fused_matches(critic, x, LABELS, ops=["linear_lrelu"] * 2)


@pytest.mark.parametrize("fused", [False, True])
def test_one_hot_critic_in_one_pass(fused: bool) -> None:
    """mlp_critic on `inputs` and `layers` is the adversarial loss and a penalty on whole rows, by autograd."""
    critic = made(CGANDiscriminator, SHAPE, 3, (9, 7), 0, 0.0)
    real, fake, eps = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2), randn(4, seed=3).sigmoid()
    adversarial = F.softplus(-critic(real, LABELS)).mean() + F.softplus(critic(fake, LABELS)).mean()
    rows = torch.lerp(critic.inputs(fake, LABELS), critic.inputs(real, LABELS), eps[:, None]).requires_grad_()
    (grad,) = torch.autograd.grad(critic.layers(rows).sum(), rows, create_graph=True)
    loss = adversarial + 10 * (grad.norm(dim=1) - 1).square().mean()
    ours = gankern.fuse(critic) if fused else critic
    layers = gankern.nn.mlp_layers(ours.layers)
    out = gankern.mlp_critic(ours.inputs(real, LABELS), ours.inputs(fake, LABELS), *layers, penalty_weight=10.0, eps=eps)
    assert_equal_derivatives(parameter_gradients(out.loss, ours), parameter_gradients(loss, critic))


def test_learned_vectors_are_not_left_untrained() -> None:
    critic = made(CGANDiscriminator, SHAPE, 3, (9, 7), 5, 0.0)
    rows = critic.inputs(randn(4, *SHAPE, seed=1), LABELS)
    with pytest.raises(ValueError, match="gradient"):
        gankern.mlp_critic(rows, rows, *gankern.nn.mlp_layers(critic.layers))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("embed", "norm"), [(5, "none"), (0, "batch")])
def test_networks_train(embed: int, norm: str, bf16: bool) -> None:
    torch.manual_seed(0)
    pair = CGANGenerator(6, 3, (16, 32), SHAPE, embed, norm, 0.2), CGANDiscriminator(SHAPE, 3, (32, 16), embed)
    real, z = randn(32, *SHAPE, seed=1, dtype=torch.float32), randn(32, 6, seed=2, dtype=torch.float32)
    assert_trains(*pair, real, z, LABELS.repeat(8), bf16=bf16)


def test_labels_and_classes() -> None:
    generator, critic = CGANGenerator(6, 3, (7,), SHAPE), CGANDiscriminator(SHAPE, 3, (7,), dropout=0.0)
    z = torch.randn(1, 6).expand(3, 6)
    fake = generator(100 * z, torch.arange(3))
    assert fake.shape == (3, *SHAPE)
    assert 0 < fake.abs().max() <= 1
    assert len(fake.unique(dim=0)) == 3
    assert len(critic(fake[:1].expand(3, *SHAPE), torch.arange(3)).unique()) == 3
    with pytest.raises(IndexError):
        generator(z, torch.tensor([0, 1, 3]))


def test_keys_and_parameter_counts() -> None:
    assert documented(CGANGenerator())
    assert documented(CGANDiscriminator())
    keys = [f"layers.{i}.{name}" for i in (0, 3, 6, 9) for name in ("weight", "bias")]
    assert list(CGANDiscriminator().state_dict()) == ["embedding.weight", *keys]
    assert CGANDiscriminator().layers[0].in_features == 794
    assert CGANGenerator().layers[0].in_features == 110


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: CGANGenerator(classes=0), ValueError, "CGANGenerator: classes must be a finite number >= 1, got 0"),
        (lambda: CGANGenerator(z_dim=0), ValueError, "CGANGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: CGANGenerator(embed=-1), ValueError, "CGANGenerator: embed must be a finite number >= 0, got -1"),
        (lambda: CGANGenerator(norm="layer"), ValueError, "CGANGenerator: norm must be one of none, batch, got 'layer'"),
        (lambda: CGANGenerator(output="sigmoid"), ValueError, "CGANGenerator: output must be one of tanh, none, got 'sigmoid'"),
        (lambda: CGANGenerator(out_shape=()), ValueError, "CGANGenerator: out_shape must have at least one dimension, got ()"),
        (lambda: CGANDiscriminator(dropout=1.5), ValueError, "CGANDiscriminator: dropout must be in [0, 1], got 1.5"),
        (
            lambda: CGANDiscriminator(widths=(5, 0)),
            ValueError,
            "CGANDiscriminator: each of widths must be a finite number >= 1, got 0",
        ),
        (
            lambda: CGANDiscriminator(negative_slope=-0.1),
            ValueError,
            "CGANDiscriminator: negative_slope must be a finite number >= 0, got -0.1",
        ),
        (
            lambda: CGANGenerator()(torch.zeros(3, 99), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "CGANGenerator: z must have shape [B, 100], got [3, 99]",
        ),
        (
            lambda: CGANGenerator()(torch.zeros(3, 100), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "CGANGenerator: labels must have shape [3], got [2]",
        ),
        (
            lambda: CGANDiscriminator()(torch.zeros(3, 1, 28, 28), torch.zeros(3)),
            TypeError,
            "CGANDiscriminator: labels must have dtype int64, got float32",
        ),
        (
            lambda: CGANDiscriminator()(torch.zeros(3, 1, 28, 28), [1, 2, 3]),
            TypeError,
            "CGANDiscriminator: labels must be a torch.Tensor, got list",
        ),
        (
            lambda: CGANDiscriminator()(torch.zeros(3, 784), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "CGANDiscriminator: x must have shape [B, 1, 28, 28], got [3, 784]",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
