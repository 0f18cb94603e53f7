"""The tables on stacked MNIST: a thousand modes, counted by the digit classifier on each channel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankern import data
from gankern.metrics.digits import load_digit_classifier
from gankern.models import sample_latent
from gankern.reproduce._training import train
from gankern.reproduce.table import Result, Row, Table, Trial, rising
from gankern.training import TrainConfig, Trainer, pictures

SAMPLES = 26_000


@torch.no_grad()
def coverage(samples: Tensor) -> tuple[int, float]:
    """How many of the 1000 triples of digits occur in samples [N, 3, 28, 28], and KL(samples || uniform) in nats."""
    net = load_digit_classifier(samples.device)
    calls = [net(part.flatten(0, 1)[:, None]).argmax(1).view(-1, 3) for part in samples.split(1000)]
    triples = (torch.cat(calls) * torch.tensor([100, 10, 1], device=samples.device)).sum(1)  # CUDA has no product of integers
    shares = torch.bincount(triples, minlength=1000).double() / len(samples)
    return int((shares > 0).sum()), torch.xlogy(shares, 1000 * shares).sum().item()


def trial(config: TrainConfig) -> Trial:
    def look(trainer: Trainer) -> tuple[Tensor, tuple[int, float]]:
        rng = torch.Generator().manual_seed(config.seed + 1000)
        samples = trainer.sample(sample_latent(SAMPLES, config.z_dim, config.latent, rng))
        return samples[:16].cpu(), coverage(samples)

    ((samples, (found, kl)),), seconds = train(config, data.load(config.data, seed=config.seed), 1, look)
    return Trial({"modes": float(found), "kl": kl}, seconds, [samples])


def draw(path: Path, results: dict[str, Result]) -> None:
    """Sixteen samples of the first seed of each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.1 * len(results)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(results), 1, squeeze=False)
    for (ax,), (name, result) in zip(axes, results.items(), strict=True):
        first = result.trials[min(result.trials)]
        ax.imshow(pictures.grid(first.looks[-1], 16).numpy(), interpolation="nearest")
        ax.set_title(f"{name}: {first.numbers['modes']:.0f} modes", fontsize=8, loc="left", pad=2)
        ax.set_axis_off()
    figure.savefig(path)


_TINY = TrainConfig(
    data="stacked-mnist",
    arch="dcgan",
    d_norm="batch",
    conv_width=16,
    d_conv_width=4,
    batch_size=64,
    lr_g=2e-4,
    lr_d=2e-4,
    steps=4_000,
)
STACKED_MNIST_TINY = Table(
    name="stacked-mnist-tiny",
    source="Lin et al., PacGAN, NeurIPS 2018, table 3",
    setup=(
        f"Small DCGAN, the discriminator a quarter as wide as the generator; modes and KL of {SAMPLES} samples by a classifier on "
        "each channel (99.5 % on MNIST's test digits). Ours are the widths, 16 and 4 channels at half the image's side, and the "
        "DCGAN's settings; the authors' code has batches of 128 packs, z in 256 dimensions, rates of 1e-4 (generator) and 2e-4, "
        "beta2 0.99, 500 000 steps and 50 trials."
    ),
    metrics=("modes", "kl"),
    rows=(
        Row("DCGAN", _TINY, {"modes": "78.5±17.6", "kl": "5.21"}),
        Row("PacDCGAN2", dataclasses.replace(_TINY, pack=2, batch_size=128), {"modes": "484.5", "kl": "2.61"}),
        Row("PacDCGAN4", dataclasses.replace(_TINY, pack=4, batch_size=256), {"modes": "667.4", "kl": "1.81"}),
    ),
    trial=trial,
    claims=(rising("modes", "DCGAN", "PacDCGAN2", "PacDCGAN4"),),
    draw=draw,
    seeds=2,
    full_seeds=10,
    full={"steps": 50_000},
)

_R3GAN = TrainConfig(
    data="stacked-mnist", arch="dcgan", conv_width=32, batch_size=64, loss="relativistic", penalty="r1r2", penalty_weight=0.5,
    beta1=0.0, beta2=0.99, lr_g=2e-4, lr_d=2e-4, steps=4_000,
)  # fmt: skip
R3GAN = Table(
    name="r3gan1",
    source="Huang et al., The GAN is dead; long live the GAN!, NeurIPS 2024, table 1",
    setup=(
        "Relativistic pairs against the plain loss, with R1 and R2 (gamma 1), no normalisation. Ours are plain DCGAN networks of "
        f"32 channels, not the paper's ResNets. Modes and KL of {SAMPLES} samples by a classifier on each channel."
    ),
    metrics=("modes", "kl"),
    rows=(
        Row("RpGAN + R1 + R2", _R3GAN, {"modes": "1000", "kl": "0.08"}),
        Row("GAN + R1 + R2", dataclasses.replace(_R3GAN, loss="non-saturating"), {"modes": "693", "kl": "0.93"}),
    ),
    trial=trial,
    claims=(rising("modes", "GAN + R1 + R2", "RpGAN + R1 + R2"),),
    draw=draw,
    seeds=1,
    full_seeds=3,
    full={"steps": 50_000},
)
