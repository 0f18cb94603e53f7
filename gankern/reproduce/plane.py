"""The tables of samples in the plane: PacGAN's ring and grid, the unrolled GAN's ring, the toys of WGAN-GP."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankern import data
from gankern.metrics import ModeCoverage, modes
from gankern.models import sample_latent
from gankern.reproduce._training import train
from gankern.reproduce.table import Claim, Result, Row, Table, Trial, rising
from gankern.training import TrainConfig, Trainer

SAMPLES = 2500
LOOKS = 10


def coverage(config: TrainConfig) -> Trial:
    """Modes, share of high-quality samples and reverse KL at the end; fewest_modes: least of the looks in the second half."""
    dataset = data.load(config.data, seed=config.seed)
    assert dataset.mixture is not None
    centres, std = dataset.mixture

    def look(trainer: Trainer) -> tuple[Tensor, ModeCoverage]:
        rng = torch.Generator().manual_seed(config.seed + 1000)
        samples = trainer.sample(sample_latent(SAMPLES, config.z_dim, config.latent, rng)).cpu()
        return samples, modes(samples, centres, std)

    seen, seconds = train(config, dataset, LOOKS, look)
    last = seen[-1][1]
    numbers = {
        "modes": float(last.found),
        "high_quality": last.high_quality,
        "reverse_kl": last.reverse_kl,
        "fewest_modes": float(min(found.found for _, found in seen[LOOKS // 2 :])),
    }
    return Trial(numbers, seconds, [samples[:1000] for samples, _ in seen])


def draw(path: Path, results: dict[str, Result]) -> None:
    """A line of small pictures for each row: the samples of each seed at the end; of a single seed, at each look."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = {name: _cells(result) for name, result in results.items()}
    columns = max(map(len, cells.values()))
    figure = Figure(figsize=(1.6 * columns + 0.6, 1.75 * len(cells) + 0.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(cells), columns, squeeze=False)
    for line, (name, shown) in zip(axes, cells.items(), strict=True):
        dataset = data.load(results[name].row.config.data, limit=1000)
        reach = 1.25 * dataset.samples.abs().max().item()
        for ax, (title, samples) in zip(line, shown, strict=False):
            ax.scatter(*dataset.samples[:1000].T, s=2, color="0.8", linewidths=0)
            ax.scatter(*samples.T, s=2, color="#0072b2", linewidths=0)
            ax.set_title(title, fontsize=7, pad=2)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path)


def _cells(result: Result) -> list[tuple[str, Tensor]]:
    if len(result.trials) == 1:
        ((_, trial),) = result.trials.items()
        steps = result.row.config.steps
        return [(f"step {steps * (i + 1) // LOOKS}", samples) for i, samples in enumerate(trial.looks)]
    return [(f"seed {seed}: {trial.numbers['modes']:.0f} modes", trial.looks[-1]) for seed, trial in sorted(result.trials.items())]


_PACKS = {1: "GAN", 2: "PacGAN2", 4: "PacGAN4"}


def _pacgan(name: str, source: str, published: dict[int, str], *claims: Claim) -> Table:
    config = TrainConfig(
        data=source, arch="pacgan-toy", z_dim=2, batch_size=100, lr_g=1e-3, lr_d=1e-3, beta1=0.8, steps=3_000, ema=0.0
    )
    return Table(
        name=name,
        source="Lin et al., PacGAN, NeurIPS 2018, table 1",
        setup=(
            f"{source}: generator 4 x 400 with BatchNorm, discriminator 3 maxout layers 200 x 5, Adam (0.8, 0.999), 100 packs a "
            "step. The paper has rates of 1e-4, 400 epochs of 100 000 points, 400 000 steps, and 10 trials, as the full form has; "
            f"the short form has 1e-3. Modes, high-quality share and reverse KL of {SAMPLES} samples."
        ),
        metrics=("modes", "high_quality", "reverse_kl"),
        rows=tuple(
            # As the authors count: 100 packs an update
            Row(_PACKS[pack], dataclasses.replace(config, pack=pack, batch_size=100 * pack), {"modes": found})
            for pack, found in published.items()
        ),
        trial=coverage,
        claims=claims,
        draw=draw,
        seeds=5,
        full_seeds=10,
        full={"steps": 400_000, "lr_g": 1e-4, "lr_d": 1e-4},
    )


