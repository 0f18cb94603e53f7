"""Faults found in well-known GAN code, each asked of the trainer as it is used; both ways of its critic, one pass and autograd.

The tests of the ops ask many of them again, of each backend and in every order of derivative. Here each has its name, and beside
the right number stands what the faulty code gives, so that the two can be told apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.losses import GANLoss, pulling_away
from gankern.models import MLPDiscriminator, MLPGenerator
from gankern.ops._objectives import OBJECTIVES
from gankern.training import PRESETS, TrainConfig, Trainer, checkpoint
from gankern.training.networks import CONDITIONAL, networks

BOTH = pytest.mark.parametrize("way", ["OnePass", "Autograd"])
SHAPE = (1, 3, 4)
SMALL = TrainConfig(batch_size=8, z_dim=5, g_widths=(8, 10), d_widths=(9, 7), seed=3)


def trainer(way: str, critic: nn.Module, shape: tuple[int, ...] = SHAPE, **changes: Any) -> Trainer:
    """With a small generator; the critic driven as `way` says."""
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(config.seed)
    made = Trainer(
        MLPGenerator(config.z_dim, config.g_widths, shape), critic if way == "OnePass" else nn.Sequential(critic), config
    )
    assert type(made.critic).__name__ == way
    return made


def mlp(shape: tuple[int, ...] = SHAPE, slope: float = 0.2, seed: int = 1) -> MLPDiscriminator:
    torch.manual_seed(seed)
    return MLPDiscriminator(shape, (9, 7), negative_slope=slope)


def linear(weight: Tensor) -> MLPDiscriminator:
    """The critic w x."""
    critic = MLPDiscriminator(tuple(weight.shape), ())
    with torch.no_grad():
        critic[0].weight.copy_(weight.reshape(1, -1))
        critic[0].bias.zero_()
    return critic


def images(n: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def penalties(t: Trainer, real: Tensor, fake: Tensor) -> Tensor:
    """What the critic's loss of WGAN has besides mean C(fake) - mean C(real), at the trainer's next random numbers."""
    with torch.no_grad():
        bare = t.discriminator(fake).mean() - t.discriminator(real).mean()
    return t.critic.discriminator(real, fake).value - bare


# --- gradient penalties


@BOTH
def test_one_eps_a_sample(way: str) -> None:
    """The fault: `random.random()`, one eps for the batch. All penalised points then lie equally far along their lines."""
    critic, real, fake = mlp(), images(8), images(8, seed=1)
    t = trainer(way, critic, loss="wgan", penalty="gp", penalty_weight=1.0)
    start = t.rng.get_state()
    got = penalties(t, real, fake)
    drawn = torch.rand(8, generator=torch.Generator().set_state(start))

    def penalty(eps: Tensor) -> Tensor:
        at = (eps.view(-1, 1, 1, 1) * real + (1 - eps.view(-1, 1, 1, 1)) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(critic(at).sum(), at)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()

    torch.testing.assert_close(got, penalty(drawn), rtol=1e-5, atol=1e-6)
    for eps in drawn:
        assert (got - penalty(eps.expand(8))).abs() > 1e-5


@BOTH
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_penalty_norm_is_of_each_sample(way: str, batch: int) -> None:
    """The fault: one norm for the whole batch, here 5 sqrt(batch); or over dim=1 of an image, 4 numbers a channel. It is 5."""
    weight = torch.zeros(2, 2, 2)
    weight[0, 0, 0], weight[1, 1, 0] = 3.0, 4.0
    t = trainer(way, linear(weight), (2, 2, 2), loss="wgan", penalty="gp", penalty_weight=1.0)
    got = penalties(t, images(batch, (2, 2, 2)), images(batch, (2, 2, 2), 1)).item()
    assert got == pytest.approx((5 - 1) ** 2, rel=1e-5)
    assert batch == 1 or abs(got - (5 * math.sqrt(batch) - 1) ** 2) > 1
    assert abs(got - weight.expand(batch, 2, 2, 2).norm(dim=1).sub(1).square().mean()) > 1


@BOTH
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 4), (3, 4, 4), (5, 4, 4), (7,)])
def test_penalty_takes_any_number_of_channels(way: str, shape: tuple[int, ...]) -> None:
    """The fault: `eps.expand(B, 3, H, W)` or `grad.view(B, 3 * H * W)`, an error for other samples than colour images."""
    t = trainer(way, linear(torch.full(shape, 2.0)), shape, loss="wgan", penalty="gp", penalty_weight=1.0)
    got = penalties(t, images(6, shape), images(6, shape, 1)).item()
    assert got == pytest.approx((2 * math.sqrt(math.prod(shape)) - 1) ** 2, rel=1e-5)
    assert all(v.isfinite() for v in t.step(images(6, shape)).values())


@pytest.mark.parametrize(
    ("way", "penalty"), [*itertools.product(("OnePass", "Autograd"), ("gp", "lp", "0gp", "r1", "r2")), ("Autograd", "dragan")]
)
def test_zero_gradient_gives_no_nan(way: str, penalty: str) -> None:
    """The fault: sqrt(sum g^2) at g = 0, whose slope is infinite: every weight is NaN after one step. The critic is flat here."""
    critic = mlp(slope=0.0)
    nn.init.constant_(critic[0].bias, -100.0)
    t = trainer(way, critic, loss="wgan", penalty=penalty, penalty_weight=2.0)
    want = {"gp": 2.0, "dragan": 2.0}.get(penalty, 0.0)
    assert penalties(t, images(8), images(8, seed=1)).item() == pytest.approx(want)
    assert all(v.isfinite() for v in t.step(images(8)).values())
    assert all(p.isfinite().all() for net in (t.generator, t.discriminator) for p in net.parameters())
    x = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad((x.square().sum().sqrt() - 1) ** 2, x)[0].isnan().all(), "the fault itself"


# --- networks


@pytest.mark.parametrize("arch", ["mlp", "cgan", "dcgan", "cdcgan", "sngan", "resnet", "tabular", "pacgan-toy"])
def test_batchnorm_keeps_pytorchs_momentum_and_eps(arch: str) -> None:
    """The fault: BatchNorm1d(n, 0.8), meant as a momentum of 0.8, sets eps: a unit of variance 1 comes out at 1 / sqrt(1.8).

    What the networks do is asked, and not only how they are set: one batch moves the averages by a tenth, and what leaves the
    norm has the variance that its weight says.
    """
    d_norm: Any = "batch" if arch in ("dcgan", "cdcgan") else "none"
    config = TrainConfig(arch=arch, g_norm="batch", d_norm=d_norm, g_widths=(16, 16), conv_width=16)
    labels = [torch.arange(64) % 3] if arch in CONDITIONAL else []
    torch.manual_seed(0)
    nets = networks(config, (2,) if arch == "pacgan-toy" else (1, 28, 28), 3, fused=False)
    norms = [m for net in nets for m in net.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = inputs[0], output

    for m in norms:
        m.register_forward_hook(note)
    with torch.no_grad():
        nets[1](nets[0](torch.randn(64, config.z_dim), *labels), *labels)
    for m in norms:
        x, y = (t.transpose(0, 1).flatten(1) for t in seen[m])
        torch.testing.assert_close(m.running_mean, 0.1 * x.mean(1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(m.running_var, 0.9 + 0.1 * x.var(1), rtol=1e-3, atol=1e-5)
        want = m.weight.abs() * (x.var(1, correction=0) / (x.var(1, correction=0) + 1e-5)).sqrt()
        torch.testing.assert_close(y.std(1, correction=0), want, rtol=1e-3, atol=1e-5)


def test_no_sigmoid_before_the_loss() -> None:
    """The fault: a sigmoid at the critic's end and BCEWithLogits after it. The loss then stays above log 2 + log(1 + exp(-1)).

    Every discriminator of the presets gives raw logits: 30 more in its last bias are 30 more in its score. A sure one pays nothing.
    """
    for name, preset in PRESETS.items():
        if preset.config.objective not in OBJECTIVES:
            continue  # its critic gives energies or features
        config = dataclasses.replace(preset.config, conv_width=16)
        size = config.size or 28
        shape = (2,) if config.arch.endswith("-toy") else (1, size, size)
        torch.manual_seed(0)
        net = networks(config, shape, classes=10)[1].eval()
        told = config.arch in CONDITIONAL and config.arch != "acgan"
        inputs = images(2 * config.pack, shape), *([torch.zeros(2 * config.pack, dtype=torch.int64)] if told else [])
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            low = net(*inputs)
            last.bias += 30.0
            for got, before in zip(*(out if isinstance(out, tuple) else (out,) for out in (net(*inputs), low)), strict=True):
                torch.testing.assert_close(got, before + 30.0, msg=lambda m, name=name: f"{name}: {m}")
    logits = torch.full((4,), 30.0)
    assert GANLoss().discriminator(logits, -logits).value < 1e-12
    assert GANLoss().discriminator(logits.sigmoid(), (-logits).sigmoid()).value > 1.0


# --- objectives


def test_pulling_away_leaves_out_the_diagonal() -> None:
    """The fault: the N cosines of samples with themselves stay in, or are in the sum and not in N (N - 1): 1/(N-1) too much."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = F.cosine_similarity(x[:, None], x[None], dim=-1).square()
    want = sum(cosines[i, j] for i in range(5) for j in range(5) if i != j) / 20
    torch.testing.assert_close(pulling_away(x), want)
    for fault in (cosines.mean(), cosines.sum() / 20):
        assert (pulling_away(x) - fault).abs() > 0.05
    assert pulling_away(torch.eye(4)).item() == 0.0


