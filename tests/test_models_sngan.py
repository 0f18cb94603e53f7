"""gankern.models: the standard CNN of SN-GAN is the paper's table, fused as plain, with and without spectral norm."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gankern
from gankern.models import SNGANDiscriminator, SNGANGenerator
from tests.networks import assert_fused_matches, assert_penalty_matches, assert_trains, documented, leaves, made, on_parameters
from tests.support import DEVICE, assert_matches, randn

SMALL: dict[str, Any] = {"widths": (2, 3, 4)}


def table(net: nn.Sequential) -> list[tuple[Any, ...]]:
    """The convolutions: kind, kernel, stride, channels."""
    convs = [m for m in net if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    return [(type(m).__name__, m.kernel_size[0], m.stride[0], m.in_channels, m.out_channels) for m in convs]


def test_generator_is_table_3() -> None:
    net = SNGANGenerator()
    assert table(net) == [
        ("ConvTranspose2d", 4, 2, 512, 256),
        ("ConvTranspose2d", 4, 2, 256, 128),
        ("ConvTranspose2d", 4, 2, 128, 64),
        ("Conv2d", 3, 1, 64, 3),
    ]
    assert (net[0].in_features, net[0].out_features) == (128, 4 * 4 * 512)
    assert SNGANGenerator(out_shape=(3, 48, 48))[0].out_features == 6 * 6 * 512  # M_g = 6 for STL-10


def test_discriminator_is_table_3() -> None:
    net = SNGANDiscriminator()
    pairs = [(3, 64), (64, 128), (128, 256)]
    both = [[("Conv2d", 3, 1, a, b), ("Conv2d", 4, 2, b, b)] for a, b in pairs]
    assert table(net) == [*both[0], *both[1], *both[2], ("Conv2d", 3, 1, 256, 512)]
    assert [m.negative_slope for m in net if isinstance(m, nn.LeakyReLU)] == [0.1] * 7
    assert net[-1].in_features == 4 * 4 * 512


def test_networks_are_their_formulas() -> None:
    def generator(z: Tensor, *p: Tensor) -> Tensor:
        h = F.linear(z, p[0], p[1]).view(len(z), 4, 2, 2)
        for w, scale, shift in (p[2:5], p[5:8]):
            h = F.relu(F.batch_norm(F.conv_transpose2d(h, w, stride=2, padding=1), None, None, scale, shift, training=True))
        return torch.tanh(F.conv2d(h, *p[8:], padding=1))

    def discriminator(x: Tensor, *p: Tensor) -> Tensor:
        for i in range(5):
            x = F.leaky_relu(F.conv2d(x, p[2 * i], p[2 * i + 1], stride=1 + i % 2, padding=1), 0.1)
        return x.flatten(1) @ p[10][0] + p[11]

    net = made(SNGANGenerator, 5, (3, 8, 8), SMALL["widths"][::-1])
    assert_matches(on_parameters(net), generator, [randn(4, 5, seed=1), *leaves(net)], 1)
    critic = made(SNGANDiscriminator, (3, 8, 8), **SMALL)
    assert_matches(on_parameters(critic), discriminator, [randn(4, 3, 8, 8, seed=1), *leaves(critic)], 1)


def test_fused_networks_are_the_plain_ones(backend: str) -> None:
    generator, critic = made(SNGANGenerator, 5, (3, 8, 8), SMALL["widths"][::-1]), made(SNGANDiscriminator, (3, 8, 8), **SMALL)
    x, y = randn(3, 3, 8, 8, seed=1), randn(3, 3, 8, 8, seed=2)
    assert_fused_matches(generator, randn(3, 5, seed=1), ops=["bn_lrelu"] * 2)
    assert_fused_matches(critic, x, ops=["bias_lrelu"] * 5)
    assert_penalty_matches(critic, x, y)


def test_fused_discriminator_of_the_automatic_choice() -> None:
    """So large that a convolution goes to the kernel."""
    torch.manual_seed(0)
    net = SNGANDiscriminator((1, 28, 28)).double().to(DEVICE)
    assert_penalty_matches(net, randn(3, 1, 28, 28, seed=1), randn(3, 1, 28, 28, seed=2))


def test_spectral_norm_fused_is_pytorchs() -> None:
    """spectral_norm_ and fuse against torch's parametrization on each layer, u and v of one state_dict."""
    critic = made(SNGANDiscriminator, (3, 8, 8), **SMALL)
    theirs = copy.deepcopy(critic)
    for m in theirs:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            parametrizations.spectral_norm(m)
    ours = gankern.fuse(gankern.nn.spectral_norm_(critic))
    assert [row.into for row in gankern.fusion_report(ours).fused] == ["bias_lrelu"] * 5
    ours.load_state_dict(theirs.state_dict())
    inputs = [randn(3, 3, 8, 8, seed=1), *leaves(theirs)]
    for net in (ours, theirs):
        net.eval()
    assert_matches(on_parameters(ours), on_parameters(theirs), inputs, 2)
    for net in (ours, theirs):
        net.train()
    torch.testing.assert_close(ours(inputs[0]), theirs(inputs[0]))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bf16", [False, True])
