"""The objective, the settings and the adversarial step: what it computes, and what it leaves out."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
from gankern.losses import GANLoss
from gankern.models import MLPDiscriminator, MLPGenerator, sample_latent
from gankern.ops._objectives import OBJECTIVES
from gankern.ops._philox import draw_seed, dropout_keep
from gankern.ops.gan_loss import gan_loss
from gankern.training import PRESETS, Ema, TrainConfig, Trainer, checkpoint, pictures
from gankern.training.config import MAY_CHANGE
from gankern.training.critics import Loss
from gankern.training.optimizers import Adam
from gankern.training.run_dir import RunDir, locate
from gankern.training.trainer import generate
from tests.support import DEVICE

SHAPE = (1, 3, 4)
SMALL = TrainConfig(batch_size=6, z_dim=5, g_widths=(8, 10), d_widths=(9, 7), seed=3)


def networks(config: TrainConfig = SMALL) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(config.seed)
    return PRESETS["gan"].build(config, SHAPE)


def trainer(config: TrainConfig = SMALL, **options: Any) -> Trainer:
    return Trainer(*networks(config), config, **options)


def autograd_trainer(config: TrainConfig = SMALL, **options: Any) -> Trainer:
    """With a critic that the one pass does not know."""
    generator, critic = networks(config)
    return Trainer(generator, nn.Sequential(critic), config, **options)


def reals(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- GANLoss


def test_loss_smooths_the_critics_labels_only() -> None:
    real, fake = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, -0.2])
    loss = GANLoss(real_label=0.9, fake_label=0.1)
    want = F.binary_cross_entropy_with_logits(real, torch.full((3,), 0.9))
    want = want + F.binary_cross_entropy_with_logits(fake, torch.full((2,), 0.1))
    torch.testing.assert_close(loss.discriminator(real, fake).loss, want)
    torch.testing.assert_close(loss.discriminator_from(torch.cat([real, fake]), 3).loss, want)
    torch.testing.assert_close(loss.generator(fake).loss, F.softplus(-fake).mean())
    torch.testing.assert_close(GANLoss("minimax").generator(fake).loss, -F.softplus(fake).mean())
    out = loss.generator(fake, real)
    torch.testing.assert_close(out.d_real, torch.sigmoid(real).mean())
    torch.testing.assert_close(out.d_fake, torch.sigmoid(fake).mean())
    assert "real_label=0.9" in repr(loss)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"objective": "gan"}, f"GANLoss: objective must be one of {', '.join(OBJECTIVES)}, got 'gan'"),
        ({"real_label": 1.5}, r"GANLoss: real_label must be in \[0, 1\], got 1.5"),
        ({"fake_label": -0.1}, r"GANLoss: fake_label must be in \[0, 1\], got -0.1"),
        ({"objective": "hinge", "generator_label": 2}, r"GANLoss: generator_label must be in \[0, 1\], got 2"),
        ({"objective": "lsgan", "fake_label": float("inf")}, "GANLoss: fake_label must be a finite number, got inf"),
    ],
)
def test_loss_refuses(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        GANLoss(**arguments)


def test_loss_is_not_called_like_a_criterion() -> None:
    sentence = r"what is called must be .discriminator\(real, fake\) or .generator\(fake\), got the module itself"
    with pytest.raises(TypeError, match=f"^GANLoss: {sentence}$"):
        GANLoss()(torch.zeros(2), torch.ones(2))


def test_least_squares_with_both_choices_of_labels() -> None:
    real, fake = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, -0.2])
    for a, b, c in ((0, 1, 1), (-1, 1, 0)):
        loss = GANLoss("lsgan", real_label=b, fake_label=a, generator_label=c)
        want = 0.5 * (real - b).square().mean() + 0.5 * (fake - a).square().mean()
        torch.testing.assert_close(loss.discriminator(real, fake).loss, want)
        torch.testing.assert_close(loss.generator(fake).loss, 0.5 * (fake - c).square().mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_has_every_objective(objective: str) -> None:
    real, fake = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.5, -0.2, 0.1])
    loss = GANLoss(objective)
    want = gan_loss(real, fake, objective)
    assert loss.discriminator(real, fake).loss == want.loss
    assert loss.discriminator_from(torch.cat([real, fake]), 3).loss == want.loss
    assert loss.generator(fake, real).loss == gan_loss(real, fake, objective, "generator").loss
    assert loss.relativistic == objective.startswith("relativistic")
    if loss.relativistic:
        with pytest.raises(ValueError, match=r"^gan_loss: real must be given for a relativistic objective, got None$"):
            loss.generator(fake)


# --- TrainConfig


def test_config_has_every_objective() -> None:
    others = {"ebgan", "began", "mmd", "mmd-gan"}  # no functions of logits
    assert set(typing.get_args(typing.get_type_hints(TrainConfig)["loss"])) == set(OBJECTIVES) | others


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_steps_of_every_objective(objective: str) -> None:
    t = trainer(dataclasses.replace(SMALL, loss=objective, clip_weights=0.5))
    before = [p.detach().clone() for p in (*t.generator.parameters(), *t.discriminator.parameters())]
    for seed in range(3):
        assert all(v.isfinite() for v in t.step(reals(6, seed)).values())
    after = [*t.generator.parameters(), *t.discriminator.parameters()]
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_config_survives_json() -> None:
    config = TrainConfig(g_widths=(3, 4), d_dropout=0.25, ema=0.99, ema_warmup=False, size=16)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_tells_differences_but_not_in_fields_that_may_change() -> None:
    assert {f.name for f in dataclasses.fields(TrainConfig)} >= MAY_CHANGE
    other = TrainConfig(steps=7, outdir="x", log_every=3, keep=0, resume="auto", batch_size=32, lr_g=1e-3)
    assert TrainConfig().differences(other) == ["batch_size (64, now 32)", "lr_g (0.0002, now 0.001)"]


@pytest.mark.parametrize(
    ("fields", "kind", "sentence"),
    [
        ({"steps": 0}, ValueError, "train: steps must be a finite number >= 1, got 0"),
        ({"steps": 2.5}, TypeError, "train: steps must be of type int, got 2.5"),
        ({"batch_size": True}, TypeError, "train: batch_size must be of type int, got True"),
        ({"batch_size": 1, "g_norm": "batch"}, ValueError, "train: batch_size must be >= 2 with BatchNorm, got 1"),
        ({"lr_g": float("nan")}, ValueError, "train: lr_g must be a finite number"),
        ({"lr_d": -1e-4}, ValueError, "train: lr_d must be a finite number >= 0, got -0.0001"),
        ({"lr_d": "fast"}, TypeError, "train: lr_d must be a number, got str"),
        ({"beta1": 1.0}, ValueError, r"train: beta1 must be in \[0, 1\), got 1.0"),
        ({"ema": 1.0}, ValueError, r"train: ema must be in \[0, 1\), got 1.0"),
        ({"d_dropout": 1.5}, ValueError, r"train: d_dropout must be in \[0, 1\], got 1.5"),
        ({"g_widths": (3, 0)}, ValueError, r"train: g_widths must have widths >= 1, got \(3, 0\)"),
        ({"g_widths": (3, "a")}, TypeError, "train: g_widths must be a tuple of ints, got"),
        ({"latent": "cauchy"}, ValueError, "train: latent must be one of normal, uniform, got 'cauchy'"),
        ({"seed": -1}, ValueError, "train: seed must be in"),
        ({"data": ""}, ValueError, "train: data must name a source, got nothing"),
        ({"data": 3}, TypeError, "train: data must be of type str, got 3"),
    ],
)
def test_config_refuses(fields: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=f"^{sentence}"):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "x: settings must be an object, got list"),
        ({"stepz": 1}, "x: settings must have known fields only, got stepz"),
        ({"steps": "many"}, "x: train: steps must be of type int, got 'many'"),
    ],
)
def test_config_from_json_refuses(values: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig.from_json(values, "x")


# --- the step against the loop that people write


class Double(nn.Module):
    """A network in float64 that takes float32 input: two orders of the same sums then agree to 1e-12, not to Adam's whims."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def plain_layers(net: nn.Module, x: Tensor, masks: list[Tensor | None]) -> Tensor:
    """The MLP in plain PyTorch, from the parameters of `net`; masks: what each hidden layer's dropout multiplies by."""
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    for i, mask in enumerate(masks):
        x = F.linear(x, linears[i].weight, linears[i].bias)
        x = F.leaky_relu(norms[i](x) if norms else x, 0.2)
        x = x if mask is None else x * mask
    return F.linear(x, linears[-1].weight, linears[-1].bias)


