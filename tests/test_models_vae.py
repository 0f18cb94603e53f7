"""gankern.models: the encoders are their formulas, rsample draws from its law, and a VAE learns from both."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.models import ConvEncoder, DCGANDiscriminator, DCGANGenerator, MLPEncoder, MLPGenerator, rsample
from tests.networks import assert_fused_matches, documented, leaves, made, on_parameters
from tests.support import DEVICE, assert_matches, randn


@pytest.mark.parametrize("widths", [(), (5, 3)])
def test_mlp_is_its_formula(widths: tuple[int, ...]) -> None:
    def formula(x: Tensor, *p: Tensor) -> Tensor:
        h = x.flatten(1)
        for i in range(len(widths)):
            h = F.leaky_relu(F.linear(h, p[2 * i], p[2 * i + 1]), 0.1)
        return F.linear(h, *p[-2:])

    net = made(MLPEncoder, (1, 2, 4), 3, widths, 0.1)
    x, both = randn(4, 1, 2, 4, seed=1), on_parameters(net)
    assert_matches(lambda *inputs: torch.cat(both(*inputs), 1), formula, [x, *leaves(net)])
    assert [h.shape for h in net(x)] == [(4, 3), (4, 3)]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_convolutions_are_those_of_the_dcgan(norm: str) -> None:
    net, plain = made(ConvEncoder, (3, 8, 8), 2, 2, "pool", norm), made(DCGANDiscriminator, (3, 8, 8), 2, "pool", norm)
    state, last, x = net.layers.state_dict(), list(plain.state_dict())[-2:], randn(4, 3, 8, 8, seed=1)
    for row, want in enumerate(torch.cat(net(x), 1).T):
        plain.load_state_dict({**state, **{key: state[key][row : row + 1] for key in last}})
        torch.testing.assert_close(want, plain(x))


def test_fused_encoders_are_the_plain_ones(backend: str) -> None:
    mlp, conv = made(MLPEncoder, (1, 2, 4), 3, (5, 3)), made(ConvEncoder, (1, 16, 16), 3, 2)
    for net, x, ops in (
        (mlp, randn(4, 1, 2, 4, seed=1), ["linear_lrelu"] * 2),
        (conv, randn(4, 1, 16, 16, seed=1), ["bias_lrelu", "bn_lrelu"]),
    ):
        assert_fused_matches(net.layers, x, ops=ops)
        for ours, theirs in zip(gankern.fuse(net)(x), net(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_draws_follow_their_law() -> None:
    """100 000 draws: mean within 4 standard errors, variance within 4 of its own, 2 / n relative squared."""
    mean, log_variance = torch.tensor([-1.0, 0.0, 3.0], device=DEVICE), torch.tensor([-2.0, 0.0, 1.5], device=DEVICE)
    n, generator = 100_000, torch.Generator(DEVICE).manual_seed(0)
    z = rsample(mean.expand(n, 3), log_variance.expand(n, 3), generator)
    deviation = (log_variance / 2).exp()
    assert ((z.mean(0) - mean).abs() < 4 * deviation / n**0.5).all()
    assert ((z.var(0) / deviation.square() - 1).abs() < 4 * (2 / n) ** 0.5).all()
    again = rsample(mean.expand(n, 3), log_variance.expand(n, 3), torch.Generator(DEVICE).manual_seed(0))
    assert torch.equal(z, again)


def test_gradients_of_a_draw() -> None:
    """dz / dmean is 1, dz / dlog_variance (z - mean) / 2."""
    mean, log_variance = randn(4, 3, seed=1).requires_grad_(), randn(4, 3, seed=2).requires_grad_()
    z = rsample(mean, log_variance)
    d_mean, d_log = torch.autograd.grad(z.sum(), (mean, log_variance))
    assert torch.equal(d_mean, torch.ones_like(mean))
    torch.testing.assert_close(d_log, (z - mean).detach() / 2)


@pytest.mark.parametrize("conv", [False, True])
def test_a_vae_learns(conv: bool) -> None:
    torch.manual_seed(0)
    encoder: Any = gankern.fuse(ConvEncoder((1, 28, 28), 3, 2) if conv else MLPEncoder((1, 28, 28), 3, (16,))).to(DEVICE)
    decoder = gankern.fuse(DCGANGenerator(3, (1, 28, 28), 2) if conv else MLPGenerator(3, (16,))).to(DEVICE)
    optimizers = [(torch.optim.Adam(net.parameters(), 1e-2), net) for net in (encoder, decoder)]
    x, losses = randn(8, 1, 28, 28, seed=1, dtype=torch.float32).sign(), []
    for _ in range(4):
        mean, log_variance = encoder(x)
        prior = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        loss = (decoder(rsample(mean, log_variance)) - x).square().mean() + 0.01 * prior
        losses.append(loss.item())
        for i, (optimizer, net) in enumerate(optimizers):
            optimizer.zero_grad()
            grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=i == 0)
            for p, g in zip(net.parameters(), grads, strict=True):
                assert g.isfinite().all()
                assert (g != 0).any()
                p.grad = g
        for optimizer, _ in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]


def test_parameter_counts() -> None:
    assert documented(MLPEncoder())
    for shape in ((1, 32, 32), (1, 28, 28), (3, 64, 64)):
        assert documented(ConvEncoder(shape))


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: MLPEncoder(z_dim=0), ValueError, "MLPEncoder: z_dim must be a finite number >= 1, got 0"),
        (lambda: MLPEncoder((2,))(torch.zeros(3, 3)), ValueError, "MLPEncoder: x must have shape [B, 2], got [3, 3]"),
        (lambda: ConvEncoder(norm="layer"), ValueError, "ConvEncoder: norm must be one of batch, none, got 'layer'"),
        (
            lambda: rsample(torch.zeros(3, 2), torch.zeros(3, 1)),
            ValueError,
            "rsample: log_variance must have shape [3, 2], got [3, 1]",
        ),
        (
            lambda: rsample(torch.zeros(2), torch.zeros(2).double()),
            TypeError,
            "rsample: log_variance must have dtype float32, got float64",
        ),
        (lambda: rsample(1.0, torch.zeros(2)), TypeError, "rsample: mean must be a torch.Tensor, got float"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
