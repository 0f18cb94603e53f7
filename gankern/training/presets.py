"""The presets: each a row that names its settings and builds its two networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from gankern.models import MLPDiscriminator, MLPGenerator
from gankern.training.config import TrainConfig

Networks = tuple[nn.Module, nn.Module]


class Preset(NamedTuple):
    """`build(config, shape)` makes (generator, discriminator) for images of `shape` [C, H, W], with PyTorch's default generator."""

    summary: str
    config: TrainConfig
    build: Callable[[TrainConfig, tuple[int, int, int]], Networks]


def mlp(config: TrainConfig, shape: tuple[int, int, int]) -> Networks:
    generator = MLPGenerator(
        config.z_dim, config.g_widths, shape, norm=config.g_norm, dropout=config.g_dropout, negative_slope=config.negative_slope
    )
    discriminator = MLPDiscriminator(shape, config.d_widths, dropout=config.d_dropout, negative_slope=config.negative_slope)
    return generator, discriminator


PRESETS = {
    # Dropout in the critic and one-sided label smoothing keep all ten digits; without them a class or two is lost.
    "gan": Preset(
        "the GAN of Goodfellow et al. 2014 with two MLPs, on MNIST", TrainConfig(d_dropout=0.3, real_label=0.9, ema=0.999), mlp
    ),
}
