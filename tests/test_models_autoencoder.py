"""gankern.models: the auto-encoder critics are their formulas, fused and unfused, and their energies train both networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.models import ConvAutoencoder, DCGANGenerator, MLPAutoencoder, MLPGenerator
from tests.networks import assert_fused_matches, assert_penalty_matches, documented, leaves, made, on_parameters, step
from tests.support import assert_matches, randn


@pytest.mark.parametrize("widths", [(), (5, 3)])
@pytest.mark.parametrize("output", ["tanh", "none"])
def test_mlp_is_its_formula(widths: tuple[int, ...], output: str) -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        h = x.flatten(1)
        layers = 2 * (len(widths) + 1)
        for i in range(layers):
            h = F.linear(h, p[2 * i], p[2 * i + 1])
            if i + 1 not in (layers // 2, layers):  # the code and the reconstruction are linear
                h = F.leaky_relu(h, 0.1)
        return (torch.tanh(h) if output == "tanh" else h).view_as(x)

    net = made(MLPAutoencoder, (1, 2, 4), widths, 2, 0.1, output)
    assert_matches(on_parameters(net), formula, [randn(4, 1, 2, 4, seed=1), *leaves(net)])


def test_conv_is_its_formula() -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        for i in range(2):
            x = F.leaky_relu(F.conv2d(x, p[2 * i], p[2 * i + 1], stride=2, padding=1), 0.1)
        h = F.linear(x.flatten(1), p[4], p[5])
        x = F.linear(h, p[6], p[7]).view(-1, 4, 4, 4)
        for i in range(4, 6):
            x = F.conv_transpose2d(F.relu(x), p[2 * i], p[2 * i + 1], stride=2, padding=1)
        return x

    net = made(ConvAutoencoder, (3, 16, 16), 2, 5, negative_slope=0.1)
    assert_matches(on_parameters(net), formula, [randn(2, 3, 16, 16, seed=1), *leaves(net)], 1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 64, 64)])
@pytest.mark.parametrize(("downsample", "upsample"), [("stride", "transposed"), ("pool", "nearest"), ("stride", "shuffle")])
def test_shapes_and_halves(shape: tuple[int, ...], downsample: str, upsample: str) -> None:
    net, x = ConvAutoencoder(shape, 2, 5, downsample, upsample), torch.randn(2, *shape)
    h = net.encode(x)
    assert h.shape == (2, 5)
    assert net.decode(h).shape == x.shape
    assert torch.equal(net.decode(h), net(x))


def test_fused_networks_are_the_plain_ones(backend: str) -> None:
    mlp, conv = made(MLPAutoencoder, (1, 2, 4), (5, 3), 2), made(ConvAutoencoder, (1, 16, 16), 2, 3)
    assert_fused_matches(mlp, randn(4, 1, 2, 4, seed=1), ops=["linear_lrelu"] * 4, order=2)
    assert_fused_matches(conv, randn(2, 1, 16, 16, seed=1), ops=["bias_lrelu"] * 3)


def test_penalty_of_the_energy() -> None:
    """A gradient penalty on the energy of a sample, the mean square of what is not reconstructed."""

    class Energy(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return (self.net(x) - x).square().flatten(1).mean(1)

    conv = made(lambda: Energy(ConvAutoencoder((1, 8, 8), 2, 3)))
    assert_penalty_matches(conv, randn(3, 1, 8, 8, seed=1), randn(3, 1, 8, 8, seed=2))


@pytest.mark.parametrize("conv", [False, True])
def test_energies_train_both_networks(conv: bool) -> None:
    """EBGAN's: mean energy of real samples + max(0, margin - energy of fakes); with the pulling-away term of the codes."""
    torch.manual_seed(0)
    critic: Any = gankern.fuse(ConvAutoencoder((1, 28, 28), 2, 8) if conv else MLPAutoencoder((1, 28, 28), (16,), 8))
    generator = gankern.fuse(DCGANGenerator(4, (1, 28, 28), 2) if conv else MLPGenerator(4, (8,)))
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-2) for net in (critic, generator))
    real, z = randn(8, 1, 28, 28, seed=1, dtype=torch.float32).tanh(), randn(8, 4, seed=2, dtype=torch.float32)
    losses = []
    for _ in range(4):
        fake = generator(z)
        energy, energy_fake = ((critic(x) - x).square().mean() for x in (real, fake.detach()))
        losses.append(energy.item())
        step(opt_d, energy + F.relu(10 - energy_fake), critic)
        code = critic.encode(fake)
        step(opt_g, (critic.decode(code) - fake).square().mean() + 0.1 * gankern.pulling_away(code), generator)
    assert losses[-1] < losses[0]


def test_parameter_counts() -> None:
    assert documented(MLPAutoencoder())
    for shape in ((1, 32, 32), (1, 28, 28), (3, 64, 64)):
        assert documented(ConvAutoencoder(shape))


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: MLPAutoencoder(code=0), ValueError, "MLPAutoencoder: code must be a finite number >= 1, got 0"),
        (lambda: MLPAutoencoder(output="relu"), ValueError, "MLPAutoencoder: output must be one of tanh, none, got 'relu'"),
        (lambda: MLPAutoencoder(widths=(0,)), ValueError, "MLPAutoencoder: each of widths must be a finite number >= 1, got 0"),
        (
            lambda: MLPAutoencoder(())(torch.zeros(1)),
            ValueError,
            "MLPAutoencoder: in_shape must have at least one dimension, got ()",
        ),
        (
            lambda: MLPAutoencoder((2,))(torch.zeros(3, 3)),
            ValueError,
            "MLPAutoencoder: x must have shape [B, 2], got [3, 3]",
        ),
        (
            lambda: MLPAutoencoder((2,)).decode(torch.zeros(3, 3)),
            ValueError,
            "MLPAutoencoder: h must have shape [B, 64], got [3, 3]",
        ),
        (lambda: ConvAutoencoder(width=0), ValueError, "ConvAutoencoder: width must be a finite number >= 1, got 0"),
        (
            lambda: ConvAutoencoder((1, 30, 30)),
            ValueError,
            "ConvAutoencoder: in_shape must have a side of 4, 5, 6 or 7 times 2, 4, 8, ..., got [1, 30, 30]",
        ),
        (
            lambda: ConvAutoencoder(upsample="bilinear"),
            ValueError,
            "ConvAutoencoder: upsample must be one of transposed, shuffle, nearest, got 'bilinear'",
        ),
        (
            lambda: ConvAutoencoder(negative_slope=-1.0),
            ValueError,
            "ConvAutoencoder: negative_slope must be a finite number >= 0, got -1.0",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
