"""The networks of each architecture, made from the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gankern import checks, models
from gankern.nn import SyncBatchNormLeakyReLU, VirtualBatchNorm, add_minibatch_features, spectral_norm_
from gankern.nn.fuse import fuse
from gankern.training.config import TrainConfig

Networks = tuple[nn.Module, nn.Module]
Shape = tuple[int, ...]


def networks(config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
    """(generator, discriminator) of config.arch for samples of `shape`, from PyTorch's default generator.

    Args:
        shape: [C, S, S] of images, [F] of points or rows of a table.
        classes: of the data; a conditional architecture needs them.
        fused: with gankern.fuse.

    Raises:
        ValueError: no classes for a conditional architecture; a shape or a pack that the architecture does not have.
    """
    arch, pack = config.arch, config.pack
    if arch in CONDITIONAL and not classes:
        checks.fail(ValueError, "train", "data", f"have labels for --arch {arch}", "none")
    if arch in IMAGES and len(shape) != 3:
        checks.fail(ValueError, "train", "data", f"be images for --arch {arch}", f"samples of shape {list(shape)}")
    generator, discriminator = _ARCHS[arch](config, shape, classes)
    if pack > 1 and not hasattr(discriminator, "pack"):
        _, discriminator = _ARCHS[arch](config, (pack * shape[0], *shape[1:]), classes)
        discriminator = models.Packed(discriminator, pack)
    if config.minibatch_features != "none":
        discriminator = add_minibatch_features(discriminator, config.minibatch_features)
    if config.virtual_batch_norm:
        n = config.batch_size
        labels = [torch.arange(n) % classes] if arch in CONDITIONAL else []
        generator = VirtualBatchNorm(generator, models.sample_latent(n, config.z_dim, config.latent), *labels)
    if config.sync_batch_norm:
        generator, discriminator = _synchronised(generator), _synchronised(discriminator)
    if fused:
        generator, discriminator = fuse(generator), fuse(discriminator)
    if config.spectral_norm_g:
        spectral_norm_(generator)
    return generator, spectral_norm_(discriminator) if config.spectral_norm else discriminator


def _synchronised(network: nn.Module) -> nn.Module:
    """Its BatchNorm layers as SyncBatchNormLeakyReLU of slope 1: nn.SyncBatchNorm has no statistics on the CPU."""
    network = SyncBatchNormLeakyReLU.convert_sync_batchnorm(network)
    for layer in network.modules():
        if type(layer) is nn.SyncBatchNorm:
            layer.__class__ = SyncBatchNormLeakyReLU
            layer.negative_slope = 1.0  # type: ignore[assignment]
    return network


def encoder(config: TrainConfig, shape: Sequence[int]) -> nn.Module:
    """Samples of `shape` -> (mean, log variance) of z: the generator's mirror image, of convolutions where it has them."""
    if config.arch in IMAGES:
        return models.ConvEncoder(shape, config.z_dim, config.conv_width, config.downsample, negative_slope=config.negative_slope)
    return models.MLPEncoder(shape, config.z_dim, config.g_widths[::-1], config.negative_slope)


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
        models.DCGANGenerator(config.z_dim, shape, config.conv_width, config.upsample),
        models.DCGANDiscriminator(
            shape, config.d_conv_width or config.conv_width, config.downsample, config.d_norm, config.negative_slope
        ),
    )


def _cdcgan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.CDCGANGenerator(config.z_dim, classes, shape, config.conv_width, upsample=config.upsample),
        models.CDCGANDiscriminator(
            shape,
            classes,
            config.conv_width,
            downsample=config.downsample,
            norm=config.d_norm,
            negative_slope=config.negative_slope,
        ),
    )


def _acgan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.CDCGANGenerator(config.z_dim, classes, shape, config.conv_width, upsample=config.upsample),
        models.ConvACGANDiscriminator(shape, classes, config.conv_width, config.downsample, config.d_norm, config.negative_slope),
    )


def _sngan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    halvings = 2 if shape[-1] == 28 else 3
    widths = [config.conv_width * 2**i for i in range(halvings + 1)]
    return models.SNGANGenerator(config.z_dim, shape, widths), models.SNGANDiscriminator(shape, widths)


def _resnet(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.ResNetGenerator(config.z_dim, shape, config.conv_width),
        models.ResNetDiscriminator(shape, config.conv_width, config.d_norm),
    )


def _cgan(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.CGANGenerator(
            config.z_dim,
            classes,
            config.g_widths,
            shape,
            norm=config.g_norm,
            dropout=config.g_dropout,
            negative_slope=config.negative_slope,
            output=_output(shape),
        ),
        models.CGANDiscriminator(shape, classes, config.d_widths, dropout=config.d_dropout, negative_slope=config.negative_slope),
    )


def _autoencoder(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    slope = config.negative_slope
    return (
        models.MLPGenerator(config.z_dim, config.g_widths, shape, config.g_norm, config.g_dropout, slope, _output(shape)),
        models.MLPAutoencoder(shape, config.d_widths, config.code, slope),
    )


def _conv_autoencoder(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return (
        models.DCGANGenerator(config.z_dim, shape, config.conv_width, config.upsample),
        models.ConvAutoencoder(shape, config.conv_width, config.code, config.downsample, config.upsample, config.negative_slope),
    )


def _pacgan_toy(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return models.pacgan_toy(shape, config.pack, config.z_dim)


def _unrolled_toy(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return models.unrolled_toy(shape, config.z_dim)


def _wgan_gp_toy(config: TrainConfig, shape: Shape, classes: int) -> Networks:
    return models.wgan_gp_toy(shape, config.z_dim)


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
    "resnet": _resnet,
    "cgan": _cgan,
    "cdcgan": _cdcgan,
    "acgan": _acgan,
    "autoencoder": _autoencoder,
    "conv-autoencoder": _conv_autoencoder,
    "tabular": _tabular,
    "pacgan-toy": _pacgan_toy,
    "unrolled-toy": _unrolled_toy,
    "wgan-gp-toy": _wgan_gp_toy,
}
CONDITIONAL = frozenset({"cgan", "cdcgan", "acgan"})
IMAGES = frozenset({"dcgan", "sngan", "resnet", "cdcgan", "acgan", "conv-autoencoder"})
