"""MMD without and with a critic, and the auxiliary classifier: against formulas written out, and where trainings end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models import (
    ACGANDiscriminator,
    CGANDiscriminator,
    CGANGenerator,
    MLPAutoencoder,
    MLPDiscriminator,
    MLPGenerator,
    Packed,
)
from gankern.training import TrainConfig, Trainer
from gankern.training.critics import MMD, MMDGAN, Auxiliary
from gankern.training.critics.mmd import rows
from tests.small import ask

pytestmark = pytest.mark.usefixtures("steady")

SHAPE = (1, 4, 4)
SIGMAS = (0.5, 2.0)
CLASSES = 3


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """[] of two vectors."""
    return sum((torch.exp(-((a - b) ** 2).sum() / (2 * s * s)) for s in SIGMAS), torch.zeros((), dtype=a.dtype))


def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([kernel(a, b) for a in x.flatten(1) for b in y.flatten(1)]).mean()


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def config(loss: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"loss": loss, "mmd_bandwidths": SIGMAS, "batch_size": 5, "z_dim": 3, **changes})


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    """By parameter; zeros where the loss does not depend on it."""
    parameters = list(net.parameters())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True))


# --- without a critic


@pytest.mark.parametrize("root", [False, True])
def test_mmd_is_the_papers(root: bool) -> None:
    real, fake = images(5), images(5, 1).requires_grad_()
    critic = ask(nn.Linear(1, 1), config("mmd", mmd_root=root))
    assert type(critic) is MMD
    want = mmd2(real, fake)
    want = want.sqrt() if root else want
    out = critic.generator(fake, real)
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss, fake), torch.autograd.grad(want, fake), rtol=1e-8, atol=1e-12)


def test_the_root_of_nothing_has_no_infinite_slope() -> None:
    fake = images(5).requires_grad_()
    out = ask(nn.Linear(1, 1), config("mmd", mmd_root=True)).generator(fake, fake.detach())
    out.backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def test_no_update_of_a_critic_is_made() -> None:
    torch.manual_seed(0)
    t = Trainer(MLPGenerator(3, (8,), SHAPE), MLPDiscriminator(SHAPE, (8,)), config("mmd"))
    before = [p.clone() for p in t.discriminator.parameters()]
    out = t.step(images(5, dtype=torch.float32))
    assert (out["d_loss"], out["d_real"], out["d_fake"]) == (0, 0, 0)
    assert 0 < out["g_loss"] < 2 * len(SIGMAS)
    assert all(torch.equal(a, b) for a, b in zip(before, t.discriminator.parameters(), strict=True))
    assert all(p.grad is None for p in t.discriminator.parameters())
    assert t.opt_d.count == 0
    assert t.opt_g.count == 1


@pytest.mark.parametrize("root", [False, True])
def test_moment_matching_fits_a_gaussian(root: bool) -> None:
    """G(z) = A z + b against N(mu, S) in the plane: mean and covariance are found."""
    torch.manual_seed(0)
    settings = TrainConfig(
        loss="mmd", mmd_root=root, mmd_bandwidths=(0.5, 1.0, 2.0), batch_size=200, z_dim=2, lr_g=0.02, beta1=0.9, seed=1
    )
    t = Trainer(nn.Linear(2, 2), nn.Linear(2, 1), settings)
    draws = torch.Generator().manual_seed(2)
    factor, mu = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([1.5, -1.0])
    for i in range(500):
        t.opt_g.set_lr(0.02 * (1 - i / 500))
        t.step(torch.randn(200, 2, generator=draws) @ factor.T + mu)
    a, b = t.generator.weight.detach(), t.generator.bias.detach()
    torch.testing.assert_close(b, mu, rtol=0, atol=0.1)
    torch.testing.assert_close(a @ a.T, factor @ factor.T, rtol=0, atol=0.15)


# --- with features that a critic learns


def autoencoder() -> nn.Module:
    torch.manual_seed(1)
    return MLPAutoencoder(SHAPE, (8,), 3).double()


def scores() -> nn.Module:
    torch.manual_seed(1)
    return MLPDiscriminator(SHAPE, (8,)).double()


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("make", [autoencoder, scores])
def test_mmd_gan_is_the_papers(make: Any, one_pass: bool) -> None:
    net, real, fake = make(), images(5), (2 * images(5, 1)).requires_grad_()
    settings = config("mmd-gan", clip_weights=0.1, mmd_reconstruction=4.0)
    critic = ask(net, settings, one_pass=one_pass)
    assert type(critic) is MMDGAN

    def features(x: Tensor) -> Tensor:
        return net.encode(x) if make is autoencoder else net(x).view(-1, 1)

    distance = mmd2(features(real), features(fake))
    want = -distance
    if make is autoencoder:
        want = want + 4.0 * (((real - net(real)) ** 2).mean() + ((fake - net(fake)) ** 2).mean())
    out = critic.discriminator(real, fake)
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients(net, out.loss), gradients(net, want), rtol=1e-8, atol=1e-11)
    witness = [mean_kernel(features(real), features(x)) - mean_kernel(features(fake), features(x)) for x in (real, fake)]
    torch.testing.assert_close((out.d_real, out.d_fake), tuple(w.detach() for w in witness), rtol=1e-8, atol=1e-14)

    out = critic.generator(fake, real)
    torch.testing.assert_close(out.loss, distance, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(out.loss, fake), torch.autograd.grad(distance, fake), rtol=1e-6, atol=1e-11)
    critic.generator(fake, real).backward()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def witness_penalty(net: Any, real: Tensor, fake: Tensor, points: Tensor, target: float, *labels: Tensor) -> Tensor:
    """Mean (norm - target)² of the witness function's slopes at points, input by input."""
    norms = []
    points = points.clone().requires_grad_()
    for i in range(len(points)):
        own = [c[i % len(c)].unsqueeze(0) for c in labels]
        code = net(points[i : i + 1], *own).view(1, -1)
        witness = mean_kernel(net(real, *labels).view(len(real), -1), code) - mean_kernel(
            net(fake, *labels).view(len(fake), -1), code
        )
        (g,) = torch.autograd.grad(witness, points, create_graph=True)
        norms.append(g[i].norm())
    return ((torch.stack(norms) - target) ** 2).mean()


