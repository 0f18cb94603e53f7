"""The generator's gradient through K updates of the critic: by hand, and against finite differences of the whole map."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern.losses import GANLoss
from gankern.models import MLPDiscriminator
from gankern.models.autoencoder import MLPAutoencoder
from gankern.nn import spectral_norm_
from gankern.nn.fuse import fuse
from gankern.ops._objectives import OBJECTIVES
from gankern.training import TrainConfig, critics
from gankern.training.optimizers import make
from tests import small


def problem(net: nn.Module, shape: tuple[int, ...] = (3,), **changes: Any) -> tuple[Any, Any, TrainConfig, Tensor, Tensor]:
    """(unrolled critic, optimiser, settings, real, fake) in float64, the fake attached."""
    config = TrainConfig(**changes)
    net = net.double()
    optimizer = make(config.optimizer_d, net.parameters(), config.rate_d, config)
    rng = torch.Generator().manual_seed(0)
    critic = critics.choose(net, config, rng, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return critic, optimizer, config, real, fake.requires_grad_()


def mlp(seed: int = 0, act: Any = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 1), nn.Flatten(0))


def warm(optimizer: Any, steps: int = 2) -> None:
    """A state to begin with."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in optimizer.parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.update()
    optimizer.forget()


def test_one_step_of_a_linear_critic_by_hand() -> None:
    """f = -w'·d, d = mean x_f - mean x_r, after w' = w - lr d: its slope in each x_f is -(w' - lr d) / B."""
    net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(0))
    changes: dict[str, Any] = {"loss": "wgan", "clip_weights": 9.0, "optimizer_d": "sgd", "lr_d": 0.3}
    critic, _, _, real, fake = problem(net, unroll=1, **changes)
    w = next(net.parameters()).detach().flatten().clone()
    out = critic.generator(fake, real)
    out.backward()
    d = fake.detach().mean(0) - real.mean(0)
    moved = w - 0.3 * d
    torch.testing.assert_close(out.value, -(moved @ d), check_dtype=False)
    torch.testing.assert_close(fake.grad, (-(moved - 0.3 * d) / 4).expand(4, 3))
    assert torch.equal(next(net.parameters()).flatten(), w)
    assert next(net.parameters()).grad is None


def value_after(net: nn.Module, optimizer: Any, config: TrainConfig, real: Tensor, fake: Tensor) -> Tensor:
    """The generator's loss after config.unroll real updates of a copy."""
    net, rule = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    twin = make(config.optimizer_d, net.parameters(), config.rate_d, config)
    twin.load_slots({i: rule["state"].get(i, {}) for i in range(len(twin.parameters))})
    plain = critics.choose(net, dataclasses.replace(config, unroll=0), torch.Generator().manual_seed(0))
    for _ in range(config.unroll):
        twin.forget()
        plain.discriminator(real, fake.detach()).backward()
        twin.update()
        if config.clip_weights:
            for p in twin.parameters:
                p.data.clamp_(-config.clip_weights, config.clip_weights)
    if config.objective in ZERO_SUM:  # what the game is about: the critic's loss without penalty or smoothed labels
        return -critics.Autograd(net, GANLoss(config.objective), "none", 0.0, torch.Generator()).discriminator(real, fake).value
    return plain.generator(fake, real).value


ZERO_SUM = ("minimax", "wgan", "fgan-pearson")
CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer_d": "sgd", "lr_d": 0.1, "momentum": 0.5},
    "rmsprop": {"optimizer_d": "rmsprop"},
    "minimax": {"generator_loss": "saturating", "label_smoothing": 0.9},
    "hinge": {"loss": "hinge"},
    "lsgan": {"loss": "lsgan"},
    "fgan": {"loss": "fgan-pearson"},
    "relativistic": {"loss": "relativistic-average"},
    "clipped": {"loss": "wgan", "clip_weights": 0.3},
    "mmd-gan": {"loss": "mmd-gan", "clip_weights": 0.5},
    "gp": {"loss": "wgan", "penalty": "gp"},
    "r1": {"penalty": "r1"},
    "r2": {"penalty": "r2"},
    "r1r2": {"penalty": "r1r2"},
    "dragan": {"penalty": "dragan"},
}


