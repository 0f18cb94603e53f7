"""The networks that the settings name: every --arch with its options trains, is captured and resumes; what is refused."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern import models
from gankern.nn import VirtualBatchNorm
from gankern.training import PRESETS, TrainConfig
from gankern.training.combinations import idle
from gankern.training.critics import Autograd
from gankern.training.critics.matching import Features
from gankern.training.networks import CONDITIONAL, IMAGES, networks
from tests import small
from tests.test_graph import differences, pair, run
from tests.test_step_capturable import walk

pytestmark = pytest.mark.usefixtures("steady")
ARCHS = typing.get_args(typing.get_type_hints(TrainConfig)["arch"])
# Of the reference batch of --virtual-batch-norm, and of the whole batch in the critic; in networks of several kinds.
LAYERS: dict[str, Any] = {"virtual_batch_norm": True, "minibatch_features": "discrimination", "d_norm": "none", "n_critic": 2}


def settings(arch: str, **changes: Any) -> TrainConfig:
    return small.config("gan", **{"arch": arch, "batch_size": 6, **changes})


SHAPING: dict[str, Any] = {
    "conv_width": 6, "d_conv_width": 6, "upsample": "shuffle", "downsample": "pool", "code": 3, "d_norm": "batch", "g_widths": (7,),
    "g_norm": "batch", "g_dropout": 0.5, "d_widths": (7,), "d_dropout": 0.5, "negative_slope": 0.5, "z_dim": 3,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_what_shapes_no_network_is_idle_and_nothing_else(arch: str) -> None:
    def outputs(config: TrainConfig) -> list[Tensor]:
        torch.manual_seed(0)
        shape = (1, 16, 16) if arch in IMAGES else (6,)
        labels = [torch.tensor([0, 1, 2, 0])] if arch in CONDITIONAL else []
        generator, critic = networks(config, shape, small.CLASSES)
        torch.manual_seed(1)
        fake = generator(torch.randn(4, config.z_dim), *labels)
        scores = critic(torch.randn(4, *shape), *(labels if arch != "acgan" else []))
        return [fake, scores[0] if arch == "acgan" else scores]

    plain = settings(arch, d_dropout=0.0, label_smoothing=1.0, loss="ebgan" if "autoencoder" in arch else "non-saturating")
    before = outputs(plain)
    for name, value in SHAPING.items():
        changed = dataclasses.replace(plain, **{name: "layer" if (name, arch) == ("d_norm", "resnet") else value})
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, outputs(changed), strict=True))
        assert same == (name in idle(changed)), name


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_has_the_shape_of_the_data(arch: str, pack: int) -> None:
    if pack > 1 and (arch in CONDITIONAL or "autoencoder" in arch):
        return
    config = settings(arch, pack=pack)
    shape = small.shape(config)
    labels = [torch.tensor([0, 1, 2, 0])] if arch in CONDITIONAL else []
    generator, critic = networks(config, shape, small.CLASSES)
    fake = generator(torch.randn(4, config.z_dim), *labels)
    assert fake.shape == (4, *shape)
    out = critic(fake, *(labels if arch != "acgan" else []))
    if "autoencoder" in arch:
        assert out.shape == fake.shape
    elif arch == "acgan":
        assert [t.shape for t in out] == [(4,), (4, small.CLASSES)]
    else:
        assert out.shape == (4 // pack,)


def test_options_reach_the_networks() -> None:
    def kinds(net: nn.Module) -> set[str]:
        return {type(m).__name__ for m in net.modules()}

    shape = (3, 16, 16)
    generator, critic = networks(settings("dcgan", upsample="shuffle", downsample="pool", d_norm="batch"), shape, fused=False)
    assert "PixelShuffle" in kinds(generator)
    assert {"AvgPool2d", "BatchNorm2d"} <= kinds(critic)
    generator, critic = networks(settings("resnet", d_norm="layer"), shape, fused=False)
    assert isinstance(generator, models.ResNetGenerator)
    assert "GroupNorm" in kinds(critic)
    assert "GroupNorm" not in kinds(networks(settings("resnet"), shape, fused=False)[1])
    generator, critic = networks(settings("cgan", g_norm="batch", g_dropout=0.3, negative_slope=0.1), (2,), 3, fused=False)
    assert {"BatchNorm1d", "Dropout"} <= kinds(generator)
    assert "Tanh" not in kinds(generator)
    assert {m.negative_slope for net in (generator, critic) for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_line_of_r3gan_says_what_its_networks_are() -> None:
    generator, critic = PRESETS["r3gan"].build(small.config("r3gan"), (1, 8, 8))
    normed = [any("Norm" in type(m).__name__ for m in net.modules()) for net in (generator, critic)]
    assert normed == [True, False]
    assert PRESETS["r3gan"].summary.endswith("no normalisation in the critic")


@pytest.mark.parametrize("arch", ["dcgan", "resnet", "cdcgan", "tabular", "pacgan-toy"])
def test_virtual_batch_norm_of_the_generator(arch: str) -> None:
    """A sample of the generator hangs on no other, while training too; its state is loaded with its reference batch."""
    config = settings(arch, virtual_batch_norm=True)
    shape = small.shape(config)
    labels = [torch.arange(6) % small.CLASSES] if arch in CONDITIONAL else []
    torch.manual_seed(0)
    generator, _ = networks(config, shape, small.CLASSES)
    assert isinstance(generator, VirtualBatchNorm)
    assert generator.reference0.shape == (6, config.z_dim)
    z = torch.randn(6, config.z_dim)
    torch.testing.assert_close(generator(z, *labels)[:2], generator(z[:2], *(t[:2] for t in labels)), rtol=1e-4, atol=1e-5)
    other, _ = networks(config, shape, small.CLASSES)
    other.load_state_dict(generator.state_dict())
    assert torch.equal(other(z, *labels), generator(z, *labels))


@pytest.mark.parametrize("kind", ["discrimination", "distance", "stddev"])
@pytest.mark.parametrize("arch", ["mlp", "sngan", "cgan"])
def test_minibatch_features_keep_real_and_fake_apart(arch: str, kind: str) -> None:
    t = small.trainer(settings(arch, minibatch_features=kind, spectral_norm=arch == "sngan"))
    assert isinstance(t.critic, Autograd)
    assert not t.critic.one_pass
    labels = [torch.arange(6) % small.CLASSES] if arch in CONDITIONAL else []
    losses = t.step(torch.randn(6, *small.shape(t.config)), *labels)
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None for p in t.discriminator.parameters())


def test_feature_matching_leaves_out_minibatch_features() -> None:
    """Its features are those of the samples: of one alone they are the same."""
    _, critic = networks(settings("dcgan", minibatch_features="discrimination"), (1, 8, 8))
    x = torch.randn(4, 1, 8, 8)
    features, _ = Features(critic).of(x)
    assert features.shape == (4, [m for m in critic.modules() if isinstance(m, nn.Linear)][-1].in_features - 100)
    torch.testing.assert_close(Features(critic).of(x[:1])[0], features[:1])


@pytest.mark.parametrize("arch", ["cdcgan", "resnet"])
def test_a_replayed_step_is_the_eager_one(arch: str) -> None:
    eager, replayed = pair("gan", arch=arch, **LAYERS)
    run(eager, 3), run(replayed, 3)
    assert differences(eager, replayed) == []


def test_the_step_can_be_captured() -> None:
    for kind in ("discrimination", "distance", "stddev"):
        walk("gan", arch="resnet", **{**LAYERS, "minibatch_features": kind})


def test_resumes_bit_for_bit() -> None:
    config = settings("resnet", **LAYERS, ema=0.9)
    whole, first, second = (small.trainer(config) for _ in range(3))
    second.load_state_dict(small.trainer(settings("resnet", **LAYERS, ema=0.9, seed=5)).state_dict())  # another reference batch
    batches = [torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    torch.manual_seed(3)
    for x in batches:
        whole.step(x)
    torch.manual_seed(3)
    for x in batches[:2]:
        first.step(x)
    second.load_state_dict(small.state(first))
    for x in batches[2:]:
        second.step(x)
    assert {"generator.reference0", "ema.reference0"} <= whole.state_dict().keys()
    for (key, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": "resnet", "d_norm": "batch"}, "d_norm must be none or layer with --arch resnet, got batch"),
        ({"arch": "dcgan", "d_norm": "layer"}, "d_norm must be none or batch with --arch dcgan, got layer"),
        (
            {"minibatch_features": "stddev", "penalty": "gp"},
            "minibatch_features must be none with --penalty, whose norm is of each sample by itself, got stddev",
        ),
        (
            {"minibatch_features": "stddev", "arch": "autoencoder"},
            "minibatch_features must be none with --arch autoencoder, whose critic gives no score, got stddev",
        ),
        (
            {"virtual_batch_norm": True},
            "virtual_batch_norm must be False with --arch mlp and --g-norm none: no BatchNorm in the generator, got True",
        ),
        (
            {"virtual_batch_norm": True, "arch": "wgan-gp-toy", "g_norm": "batch"},
            "virtual_batch_norm must be False with --arch wgan-gp-toy and --g-norm batch: no BatchNorm in the generator, got True",
        ),
        (
            {"virtual_batch_norm": True, "arch": "dcgan", "batch_size": 1},
            "batch_size must be >= 2 with --virtual-batch-norm, got 1",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"train: {sentence}") + "$"):
        TrainConfig(**changes)