def test_the_penalty_of_packs_is_one_a_pack() -> None:
    torch.manual_seed(1)
    net, real, fake = Packed(MLPDiscriminator((2, 4, 4), (8,)), 2).double(), images(6), 2 * images(6, 1)
    critic = ask(net, config("mmd-gan", penalty="r2", penalty_weight=3.0))
    packs = [x.reshape(3, 2, 4, 4) for x in (real, fake)]
    want = 3.0 * witness_penalty(net.critic, *packs, packs[1], 0.0) - mmd2(net(real)[:, None], net(fake)[:, None])
    torch.testing.assert_close(critic.discriminator(real, fake).loss, want, rtol=1e-9, atol=0)


def test_the_penalty_of_both_halves_is_told_the_classes_of_both() -> None:
    torch.manual_seed(1)
    net, real, fake, labels = (
        CGANDiscriminator(SHAPE, 3, (8,), dropout=0.0).double(),
        images(5),
        2 * images(5, 1),
        torch.arange(5) % 3,
    )
    critic = ask(net, config("mmd-gan", penalty="r1r2", penalty_weight=3.0))
    penalty = sum(3.0 * witness_penalty(net, real, fake, points, 0.0, labels) for points in (real, fake))
    want = penalty - mmd2(net(real, labels)[:, None], net(fake, labels)[:, None])
    torch.testing.assert_close(critic.discriminator(real, fake, labels).loss, want, rtol=1e-9, atol=0)