@BOTH
@pytest.mark.parametrize("objective", ["relativistic", "relativistic-average"])
def test_relativistic_compares_real_with_fake(way: str, objective: str) -> None:
    """The fault: C(x) - mean C(x) in the real branch. The real half then learns nothing from what the fakes score."""
    critic, real, fake = mlp(), images(8), images(8, seed=1)
    t = trainer(way, critic, loss=objective)
    with torch.no_grad():
        a, b = critic(real), critic(fake)
    if objective == "relativistic":
        want = F.softplus(b - a).mean()
        generator = F.softplus(a - b).mean()
    else:
        want = F.softplus(-(a - b.mean())).mean() + F.softplus(b - a.mean()).mean()
        generator = F.softplus(a - b.mean()).mean() + F.softplus(-(b - a.mean())).mean()
    torch.testing.assert_close(t.critic.discriminator(real, fake).value, want)
    torch.testing.assert_close(t.critic.generator(fake, real).value, generator)
    fault = F.softplus(-(a - a.mean())).mean() + F.softplus(b - a.mean()).mean()
    assert (want - fault).abs() > 1e-3


@BOTH
@pytest.mark.parametrize("objective", ["fgan-reverse-kl", "fgan-hellinger"])
def test_fgan_output_activations(way: str, objective: str) -> None:
    """The fault: the raw score as t. f*(t) is then NaN for t >= 0 (reverse KL), or of the wrong sign for t > 1 (Hellinger)."""
    critic, real, fake = linear(torch.tensor([3.0])), torch.tensor([[-1.0], [0.5]]), torch.tensor([[1.0], [-0.2]])
    t = trainer(way, critic, (1,), loss=objective)
    a, b = 3 * real, 3 * fake
    if objective == "fgan-reverse-kl":
        g, conjugate = (lambda v: -torch.exp(-v)), (lambda u: -1 - torch.log(-u))
    else:
        g, conjugate = (lambda v: 1 - torch.exp(-v)), (lambda u: u / (1 - u))
    want = conjugate(g(b)).mean() - g(a).mean()
    got = t.critic.discriminator(real, fake).value
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(t.critic.generator(fake, real).value, -conjugate(g(b)).mean())
    fault = conjugate(b).mean() - a.mean()
    assert fault.isnan() or (got - fault).abs() > 0.1


