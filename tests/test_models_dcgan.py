"""gankern.models: the DCGAN against its formula in functional PyTorch, fused against plain, in range, and refusing bad input."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models import DCGANDiscriminator, DCGANGenerator
from gankern.models.dcgan import DOWNSAMPLES, UPSAMPLES
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
from tests.support import DEVICE, assert_matches, randn

SIDES = {8: (4, 1), 28: (7, 2), 32: (4, 3), 64: (4, 4), 96: (6, 4)}  # image: side after the linear layer, doublings


def upsampled(how: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if how == "transposed":
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    if how == "nearest":
        return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
    y = F.conv2d(x, weight, bias, padding=1)
    n, c, h, w = y.shape
    return y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def generator_formula(how: str, start: int, stages: int) -> Callable[..., Tensor]:
    def run(z: Tensor, project: Tensor, *p: Tensor) -> Tensor:
        h = (z @ project.T).view(len(z), -1, start, start)
        for i in range(stages):
            scale, shift, weight = p[3 * i : 3 * i + 3]
            h = F.relu(F.batch_norm(h, None, None, scale, shift, training=True))
            h = upsampled(how, h, weight, p[-1] if i == stages - 1 else None)
        assert len(p) == 3 * stages + 1
        return torch.tanh(h)

    return run


def discriminator_formula(pooled: bool, norm: bool, stages: int, slope: float) -> Callable[..., Tensor]:
    def run(x: Tensor, *p: Tensor) -> Tensor:
        left = list(p)
        for i in range(stages):
            weight, bias = left.pop(0), None if i and norm else left.pop(0)
            x = F.conv2d(x, weight, bias, stride=1 if pooled else 2, padding=1)
            if i and norm:
                x = F.batch_norm(x, None, None, left.pop(0), left.pop(0), training=True)
            x = F.leaky_relu(x, slope)
            x = F.avg_pool2d(x, 2) if pooled else x
        weight, bias = left
        return x.flatten(1) @ weight[0] + bias

    return run


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("upsample", ["transposed", "shuffle", "nearest"])
def test_generator_is_its_formula(side: int, upsample: str) -> None:
    net = made(DCGANGenerator, 5, (3, side, side), 2, upsample)
    z = randn(4, 5, seed=1)
    assert net(z).shape == (4, 3, side, side)
    assert_matches(on_parameters(net), generator_formula(upsample, *SIDES[side]), [z, *leaves(net)], 1)


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("downsample", ["stride", "pool"])
def test_discriminator_is_its_formula(side: int, norm: str, downsample: str) -> None:
    net = made(DCGANDiscriminator, (3, side, side), 2, downsample, norm, 0.3)
    x = randn(4, 3, side, side, seed=1)
    assert net(x).shape == (4,)
    formula = discriminator_formula(downsample == "pool", norm == "batch", SIDES[side][1], 0.3)
    assert_matches(on_parameters(net), formula, [x, *leaves(net)], 1)


@pytest.mark.parametrize("upsample", ["transposed", "shuffle", "nearest"])
def test_fused_generator_is_the_plain_one(backend: str, upsample: str) -> None:
    net = made(DCGANGenerator, 5, (1, 16, 16), 2, upsample)
    assert_fused_matches(net, randn(3, 5, seed=1), ops=["bn_lrelu"] * 2)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("downsample", ["stride", "pool"])
def test_fused_discriminator_is_the_plain_one(backend: str, norm: str, downsample: str) -> None:
    net = made(DCGANDiscriminator, (1, 16, 16), 2, downsample, norm)
    ops = ["bias_lrelu", "bn_lrelu" if norm == "batch" else "bias_lrelu"]
    x, y = randn(3, 1, 16, 16, seed=1), randn(3, 1, 16, 16, seed=2)
    assert_fused_matches(net, x, ops=ops)
    assert_penalty_matches(net, x, y)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_fused_discriminator_of_the_automatic_choice(norm: str) -> None:
    """So large that a convolution goes to the kernel."""
    torch.manual_seed(0)
    net = DCGANDiscriminator(norm=norm).double().to(DEVICE)
    assert_penalty_matches(net, randn(4, 1, 32, 32, seed=1), randn(4, 1, 32, 32, seed=2))


def test_fused_networks_in_evaluation_mode() -> None:
    generator, critic = made(DCGANGenerator, 5, (1, 16, 16), 2), made(DCGANDiscriminator, (1, 16, 16), 2)
    assert_fused_matches(generator.eval(), randn(3, 5, seed=1), ops=["bn_lrelu"] * 2)
    assert_fused_matches(critic.eval(), randn(3, 1, 16, 16, seed=1), ops=["bias_lrelu", "bn_lrelu"])


def test_fused_networks_channels_last() -> None:
    generator, critic = made(DCGANGenerator, 5, (3, 16, 16), 2), made(DCGANDiscriminator, (3, 16, 16), 2)
    generator.to(memory_format=torch.channels_last)
    critic.to(memory_format=torch.channels_last)
    x = randn(3, 3, 16, 16, seed=1).to(memory_format=torch.channels_last)
    assert_fused_matches(generator, randn(3, 5, seed=1), ops=["bn_lrelu"] * 2)
    assert_fused_matches(critic, x, ops=["bias_lrelu", "bn_lrelu"])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("upsample", "downsample", "norm"),
    [("transposed", "stride", "batch"), ("shuffle", "pool", "none"), ("nearest", "pool", "batch")],
)
def test_networks_train(upsample: str, downsample: str, norm: str, bf16: bool) -> None:
    torch.manual_seed(0)
    pair = DCGANGenerator(6, (1, 28, 28), 4, upsample), DCGANDiscriminator((1, 28, 28), 4, downsample, norm)
    assert_trains(*pair, randn(4, 1, 28, 28, seed=1, dtype=torch.float32), randn(4, 6, seed=2, dtype=torch.float32), bf16=bf16)


@pytest.mark.parametrize("shape", [(c, side, side) for side in (28, 32, 64) for c in (1, 3)])
def test_every_combination_builds_and_trains(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    real, z = randn(2, *shape, seed=1, dtype=torch.float32), randn(2, 3, seed=2, dtype=torch.float32)
    for upsample, downsample in itertools.product(UPSAMPLES, DOWNSAMPLES):
        assert_trains(DCGANGenerator(3, shape, 2, upsample), DCGANDiscriminator(shape, 2, downsample, "none"), real, z)


@pytest.mark.parametrize("side", SIDES)
def test_stages(side: int) -> None:
    start, doublings = SIDES[side]
    generator, critic = DCGANGenerator(3, (1, side, side), 2), DCGANDiscriminator((1, side, side), 2)
    assert generator[1](generator[0](torch.randn(2, 3))).shape == (2, 2**doublings, start, start)
    assert [m.in_channels for m in generator if isinstance(m, nn.ConvTranspose2d)] == [2**i for i in range(doublings, 0, -1)]
    assert [m.out_channels for m in critic if isinstance(m, nn.Conv2d)] == [2**i for i in range(1, doublings + 1)]
    assert critic(generator(torch.randn(2, 3))).shape == (2,)


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 28, 28), (3, 64, 64)])
def test_parameter_counts(shape: tuple[int, ...]) -> None:
    assert documented(DCGANGenerator(out_shape=shape))
    assert documented(DCGANDiscriminator(shape))


def test_paper_at_64_pixels() -> None:
    """Figure 1: 100, 1024 x 4 x 4, 512 x 8 x 8, 256 x 16 x 16, 128 x 32 x 32, 3 x 64 x 64, by 4x4 kernels for its 5x5."""
    channels = [1024, 512, 256, 128, 3]
    weights = 100 * 1024 * 16 + sum(16 * a * b for a, b in itertools.pairwise(channels))
    assert count(DCGANGenerator(out_shape=(3, 64, 64), width=128)) == weights + 2 * (1024 + 512 + 256 + 128) + 3


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (DCGANGenerator, {}),
        (DCGANGenerator, {"upsample": "shuffle"}),
        (DCGANDiscriminator, {}),
        (DCGANDiscriminator, {"norm": "none"}),
    ],
)
def test_initial_weights_and_biases(make: Callable[..., nn.Sequential], options: dict[str, Any]) -> None:
    """N(0, 0.02), BatchNorm's N(1, 0.02): mean and deviation within 5 standard errors; no bias before a BatchNorm, the others 0."""
    torch.manual_seed(0)
    followed = [m for m in make(**options) if not isinstance(m, (nn.Unflatten, nn.PixelShuffle, nn.Upsample))]
    for m, after in zip(followed, [*followed[1:], None], strict=True):
        if not isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            continue
        n, norm = m.weight.numel(), isinstance(m, nn.BatchNorm2d)
        assert abs(m.weight.mean().item() - norm) < 5 * 0.02 / n**0.5
        assert abs(m.weight.std().item() / 0.02 - 1) < 5 / (2 * n) ** 0.5
        assert (m.bias is None) == isinstance(after, nn.BatchNorm2d)
        assert m.bias is None or not m.bias.any()