def test_the_witness_function_of_bfloat16_features_is_computed_in_float32() -> None:
    critic = ask(scores(), config("mmd-gan", penalty="r1"))
    assert isinstance(critic, MMDGAN)
    a, b = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(critic._similarity(rows(a), rows(b)), critic._similarity(a.float(), b.float()))


def test_refuses_a_critic_that_gives_classes() -> None:
    with pytest.raises(ValueError, match=r"^train: arch must give features with --loss mmd-gan"):
        ask(classifier(), config("mmd-gan", clip_weights=0.1))


@pytest.mark.parametrize("penalty", ["gp", "r1"])
def test_the_penalty_is_that_of_the_witness_function(penalty: str) -> None:
    net, real, fake = autoencoder(), images(5), 2 * images(5, 1)
    settings = config("mmd-gan", penalty=penalty, penalty_weight=3.0, mmd_reconstruction=0.0)
    out = ask(net, settings, torch.Generator().manual_seed(7)).discriminator(real, fake)
    eps = torch.rand(5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[:, None, None, None]
    points = eps * real + (1 - eps) * fake if penalty == "gp" else real
    want = 3.0 * witness_penalty(net.encode, real, fake, points, float(penalty == "gp")) - mmd2(net.encode(real), net.encode(fake))
    torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients(net, out.loss), gradients(net, want), rtol=1e-7, atol=1e-10)


def test_mmd_gan_of_classes() -> None:
    """A critic that is told the classes gives features that depend on them."""
    torch.manual_seed(0)
    settings = config("mmd-gan", penalty="gp", arch="cgan")

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16 + CLASSES, 4)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.layer(torch.cat([x.flatten(1), F.one_hot(labels, CLASSES).to(x.dtype)], 1))

    t = Trainer(CGANGenerator(3, CLASSES, (8,), SHAPE), Told(), settings)
    before = t.discriminator.layer.weight.clone()
    out = t.step(images(6, dtype=torch.float32), torch.arange(6) % CLASSES)
    assert out["d_real"] - out["d_fake"] > 0
    assert (t.discriminator.layer.weight[:, 16:] != before[:, 16:]).any()


def test_a_generator_learns_from_learned_features() -> None:
    torch.manual_seed(0)
    settings = TrainConfig(
        loss="mmd-gan", penalty="gp", penalty_weight=1.0, mmd_reconstruction=1.0, batch_size=32, z_dim=3, lr_g=2e-3, lr_d=1e-3
    )
    t = Trainer(MLPGenerator(3, (16,), SHAPE), MLPAutoencoder(SHAPE, (16,), 4), settings)
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
    centre = 0.6 * images(1, 5, torch.float32)
    start = (t.sample(z).mean(0) - centre).abs().mean()
    for i in range(250):
        t.step(centre + 0.1 * images(32, i, torch.float32))
    assert (t.sample(z).mean(0) - centre).abs().mean() < 0.4 * start


# --- the auxiliary classifier


def classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return ACGANDiscriminator(SHAPE, CLASSES, (8,), dropout=0.0).to(dtype)


def sp(a: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(a))


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row.exp().sum().log() - row[c] for row, c in zip(logits, labels, strict=True)]).mean()


@pytest.mark.parametrize("one_pass", [True, False])
def test_acgan_is_the_papers(one_pass: bool) -> None:
    net, real, fake, labels = classifier(), images(5), images(5, 1).requires_grad_(), torch.arange(5) % CLASSES
    critic = ask(net, config("non-saturating", class_weight=0.7), one_pass=one_pass)
    assert isinstance(critic, Auxiliary)
    (r, of_real), (f, of_fake) = net(real), net(fake)
    want = sp(-r).mean() + sp(f).mean() + 0.7 * (entropy(of_real, labels) + entropy(of_fake, labels))
    out = critic.discriminator(real, fake, labels)
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(net, out.loss), gradients(net, want), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close((out.d_real, out.d_fake), (r.sigmoid().mean().detach(), f.sigmoid().mean().detach()))

    want = sp(-f).mean() + 0.7 * entropy(of_fake, labels)
    out = critic.generator(fake, real, labels)
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss, fake), torch.autograd.grad(want, fake), rtol=1e-8, atol=1e-12)
    critic.generator(fake, real, labels).backward()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("loss", "penalty"), [("wgan", "gp"), ("hinge", "r1"), ("relativistic", "none"), ("lsgan", "0gp")])
