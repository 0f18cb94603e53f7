"""EBGAN and BEGAN: their losses against the papers' formulas, where they end, and BEGAN's k."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern.models import MLPAutoencoder, MLPGenerator
from gankern.training import TrainConfig, Trainer
from gankern.training.critics import BEGAN, EBGAN
from tests.small import ask

pytestmark = pytest.mark.usefixtures("steady")

SHAPE = (1, 4, 4)
SMALL: dict[str, Any] = {"batch_size": 6, "z_dim": 3, "lr_g": 1e-3, "lr_d": 1e-3}


def config(loss: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"loss": loss, **SMALL, **changes})


def trainer(loss: str, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(MLPGenerator(3, (8,), SHAPE), MLPAutoencoder(SHAPE, (8,), 3), config(loss, **changes))


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def autoencoder(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return MLPAutoencoder(SHAPE, (8,), 3).to(dtype)


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def cosines(h: Tensor) -> Tensor:
    """The pulling-away term as the paper writes it."""
    n = len(h)
    pairs = [(h[i] @ h[j] / (h[i].norm() * h[j].norm())) ** 2 for i in range(n) for j in range(n) if i != j]
    return torch.stack(pairs).sum() / (n * (n - 1))


@pytest.mark.parametrize("one_pass", [True, False])
def test_ebgan_is_the_papers(one_pass: bool) -> None:
    net, real, fake = autoencoder(), images(6, dtype=torch.float64), 3 * images(6, 1, torch.float64)
    fake.requires_grad_()
    settings = config("ebgan", margin=2.5, pulling_away_weight=0.3)
    critic = ask(net, settings, one_pass=one_pass)
    assert type(critic) is EBGAN

    def energy(x: Tensor) -> Tensor:
        return torch.stack([((a - b) ** 2).sum() / 16 for a, b in zip(x, net(x), strict=True)])

    assert 0 < (energy(fake) > 2.5).sum() < 6  # the margin cuts some of them
    want = energy(real).mean() + torch.stack([torch.relu(2.5 - e) for e in energy(fake)]).mean()
    out = critic.discriminator(real, fake)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(net, out.loss), gradients(net, want), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((out.d_real, out.d_fake), (energy(real).mean().detach(), energy(fake).mean().detach()))

    want = energy(fake).mean() + 0.3 * cosines(net.encode(fake))
    out = critic.generator(fake, real)
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss, fake), torch.autograd.grad(want, fake), rtol=1e-10, atol=1e-12)
    out = critic.generator(fake, real)
    out.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_without_pulling_away_the_generator_pays_the_energy() -> None:
    net, fake = autoencoder(), images(6, dtype=torch.float64)
    out = ask(net, config("ebgan", pulling_away_weight=0.0)).generator(fake, fake)
    torch.testing.assert_close(out.loss, ((fake - net(fake)) ** 2).mean(), rtol=1e-12, atol=0)


def test_the_critic_pushes_fakes_to_the_margin_and_no_further() -> None:
    """At a generator that stays where it is: E(x) -> 0, E(G(z)) -> m, so that its loss goes to 0."""
    t = trainer("ebgan", margin=1.0, lr_d=3e-3)
    real, fake = (images(1, seed).expand(6, -1, -1, -1) for seed in (0, 1))
    for _ in range(300):
        out = t.discriminator_step(real, fake)
    assert out.d_real.item() == pytest.approx(0, abs=0.02)
    assert out.d_fake.item() == pytest.approx(1.0, abs=0.1)
    assert out.value.item() == pytest.approx(0, abs=0.05)


def test_began_is_the_papers() -> None:
    net, real, fake = autoencoder(), images(6, dtype=torch.float64), images(6, 1, torch.float64)
    fake.requires_grad_()
    critic = ask(net, config("began", began_gamma=0.7, began_lambda=0.1))
    assert isinstance(critic, BEGAN)
    critic.k.fill_(0.4)
    of_real, of_fake = ((x - net(x)).abs().mean() for x in (real, fake))
    want = of_real - 0.4 * of_fake
    out = critic.discriminator(real, fake)
    torch.testing.assert_close(out.loss, want, rtol=1e-7, atol=0)  # k is float32
    torch.testing.assert_close(gradients(net, out.loss), gradients(net, want), rtol=1e-6, atol=1e-9)
    out = critic.generator(fake, real)
    torch.testing.assert_close(out.loss, (fake - net(fake)).abs().mean(), rtol=1e-12, atol=0)
    assert critic.k.item() == pytest.approx(0.4 + 0.1 * (0.7 * of_real.item() - of_fake.item()), abs=1e-6)


def test_trajectory_of_k() -> None:
    """Step by step from the log: k follows gamma L(x) - L(G(z)), both of the same step, and stays in [0, 1]."""
    t = trainer("began", began_gamma=0.9, began_lambda=1.0)
    assert isinstance(t.critic, BEGAN)
    k, seen = 0.0, []
    for i in range(60):
        with torch.no_grad():
            before = [p.clone() for p in t.generator.parameters()]
        out = t.step(images(6, i) * (0.1 if i > 30 else 1.0))
        k = min(max(k + (0.9 * out["d_real"].item() - out["g_loss"].item()), 0.0), 1.0)
        assert t.critic.k.item() == pytest.approx(k, abs=1e-5)
        assert any((a != b).any() for a, b in zip(before, t.generator.parameters(), strict=True))
        seen.append(k)

    assert min(seen) == 0.0
    assert max(seen) > 0.3


def test_k_is_read_before_it_is_changed() -> None:
    """The fault: k of the step after, or a k with a graph. The critic's loss has the k of the end of the last step."""
    t = trainer("began", began_gamma=1.0, began_lambda=1.0)
    assert isinstance(t.critic, BEGAN)
    for i in range(5):
        before = t.critic.k.item()
        out = t.step(images(6, i))
        assert out["d_loss"].item() == pytest.approx(out["d_real"].item() - before * out["d_fake"].item(), abs=1e-5)
        assert not t.critic.k.requires_grad


