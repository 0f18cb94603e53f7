"""The techniques of a step: each against its formula, resumable bit for bit, and refused where it has no meaning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.training import PRESETS, TrainConfig, Trainer, checkpoint
from gankern.training.combinations import idle
from gankern.training.graph import Eager
from tests import small


def spied(settings: TrainConfig) -> tuple[Trainer, list[tuple[Tensor, ...]]]:
    """A trainer, and a list that gets (real, fake, logits of real, logits of fake) of each update of its critic, before it."""
    trainer, seen = small.trainer(settings), []
    ask = trainer.critic.discriminator

    def asked(real: Tensor, fake: Tensor, *labels: Tensor) -> Any:
        with torch.no_grad():
            seen.append((real, fake, *(trainer.discriminator(x, *labels) for x in (real, fake))))
        return ask(real, fake, *labels)

    trainer.critic.discriminator = asked  # type: ignore[method-assign]
    return trainer, seen


def reals(settings: TrainConfig, seed: int = 0) -> Tensor:
    n = settings.batch_size * settings.n_critic
    return torch.rand(n, *small.shape(settings), generator=torch.Generator().manual_seed(seed)) * 2 - 1


PLAIN: dict[str, Any] = {"d_dropout": 0.0, "label_smoothing": 1.0, "ema": 0.0}


@pytest.mark.parametrize("technique", small.TECHNIQUES)
@pytest.mark.parametrize("preset", ["gan", "dcgan"])
def test_resumed_steps_equal_uninterrupted_ones(technique: str, preset: str, tmp_path: Path) -> None:
    settings = small.config(preset, **{"d_norm": "none", **small.TECHNIQUES[technique]})
    whole, first, second = (small.trainer(s) for s in (settings, settings, dataclasses.replace(settings, seed=1)))
    batches = [reals(settings, i) for i in range(4)]
    torch.manual_seed(1)
    for x in batches:
        whole.step(x)
    torch.manual_seed(1)
    for x in batches[:2]:
        first.step(x)
    checkpoint.save(tmp_path / "saved", first.state_dict())
    torch.manual_seed(2)
    second.load_state_dict(checkpoint.load(tmp_path / "saved"))
    for x in batches[2:]:
        second.step(x)
    ends = whole.state_dict(), second.state_dict()
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]) if isinstance(value, Tensor) else value == ends[1][key], key


@pytest.mark.parametrize("technique", [name for name in small.TECHNIQUES if name != "log-gradients"])
def test_technique_changes_the_step(technique: str) -> None:
    plain, other = (small.trainer(small.config("gan", **changes)) for changes in ({}, small.TECHNIQUES[technique]))
    for t in (plain, other):
        torch.manual_seed(1)
        for i in range(3):
            t.step(reals(t.config, i))
    same = [torch.equal(a, b) for a, b in zip(plain.generator.parameters(), other.generator.parameters(), strict=True)]
    assert not all(same)


# --- labels


@pytest.mark.parametrize("preset", ["gan", "dcgan", "ctgan-like"])
def test_drawn_labels_enter_the_loss(preset: str) -> None:
    ranges: dict[str, Any] = {"real_label_range": (0.7, 1.2), "fake_label_range": (0.0, 0.3)}
    loss: dict[str, Any] = {"loss": "non-saturating", "penalty": "none", "d_norm": "none"}
    t, seen = spied(small.config(preset, **{**PLAIN, **loss, **ranges}))
    out = t.step(reals(t.config))
    (_, _, a, b), (real, fake) = seen[0], (t.critic.loss.real_label, t.critic.loss.fake_label)
    assert isinstance(real, Tensor)
    assert isinstance(fake, Tensor)
    assert len(a) == len(real) == t.config.batch_size // t.config.pack
    expected = F.softplus(a) - real * a + F.softplus(b) - fake * b
    torch.testing.assert_close(out["d_loss"], expected.mean())


def test_labels_are_drawn_from_their_ranges_and_swapped() -> None:
    many: dict[str, Any] = {"batch_size": 20000, "d_widths": (2,), "g_widths": (2,)}
    t = small.trainer(small.config("gan", real_label_range=(0.7, 1.2), fake_label_range=(0.0, 0.3), label_noise=0.1, **many))
    x = torch.zeros(20000, *small.shape(t.config))
    t.step(x)
    real, fake = t.critic.loss.real_label, t.critic.loss.fake_label
    for own, (low, high), (a, b) in ((real, (0.7, 1.2), (0.0, 0.3)), (fake, (0.0, 0.3), (0.7, 1.2))):
        inside = own[(own >= low) & (own <= high)]
        assert torch.equal(own[(own < low) | (own > high)].clamp(a, b), own[(own < low) | (own > high)])
        assert abs(len(inside) / len(own) - 0.9) < 0.01
        assert abs(inside.mean() - (low + high) / 2) < 0.005
        assert abs(inside.std() - (high - low) / 12**0.5) < 0.005
    assert not torch.equal(real, (t.step(x), t.critic.loss.real_label)[1])  # anew at each update
    single = small.trainer(small.config("gan", label_noise=0.25, label_smoothing=0.9, fake_label=0.1, **many))
    single.step(x)
    values, counts = single.critic.loss.real_label.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.1, 0.9]))
    assert abs(counts[0] / 20000 - 0.25) < 0.01
    assert "real_label=drawn" in repr(single.critic.loss)


# --- instance noise


@pytest.mark.parametrize("capturable", [False, True])
def test_instance_noise_fades_over_its_steps_and_a_resume(capturable: bool) -> None:
    """Of real and of fake samples, for either network: s, s 2/3, s 1/3, 0, 0."""
    settings = small.config("gan", **PLAIN, batch_size=500, instance_noise=0.6, instance_noise_steps=3)
    t, x = small.trainer(settings, capturable=capturable), reals(settings)
    for share in (1, 2 / 3, 1 / 3, 0, 0):
        added = t.seen(x) - x
        assert abs(added.mean()) < 0.02
        torch.testing.assert_close(added.std(), torch.tensor(0.6 * share), rtol=0.03, atol=1e-6)
        spies: dict[str, list[tuple[Tensor, ...]]] = {"discriminator": [], "generator": []}
        for side, calls in spies.items():
            ask = getattr(t.critic, side)
            setattr(t.critic, side, lambda *samples, ask=ask, calls=calls: (calls.append(samples), ask(*samples))[1])
        t.step(x)
        (real, _), (_, again) = spies["discriminator"][0], spies["generator"][0]
        assert torch.equal(real, x) == torch.equal(again, x) == (share == 0)
        resumed = small.trainer(settings, capturable=capturable)
        resumed.load_state_dict(t.state_dict())
        t = resumed


# --- replay


def test_replayed_fakes_are_earlier_ones() -> None:
    t, seen = spied(small.config("gan", batch_size=8, replay=10, n_critic=3))
    made: list[Tensor] = []
    fakes = t.techniques["replay"].fakes
    t.techniques["replay"].fakes = lambda fake: (made.append(fake), fakes(fake))[1]  # type: ignore[method-assign,func-returns-value]
    for i in range(6):
        t.step(reals(t.config, i))
    for update, (_, shown, *_) in enumerate(seen):
        now, before = made[update], torch.cat([m[:4] for m in made[:update]] or [torch.empty(0, *shown.shape[1:])])
        assert torch.equal(shown[:4], now[:4])
        if update == 0:
            assert torch.equal(shown, now)
            continue
        which = [[i for i, b in enumerate(before) if torch.equal(b, x)] for x in shown[4:]]
        assert all(len(w) == 1 for w in which)
        assert len({w[0] for w in which}) == 4
    assert t.techniques["replay"].state()["filled"].sum() == 10
    kept = t.techniques["replay"].state()["buffer"]
    assert all(any(torch.equal(k, x) for k in kept) for x in made[-1][:4])


def test_replay_keeps_packs_whole() -> None:
    """Two packs of ten in a batch: the second is of earlier fakes, and the first goes into the buffer."""
    t, seen = spied(small.config("ctgan-like", replay=10, n_critic=1))
    for i in range(3):
        t.step(reals(t.config, i))
        buffer = t.techniques["replay"].state()["buffer"].clone()
        assert all(any(torch.equal(x, b) for b in buffer) for x in seen[i][1][:10])
    assert all(any(torch.equal(x, y) for y in seen[1][1][:10]) for x in seen[2][1][10:])


# --- feature matching


def features(net: Any, x: Tensor) -> Tensor:
    """What the last layer takes, layer by layer."""
    layers = net.layers[:-1] if hasattr(net, "layers") else nn.Sequential(*list(net)[:-1])
    return layers(net.inputs(x) if hasattr(net, "inputs") else x)


@pytest.mark.parametrize("preset", ["gan", "dcgan", "ctgan-like"])
def test_feature_matching(preset: str) -> None:
    changes: dict[str, Any] = {**PLAIN, "loss": "lsgan", "penalty": "none", "spectral_norm": False}
    plain, alone, both = (
        small.trainer(small.config(preset, **changes, **more))
        for more in ({}, {"generator_loss": "matching"}, {"feature_matching": 0.7})
    )
    x = reals(plain.config)
    fake = plain.fake(plain.noise(len(x))).detach().requires_grad_()
    with torch.no_grad():
        wanted = features(plain.discriminator, x).mean(0)
    expected = (features(plain.discriminator, fake).mean(0) - wanted).square().sum()
    (slope,) = torch.autograd.grad(expected, fake)
    out = alone.critic.generator(fake, x)
    out.backward()
    torch.testing.assert_close(out.value, expected.detach())
    torch.testing.assert_close(fake.grad, slope)
    torch.testing.assert_close(out.d_fake, plain.critic.generator(fake, x).d_fake)
    torch.testing.assert_close(both.techniques["feature_matching"].term(fake, x), 0.7 * expected)
    assert all(p.grad is None and p.requires_grad for p in alone.discriminator.parameters())
    values = [t.step(x)["g_loss"] for t in (plain, both)]
    assert values[1] > values[0]


# --- historical averaging


def test_historical_averaging_adds_the_gradient_of_its_term() -> None:
    t = small.trainer(small.config("gan", **PLAIN, historical_averaging=0.3, n_critic=2, optimizer_d="sgd", lr_d=0.1))
    past: list[Tensor] = []
    optimizer, plain = t.opt_d, []
    technique = t.techniques["historical_averaging"]
    before, after = technique.gradients, []

    def hooked(which: Any) -> None:
        if which is optimizer:
            past.append(torch.cat([p.detach().flatten() for p in optimizer.parameters]))
            plain.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))  # type: ignore[union-attr]
        before(which)
        if which is optimizer:
            after.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))  # type: ignore[union-attr]

    technique.gradients = hooked  # type: ignore[method-assign]
    for i in range(3):
        t.step(reals(t.config, i))
    assert len(past) == 6
    for i, (old, new) in enumerate(zip(plain, after, strict=True)):
        theta = past[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(0.3 * (theta - torch.stack(past[: i + 1]).mean(0)).square().sum(), theta)
        torch.testing.assert_close(new - old, slope, rtol=1e-4, atol=1e-6)
    assert (after[-1] - plain[-1]).norm() > 0
    assert technique.state()["d.count"] == 6


# --- norms of gradients


@pytest.mark.parametrize("capturable", [False, True])
def test_norms_of_the_gradients_are_logged(capturable: bool) -> None:
    settings = small.config("gan", log_gradients=True, historical_averaging=0.1, n_critic=2)
    t, other = small.trainer(settings, capturable=capturable), small.trainer(dataclasses.replace(settings, log_gradients=False))
    for trainer in (t, other):
        torch.manual_seed(1)
        trainer.step(reals(settings, 0))
        out = trainer.step(reals(settings, 1))
        if trainer is t:
            norms = {name: out[name].item() for name in ("g_grad_norm", "d_grad_norm")}
    for name, optimizer in (("g_grad_norm", other.opt_g), ("d_grad_norm", other.opt_d)):
        expected = torch.cat([p.grad.flatten() for p in optimizer.parameters]).norm()  # type: ignore[union-attr]
        torch.testing.assert_close(torch.tensor(norms[name]), expected)
    engine = Eager(t, small.batches(settings))
    out = engine.step()
    values = engine.losses.request().read().values
    assert values == {name: out[name].item() for name in ("d_loss", "g_loss", "d_real", "d_fake", "g_grad_norm", "d_grad_norm")}


# --- VAE-GAN


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
def test_vae_term_and_its_gradients(reconstruct: str) -> None:
    changes: dict[str, Any] = {**PLAIN, "reconstruction": 0.3, "kl": 0.7, "reconstruct": reconstruct}
    t = small.trainer(small.config("gan", **changes))
    technique: Any = t.techniques["reconstruction"]
    x, state = reals(t.config), t.rng.get_state()
    fake = t.fake(t.noise(len(x)))
    before = t.rng.get_state()
    term = technique.term(fake, x)
    t.rng.set_state(before)
    mean, log_variance = technique.encoder(x)
    s = (log_variance / 2).exp()
    again = t.generator(mean + s * torch.randn(mean.shape, generator=t.rng))
    a, b = (x, again) if reconstruct == "pixels" else (features(t.discriminator, x).detach(), features(t.discriminator, again))
    law = torch.distributions.kl_divergence(torch.distributions.Normal(mean, s), torch.distributions.Normal(0.0, 1.0))
    expected = 0.3 * (a - b).flatten(1).norm(dim=1).square().mean() + 0.7 * law.sum(1).mean()
    torch.testing.assert_close(term, expected)
    learners = [*t.generator.parameters(), *technique.encoder.parameters()]
    for got, want in zip(torch.autograd.grad(term, learners), torch.autograd.grad(expected, learners), strict=True):
        torch.testing.assert_close(got, want)
    assert not any(p.grad is not None for p in t.discriminator.parameters())
    t.rng.set_state(state)
    old = [p.detach().clone() for p in technique.encoder.parameters()]
    t.step(x)
    assert not any(torch.equal(p, q) for p, q in zip(technique.encoder.parameters(), old, strict=True))


@pytest.mark.parametrize("width", [16, 64])
def test_preset_vae_gan_is_led_by_the_critic_too(width: int) -> None:
    """A fault: the squares of thousands of features, not scaled down, and the critic's part is a thousandth of the gradient."""
    settings = dataclasses.replace(PRESETS["vae-gan"].config, batch_size=16, conv_width=width)
    torch.manual_seed(0)
    t = Trainer(*PRESETS["vae-gan"].build(settings, (1, 28, 28)), settings)
    x = torch.rand(16, 1, 28, 28) * 2 - 1
    terms = t.critic.generator(t.fake(t.noise(16)), x).loss, t.techniques["reconstruction"].term(x, x)
    sizes = [torch.nn.utils.get_total_norm(torch.autograd.grad(term, list(t.generator.parameters()))) for term in terms]
    assert 0.1 < sizes[1] / sizes[0] < 10
    assert settings.kl == 2 * settings.reconstruction  # the lower bound's ratio at unit variance