def draw_masks(rows: int, widths: tuple[int, ...], p: float) -> list[Tensor | None]:
    return [dropout_keep(draw_seed(torch.device(DEVICE), None), rows, w, p).double() / (1 - p) if p else None for w in widths]


def plain_loop(generator: nn.Module, critic: nn.Module, config: TrainConfig, batches: list[Tensor]) -> list[list[float]]:
    """The textbook loop: real and fake apart, critic gradients computed in the generator's step too, Adam as created."""
    betas = (config.beta1, config.beta2)
    opt_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=betas)
    opt_d = torch.optim.Adam(critic.parameters(), lr=config.lr_d, betas=betas)
    rng = torch.Generator(DEVICE).manual_seed(config.seed + 1)
    history = []
    for real in batches:
        n = len(real)
        z = sample_latent(n, config.z_dim, config.latent, rng, DEVICE)
        fake = torch.tanh(plain_layers(generator, z.double(), draw_masks(n, config.g_widths, config.g_dropout)))
        masks = draw_masks(2 * n, config.d_widths, config.d_dropout)
        a_real = plain_layers(critic, real.double().flatten(1), [None if m is None else m[:n] for m in masks])
        a_fake = plain_layers(critic, fake.detach(), [None if m is None else m[n:] for m in masks])
        d_loss = F.binary_cross_entropy_with_logits(a_real, torch.full_like(a_real, config.label_smoothing))
        d_loss = d_loss + F.binary_cross_entropy_with_logits(a_fake, torch.full_like(a_fake, config.fake_label))
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()
        a = plain_layers(critic, fake, draw_masks(n, config.d_widths, config.d_dropout))
        if config.objective == "minimax":
            g_loss = -F.binary_cross_entropy_with_logits(a, torch.zeros_like(a))
        else:
            g_loss = F.binary_cross_entropy_with_logits(a, torch.ones_like(a))
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()
        history.append([d_loss.item(), g_loss.item(), torch.sigmoid(a_real).mean().item(), torch.sigmoid(a_fake).mean().item()])
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_dropout": 0.3, "g_dropout": 0.2, "label_smoothing": 0.9},
        {"g_norm": "batch", "loss": "minimax", "latent": "uniform", "fake_label": 0.1},
    ],
    ids=["plain", "dropout", "batchnorm"],
)
def test_step_equals_the_textbook_loop(changes: dict[str, Any], backend: str) -> None:
    config = dataclasses.replace(SMALL, **changes)
    batches = [reals(6, seed).to(DEVICE) for seed in range(4 if backend == "triton" else 20)]  # the interpreter is slow
    generator, critic = map(Double, networks(config))
    t = Trainer(generator, critic, config, DEVICE, capturable=False)  # the rate as the float64 number that the loop has
    torch.manual_seed(11)
    got = []
    for real in batches:
        out = t.step(real)
        assert list(out) == ["d_loss", "g_loss", "d_real", "d_fake"]
        assert not any(v.requires_grad or v.dim() for v in out.values())
        got.append([v.item() for v in out.values()])
    plain_g, plain_d = (Double(net).to(DEVICE) for net in networks(config))
    torch.manual_seed(11)
    want = plain_loop(plain_g, plain_d, config, batches)
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )
    for mine, plain in ((generator, plain_g), (critic, plain_d)):
        for (name, a), b in zip(mine.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_changes_the_step() -> None:
    """The comparison above would hold for a dropout that never drops."""
    losses = []
    for p in (0.0, 0.3):
        t = trainer(dataclasses.replace(SMALL, d_dropout=p))
        losses.append(t.step(reals(6))["d_loss"].item())
    assert losses[0] != losses[1]


# --- what the step leaves out


class Count(TorchDispatchMode):
    """Counts matrix products, and refuses what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero"), f"the step waits for the device: {name}"
        self.products += name in ("mm", "addmm", "addmv", "mv", "bmm")
        return func(*args, **(kwargs or {}))


def test_critic_step_builds_no_generator_gradient() -> None:
    t = autograd_trainer()
    fake = t.generator(t.noise(6))
    with Count() as count:
        t.discriminator_step(reals(6), fake.detach())
    assert all(p.grad is None for p in t.generator.parameters())
    assert all(p.grad is not None for p in t.discriminator.parameters())
    assert count.products == 3 + 3 + 2  # forward, weight gradients, data gradients but for the first layer: real and fake together


def test_generator_step_computes_no_critic_gradient() -> None:
    t = autograd_trainer()
    fake = t.generator(t.noise(6))
    with Count() as count:
        t.generator_step(fake, reals(6))
    assert all(p.grad is None and p.requires_grad for p in t.discriminator.parameters())
    assert all(p.grad is not None for p in t.generator.parameters())
    assert count.products == 3 + 3 + 3 + 2  # critic forward, its data gradients; generator's weight gradients, data gradients


@pytest.mark.parametrize("make", [trainer, autograd_trainer])
def test_generator_step_leaves_the_critics_gradients_alone(make: Callable[[], Trainer]) -> None:
    t = make()
    fake = t.generator(t.noise(6))
    t.discriminator_step(reals(6), fake.detach())
    before = [p.grad.clone() for p in t.discriminator.parameters() if p.grad is not None]
    weights = [p.clone() for p in t.discriminator.parameters()]
    t.generator_step(fake, reals(6))
    for p, gradient, weight in zip(t.discriminator.parameters(), before, weights, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)
        assert torch.equal(p, weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_frozen_parameters_of_the_critic_stay_frozen(wrapped: bool) -> None:
    generator, critic = networks()
    frozen = next(critic.parameters()).requires_grad_(False)
    before = frozen.clone()
    Trainer(generator, nn.Sequential(critic) if wrapped else critic, SMALL).step(reals(6))
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)


def calls(module: nn.Module) -> list[int]:
    sizes: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


def test_passes_through_each_network() -> None:
    t = autograd_trainer()
    g, d = calls(t.generator), calls(t.discriminator)
    t.step(reals(6))
    assert (g, d) == ([6], [12, 6])


def test_batch_norm_in_the_critic_keeps_pure_batches() -> None:
    generator, _ = networks()

    def critic() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    t = Trainer(generator, critic(), SMALL)
    sizes = calls(t.discriminator)
    real, fake = reals(6), reals(6, 1)
    got = t.discriminator_step(real, fake).value
    assert sizes == [6, 6]
    plain = critic()
    a_real, a_fake = plain(real), plain(fake)
    want = F.softplus(-a_real).mean() + F.softplus(a_fake).mean()
    mixed = critic()(torch.cat([real, fake]))
    torch.testing.assert_close(got, want)
    assert abs(want - F.softplus(-mixed[:6]).mean() - F.softplus(mixed[6:]).mean()) > 1e-3
    t = Trainer(generator, critic(), SMALL, one_pass=True)
    sizes = calls(t.discriminator)
    t.discriminator_step(real, fake)
    assert sizes == [12]
    t = trainer(one_pass=False)
    sizes = calls(t.discriminator)
    t.discriminator_step(real, fake)
    assert sizes == [6, 6]


def test_step_only_computes(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    t = trainer(dataclasses.replace(SMALL, ema=0.9, d_dropout=0.2))
    with Count() as count:
        t.step(reals(6))
    assert count.products > 0
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_step_learns_where_the_data_is() -> None:
    config = TrainConfig(z_dim=2, g_widths=(16,), d_widths=(16,), lr_g=2e-3, lr_d=2e-3, ema=0.95, batch_size=64)
    torch.manual_seed(0)
    t = Trainer(MLPGenerator(2, (16,), (2,)), MLPDiscriminator((2,), (16,)), config)
    centre = torch.tensor([0.5, -0.3])
    data = torch.Generator().manual_seed(0)
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    start = (t.sample(z).mean(0) - centre).norm()
    for _ in range(400):
        t.step(centre + 0.1 * torch.randn(64, 2, generator=data))
    end = (t.sample(z).mean(0) - centre).norm()
    assert start > 0.4
    assert end < 0.1


# --- several critic updates, penalties, clipping, labels


def as_double(t: Trainer) -> Trainer:
    """The same trainer in float64, state included."""
    for module in (t.generator, t.discriminator):
        module.double()
    t.opt_g, t.opt_d = (Adam(m.parameters(), t.config.lr_g, (0.5, 0.9)) for m in (t.generator, t.discriminator))
    return t


@pytest.mark.parametrize("penalty", ["gp", "lp", "0gp", "r1", "r2", "r1r2"])
def test_critic_steps_with_a_penalty_equal_the_textbook_loop(penalty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, loss="wgan", penalty=penalty, n_critic=3, penalty_weight=2.0)
    monkeypatch.setattr(Trainer, "noise", lambda self, n: torch.randn(n, 5, generator=self.rng).double())
    trainers = [as_double(make(config)) for make in (trainer, autograd_trainer)]
    assert [type(t.critic).__name__ for t in trainers] == ["OnePass", "Autograd"]
    plain_g, plain_d = (net.double() for net in networks(config))
    opts = [torch.optim.Adam(net.parameters(), lr=config.lr_g, betas=(0.5, 0.9)) for net in (plain_g, plain_d)]
    rng = torch.Generator().manual_seed(config.seed + 1)
    for step in range(3):
        real = reals(18, step).double()
        got = []
        for t in trainers:
            torch.manual_seed(step)
            got.append(t.step(real))
        torch.manual_seed(step)
        for x, z in zip(real.chunk(3), torch.randn(18, 5, generator=rng).double().chunk(3), strict=True):
            fake = plain_g(z)
            loss = plain_d(fake.detach()).mean() - plain_d(x).mean()
            if penalty in ("r1", "r2"):
                at = x if penalty == "r1" else fake.detach()
            elif penalty == "r1r2":
                at = torch.cat([x, fake.detach()])  # the sum of two means, which is twice their mean
            else:
                eps = torch.rand(6, generator=rng, dtype=torch.float64).view(6, 1, 1, 1)
                at = eps * x + (1 - eps) * fake.detach()
            at.requires_grad_()
            (g,) = torch.autograd.grad(plain_d(at).sum(), at, create_graph=True)
            gap = g.flatten(1).norm(dim=1) - (1.0 if penalty in ("gp", "lp") else 0.0)
            weight = 4.0 if penalty == "r1r2" else 2.0
            loss = loss + weight * (gap.clamp_min(0) if penalty == "lp" else gap).square().mean()
            opts[1].zero_grad()
            loss.backward()
            opts[1].step()
        g_loss = -plain_d(fake).mean()
        opts[0].zero_grad()
        g_loss.backward()
        opts[0].step()
        for out in got:
            torch.testing.assert_close(out["d_loss"], loss.detach(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(out["g_loss"], g_loss.detach(), rtol=1e-9, atol=1e-11)


class Kept(nn.Sequential):
    """A generator with a buffer, which might change from pass to pass."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("kept", torch.zeros(1))


def test_fakes_of_several_updates_share_a_pass_where_that_is_exact() -> None:
    three = dataclasses.replace(SMALL, n_critic=3)
    generator, critic = networks(three)
    for t, sizes in (
        (trainer(three), [12, 6]),
        (trainer(three, one_pass=False), [6, 6, 6]),
        (trainer(dataclasses.replace(three, g_norm="batch")), [6, 6, 6]),
        (Trainer(Kept(generator), critic, three), [6, 6, 6]),
    ):
        got = calls(t.generator)
        t.step(reals(18))
        assert got == sizes
    together, alone = trainer(three), trainer(three, one_pass=False)
    for _ in range(3):
        got, want = together.step(reals(18)), alone.step(reals(18))
        torch.testing.assert_close(got, want)


def test_each_update_of_the_critic_has_fakes_of_its_own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(dataclasses.replace(SMALL, n_critic=3))
    t.forward = lambda z, labels: t.generator(z) * 0 + labels.view(-1, 1, 1, 1)
    seen: list[Tensor] = []

    def update(real: Tensor, fake: Tensor, labels: Tensor) -> Loss:
        assert torch.equal(fake.detach(), labels.view(-1, 1, 1, 1).expand_as(fake).to(fake.dtype))
        seen.append(labels)
        return t.critic.discriminator(real, fake)

    monkeypatch.setattr(t, "discriminator_step", update)
    monkeypatch.setattr(t, "generator_step", lambda fake, real, labels: t.critic.generator(fake, real))
    t.step(reals(18), torch.arange(18))
    assert torch.equal(torch.cat(seen), torch.arange(18))


def test_dragan_goes_by_autograd() -> None:
    t = trainer(dataclasses.replace(SMALL, penalty="dragan"))
    plain = trainer()
    assert type(t.critic).__name__ == "Autograd"
    assert t.step(reals(6))["d_loss"] > plain.step(reals(6))["d_loss"]


def test_weights_are_clipped_after_each_update_of_the_critic() -> None:
    t = trainer(dataclasses.replace(SMALL, loss="wgan", clip_weights=0.01))
    t.step(reals(6))
    assert all(p.abs().max() <= 0.01 for p in t.discriminator.parameters())
    assert max(p.abs().max() for p in t.generator.parameters()) > 0.01


def test_gradients_are_clipped_to_a_norm() -> None:
    t = trainer(dataclasses.replace(SMALL, clip_gradients=1e-3))
    t.step(reals(6))
    for net in (t.generator, t.discriminator):
        norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_step_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"^Trainer: real must have a multiple of n_critic \(2\) samples, got 5$"):
        trainer(dataclasses.replace(SMALL, n_critic=2)).step(reals(5))