def test_images_lie_in_range_and_logits_do_not() -> None:
    torch.manual_seed(0)
    generator, critic = DCGANGenerator(width=4), DCGANDiscriminator(width=4)
    fake = generator(1000 * torch.randn(4, 100))
    assert 0 < fake.abs().max() <= 1
    nn.init.constant_(critic[-1].bias, -7.0)
    assert (critic(fake) < -5).all()


def test_state_is_that_of_a_plain_sequential() -> None:
    for net in (DCGANGenerator(width=2), DCGANDiscriminator(width=2)):
        nn.Sequential(*net).load_state_dict(net.state_dict())
        assert list(nn.Sequential(*net).state_dict()) == list(net.state_dict())


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: DCGANGenerator(z_dim=0), ValueError, "DCGANGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: DCGANGenerator(width=0), ValueError, "DCGANGenerator: width must be a finite number >= 1, got 0"),
        (
            lambda: DCGANGenerator(upsample="bilinear"),
            ValueError,
            "DCGANGenerator: upsample must be one of transposed, shuffle, nearest, got 'bilinear'",
        ),
        (
            lambda: DCGANGenerator(out_shape=(1, 30, 30)),
            ValueError,
            "DCGANGenerator: out_shape must have a side of 4, 5, 6 or 7 times 2, 4, 8, ..., got [1, 30, 30]",
        ),
        (
            lambda: DCGANGenerator(out_shape=(1, 7, 7)),
            ValueError,
            "DCGANGenerator: out_shape must have a side of 4, 5, 6 or 7 times 2, 4, 8, ..., got [1, 7, 7]",
        ),
        (
            lambda: DCGANGenerator(out_shape=(1, 32, 28)),
            ValueError,
            "DCGANGenerator: out_shape must be [C, S, S], the shape of a square image, got [1, 32, 28]",
        ),
        (
            lambda: DCGANDiscriminator((784,)),
            ValueError,
            "DCGANDiscriminator: in_shape must be [C, S, S], the shape of a square image, got [784]",
        ),
        (
            lambda: DCGANDiscriminator((1.0, 32, 32)),  # type: ignore[arg-type]
            TypeError,
            "DCGANDiscriminator: each of in_shape must be an int, got float",
        ),
        (
            lambda: DCGANDiscriminator(downsample="max"),
            ValueError,
            "DCGANDiscriminator: downsample must be one of stride, pool, got 'max'",
        ),
        (lambda: DCGANDiscriminator(norm="layer"), ValueError, "DCGANDiscriminator: norm must be one of batch, none, got 'layer'"),
        (
            lambda: DCGANDiscriminator(negative_slope=-1.0),
            ValueError,
            "DCGANDiscriminator: negative_slope must be a finite number >= 0, got -1.0",
        ),
        (lambda: DCGANGenerator()(torch.zeros(3, 99)), ValueError, "DCGANGenerator: z must have shape [B, 100], got [3, 99]"),
        (lambda: DCGANGenerator()([1.0]), TypeError, "DCGANGenerator: z must be a torch.Tensor, got list"),
        (
            lambda: DCGANDiscriminator()(torch.zeros(3, 3, 32, 32)),
            ValueError,
            "DCGANDiscriminator: x must have shape [B, 1, 32, 32], got [3, 3, 32, 32]",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