_MORE = rising("modes", "GAN", "PacGAN2")
PACGAN_RING = _pacgan("pacgan1-ring", "ring", {1: "6.3±0.5", 2: "7.9±0.1", 4: "7.8±0.1"}, _MORE, rising("modes", "GAN", "PacGAN4"))
PACGAN_GRID = _pacgan(
    "pacgan1-grid",
    "grid",
    {1: "17.3±0.8", 2: "23.8±0.7", 4: "24.8±0.2"},
    _MORE,
    rising("modes", "PacGAN2", "PacGAN4", strictly=False),
)

_UNROLLED = TrainConfig(
    data="unrolled-ring",
    arch="unrolled-toy",
    z_dim=256,
    batch_size=512,
    generator_loss="saturating",  # the paper's game is zero-sum
    lr_g=1e-3,  # the paper's rates are 1e-4, for five times as many steps
    lr_d=1e-3,
    beta1=0.5,
    steps=3_000,
    ema=0.0,
)
UNROLLED_RING = Table(
    name="unrolled-ring",
    source="Metz et al., Unrolled generative adversarial networks, ICLR 2017, section 3.1",
    setup=(
        "Eight Gaussians on a ring, z in 256 dimensions, generator 128-128, discriminator 128; K critic updates are unrolled. "
        "Both rates are 1e-3; the paper's are 1e-4, and the generator's in the authors' notebook 1e-3, for 25 000 steps. "
        "The paper shows pictures: without unrolling the samples hop from mode to mode, with 5 or 10 updates they cover the ring."
    ),
    metrics=("modes", "fewest_modes", "high_quality"),
    rows=tuple(Row(f"unrolled-{k}", dataclasses.replace(_UNROLLED, unroll=k)) for k in (0, 5, 10)),
    trial=coverage,
    claims=(
        rising("modes", "unrolled-0", "unrolled-10"),
        Claim("median modes of unrolled-10 is 8", lambda r: statistics.median(r["unrolled-10"].values("modes")) == 8),
    ),
    draw=draw,
    seeds=3,
    full_seeds=10,
    full={"steps": 25_000},
)

PACKING = Table(
    name="packing-ring",
    source="Lin et al., PacGAN, NeurIPS 2018, section 2, on the ring of Metz et al., ICLR 2017",
    setup=(
        "The networks, ring and settings of unrolled-ring, where the GAN loses the modes in seconds of training, with packs in "
        "place of unrolling; 512 samples a step in each row. No published numbers."
    ),
    metrics=("modes", "fewest_modes", "reverse_kl"),
    rows=tuple(Row(name, dataclasses.replace(_UNROLLED, pack=pack)) for pack, name in _PACKS.items()),
    trial=coverage,
    claims=(_MORE, rising("modes", "PacGAN2", "PacGAN4", strictly=False)),
    draw=draw,
    seeds=5,
    full_seeds=10,
    full={"steps": 25_000},
)

_WGAN_GP = TrainConfig(
    data="8gaussians", arch="wgan-gp-toy", loss="wgan", penalty="gp", penalty_weight=0.1, n_critic=5, z_dim=2, batch_size=256,
    lr_g=1e-4, lr_d=1e-4, beta1=0.5, beta2=0.9, steps=5_000, ema=0.0,
)  # fmt: skip
WGAN_GP_TOYS = Table(
    name="wgan-gp-toys",
    source="Gulrajani et al., Improved training of Wasserstein GANs, NeurIPS 2017, figure 2",
    setup="Generator and critic 3 x 512 ReLU, penalty 0.1, 5 critic updates, batch 256. The paper shows level sets of the critic.",
    metrics=("modes", "high_quality", "reverse_kl"),
    rows=(
        Row("8 Gaussians", dataclasses.replace(_WGAN_GP, steps=10_000)),
        Row("25 Gaussians", dataclasses.replace(_WGAN_GP, data="25gaussians")),
    ),
    trial=coverage,
    claims=(
        Claim("8 Gaussians: all 8 modes at the end of each trial", lambda r: min(r["8 Gaussians"].values("modes")) == 8),
        Claim("8 Gaussians: never fewer in the second half", lambda r: min(r["8 Gaussians"].values("fewest_modes")) == 8),
    ),
    draw=draw,
    seeds=1,
    full_seeds=3,
    full={"steps": 100_000},
)
