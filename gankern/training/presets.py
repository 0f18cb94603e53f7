"""The presets: each a row that names its settings, where they come from, and what to expect."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from gankern.training.config import TrainConfig
from gankern.training.networks import Networks, Shape, networks


class Preset(NamedTuple):
    """A line for the list, its source, what a run shows, the settings, and `build(config, shape, classes)`: see `networks`."""

    summary: str
    source: str
    expect: str
    config: TrainConfig

    def build(self, config: TrainConfig, shape: Shape, classes: int = 0, fused: bool = True) -> Networks:
        return networks(config, shape, classes, fused)


# Dropout in the critic and one-sided label smoothing keep all ten digits; without them a class or two is lost.
_MLP: dict[str, Any] = {"d_dropout": 0.3, "ema": 0.999}
_DCGAN: dict[str, Any] = {"arch": "dcgan", "d_norm": "batch", "batch_size": 128, "ema": 0.999}
_PACGAN: dict[str, Any] = {"arch": "pacgan-toy", "z_dim": 2, "lr_g": 1e-4, "lr_d": 1e-4, "beta1": 0.8, "pack": 2, "batch_size": 200}
_BOUNDED: dict[str, Any] = {
    "arch": "dcgan",
    "spectral_norm": True,
    "beta1": 0.0,
    "beta2": 0.9,
    "lr_d": 4e-4,
    "lr_g": 1e-4,
    "ema": 0.999,
}

# The paper's 2, 5, 10, 20, 40 and 80 are sigma² for pixels in [0, 1]; here sigma for pixels in [-1, 1]: twice the root of each.
_GMMN_WIDTHS = (2.8, 4.5, 6.3, 8.9, 12.6, 17.9)

PRESETS = {
    "gan": Preset(
        "the GAN: two MLPs, the non-saturating loss, on MNIST",
        "Goodfellow et al. 2014",
        "all ten digits, a little noisy",
        TrainConfig(**_MLP, label_smoothing=0.9),
    ),
    "gan-minimax": Preset(
        "the same with the minimax loss of algorithm 1",
        "Goodfellow et al. 2014",
        "slower at first: the generator's gradient vanishes while the critic wins",
        TrainConfig(**_MLP, label_smoothing=0.9, generator_loss="saturating"),
    ),
    "gan-bn": Preset(
        "the same with BatchNorm in the generator",
        "Goodfellow et al. 2014; Ioffe and Szegedy 2015",
        "as gan; BatchNorm ties the samples of a batch together",
        TrainConfig(**_MLP, label_smoothing=0.9, g_norm="batch"),
    ),
    "dcgan": Preset(
        "convolutional GAN at the data's own size (28, 32, 64 px)",
        "Radford et al. 2016",
        "digits after about a thousand steps",
        TrainConfig(**_DCGAN),
    ),
    "dcgan-32": Preset(
        "convolutional GAN at 32 px", "Radford et al. 2016", "as dcgan, a little larger", TrainConfig(**_DCGAN, size=32)
    ),
    "dcgan-64": Preset(
        "convolutional GAN at 64 px", "Radford et al. 2016", "as dcgan, large", TrainConfig(**_DCGAN, size=64)
    ),
    "cgan": Preset(
        "conditional GAN: two MLPs that are told the class",
        "Mirza and Osindero 2014",
        "the digit that is asked for",
        TrainConfig(arch="cgan", **_MLP, label_smoothing=0.9),
    ),
    "lsgan": Preset(
        "least squares in place of the logistic loss, convolutional",
        "Mao et al. 2017",
        "clean digits",
        TrainConfig(**_DCGAN, loss="lsgan"),
    ),
    "hinge": Preset(
        "hinge loss, spectrally normalised convolutional critic",
        "Lim and Ye 2017; Miyato et al. 2018",
        "clean digits; the critic's loss stays between 1 and 2",
        TrainConfig(**_BOUNDED, loss="hinge"),
    ),
    "wgan": Preset(
        "Wasserstein GAN with clipped weights, 5 critic updates a step",
        "Arjovsky et al. 2017",
        "-d_loss falls slowly as the samples improve",
        TrainConfig(
            arch="dcgan", loss="wgan", clip_weights=0.01, n_critic=5, optimizer_d="rmsprop", optimizer_g="rmsprop", lr_g=5e-5,
            lr_d=5e-5, ema=0.999,
        ),
    ),
    "wgan-gp": Preset(
        "Wasserstein GAN with gradient penalty, two MLPs, 5 critic updates a step",
        "Gulrajani et al. 2017",
        "-d_loss falls as the samples improve; all ten digits",
        TrainConfig(
            loss="wgan", penalty="gp", n_critic=5, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9, ema=0.999
        ),
    ),
    "sngan": Preset(
        "spectrally normalised critic, hinge loss, the standard CNN",
        "Miyato et al. 2018",
        "clean digits; the critic's loss stays between 1 and 2",
        TrainConfig(arch="sngan", loss="hinge", spectral_norm=True, size=32, beta1=0.0, beta2=0.9, z_dim=128, ema=0.999),
    ),
    **{
        name: Preset(
            f"the critic bounds the {words} from below, two MLPs",
            "Nowozin et al. 2016",
            expect,
            TrainConfig(**_MLP, loss=loss, generator_loss="non-saturating", lr_d=1e-4, lr_g=1e-4),
        )
        for name, loss, words, expect in (
            ("fgan-kl", "fgan-kl", "Kullback-Leibler divergence", "by theory smears rather than missing digits"),
            ("fgan-rkl", "fgan-reverse-kl", "reverse Kullback-Leibler divergence", "by theory missing digits rather than smears"),
            ("fgan-pearson", "fgan-pearson", "Pearson divergence", "by theory covers all digits; a steep loss"),
            ("fgan-hellinger", "fgan-hellinger", "squared Hellinger distance", "by theory between fgan-kl and fgan-rkl"),
            ("fgan-js", "fgan-jensen-shannon", "Jensen-Shannon divergence", "as gan"),
        )
    },
    "rsgan": Preset(
        "the critic compares each real sample with a fake one, convolutional",
        "Jolicoeur-Martineau 2019",
        "clean digits; both losses are log 2 when the critic cannot tell",
        TrainConfig(**_DCGAN, loss="relativistic"),
    ),
    "ragan": Preset(
        "the critic compares each sample with the mean of the other half, convolutional",
        "Jolicoeur-Martineau 2019",
        "as rsgan; both losses are 2 log 2 when the critic cannot tell",
        TrainConfig(**_DCGAN, loss="relativistic-average"),
    ),
    "rahinge": Preset(
        "the same with the hinge loss",
        "Jolicoeur-Martineau 2019",
        "as rsgan; both losses are 2 when the critic cannot tell",
        TrainConfig(**_DCGAN, loss="relativistic-average-hinge"),
    ),
    "cdcgan": Preset(
        "conditional DCGAN: both networks are told the class",
        "Mirza and Osindero 2014; Radford et al. 2016",
        "the digit that is asked for",
        TrainConfig(**{**_DCGAN, "arch": "cdcgan"}),
    ),
    "r3gan": Preset(
        "relativistic pairs with R1 and R2, convolutional, no normalisation in the critic",
        "Huang et al. 2024",
        "digits; by the paper, which has no normalisation in the generator either, stable for as long as it runs",
        TrainConfig(**{**_DCGAN, "d_norm": "none"}, loss="relativistic", penalty="r1r2", penalty_weight=0.5, beta1=0.0, beta2=0.99),
    ),
    "improved": Preset(
        "minibatch discrimination, feature matching, virtual batch norm and label smoothing, convolutional",
        "Salimans et al. 2016",
        "digits, kept varied by what the critic sees of the batch",
        TrainConfig(
            **_DCGAN, minibatch_features="discrimination", feature_matching=0.01, virtual_batch_norm=True, label_smoothing=0.9
        ),
    ),
    # The evidence's lower bound at unit variance, times 0.01: as steep for the generator as what the critic says. The sum over some
    # thousand features with a weight of 10 drowns that a thousandfold, and codes far from N(0, 1) leave drawn z without meaning.
    "vae-gan": Preset(
        "an encoder besides: the generator also restores real images from their codes, convolutional",
        "Larsen et al. 2016",
        "smooth digits",
        TrainConfig(**_DCGAN, reconstruction=0.005, reconstruct="features", kl=0.01),
    ),
    "unrolled": Preset(
        "eight Gaussians on a ring; the generator looks 10 critic updates ahead",
        "Metz et al. 2017",
        "all 8 modes within some thousand steps; with --unroll 0 the samples hop from mode to mode",
        TrainConfig(
            data="unrolled-ring", arch="unrolled-toy", z_dim=256, batch_size=512, generator_loss="saturating", lr_g=1e-3, lr_d=1e-3,
            unroll=10, steps=5_000,
        ),
    ),
    "ring": Preset(
        "eight Gaussians on a ring, pairs of samples judged together",
        "Lin et al. 2018",
        "all 8 modes after 8 000 steps; in the paper, after 400 000, nearly always, and 6 with --pack 1",
        TrainConfig(data="ring", **_PACGAN),
    ),
    "grid": Preset(
        "25 Gaussians on a grid, pairs of samples judged together",
        "Lin et al. 2018",
        "the paper has 24 of the 25 modes after 400 000 steps, and 17 with --pack 1",
        TrainConfig(data="grid", **_PACGAN),
    ),
    "swissroll": Preset(
        "the Swiss roll with WGAN-GP",
        "Gulrajani et al. 2017",
        "the spiral, after some thousand steps",
        TrainConfig(
            data="swissroll", arch="wgan-gp-toy", loss="wgan", penalty="gp", penalty_weight=0.1, n_critic=5, z_dim=2,
            batch_size=256, lr_g=1e-4, lr_d=1e-4, beta1=0.5, beta2=0.9,
        ),
    ),
    "acgan": Preset(
        "the critic tells the class too, convolutional",
        "Odena et al. 2017",
        "the digit that is asked for, clean",
        TrainConfig(**_DCGAN | {"arch": "acgan", "batch_size": 64}),
    ),
    "gmmn": Preset(
        "moment matching of batches of 500 images, an MLP and no critic",
        "Li, Swersky, Zemel 2015",
        "digits of all kinds, coarse at the edges; g_loss near 0.25",
        TrainConfig(
            loss="mmd", mmd_root=True, mmd_bandwidths=_GMMN_WIDTHS, batch_size=500, z_dim=10, latent="uniform",
            g_widths=(64, 256, 256, 1024), lr_g=1e-3, beta1=0.9, ema=0.99, steps=3000,
        ),
    ),
    "mmd-gan": Preset(
        "moment matching of 16 features that a spectrally normalised encoder learns, convolutional",
        "Li et al. 2017; the bound: Miyato et al. 2018",
        "digits of all kinds within some hundred steps; g_loss falls from 6 to below 0.3",
        TrainConfig(
            arch="conv-autoencoder", loss="mmd-gan", code=16, conv_width=24, spectral_norm=True, mmd_reconstruction=0.0,
            lr_g=4e-4, lr_d=4e-4, beta1=0.0, beta2=0.9, ema=0.999,
        ),
    ),
    "ebgan": Preset(
        "energies: the critic is an auto-encoder, the generator's samples are pulled apart, two MLPs",
        "Zhao, Mathieu, LeCun 2017",
        "all ten digits; d_loss comes to the margin",
        TrainConfig(
            arch="autoencoder", loss="ebgan", margin=0.13, pulling_away_weight=0.002, d_widths=(512, 256), g_norm="batch",
            lr_d=1e-3, ema=0.999,
        ),
    ),
    # Equal rates and a quick k: where the generator is slower than the critic, k stays near 0, and nothing moves it off one digit.
    "began": Preset(
        "energies kept in balance, two MLPs",
        "Berthelot, Schumm, Metz 2017",
        "smooth digits; d_real falls, d_fake stays at began_gamma times it",
        TrainConfig(
            arch="autoencoder", loss="began", began_gamma=0.8, began_lambda=0.05, z_dim=64, d_widths=(512, 256), g_norm="batch",
            lr_g=5e-4, lr_d=5e-4, ema=0.999,
        ),
    ),
    "ctgan-like": Preset(
        "the MLPs of CTGAN: dropout 0.5, packs of 10, gradient penalty, batch 500",
        "Xu et al. 2019",
        "for tables; of MNIST coarse digits",
        TrainConfig(
            arch="tabular", loss="wgan", penalty="gp", pack=10, d_dropout=0.5, z_dim=128, batch_size=500,
            g_widths=(256, 256), d_widths=(256, 256), beta1=0.5, beta2=0.9,
        ),
    ),
}  # fmt: skip


def flags(preset: str, config: TrainConfig) -> list[str]:
    """The flags that give `config`, for those fields in which it differs from the preset."""
    words = []
    for name, value in dataclasses.asdict(config).items():
        if value != getattr(PRESETS[preset].config, name):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words