@pytest.mark.parametrize(
    ("real", "kind", "sentence"),
    [
        (torch.zeros(0, *SHAPE), ValueError, r"real must have a multiple of n_critic \(1\) samples, got 0"),
        (torch.zeros(6, *SHAPE, dtype=torch.uint8), TypeError, "real must have dtype float32, got uint8"),
        (torch.zeros(6, *SHAPE, dtype=torch.float64), TypeError, "real must have dtype float32, got float64"),
        (torch.zeros(6, *SHAPE, device="meta"), ValueError, f"real must be on {DEVICE}.*, got meta"),
        ([[0.0]], TypeError, "real must be a torch.Tensor, got list"),
    ],
    ids=["empty", "uint8", "float64", "device", "list"],
)
def test_step_refuses_what_is_no_batch(real: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=f"^Trainer: {sentence}$"):
        trainer(SMALL).step(real)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": PRESETS["gan"]}, r"config must be a TrainConfig, as PRESETS\[name\].config is, got Preset"),
        ({"generator": None}, "generator must be a torch.nn.Module, got NoneType"),
        ({"discriminator": "dcgan"}, "discriminator must be a torch.nn.Module, got str"),
    ],
    ids=str,
)
def test_trainer_refuses_what_is_no_network_or_config(change: dict[str, Any], sentence: str) -> None:
    arguments = dict(zip(("generator", "discriminator", "config"), (*networks(SMALL), SMALL), strict=True))
    with pytest.raises(TypeError, match=f"^Trainer: {sentence}$"):
        Trainer(**(arguments | change))