def test_vae_learns_to_encode_what_the_generator_makes() -> None:
    """On two points, far apart, the reconstruction alone brings the error down."""
    t = small.trainer(small.config("gan", **PLAIN, reconstruction=1.0, kl=0.01, lr_g=5e-3, g_widths=(32,), batch_size=16))
    x = torch.cat([torch.full((8, *small.shape(t.config)), 0.7), torch.full((8, *small.shape(t.config)), -0.7)])
    errors = []
    for _ in range(150):
        t.step(x)
        mean, _ = t.techniques["reconstruction"].models()["encoder"](x)
        errors.append((t.generator(mean) - x).square().mean().item())
    assert errors[-1] < 0.1 * errors[0]


# --- the generator's spectral norm, and dropout where samples are drawn


def test_spectral_norm_of_the_generator() -> None:
    t = small.trainer(small.config("gan", spectral_norm_g=True, g_widths=(30, 20)))
    for i in range(3):
        t.step(reals(t.config, i))
    linears = [m for m in t.generator.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    for m in linears:
        assert abs(torch.linalg.matrix_norm(m.weight.detach(), 2) - 1) < 0.05
    assert not any(hasattr(m, "parametrizations") for m in t.discriminator.modules())


@pytest.mark.parametrize("preset", ["gan", "gan-bn"])
def test_dropout_in_drawn_samples(preset: str) -> None:
    settings = small.config(preset, g_dropout=0.5, g_widths=(200,), ema=0.9)
    plain, dropped = small.trainer(settings), small.trainer(dataclasses.replace(settings, sample_dropout=True))
    for t in (plain, dropped):
        torch.manual_seed(1)
        t.step(reals(settings))
    z = torch.randn(50, settings.z_dim)
    assert torch.equal(plain.sample(z), plain.sample(z))
    before = torch.get_rng_state()
    first = dropped.sample(z)
    assert torch.equal(torch.get_rng_state(), before)  # the training's draws do not depend on pictures
    torch.rand(1)
    assert not torch.equal(dropped.sample(z), first)
    draws = []
    for _ in range(200):
        draws.append(dropped.sample(z))
        torch.rand(1)
    assert (torch.stack(draws).mean(0) - plain.sample(z)).abs().mean() < 0.02  # tanh is near linear here
    assert dropped.generator.training
    assert not dropped.ema.model.training  # type: ignore[union-attr]
    norms = [m for m in dropped.ema.model.modules() if isinstance(m, nn.BatchNorm1d)]  # type: ignore[union-attr]
    assert len(norms) == (preset == "gan-bn")
    assert all(torch.equal(a, b) for a, b in zip(plain.generator.buffers(), dropped.generator.buffers(), strict=True))


# --- without effect, and refused

OTHERS: dict[str, Any] = {
    "margin": 0.3, "pulling_away_weight": 0.7, "began_gamma": 0.9, "began_lambda": 0.5, "mmd_bandwidths": (3.0,), "mmd_root": True,
    "mmd_reconstruction": 2.0, "class_weight": 3.0, "label_smoothing": 0.8, "fake_label": 0.1,
    "penalty_weight": 3.0, "instance_noise_steps": 5, "reconstruct": "features", "lr_d": 0.1, "ttur": 7.0, "optimizer_d": "rmsprop",
    "beta1": 0.1, "beta2": 0.7, "momentum": 0.5, "sample_dropout": True, "ema_warmup": False, "conv_width": 6, "code": 3,
    "g_widths": (7,), "d_widths": (7,), "negative_slope": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"loss": "relativistic"},
        {"loss": "relativistic", "label_noise": 0.4},
        {"real_label_range": (0.5, 1.0), "fake_label_range": (0.0, 0.3)},
        {"penalty": "r1", "ttur": 2.0, "instance_noise": 0.2, "g_dropout": 0.3, "ema": 0.9},
        {"optimizer_d": "sgd", "optimizer_g": "rmsprop", "reconstruction": 1.0},
        {"loss": "mmd", "optimizer_d": "sgd"},
        {"arch": "autoencoder", "loss": "ebgan"},
        {"arch": "autoencoder", "loss": "began"},
        {"arch": "autoencoder", "loss": "mmd-gan", "clip_weights": 0.5},
        {"arch": "acgan"},
        {"arch": "dcgan", "loss": "mmd"},
        {"arch": "pacgan-toy", "reconstruction": 1.0},
    ],
    ids=str,
)
def test_what_changes_nothing_is_idle_and_nothing_else(base: dict[str, Any]) -> None:
    """Two steps and samples after them, with one setting changed after the other."""

    def outcome(settings: TrainConfig) -> list[Tensor]:
        torch.manual_seed(0)
        engine = Eager(small.trainer(settings), small.batches(settings))
        losses = [value for _ in range(2) for value in engine.step().values()]
        labels = [torch.arange(4) % small.CLASSES] if settings.arch == "acgan" else []
        torch.manual_seed(1)
        return [*losses, engine.trainer.sample(torch.linspace(-1, 1, 4 * settings.z_dim).view(4, -1), *labels)]

    def made(**changes: Any) -> TrainConfig:
        plain = {"d_dropout": 0.0, "label_smoothing": 1.0, "ema": 0.0, "lr_g": 0.01, "lr_d": 0.01, "batch_size": 6}
        return dataclasses.replace(TrainConfig(**(small.WIDTHS | plain | base)), **changes)

    before = outcome(made())
    for name, value in OTHERS.items():
        try:
            changed = made(**{name: value})
        except ValueError:  # refused: no matter
            continue
        same = all(torch.equal(a, b) for a, b in zip(before, outcome(changed), strict=True))
        assert same == (name in idle(changed)), name