def test_networks_train_under_spectral_norm(bf16: bool) -> None:
    torch.manual_seed(0)
    generator = SNGANGenerator(6, (1, 28, 28), (16, 8, 4))
    critic = gankern.nn.spectral_norm_(SNGANDiscriminator((1, 28, 28), (4, 8, 16)))
    real, z = randn(4, 1, 28, 28, seed=1, dtype=torch.float32), randn(4, 6, seed=2, dtype=torch.float32)
    assert_trains(generator, critic, real, z, bf16=bf16)


@pytest.mark.parametrize(("side", "start", "convs"), [(28, 7, 5), (32, 4, 7), (48, 6, 7), (64, 8, 7)])
def test_sides(side: int, start: int, convs: int) -> None:
    generator, critic = SNGANGenerator(4, (1, side, side)), SNGANDiscriminator((1, side, side))
    assert generator[1](generator[0](torch.zeros(1, 4))).shape == (1, 512 if convs == 7 else 256, start, start)
    assert len(table(critic)) == convs
    fake = generator(1000 * torch.randn(2, 4))
    assert fake.shape == (2, 1, side, side)
    assert 0 < fake.abs().max() <= 1
    assert critic(fake).shape == (2,)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (1, 28, 28)])
def test_parameter_counts(shape: tuple[int, ...]) -> None:
    assert documented(SNGANGenerator(out_shape=shape))
    assert documented(SNGANDiscriminator(shape))


def test_state_is_that_of_a_plain_sequential() -> None:
    for net in (SNGANGenerator(5, (3, 8, 8), (4, 2)), SNGANDiscriminator((3, 8, 8), **SMALL)):
        nn.Sequential(*net).load_state_dict(net.state_dict())
        assert list(nn.Sequential(*net).state_dict()) == list(net.state_dict())


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: SNGANGenerator(z_dim=1.5), TypeError, "SNGANGenerator: z_dim must be an int, got float"),  # type: ignore[arg-type]
        (
            lambda: SNGANGenerator(out_shape=(3, 30, 30)),
            ValueError,
            "SNGANGenerator: out_shape must have a side that 3 widths divide by 4, got [3, 30, 30]",
        ),
        (lambda: SNGANGenerator(widths=()), ValueError, "SNGANGenerator: widths must have at least one entry, got ()"),
        (
            lambda: SNGANDiscriminator((3, 28, 28), (8, 8, 8, 8)),
            ValueError,
            "SNGANDiscriminator: in_shape must have a side that 4 widths divide by 8, got [3, 28, 28]",
        ),
        (
            lambda: SNGANDiscriminator((3, 32, 16)),
            ValueError,
            "SNGANDiscriminator: in_shape must be [C, S, S], the shape of a square image, got [3, 32, 16]",
        ),
        (
            lambda: SNGANDiscriminator(widths=(8, 0)),
            ValueError,
            "SNGANDiscriminator: each of widths must be a finite number >= 1, got 0",
        ),
        (
            lambda: SNGANDiscriminator(negative_slope=-0.1),
            ValueError,
            "SNGANDiscriminator: negative_slope must be a finite number >= 0, got -0.1",
        ),
        (lambda: SNGANGenerator()(torch.zeros(128)), ValueError, "SNGANGenerator: z must have shape [B, 128], got [128]"),
        (
            lambda: SNGANDiscriminator()(torch.zeros(2, 1, 32, 32)),
            ValueError,
            "SNGANDiscriminator: x must have shape [B, 3, 32, 32], got [2, 1, 32, 32]",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