def test_a_preset_from_python() -> None:
    """The example of Trainer's docstring, at a small size."""
    preset, data = PRESETS["wgan-gp"], gankern.data.load("mnist", limit=40)
    config = dataclasses.replace(preset.config, batch_size=4, g_widths=(8,), d_widths=(8,))
    t = Trainer(*preset.build(config, data.shape, len(data.classes)), config)
    batches = gankern.data.Batches(data, config.n_critic * config.batch_size)
    assert t.step(next(batches))["d_loss"].isfinite()
    assert t.sample(t.noise(3)).shape == (3, 1, 28, 28)


def test_adam_equals_that_of_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [nn.Linear(7, 5), nn.Linear(7, 5)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, theirs = (
        Adam(nets[0].parameters(), 1e-2, (0.5, 0.9)),
        torch.optim.Adam(nets[1].parameters(), 1e-2, (0.5, 0.9), fused=True),
    )
    for step in range(6):
        for net, opt in zip(nets, (ours, theirs), strict=True):
            opt.zero_grad()
            net(torch.full((3, 7), float(step))).square().sum().backward()
            if step == 4:
                net.bias.grad = None  # a parameter without a gradient
            opt.step()
        if step == 2:
            ours.set_lr(3e-3)
            theirs.param_groups[0]["lr"] = 3e-3
        if step < 4:  # PyTorch counts the steps of each parameter by itself
            for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                assert torch.equal(a, b)
    with pytest.raises(TypeError, match=r"^Adam: closure must be None, got one$"):
        ours.step(lambda: 0.0)


def test_adam_loads_the_state_of_pytorchs() -> None:
    """In place: the averages that `update` uses are those that were loaded."""
    torch.manual_seed(0)
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    theirs = torch.optim.Adam(nets[1].parameters(), 1e-2, (0.5, 0.9), fused=True)
    for step in range(3):
        theirs.zero_grad()
        nets[1](torch.full((2, 4), float(step))).square().sum().backward()
        theirs.step()
    nets[0].load_state_dict(nets[1].state_dict())
    ours = Adam(nets[0].parameters(), 1e-3)
    ours.load_state_dict(theirs.state_dict())
    for net, opt in zip(nets, (ours, theirs), strict=True):
        opt.zero_grad()
        net(torch.ones(2, 4)).square().sum().backward()
        opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(
        ValueError, match=r"^Adam: state_dict must hold the state of 2 parameters of these shapes, got another one's$"
    ):
        ours.load_state_dict(torch.optim.Adam(nn.Linear(5, 3).parameters(), 1e-2).state_dict())
    with pytest.raises(ValueError, match=r"^Adam: param_group must be the only one, got a second$"):
        ours.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("change", ["dropout", "slope", "mode", "weight"])
def test_one_pass_sees_what_is_changed_in_the_critic(change: str) -> None:
    """It keeps what it has read of the layers, and must not train with what they were."""
    t = trainer(dataclasses.replace(SMALL, d_dropout=0.5))
    t.critic.discriminator(reals(6), reals(6, 1))
    layer: Any = t.discriminator[0]
    if change == "dropout":
        layer.dropout = 0.1
    elif change == "slope":
        layer.negative_slope = 0.7
    elif change == "mode":
        layer.eval()
    else:
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    fresh = Trainer(t.generator, t.discriminator, t.config)
    values = []
    for critic in (t.critic, fresh.critic):
        torch.manual_seed(1)
        values.append(critic.discriminator(reals(6), reals(6, 1)).value)
    assert torch.equal(*values)


def test_capturable_trainer_takes_the_same_steps() -> None:
    """What a CUDA graph needs: learning rates, step count and EMA decay in tensors."""
    config = dataclasses.replace(SMALL, ema=0.5)
    plain, ready = trainer(config), trainer(config, capturable=True)
    for seed in range(4):
        for t in (plain, ready):
            t.step(reals(6, seed))
    for key, value in plain.state_dict().items():
        other = ready.state_dict()[key]
        if isinstance(value, Tensor) and not key.startswith("rng."):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=key)
    ready.load_state_dict(plain.state_dict())
    assert ready.clock is not None
    assert ready.clock.item() == 4


