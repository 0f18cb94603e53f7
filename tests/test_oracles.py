"""Whole trainings whose end is known exactly: the trainer, its objectives and penalties against closed forms and quadrature.

All laws are on the line. Where p is the law of the data and q that of the generator, real samples are the quantiles of p at one
random level in each of B equal intervals: each batch has the law p, with little noise. The generator draws as it always does.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankern.models import MLPDiscriminator
from gankern.reproduce.fgan import DATA, FITS, TABLE, Mixture, Normal, divergence, fit, normal
from gankern.training import TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("steady")

LOG2 = math.log(2)


def make(generator: Normal, config: TrainConfig, one_pass: bool = True, widths: tuple[int, ...] = (64, 64)) -> Trainer:
    """With a critic of ReLU units: 1 -> widths -> 1. Not one_pass: by autograd."""
    torch.manual_seed(config.seed)
    critic = MLPDiscriminator((1,), widths, negative_slope=0.0)
    trainer = Trainer(generator, critic if one_pass else nn.Sequential(critic), config)
    assert type(trainer.critic).__name__ == ("OnePass" if one_pass else "Autograd")
    return trainer


def train(trainer: Trainer, p: Mixture, steps: int, last: int, slower: float = 0.1) -> None:
    """So many steps; the rates are those of the config but for the `last` ones."""
    draws, config = torch.Generator().manual_seed(100 + trainer.config.seed), trainer.config
    for step in range(steps):
        if step == steps - last:
            trainer.opt_g.set_lr(config.lr_g * slower)
            trainer.opt_d.set_lr(config.lr_d * slower)
        trainer.step(p.samples(config.n_critic, config.batch_size, draws))


def fixed(objective: str, **settings: object) -> TrainConfig:
    """A generator that stays as it is."""
    return TrainConfig(loss=objective, z_dim=1, lr_g=0.0, batch_size=512, **settings)  # type: ignore[arg-type]


# --- the optimal discriminator


@pytest.mark.parametrize(
    ("objective", "one_pass"), [("non-saturating", True), ("non-saturating", False), ("fgan-jensen-shannon", True), ("lsgan", True)]
)
def test_optimal_discriminator(objective: str, one_pass: bool) -> None:
    """For fixed p and q it is p / (p + q) (Goodfellow et al. 2014, proposition 1; Mao et al. 2017, eq. 4 at labels 0 and 1)."""
    p, q = normal(-0.7, 0.8), normal(0.9, 1.3)
    trainer = make(Normal(0.9, 1.3), fixed(objective, lr_d=3e-3), one_pass)
    train(trainer, p, 400, last=150)
    assert trainer.generator.mu == 0.9
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    dense = torch.logaddexp(p.log_density(x), q.log_density(x)) > math.log(0.02)
    assert dense.sum() > 100
    want = torch.sigmoid(p.log_density(x) - q.log_density(x))
    with torch.no_grad():
        score = trainer.discriminator(x[:, None].float()).double()
    got = score if objective == "lsgan" else score.sigmoid()
    assert (got - want)[dense].abs().max() < 0.05
    assert (want[dense].max() - want[dense].min()) > 0.8, "and no constant comes near it"


def test_value_at_equilibrium_is_minus_log_4() -> None:
    """At p = q the best discriminator says 1/2 everywhere: V = -log 4, and the loss, two binary cross entropies, is 2 log 2."""
    p = normal(0.5, 1.2)
    trainer = make(Normal(0.5, 1.2), fixed("non-saturating", lr_d=3e-3))
    train(trainer, p, 200, last=100)
    real = fake = p.sure(4000)
    with torch.no_grad():
        d_real, d_fake = (trainer.discriminator(x).sigmoid() for x in (real, fake))
    value = d_real.log().mean() + (1 - d_fake).log().mean()
    assert value.item() == pytest.approx(-math.log(4), abs=0.02)
    assert trainer.critic.discriminator(real, fake).value.item() == pytest.approx(2 * LOG2, abs=0.02)
    assert (d_real - 0.5).abs().mean() < 0.05


# --- Wasserstein


@pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "autograd"])
def test_wgan_gp_measures_the_shift(one_pass: bool) -> None:
    """W = W1 of N(2, 1) and N(0, 1) is 2. The penalty lets the slope be 1 + W / (2 weight): at weight 100 the value may be 2.02.

    First the weight is 1/2: above W / 2 a slope of -1 is a minimum too, and on a line nothing leads around it.
    """
    p, q = normal(2.0, 1.0), normal(0.0, 1.0)
    weak, strong = (
        make(Normal(), fixed("wgan", penalty="gp", penalty_weight=weight, lr_d=5e-3, beta1=0.0, beta2=0.9), one_pass)
        for weight in (0.5, 100.0)
    )
    train(weak, p, 100, last=0)
    strong.discriminator.load_state_dict(weak.discriminator.state_dict())
    train(strong, p, 300, last=150)
    with torch.no_grad():
        value = strong.discriminator(p.sure(4000)).mean() - strong.discriminator(q.sure(4000)).mean()
    assert value.item() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("penalty", ["gp", "lp", "0gp", "r1", "r2", "dragan"])
@pytest.mark.parametrize("length", [0.25, 5.0])
def test_penalty_of_a_linear_critic(penalty: str, length: float) -> None:
    """w x has the gradient w everywhere, on any batch: (|w| - 1)^2 exactly; |w|^2 for the target 0; one-sided 0 below 1."""
    torch.manual_seed(0)
    w = F.normalize(torch.randn(1, 7, dtype=torch.float64)) * length
    want = length**2 if penalty in ("0gp", "r1", "r2") else 0.0 if penalty == "lp" and length < 1 else (length - 1) ** 2
    for one_pass in (True, False)[penalty == "dragan" :]:
        critic = MLPDiscriminator((7,), ()).double()
        critic[0].weight.data.copy_(w)
        net = critic if one_pass else nn.Sequential(critic)
        trainer = Trainer(Normal(), net, TrainConfig(loss="wgan", penalty=penalty, penalty_weight=1.0))  # type: ignore[arg-type]
        for batch in (1, 3, 64):
            real, fake = torch.randn(2, batch, 7, dtype=torch.float64)
            with torch.no_grad():
                bare = critic(fake).mean() - critic(real).mean()
            got = trainer.critic.discriminator(real, fake).value - bare
            assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-12)


# --- f-GAN: the table of Nowozin et al. 2016, section 3.4, for another mixture and with the exact optima


@pytest.mark.parametrize("name", FITS)
def test_optima_by_quadrature(name: str) -> None:
    """The table itself: its value is the divergence there, and 0.05 away in any direction it is larger."""
    p, (_, least, mu, sigma) = Mixture(*DATA), FITS[name]
    assert divergence(name, p, mu, sigma) == pytest.approx(least, abs=1e-4)
    for a, b in ((0.05, 0.0), (-0.05, 0.0), (0.0, 0.05), (0.0, -0.05)):
        assert divergence(name, p, mu + a, sigma + b) > least + 1e-4


@pytest.mark.parametrize("name", FITS)
def test_fgan_fit(name: str) -> None:
    """N(mu, sigma) comes within 0.1 of the optimum, and the critic's bound stays below the divergence, and near it."""
    p, (_, _, mu, sigma) = Mixture(*DATA), FITS[name]
    (config,) = (row.config for row in TABLE.rows if row.name == name)
    trainer, got_mu, got_sigma = fit(config, last=250)
    assert got_mu == pytest.approx(mu, abs=0.1)
    assert got_sigma == pytest.approx(sigma, abs=0.1)
    q = normal(trainer.generator.mu.item(), trainer.generator.log_sigma.exp().item())
    bound = -trainer.critic.discriminator(p.sure(20_000), q.sure(20_000)).value.item()
    exact = divergence(name, p, q.m.item(), q.s.item())
    assert bound < exact + 0.02
    assert bound > exact - 0.02
