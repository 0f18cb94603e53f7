"""The networks of each architecture, made from the settings."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gankern import checks, models
from gankern.nn import spectral_norm_
from gankern.nn.fuse import fuse
from gankern.training.config import TrainConfig

Networks = tuple[nn.Module, nn.Module]
Shape = tuple[int, ...]


def networks(config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
    """(generator, discriminator) of config.arch for samples of `shape`, [C, H, W] of images, from PyTorch's default generator.

    Args:
        classes: of the data; a conditional architecture needs them.
        fused: with gankern.fuse.

    Raises:
        ValueError: no classes for a conditional architecture; a size that the architecture does not have.
    """
    generator, discriminator = _ARCHS[config.arch](config, shape, classes)
    if fused:
        generator, discriminator = fuse(generator), fuse(discriminator)
    return generator, spectral_norm_(discriminator) if config.spectral_norm else discriminator


def _mlp(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    slope = config.negative_slope
    return (
        models.MLPGenerator(config.z_dim, config.g_widths, shape, config.g_norm, config.g_dropout, slope, _output(shape)),
        models.MLPDiscriminator(shape, config.d_widths, config.d_dropout, slope),
    )


def _output(shape: Shape) -> str:
    """Images are in [-1, 1], all else is unbounded."""
    return "tanh" if len(shape) == 3 else "none"


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
        models.TabularGenerator(shape, config.z_dim, config.g_widths, _output(shape)),
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