# --- EMA, precision, sampling


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_its_formula(warmup: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(net, 0.8, warmup)
    want = [p.detach().clone() for p in net.parameters()]
    for step in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
            net[1].running_mean.add_(1.0)  # type: ignore[operator]
        ema.update(net, step)
        decay = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
        want = [decay * w + (1 - decay) * p.detach() for w, p in zip(want, net.parameters(), strict=True)]
    for average, w in zip(ema.model.parameters(), want, strict=True):
        torch.testing.assert_close(average, w)
        assert not average.requires_grad
    assert torch.equal(ema.model[1].running_mean, net[1].running_mean)  # type: ignore[index,arg-type]
    assert not ema.model.training


def test_samples_come_from_the_average_and_draw_nothing() -> None:
    t = trainer(dataclasses.replace(SMALL, ema=0.9, ema_warmup=False, g_dropout=0.3))
    for seed in range(3):
        t.step(reals(6, seed))
    assert t.ema is not None
    states = torch.get_rng_state(), t.rng.get_state()
    z = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    got = t.sample(z)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], t.rng.get_state())
    assert torch.equal(got, t.ema.model(z))
    assert not torch.equal(got, generate(t.generator, z))
    assert t.generator.training
    torch.testing.assert_close(generate(t.ema.model, z, chunk=2), got)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    config = dataclasses.replace(SMALL, precision="bf16", d_dropout=0.1)
    t = autograd_trainer(config)
    dtypes: list[torch.dtype] = []
    t.discriminator.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    out = t.step(reals(6))
    assert dtypes == [torch.bfloat16] * 2
    exact = trainer(dataclasses.replace(SMALL, d_dropout=0.1)).step(reals(6))
    for got in (out, trainer(config).step(reals(6))):
        assert all(v.isfinite() and v.dtype == torch.float32 for v in got.values())
        assert 0 < abs(got["d_loss"] - exact["d_loss"]) < 0.02
    assert all(p.dtype == torch.float32 for p in t.generator.parameters())


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^train: precision must be fp32 or bf16 on cpu, got tf32$"):
        trainer(dataclasses.replace(SMALL, precision="tf32"))