# --- the loop


@BOTH
def test_critic_is_updated_in_each_of_its_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: optimizer.step() behind the inner loop: one update from the last batch (or from summed gradients), and not k."""
    t = trainer(way, mlp(), loss="wgan", penalty="gp", n_critic=4)
    weights, batches = [[p.detach().clone() for p in t.discriminator.parameters()]], []
    update = t.opt_d.update

    def watched() -> None:
        update()
        weights.append([p.detach().clone() for p in t.discriminator.parameters()])

    monkeypatch.setattr(t.opt_d, "update", watched)
    ask = t.critic.discriminator

    def counted(real: Tensor, fake: Tensor) -> Any:
        batches.append(real)
        return ask(real, fake)

    monkeypatch.setattr(t.critic, "discriminator", counted)
    real = images(32)
    t.step(real)
    assert len(weights) == 5
    for before, after in itertools.pairwise(weights):
        assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert torch.equal(torch.cat(batches), real), "each has samples of its own"
    assert t.opt_d.count.item() == 4
    assert t.opt_g.count.item() == 1


@BOTH
def test_checkpoint_has_optimiser_state_and_step(way: str, tmp_path: Path) -> None:
    """The fault: only the weights are saved. A resumed run then starts Adam's averages and its bias correction at zero."""

    def make(seed: int) -> Trainer:
        return trainer(way, mlp(seed=seed), ema=0.9, seed=seed)

    a = make(3)
    for i in range(5):
        a.step(images(8, seed=i))
    checkpoint.save(tmp_path / "c", a.state_dict())
    state = checkpoint.load(tmp_path / "c")
    assert state["step"] == 5
    for name, net in (("opt_g", a.generator), ("opt_d", a.discriminator)):
        for i, p in enumerate(net.parameters()):
            assert state[f"{name}.{i}.step"] == 5
            for slot in ("exp_avg", "exp_avg_sq"):
                assert state[f"{name}.{i}.{slot}"].shape == p.shape
                assert state[f"{name}.{i}.{slot}"].any()
    whole, weights_only = make(4), make(4)
    whole.load_state_dict(state)
    fresh = {k: v for k, v in make(4).state_dict().items() if k == "step" or k.startswith("opt_")}
    weights_only.load_state_dict(state | fresh)
    for t in (a, whole, weights_only):
        t.step(images(8, seed=9))
    want, got, fault = (torch.cat([p.detach().flatten() for p in t.generator.parameters()]) for t in (a, whole, weights_only))
    assert torch.equal(got, want)
    assert whole.steps_done == a.steps_done == 6
    assert (fault - want).abs().max() > 1e-5