def test_k_is_saved() -> None:
    t, again = (trainer("began", began_gamma=1.0, began_lambda=0.1) for _ in range(2))
    for i in range(4):
        t.step(images(6, i))
    state = {key: v.clone() if isinstance(v, Tensor) else v for key, v in t.state_dict().items()}
    assert state["critic.k"] > 0
    again.load_state_dict(state)
    for i in range(4, 8):
        one, other = t.step(images(6, i)), again.step(images(6, i))
        assert all(torch.equal(v, other[name]) for name, v in one.items())
    assert torch.equal(t.state_dict()["critic.k"], again.state_dict()["critic.k"])


@pytest.mark.parametrize("loss", ["ebgan", "began"])
def test_a_generator_learns_from_energies(loss: str) -> None:
    """All data are one image: the samples come to it."""
    t = trainer(loss, lr_g=3e-3, lr_d=3e-3, margin=0.5, began_gamma=0.5, began_lambda=0.01, pulling_away_weight=0.0)
    real = 0.5 * images(1, 5).expand(6, -1, -1, -1)
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(3))
    start = (t.sample(z) - real[:1]).abs().mean()
    for _ in range(400):
        t.step(real)
    assert (t.sample(z) - real[:1]).abs().mean() < 0.3 * start


@pytest.mark.parametrize("loss", ["ebgan", "began"])
def test_sixteen_bits_are_summed_in_float32(loss: str) -> None:
    t = trainer(loss, precision="bf16")
    out = t.step(images(6))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in out.values())


def test_settings_that_do_not_go_together() -> None:
    for changes, sentence in (
        ({"loss": "ebgan", "penalty": "gp"}, "penalty must be none with --loss ebgan, whose critic gives energies .*, got gp"),
        ({"loss": "began", "label_smoothing": 0.9}, "label_smoothing must be 1 with --loss began, which has no targets, got 0.9"),
        ({"loss": "hinge", "fake_label": 0.1}, "fake_label must be 0 with --loss hinge, which has no targets, got 0.1"),
        ({"loss": "fgan-kl", "label_smoothing": 0.9}, "label_smoothing must be 1 with --loss fgan-kl, .*, got 0.9"),
        ({"loss": "ebgan", "generator_loss": "saturating"}, "generator_loss must be default with --loss ebgan, got 'saturating'"),
        ({"loss": "ebgan", "margin": -1.0}, "margin must be a finite number >= 0, got -1.0"),
        ({"loss": "began", "began_gamma": 1.5}, r"began_gamma must be in \[0, 1\], got 1.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"train: {sentence}"):
            TrainConfig(**changes)
    for loss in ("lsgan", "minimax", "relativistic", "relativistic-average-lsgan", "fgan-gan"):
        assert TrainConfig(loss=loss, label_smoothing=0.9).label_smoothing == 0.9


def test_networks_that_do_not_fit_are_refused() -> None:
    plain = dataclasses.replace(config("ebgan"), arch="mlp")
    with pytest.raises(ValueError, match="train: arch must be autoencoder or conv-autoencoder with --loss ebgan, got mlp"):
        ask(nn.Linear(2, 1), plain)
    for arch in ("autoencoder", "conv-autoencoder"):
        words = f"train: loss must be ebgan, began, mmd or mmd-gan with --arch {arch}, .* got lsgan"
        with pytest.raises(ValueError, match=words):
            ask(autoencoder(), dataclasses.replace(config("lsgan"), arch=arch))