# --- state and checkpoints


def busy_trainer(steps: int) -> Trainer:
    t = trainer(dataclasses.replace(SMALL, ema=0.9, d_dropout=0.3, g_norm="batch"))
    for seed in range(steps):
        t.step(reals(6, seed))
    return t


@pytest.mark.parametrize("steps", [0, 4])
def test_state_goes_through_a_checkpoint_bit_for_bit(steps: int, tmp_path: Path) -> None:
    a = busy_trainer(steps)
    checkpoint.save(tmp_path / "c", a.state_dict())
    after_a = [a.step(reals(6, 50 + i)) for i in range(3)]
    b = trainer(dataclasses.replace(a.config, seed=99))
    b.load_state_dict(checkpoint.load(tmp_path / "c"))
    b.ema.decay = 0.9  # type: ignore[union-attr]
    assert b.steps_done == steps
    after_b = [b.step(reals(6, 50 + i)) for i in range(3)]
    assert [[v.item() for v in out.values()] for out in after_a] == [[v.item() for v in out.values()] for out in after_b]
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    assert all(torch.equal(state_a[k], state_b[k]) for k in state_a if isinstance(state_a[k], Tensor))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: s.pop("generator.0.weight"), "Trainer: state must have the entry generator.0.weight"),
        (lambda s: s.pop("opt_d.0.exp_avg"), "Trainer: state must have the entry opt_d.0.exp_avg"),
        (lambda s: s.update(extra=torch.zeros(1)), "Trainer: state must not have the entry extra"),
        (
            lambda s: s.update({"ema.0.bias": torch.zeros(3)}),
            r"Trainer: ema.0.bias must be torch.float32 \[8\], got torch.float32 \[3\]",
        ),
        (lambda s: s.update({"rng.noise": torch.zeros(3)}), "Trainer: rng.noise must be torch.uint8"),
        (lambda s: s.update(step=-1), "Trainer: step must be an int >= 0, got -1"),
    ],
)
def test_state_of_another_model_is_refused_untouched(damage: Callable[[dict[str, Any]], object], sentence: str) -> None:
    t = busy_trainer(1)
    state = busy_trainer(2).state_dict()
    damage(state)
    before = [p.clone() for p in t.generator.parameters()]
    with pytest.raises(ValueError, match=f"^{sentence}"):
        t.load_state_dict(state)
    assert t.steps_done == 1
    assert all(torch.equal(p, q) for p, q in zip(before, t.generator.parameters(), strict=True))