def check(net: nn.Module, shape: tuple[int, ...] = (3,), **changes: Any) -> None:
    """Value, gradient and what must stay as it is."""
    critic, optimizer, config, real, fake = problem(net, shape, **{"unroll": 2, "lr_d": 0.05, **changes})
    warm(optimizer)
    before = [t.clone() for t in (*net.state_dict().values(), *itertools.chain(*optimizer.slots.values()))]

    def unrolled(x: Tensor) -> Any:
        if hasattr(critic.inner, "rng"):
            critic.inner.rng.manual_seed(0)
        return critic.generator(x, real)

    out = unrolled(fake)
    out.backward()
    assert fake.grad is not None
    after = [*net.state_dict().values(), *itertools.chain(*optimizer.slots.values())]
    assert all(torch.equal(s, t) for s, t in zip(after, before, strict=True))
    assert (optimizer.count, [p.grad for p in net.parameters()]) == (2, [None] * len(list(net.parameters())))
    torch.testing.assert_close(out.value, value_after(net, optimizer, config, real, fake), rtol=1e-10, atol=1e-10)
    direction = torch.randn(fake.shape, generator=torch.Generator().manual_seed(5), dtype=fake.dtype)
    ends = [unrolled(fake.detach() + s * direction).value for s in (1e-5, -1e-5)]
    slope = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close((fake.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("case", CASES)
def test_equals_real_updates_and_finite_differences(case: str) -> None:
    check(mlp(), **CASES[case])


def test_more_steps() -> None:
    check(mlp(), unroll=5)


def test_critics_of_our_layers() -> None:
    """Fused layers, BatchNorm and spectral norm, whose buffers stay what they are.

    In evaluation mode, where its vectors, of which nothing has a derivative, do not move with the weights.
    """
    torch.manual_seed(0)
    check(MLPDiscriminator((3,), (5, 4)), loss="hinge")
    check(MLPDiscriminator((3,), (5, 4)), loss="wgan", penalty="gp")
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0))
    check(fuse(conv), (1, 4, 4))
    normed = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1), nn.Flatten(0))
    check(spectral_norm_(fuse(normed)).eval())
    check(MLPAutoencoder((3,), (5,), 2), loss="ebgan")


def test_no_gradient_and_no_past_give_no_nan() -> None:
    """A critic of ReLUs that are all off has the gradient 0, at which Adam's root has no slope."""
    net = mlp(act=nn.ReLU)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # type: ignore[index,union-attr]
    critic, _, _, real, fake = problem(net, unroll=3)
    critic.generator(fake, real).backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def test_zero_sum_games() -> None:
    fgan = {f"fgan-{name}" for name in ("kl", "reverse-kl", "pearson", "hellinger", "jensen-shannon", "gan")}
    assert {name for name, row in OBJECTIVES.items() if row.zero_sum} == {"minimax", "wgan", *fgan}


def test_off_is_the_plain_critic() -> None:
    assert not isinstance(small.trainer(small.config("gan")).critic, critics.Unrolled)
    t = small.trainer(small.config("gan", unroll=2))
    assert isinstance(t.critic, critics.Unrolled)
    assert isinstance(t.critic.critic, critics.OnePass)


def test_unrolling_reaches_the_generator() -> None:
    """Against K = 0 with the same critic after its updates: the path through the updates is in the gradient."""
    critic, _, config, real, fake = problem(mlp(), unroll=1, lr_d=0.5, optimizer_d="sgd")
    critic.generator(fake, real).backward()
    whole, fake.grad = fake.grad, None
    net = copy.deepcopy(critic.inner.net)
    rule = make("sgd", net.parameters(), config.rate_d, config)
    plain = critics.choose(net, dataclasses.replace(config, unroll=0), torch.Generator())
    plain.discriminator(real, fake.detach()).backward()
    rule.update()
    plain.generator(fake, real).backward()
    assert (whole - fake.grad).norm() > 0.01 * fake.grad.norm()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "mmd"}, "unroll must be 0 with --loss mmd, which has no critic"),
        ({"loss": "began"}, "unroll must be 0 with --loss began"),
        ({"clip_gradients": 1.0}, "unroll must be 0 with --clip-gradients"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^train: {words}"):
        TrainConfig(unroll=2, **changes)


def test_the_path_through_the_best_critic_fades() -> None:
    """Where the critic is the best there is, f does not change with it: the gradient is that at a fixed critic (section 2.4)."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    critic, optimizer, config, real, fake = problem(net, (1,), unroll=2, generator_loss="saturating", optimizer_d="sgd", lr_d=1.0)
    for _ in range(500):
        optimizer.forget()
        critic.discriminator(real, fake.detach()).backward()
        optimizer.update()
    critic.generator(fake, real).backward()
    whole, fake.grad = fake.grad, None
    critics.choose(net, dataclasses.replace(config, unroll=0), torch.Generator()).generator(fake, real).backward()
    torch.testing.assert_close(whole, fake.grad, rtol=1e-5, atol=1e-7)