def test_the_classifier_goes_with_any_objective(loss: str, penalty: str) -> None:
    net, real, fake, labels = classifier(), images(5), images(5, 1), torch.arange(5) % CLASSES
    settings = config(loss, penalty=penalty, penalty_weight=2.0, class_weight=0.5)
    out = ask(net, settings, torch.Generator().manual_seed(7)).discriminator(real, fake, labels)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = net

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x)[0]

    plain = ask(Logits(), settings, torch.Generator().manual_seed(7)).discriminator(real, fake)
    more = 0.5 * sum(entropy(net(x)[1], labels) for x in (real, fake))
    torch.testing.assert_close(out.loss, plain.loss + more, rtol=1e-9, atol=0)


def test_the_generator_learns_the_classes() -> None:
    """Data: one image a class. Told a class, the generator makes something like its image."""
    torch.manual_seed(0)
    settings = TrainConfig(batch_size=24, z_dim=3, lr_g=2e-3, lr_d=2e-3, label_smoothing=0.9)
    t = Trainer(CGANGenerator(3, CLASSES, (16,), SHAPE), classifier(torch.float32), settings)
    kinds, labels = images(CLASSES, 5, torch.float32), torch.arange(24) % CLASSES
    for i in range(300):
        t.step(kinds[labels] + 0.1 * images(24, i, torch.float32), labels)
    fake = t.sample(torch.randn(24, 3), labels)
    nearest = torch.cdist(fake.flatten(1), kinds.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.9


# --- what does not go together


def test_settings_that_do_not_go_together() -> None:
    for changes, sentence in (
        ({"penalty": "gp"}, "penalty must be none with --loss mmd, which has no critic, got gp"),
        ({"n_critic": 5}, "n_critic must be 1 with --loss mmd, which has no critic, got 5"),
        ({"spectral_norm": True}, "spectral_norm must be False with --loss mmd, which has no critic, got True"),
        ({"clip_weights": 0.1}, "clip_weights must be 0.0 with --loss mmd, which has no critic, got 0.1"),
        ({"label_smoothing": 0.9}, "label_smoothing must be 1 with --loss mmd, which has no targets, got 0.9"),
        ({"mmd_bandwidths": (1.0, 0.0)}, r"mmd_bandwidths must be 1 to 16 numbers > 0, got \(1.0, 0.0\)"),
        ({"mmd_bandwidths": ()}, r"mmd_bandwidths must be 1 to 16 numbers > 0, got \(\)"),
        ({"loss": "mmd-gan"}, "loss must have a bounded critic: --penalty, --spectral-norm or --clip-weights, got mmd-gan alone"),
    ):
        with pytest.raises(ValueError, match=f"train: {sentence}"):
            TrainConfig(**{"loss": "mmd", **changes})
    with pytest.raises(TypeError, match="train: mmd_bandwidths must be a tuple of floats, got 'wide'"):
        TrainConfig(mmd_bandwidths="wide")  # type: ignore[arg-type]
    assert TrainConfig.from_json(config("mmd").to_json() | {"mmd_bandwidths": [1.0, 2]}).mmd_bandwidths == (1.0, 2.0)
    with pytest.raises(ValueError, match="train: arch must be unconditional with --loss mmd, which does not see classes, got cgan"):
        ask(nn.Linear(1, 1), config("mmd", arch="cgan"))
