"""gankern.models: the conditional DCGAN is the DCGAN with the label's vector in z and in planes; what ACGAN's critics give."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.models import (
    ACGANDiscriminator,
    CDCGANDiscriminator,
    CDCGANGenerator,
    CGANGenerator,
    ConvACGANDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
)
from tests.networks import (
    assert_fused_matches,
    assert_penalty_matches,
    assert_trains,
    documented,
    leaves,
    made,
    on_parameters,
    step,
)
from tests.support import DEVICE, assert_matches, randn

LABELS = torch.tensor([2, 0, 1, 2], device=DEVICE)
SHAPES = [(1, 28, 28), (1, 32, 32), (3, 64, 64)]


def vectors(embedding: nn.Embedding) -> Tensor:
    return torch.stack([embedding.weight[int(i)] for i in LABELS])


@pytest.mark.parametrize("embed", [0, 5])
@pytest.mark.parametrize("upsample", ["transposed", "shuffle", "nearest"])
def test_generator_is_the_dcgan_on_z_and_vector(embed: int, upsample: str) -> None:
    net = made(CDCGANGenerator, 6, 3, (1, 8, 8), 2, upsample, embed)
    plain = made(DCGANGenerator, 6 + (embed or 3), (1, 8, 8), 2, upsample)
    plain.load_state_dict(net.layers.state_dict())
    z = randn(4, 6, seed=1)
    torch.testing.assert_close(net(z, LABELS), plain(torch.cat([z, vectors(net.embedding)], 1)))


@pytest.mark.parametrize("embed", [0, 2])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_discriminator_is_the_dcgan_on_planes(embed: int, norm: str) -> None:
    """Channel C + k is the k-th entry of the label's vector everywhere."""
    net = made(CDCGANDiscriminator, (3, 8, 8), 3, 2, "stride", norm, embed)
    x, v = randn(4, 3, 8, 8, seed=1), vectors(net.embedding)
    planes = torch.ones(4, v.shape[1], 8, 8, dtype=v.dtype, device=v.device) * v[:, :, None, None]
    plain = made(DCGANDiscriminator, (3 + v.shape[1], 8, 8), 2, "stride", norm)
    plain.load_state_dict(net.layers.state_dict())
    torch.testing.assert_close(net(x, LABELS), plain(torch.cat([x, planes], 1)))