def test_checkpoint_keeps_types_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"a.x": torch.arange(3), "step": 4})
    checkpoint.save(path, {"a.x": torch.ones(2, dtype=torch.bfloat16), "b.y": torch.zeros(()), "word": "é", "time_s": 0.1})
    state = checkpoint.load(path)
    assert state.keys() == {"a.x", "b.y", "word", "time_s"}
    assert state["a.x"].dtype == torch.bfloat16
    assert (state["word"], state["time_s"]) == ("é", 0.1)
    assert checkpoint.load(path, ("b.",)).keys() == {"b.y", "word", "time_s"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# --- run directories, pictures


def new_run(outdir: Path, preset: str = "gan", data: str = "mnist") -> RunDir:
    config = TrainConfig(outdir=str(outdir), data=data)
    return RunDir.create(preset, config, "My Data.v2", (1, 28, 28), {})


def test_runs_are_numbered_and_found_again(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "runs"
    first, second, third = new_run(out), new_run(out, data="/elsewhere"), new_run(out)
    assert [r.path.name for r in (first, second, third)] == [f"0000{i}-gan-my-data-v2-b64" for i in range(3)]
    (out / "00007-gan-broken").mkdir()
    (out / "00009-notes.txt").touch()
    newest = RunDir.newest(out, "gan", "mnist")
    assert newest is not None
    assert newest.path == third.path
    damaged = new_run(out).path
    assert damaged.name.startswith("00008-")
    (damaged / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=damaged.name):  # not passed over in silence: it may be the run that is asked for
        RunDir.newest(out, "gan", "mnist")
    (damaged / "config.json").unlink()
    other = new_run(out, data="/elsewhere").path / "config.json"
    other.write_text(other.read_text().replace('"steps": 12000', '"steps": 0'))
    assert RunDir.newest(out, "gan", "mnist") is not None  # another run's settings are no matter
    with pytest.raises(ValueError, match=rf"{other}: train: steps must be a finite number >= 1, got 0"):
        RunDir.newest(out, "gan", "/elsewhere")
    assert RunDir.newest(out, "wgan", "mnist") is None
    assert RunDir.newest(tmp_path / "none", "gan", "mnist") is None


def test_run_keeps_the_newest_checkpoints_and_rewinds(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in (1, 2, 3, 1_000_000):
        run.save({"step": step}, keep=2)
        run.log({"step": step, "d_loss": 0.5})
    assert [s for s, _ in run.checkpoints()] == [3, 1_000_000]
    run.save({"step": 5}, keep=0)
    assert [s for s, _ in run.checkpoints()] == [3, 5, 1_000_000]
    assert [p.name for p in locate(run.path)[1]] == [f"checkpoint-{s}.safetensors" for s in ("1000000", "000005", "000003")]
    assert locate(run.path / "checkpoint-000003.safetensors")[0].path == run.path.resolve()
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"step": 1000001, "d_l')  # cut short by a crash
    (run.path / ".tmp-x").touch()
    run.rewind(3)
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    assert [s for s, _ in run.checkpoints()] == [3]
    assert not (run.path / ".tmp-x").exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"step": 4, "d_loss": float("nan")})
    assert len(run.rows()) == 3


def test_grid_puts_samples_in_rows() -> None:
    samples = torch.stack([torch.full((3, 2, 2), v) for v in (-1.0, 0.0, 1.0, 2.0, -3.0)])
    picture = pictures.grid(samples, columns=3)
    assert picture.shape == (4, 6, 3)
    assert picture[:, :, 1][::2, ::2].tolist() == [[0, 128, 255], [255, 0, 0]]
    assert pictures.grid(torch.zeros(1, 1, 5, 7)).shape == (5, 7, 1)
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(pictures.to_uint8(ramp.float() / 127.5 - 1)[0, ..., 0], ramp[0, 0])


def test_running_mean() -> None:
    assert pictures.smooth([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert pictures.smooth([], 3) == []
