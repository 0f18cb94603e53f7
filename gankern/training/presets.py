"""The presets: each a row that names its settings; and the networks of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from gankern import checks, models
from gankern.nn import spectral_norm_
from gankern.nn.fuse import fuse
from gankern.training.config import TrainConfig

Networks = tuple[nn.Module, nn.Module]
Shape = tuple[int, int, int]


class Preset(NamedTuple):
    """A line for the list, the settings, and `build(config, shape, classes)`: see `networks`."""

    summary: str
    config: TrainConfig

    def build(self, config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
        return networks(config, shape, classes, fused)


def networks(config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
    """(generator, discriminator) of config.arch for images of `shape` [C, H, W], from PyTorch's default generator.

    Args:
        classes: of the data; a conditional architecture needs them.
        fused: with gankern.fuse. (Those of mlp are made of fused layers.)

    Raises:
        ValueError: no classes for a conditional architecture; a size that the architecture does not have.
    """
    generator, discriminator = _ARCHS[config.arch](config, shape, classes)
    if fused and config.arch != "mlp":
        generator, discriminator = fuse(generator), fuse(discriminator)
    return generator, spectral_norm_(discriminator) if config.spectral_norm else discriminator


def _mlp(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    slope = config.negative_slope
    return (
        models.MLPGenerator(config.z_dim, config.g_widths, shape, config.g_norm, config.g_dropout, slope),
        models.MLPDiscriminator(shape, config.d_widths, config.d_dropout, slope),
    )


def _dcgan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.DCGANGenerator(config.z_dim, shape, config.conv_width),
        models.DCGANDiscriminator(shape, config.conv_width, norm=config.d_norm, negative_slope=config.negative_slope),
    )


def _sngan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    halvings = 2 if shape[-1] == 28 else 3
    widths = [config.conv_width * 2**i for i in range(halvings + 1)]
    return models.SNGANGenerator(config.z_dim, shape, widths), models.SNGANDiscriminator(shape, widths)


def _cgan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    if not classes:
        checks.fail(ValueError, "train", "data", "have labels for --arch cgan", "none")
    return (
        models.CGANGenerator(config.z_dim, classes, config.g_widths, shape),
        models.CGANDiscriminator(shape, classes, config.d_widths, dropout=config.d_dropout),
    )


def _tabular(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.TabularGenerator(shape, config.z_dim, config.g_widths),
        models.TabularDiscriminator(
            shape, config.d_widths, dropout=config.d_dropout, pack=config.pack, negative_slope=config.negative_slope
        ),
    )


_ARCHS: dict[str, Callable[[TrainConfig, Shape, int], Networks]] = {
    "mlp": _mlp,
    "dcgan": _dcgan,
    "sngan": _sngan,
    "cgan": _cgan,
    "tabular": _tabular,
}
CONDITIONAL = frozenset({"cgan"})

_DCGAN: dict[str, Any] = {"arch": "dcgan", "d_norm": "batch", "batch_size": 128, "ema": 0.999}

PRESETS = {
    # Dropout in the critic and one-sided label smoothing keep all ten digits; without them a class or two is lost.
    "gan": Preset(
        "the GAN of Goodfellow et al. 2014 with two MLPs, on MNIST", TrainConfig(d_dropout=0.3, real_label=0.9, ema=0.999)
    ),
    "cgan": Preset(
        "conditional GAN, two MLPs that are told the class (Mirza and Osindero 2014)",
        TrainConfig(arch="cgan", d_dropout=0.3, real_label=0.9, ema=0.999),
    ),
    "wgan-gp": Preset(
        "Wasserstein GAN with gradient penalty, two MLPs, 5 critic updates a step (Gulrajani et al. 2017)",
        TrainConfig(
            objective="wgan", penalty="gp", n_critic=5, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9, ema=0.999
        ),
    ),
    "sngan": Preset(
        "spectrally normalised critic, hinge objective, the standard CNN (Miyato et al. 2018)",
        TrainConfig(arch="sngan", objective="hinge", spectral_norm=True, size=32, beta1=0.0, beta2=0.9, z_dim=128, ema=0.999),
    ),
    "dcgan-32": Preset("convolutional GAN at 32 px (Radford et al. 2016)", TrainConfig(**_DCGAN, size=32)),
    "dcgan-64": Preset("convolutional GAN at 64 px (Radford et al. 2016)", TrainConfig(**_DCGAN, size=64)),
    "ctgan-like": Preset(
        "the MLPs of CTGAN: dropout 0.5, packs of 10, gradient penalty, batch 500 (Xu et al. 2019)",
        TrainConfig(
            arch="tabular", objective="wgan", penalty="gp", pack=10, d_dropout=0.5, z_dim=128, batch_size=500,
            g_widths=(256, 256), d_widths=(256, 256), beta1=0.5, beta2=0.9,
        ),
    ),
}  # fmt: skip