@pytest.mark.parametrize("term", ["feature_matching", "historical_averaging"])
def test_techniques_with_a_critic_that_tells_the_class(term: str) -> None:
    settings = small.config("acgan", **{term: 1.0})
    assert all(value.isfinite() for value in Eager(small.trainer(settings), small.batches(settings)).step().values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"real_label_range": (1.2, 0.7)}, "real_label_range must be two numbers, the smaller one first, or nothing"),
        ({"real_label_range": (0.7,)}, "real_label_range must be two numbers"),
        ({"real_label_range": (0.9, 1.2)}, "real_label_range must have its middle in .0, 1. with --loss non-saturating"),
        ({"fake_label_range": (-0.4, 0.3)}, "fake_label_range must have its middle"),
        ({"label_noise": 1.1}, "label_noise must be in .0, 1."),
        ({"loss": "hinge", "real_label_range": (0.9, 1.0)}, "real_label_range must be left out with --loss hinge"),
        ({"feature_matching": 1.0, "generator_loss": "matching"}, "feature_matching must be 0 with --generator-loss matching"),
        ({"loss": "ebgan", "feature_matching": 1.0}, "feature_matching must be left out with --loss ebgan"),
        ({"loss": "mmd", "generator_loss": "matching"}, "generator_loss must be left out with --loss mmd"),
        ({"arch": "cgan", "replay": 100}, "replay must be 0 with --arch cgan"),
        ({"arch": "acgan", "generator_loss": "matching"}, "generator_loss must be another with --arch acgan"),
        ({"arch": "tabular", "batch_size": 1}, "batch_size must be >= 2 with BatchNorm"),
        ({"loss": "ebgan", "batch_size": 1}, "batch_size must be >= 2 with --pulling-away-weight"),
        ({"kl": 0.1}, "kl must be 0 with --reconstruction 0"),
        ({"penalty": "gp", "clip_weights": 0.1}, "clip_weights must be 0 with --penalty gp"),
        ({"kl": 0.1, "reconstruction": 1.0, "latent": "uniform"}, "latent must be normal with --kl"),
        ({"loss": "ebgan", "reconstruction": 1.0, "reconstruct": "features"}, "reconstruct must be pixels with --loss ebgan"),
        ({"arch": "cgan", "reconstruction": 1.0}, "reconstruction must be 0 with --arch cgan"),
        ({"loss": "mmd", "replay": 100}, "replay must be 0 with --loss mmd"),
        ({"replay": 31}, "replay must be >= 32, half of --batch-size"),
        ({"unroll": 1, "generator_loss": "matching"}, "unroll must be 0 with --generator-loss matching"),
        ({"unroll": 1, "historical_averaging": 0.1}, "unroll must be 0 with --historical-averaging"),
        ({"loss": "mmd", "label_noise": 0.1}, "label_noise must be 0 with --loss mmd"),
    ],
)
def test_refused_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^train: {words}"):
        TrainConfig(**changes)


def test_settings_at_the_border_are_taken() -> None:
    TrainConfig(loss="lsgan", real_label_range=(1.0, 2.0))
    TrainConfig(loss="hinge", label_noise=0.1)
