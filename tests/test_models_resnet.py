"""gankern.models: the ResNets of WGAN-GP and SN-GAN against their formula, block by block, fused and unfused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models import ResNetDiscriminator, ResNetGenerator
from tests.networks import (
    assert_fused_matches,
    assert_penalty_matches,
    assert_trains,
    documented,
    leaves,
    made,
    on_parameters,
)
from tests.support import assert_matches, randn

Weights = dict[str, Tensor]


def by_name(net: nn.Module, formula: Callable[[Tensor, Weights], Tensor]) -> Callable[..., Tensor]:
    names = [name for name, _ in net.named_parameters()]
    return lambda x, *values: formula(x, dict(zip(names, values, strict=True)))


def conv(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=p[f"{name}.weight"].shape[-1] // 2)


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def normed(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.batch_norm(x, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)


def layer_normed(x: Tensor, p: Weights, name: str) -> Tensor:
    """Over channels and positions of a sample, as WGAN-GP's; the identity where the block has none."""
    if f"{name}.weight" not in p:
        return x
    centred = x - x.mean((1, 2, 3), keepdim=True)
    scaled = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def test_generator_is_its_formula() -> None:
    """A shortcut is a 1x1 convolution after upsampling, as in the papers."""

    def formula(z: Tensor, p: Weights) -> Tensor:
        h = F.linear(z, p["0.weight"], p["0.bias"]).view(-1, 3, 4, 4)
        for block in ("2", "3"):
            y = conv(double(F.relu(normed(h, p, f"{block}.residual.0"))), p, f"{block}.residual.3")
            y = conv(F.relu(normed(y, p, f"{block}.residual.4")), p, f"{block}.residual.6")
            h = y + conv(double(h), p, f"{block}.shortcut.0")
        return torch.tanh(conv(F.relu(normed(h, p, "4")), p, "6"))

    net = made(ResNetGenerator, 5, (2, 16, 16), 3)
    assert_matches(on_parameters(net), by_name(net, formula), [randn(3, 5, seed=1), *leaves(net)], 1)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_discriminator_is_its_formula(norm: str) -> None:
    """A shortcut is a 1x1 convolution before pooling, as in the papers; the first block begins with its convolution."""

    def formula(x: Tensor, p: Weights) -> Tensor:
        y = conv(F.relu(conv(x, p, "blocks.0.residual.0")), p, "blocks.0.residual.2")
        h = F.avg_pool2d(y, 2) + F.avg_pool2d(conv(x, p, "blocks.0.shortcut.1"), 2)
        places = ("0", "2", "3", "5") if norm == "layer" else ("norm", "1", "norm", "3")
        for i in (1, 2, 3):
            first, one, second, two = (f"blocks.{i}.residual.{place}" for place in places)
            y = conv(F.relu(layer_normed(h, p, first)), p, one)
            y = conv(F.relu(layer_normed(y, p, second)), p, two)
            h = F.avg_pool2d(y, 2) + F.avg_pool2d(conv(h, p, "blocks.1.shortcut.1"), 2) if i == 1 else y + h
        return F.relu(h).sum((2, 3)) @ p["linear.weight"][0] + p["linear.bias"]

    net = made(ResNetDiscriminator, (2, 28, 28), 3, norm)
    assert_matches(on_parameters(net), by_name(net, formula), [randn(2, 2, 28, 28, seed=1), *leaves(net)], 1)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_fused_networks_are_the_plain_ones(backend: str, norm: str) -> None:
    if norm == "none":
        assert_fused_matches(made(ResNetGenerator, 5, (1, 8, 8), 2), randn(3, 5, seed=1), ops=["bn_lrelu"] * 3)
    critic, x, y = made(ResNetDiscriminator, (1, 8, 8), 2, norm), randn(2, 1, 8, 8, seed=1), randn(2, 1, 8, 8, seed=2)
    assert_fused_matches(critic, x, ops=["bias_lrelu"] * (3 if norm == "none" else 1))
    assert_penalty_matches(critic, x, y)


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_stages(side: int) -> None:
    sides: list[int] = []
    critic = ResNetDiscriminator((1, side, side), 2)
    for block in critic.blocks:
        block.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    assert critic(ResNetGenerator(3, (1, side, side), 2)(torch.randn(2, 3))).shape == (2,)
    want = {8: [4, 4, 4], 28: [14, 7, 7, 7], 32: [16, 8, 8, 8], 64: [32, 16, 8, 8, 8]}[side]
    assert sides == [*want, want[-1]]


@pytest.mark.parametrize(("shape", "norm"), [((3, 32, 32), "layer"), ((1, 28, 28), "none")])
def test_networks_train(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    pair = ResNetGenerator(4, shape, 4), ResNetDiscriminator(shape, 4, norm)
    assert_trains(*pair, randn(4, *shape, seed=1, dtype=torch.float32), randn(4, 4, seed=2, dtype=torch.float32))


def test_parameter_counts() -> None:
    assert documented(ResNetGenerator(width=128))
    for shape in ((3, 32, 32), (1, 28, 28)):
        assert documented(ResNetGenerator(out_shape=shape))
        assert documented(ResNetDiscriminator(shape))


def test_initial_weights() -> None:
    """Uniform with variance 2 g² / (inputs + outputs): g² is 2 in the 3x3 convolutions of the blocks, else 1; biases 0."""
    torch.manual_seed(0)
    for net in (ResNetGenerator(width=32), ResNetDiscriminator(width=32)):
        for name, m in net.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                area = m.weight[0, 0].numel()
                variance = (4 if "residual" in name else 2) / (area * (m.weight.shape[0] + m.weight.shape[1]))
                assert m.weight.abs().max() <= (3 * variance) ** 0.5 * (1 + 1e-6)
                assert abs(m.weight.var().item() / variance - 1) < 5 / m.weight.numel() ** 0.5
                assert m.bias is None or not m.bias.any()


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: ResNetGenerator(0), ValueError, "ResNetGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: ResNetGenerator(width=2.0), TypeError, "ResNetGenerator: width must be an int, got float"),  # type: ignore[arg-type]
        (
            lambda: ResNetGenerator(out_shape=(1, 30, 30)),
            ValueError,
            "ResNetGenerator: out_shape must have a side of 4, 5, 6 or 7 times 2, 4, 8, ..., got [1, 30, 30]",
        ),
        (
            lambda: ResNetGenerator(4, width=2)(torch.zeros(3, 5)),
            ValueError,
            "ResNetGenerator: z must have shape [B, 4], got [3, 5]",
        ),
        (
            lambda: ResNetDiscriminator(norm="batch"),
            ValueError,
            "ResNetDiscriminator: norm must be one of none, layer, got 'batch'",
        ),
        (
            lambda: ResNetDiscriminator(width=2)(torch.zeros(3, 1, 32, 32)),
            ValueError,
            "ResNetDiscriminator: x must have shape [B, 3, 32, 32], got [3, 1, 32, 32]",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