def test_every_parameter_learns_from_the_label() -> None:
    """The gradient reaches the vectors of the labels that were given, and no other."""
    for net, x in (
        (made(CDCGANGenerator, 6, 4, (1, 8, 8), 2), randn(4, 6, seed=1)),
        (made(CDCGANDiscriminator, (1, 8, 8), 4, 2), randn(4, 1, 8, 8, seed=1)),
    ):
        net(x, LABELS).square().sum().backward()
        assert net.embedding.weight.grad.abs().sum(1).ne(0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_fused_networks_are_the_plain_ones(backend: str, norm: str) -> None:
    generator, critic = made(CDCGANGenerator, 6, 3, (1, 8, 8), 2), made(CDCGANDiscriminator, (1, 16, 16), 3, 2, "stride", norm, 2)
    x, y = randn(4, 1, 16, 16, seed=1), randn(4, 1, 16, 16, seed=2)
    assert_fused_matches(generator, randn(4, 6, seed=1), LABELS, ops=["bn_lrelu"])
    assert_fused_matches(critic, x, LABELS, ops=["bias_lrelu", "bn_lrelu" if norm == "batch" else "bias_lrelu"])
    assert_penalty_matches(critic, x, y, LABELS)


@pytest.mark.parametrize("shape", SHAPES)
def test_networks_train(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pair = CDCGANGenerator(4, 3, shape, 2, embed=2), CDCGANDiscriminator(shape, 3, 2, embed=2)
    assert_trains(*pair, randn(4, *shape, seed=1, dtype=torch.float32), randn(4, 4, seed=2, dtype=torch.float32), LABELS)


@pytest.mark.parametrize("widths", [(), (5, 3)])
def test_acgan_mlp_is_its_formula(widths: tuple[int, ...]) -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        h = x.flatten(1)
        for i in range(len(widths)):
            h = F.leaky_relu(F.linear(h, p[2 * i], p[2 * i + 1]), 0.1)
        return F.linear(h, *p[-2:])

    net = made(ACGANDiscriminator, (1, 2, 4), 3, widths, 0.0, 0.1)
    x = randn(4, 1, 2, 4, seed=1)
    both = on_parameters(net)
    assert_matches(lambda *inputs: torch.column_stack(both(*inputs)), formula, [x, *leaves(net)])
    logits, classes = net(x)
    assert (logits.shape, classes.shape) == ((4,), (4, 3))
    assert torch.equal(logits, net.layers(x)[:, 0])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_acgan_convolutions_are_those_of_the_dcgan(norm: str) -> None:
    net, plain = made(ConvACGANDiscriminator, (3, 8, 8), 4, 2, "pool", norm), made(DCGANDiscriminator, (3, 8, 8), 2, "pool", norm)
    state = net.layers.state_dict()
    last = list(plain.state_dict())[-2:]
    x = randn(4, 3, 8, 8, seed=1)
    logits, classes = net(x)
    for column, want in enumerate([logits, *classes.T]):
        plain.load_state_dict({**state, **{key: state[key][column : column + 1] for key in last}})
        torch.testing.assert_close(want, plain(x))


def test_fused_acgan_critics_are_the_plain_ones(backend: str) -> None:
    mlp, conv = made(ACGANDiscriminator, (1, 2, 4), 3, (5, 3), 0.0), made(ConvACGANDiscriminator, (1, 16, 16), 3, 2)
    for net, x, ops in (
        (mlp, randn(4, 1, 2, 4, seed=1), ["linear_lrelu"] * 2),
        (conv, randn(4, 1, 16, 16, seed=1), ["bias_lrelu", "bn_lrelu"]),
    ):
        assert_fused_matches(net.layers, x, ops=ops)
        for ours, theirs in zip(gankern.fuse(net)(x), net(x), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("conv", [False, True])
def test_acgan_trains(conv: bool) -> None:
    """Both terms of the paper: log-likelihood of the source and of the class, for real and generated samples."""
    torch.manual_seed(0)
    critic = gankern.fuse(ConvACGANDiscriminator((1, 28, 28), 3, 4) if conv else ACGANDiscriminator((1, 28, 28), 3, (16,))).to(
        DEVICE
    )
    generator = gankern.fuse(CDCGANGenerator(4, 3, (1, 28, 28), 4) if conv else CGANGenerator(4, 3, (16,))).to(DEVICE)
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-3) for net in (critic, generator))
    real, z = randn(4, 1, 28, 28, seed=1, dtype=torch.float32), randn(4, 4, seed=2, dtype=torch.float32)
    for _ in range(2):
        fake = generator(z, LABELS)
        (a, c), (b, d) = critic(real), critic(fake.detach())
        step(opt_d, F.softplus(-a).mean() + F.softplus(b).mean() + F.cross_entropy(c, LABELS) + F.cross_entropy(d, LABELS), critic)
        b, d = critic(fake)
        step(opt_g, F.softplus(-b).mean() + F.cross_entropy(d, LABELS), generator)


def test_parameter_counts() -> None:
    assert documented(ACGANDiscriminator())
    for shape in SHAPES:
        for net in (CDCGANGenerator(out_shape=shape), CDCGANDiscriminator(shape), ConvACGANDiscriminator(shape)):
            assert documented(net)


def test_initial_weights_are_the_dcgan_s() -> None:
    torch.manual_seed(0)
    for net in (CDCGANGenerator(), CDCGANDiscriminator(), ConvACGANDiscriminator()):
        for m in net.layers:
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                assert abs(m.weight.std().item() / 0.02 - 1) < 5 / (2 * m.weight.numel()) ** 0.5
        embedding = getattr(net, "embedding", None)
        assert embedding is None or 0.5 < embedding.weight.std() < 1.5


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: CDCGANGenerator(0), ValueError, "CDCGANGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: CDCGANGenerator(classes=0), ValueError, "CDCGANGenerator: classes must be a finite number >= 1, got 0"),
        (
            lambda: CDCGANGenerator(upsample="bilinear"),
            ValueError,
            "CDCGANGenerator: upsample must be one of transposed, shuffle, nearest, got 'bilinear'",
        ),
        (
            lambda: CDCGANGenerator()(torch.zeros(3, 99), LABELS),
            ValueError,
            "CDCGANGenerator: z must have shape [B, 100], got [3, 99]",
        ),
        (
            lambda: CDCGANGenerator().to(DEVICE)(torch.zeros(3, 100, device=DEVICE), LABELS),
            ValueError,
            "CDCGANGenerator: labels must have shape [3], got [4]",
        ),
        (lambda: CDCGANDiscriminator(embed=-1), ValueError, "CDCGANDiscriminator: embed must be a finite number >= 0, got -1"),
        (
            lambda: CDCGANDiscriminator((2,)),
            ValueError,
            "CDCGANDiscriminator: in_shape must be [C, S, S], the shape of a square image, got [2]",
        ),
        (
            lambda: CDCGANDiscriminator().to(DEVICE)(torch.zeros(4, 1, 32, 32, device=DEVICE), LABELS.float()),
            TypeError,
            "CDCGANDiscriminator: labels must have dtype int64, got float32",
        ),
        (lambda: ACGANDiscriminator(classes=0), ValueError, "ACGANDiscriminator: classes must be a finite number >= 1, got 0"),
        (lambda: ACGANDiscriminator(dropout=2.0), ValueError, "ACGANDiscriminator: dropout must be in [0, 1], got 2.0"),
        (
            lambda: ACGANDiscriminator((2,))(torch.zeros(3, 3)),
            ValueError,
            "ACGANDiscriminator: x must have shape [B, 2], got [3, 3]",
        ),
        (
            lambda: ConvACGANDiscriminator(norm="layer"),
            ValueError,
            "ConvACGANDiscriminator: norm must be one of batch, none, got 'layer'",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
