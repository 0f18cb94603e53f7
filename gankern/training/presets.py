"""The presets: each a row that names its settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from gankern.training.config import TrainConfig
from gankern.training.networks import Networks, Shape, networks


class Preset(NamedTuple):
    """A line for the list, the settings, and `build(config, shape, classes)`: see `networks`."""

    summary: str
    config: TrainConfig

    def build(self, config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
        return networks(config, shape, classes, fused)


_DCGAN: dict[str, Any] = {"arch": "dcgan", "d_norm": "batch", "batch_size": 128, "ema": 0.999}

PRESETS = {
    # Dropout in the critic and one-sided label smoothing keep all ten digits; without them a class or two is lost.
    "gan": Preset(
        "the GAN of Goodfellow et al. 2014 with two MLPs, on MNIST", TrainConfig(d_dropout=0.3, label_smoothing=0.9, ema=0.999)
    ),
    "cgan": Preset(
        "conditional GAN, two MLPs that are told the class (Mirza and Osindero 2014)",
        TrainConfig(arch="cgan", d_dropout=0.3, label_smoothing=0.9, ema=0.999),
    ),
    "wgan-gp": Preset(
        "Wasserstein GAN with gradient penalty, two MLPs, 5 critic updates a step (Gulrajani et al. 2017)",
        TrainConfig(
            loss="wgan", penalty="gp", n_critic=5, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9, ema=0.999
        ),
    ),
    "sngan": Preset(
        "spectrally normalised critic, hinge objective, the standard CNN (Miyato et al. 2018)",
        TrainConfig(arch="sngan", loss="hinge", spectral_norm=True, size=32, beta1=0.0, beta2=0.9, z_dim=128, ema=0.999),
    ),
    "dcgan-32": Preset("convolutional GAN at 32 px (Radford et al. 2016)", TrainConfig(**_DCGAN, size=32)),
    "dcgan-64": Preset("convolutional GAN at 64 px (Radford et al. 2016)", TrainConfig(**_DCGAN, size=64)),
    "ctgan-like": Preset(
        "the MLPs of CTGAN: dropout 0.5, packs of 10, gradient penalty, batch 500 (Xu et al. 2019)",
        TrainConfig(
            arch="tabular", loss="wgan", penalty="gp", pack=10, d_dropout=0.5, z_dim=128, batch_size=500,
            g_widths=(256, 256), d_widths=(256, 256), beta1=0.5, beta2=0.9,
        ),
    ),
}  # fmt: skip
