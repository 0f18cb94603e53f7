"""f-GAN: N(mu, sigma) fitted to a mixture of two Gaussians by each of six divergences; the optima are known by quadrature.

Source: Nowozin, Cseke, Tomioka, "f-GAN: training generative neural samplers using variational divergence minimization", NeurIPS
2016, section 2.4 and table 1, which has the optima of the divergences in PUBLISHED.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gankern.models import MLPDiscriminator
from gankern.reproduce.table import Claim, Result, Row, Table, Trial
from gankern.training import TrainConfig, Trainer

LOG2 = math.log(2)
DATA = ((0.33, -1.0, math.sqrt(0.065)), (0.67, 2.0, math.sqrt(2.0)))
TOLERANCE = 0.1


class Normal(nn.Module):
    """z -> mu + sigma z, two parameters: for z of N(0, 1) the law N(mu, sigma)."""

    def __init__(self, mu: float = 0.0, sigma: float = 1.0) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu))
        self.log_sigma = nn.Parameter(torch.tensor(sigma).log())

    def forward(self, z: Tensor) -> Tensor:
        return self.mu + self.log_sigma.exp() * z


class Mixture:
    """Sum of weights w, of normal laws with means m and deviations s: density and quantiles in float64."""

    def __init__(self, *parts: tuple[float, float, float]) -> None:
        self.w, self.m, self.s = torch.tensor(parts, dtype=torch.float64).unbind(1)
        self.x = torch.linspace(-12, 15, 20_001, dtype=torch.float64)
        self.cdf = (self.w * torch.special.ndtr((self.x[:, None] - self.m) / self.s)).sum(1)

    def log_density(self, x: Tensor) -> Tensor:
        gauss = -0.5 * ((x[:, None] - self.m) / self.s).square() - self.s.log() - 0.5 * math.log(2 * math.pi)
        return (self.w.log() + gauss).logsumexp(1)

    def quantiles(self, levels: Tensor) -> Tensor:
        """[n] in (0, 1) -> [n, 1], float32."""
        i = torch.searchsorted(self.cdf, levels).clamp(1, len(self.x) - 1)
        share = (levels - self.cdf[i - 1]) / (self.cdf[i] - self.cdf[i - 1])
        return torch.lerp(self.x[i - 1], self.x[i], share)[:, None].float()

    def samples(self, batches: int, size: int, draws: torch.Generator) -> Tensor:
        """[batches * size, 1], each batch with one sample in each of `size` equally likely intervals."""
        levels = torch.arange(size) + torch.rand(batches, size, generator=draws, dtype=torch.float64)
        return self.quantiles(levels.flatten() / size)

    def sure(self, size: int) -> Tensor:
        """[size, 1]: the middles of these intervals, for integrals."""
        return self.quantiles((torch.arange(size) + 0.5) / size)


def normal(mu: float, sigma: float) -> Mixture:
    return Mixture((1.0, mu, sigma))


PUBLISHED = {
    "kl": {"mu": "1.0100", "sigma": "1.8308", "divergence": "0.2831"},
    "reverse-kl": {"mu": "1.5782", "sigma": "1.6319", "divergence": "0.2480"},
    "pearson": {"mu": "0.5737", "sigma": "1.9274", "divergence": "0.6457"},
    "jensen-shannon": {"mu": "1.3070", "sigma": "1.7542", "divergence": "0.1280"},
}
# name: the divergence's integrand from log p and log q; its smallest value over all N(mu, sigma), and where that is
FITS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float, float]] = {
    "kl": (lambda p, q: p.exp() * (p - q), 0.2831, 1.0100, 1.8307),
    "reverse-kl": (lambda p, q: q.exp() * (q - p), 0.2482, 1.5781, 1.6313),
    "pearson": (lambda p, q: (p.exp() - q.exp()).square() / q.exp(), 0.6458, 0.5736, 1.9273),
    "hellinger": (lambda p, q: ((p / 2).exp() - (q / 2).exp()).square(), 0.1347, 1.3129, 1.7326),
    "jensen-shannon": (
        lambda p, q: p.exp() * (p - torch.logaddexp(p, q) + LOG2) + q.exp() * (q - torch.logaddexp(p, q) + LOG2),
        0.1281,
        1.3068,
        1.7539,
    ),
    "gan": (
        lambda p, q: p.exp() * (p - torch.logaddexp(p, q)) + q.exp() * (q - torch.logaddexp(p, q)),
        0.1281 - 2 * LOG2,
        1.3068,
        1.7539,
    ),
}


def divergence(name: str, p: Mixture, mu: float, sigma: float) -> float:
    """Of p from N(mu, sigma), by the trapezoidal rule."""
    return torch.trapezoid(FITS[name][0](p.log_density(p.x), normal(mu, sigma).log_density(p.x)), p.x).item()


def law(generator: Any) -> tuple[float, float]:
    """mu and sigma of a Normal."""
    return generator.mu.item(), generator.log_sigma.exp().item()


def fit(config: TrainConfig, last: int) -> tuple[Trainer, float, float]:
    """config.steps steps, the last ones at a tenth of the rates: the trainer, and mu and sigma of the averaged generator."""
    torch.manual_seed(config.seed)
    trainer = Trainer(Normal(), MLPDiscriminator((1,), (64, 64), negative_slope=0.0), config)
    p, draws = Mixture(*DATA), torch.Generator().manual_seed(100 + config.seed)
    for step in range(config.steps):
        if step == config.steps - last:
            trainer.opt_g.set_lr(0.1 * config.lr_g)
            trainer.opt_d.set_lr(0.1 * config.lr_d)
        trainer.step(p.samples(config.n_critic, config.batch_size, draws))
    assert trainer.ema is not None
    return trainer, *law(trainer.ema.model)


def trial(config: TrainConfig) -> Trial:
    """mu, sigma, the critic's bound and the divergence of the generator as it is at the end."""
    start = time.process_time()
    trainer, mu, sigma = fit(config, config.steps // 3)
    seconds = time.process_time() - start
    q, p = normal(*law(trainer.generator)), Mixture(*DATA)
    bound = -trainer.critic.discriminator(p.sure(20_000), q.sure(20_000)).value.item()
    name = config.loss.removeprefix("fgan-")
    exact = divergence(name, p, q.m.item(), q.s.item())
    return Trial({"mu": mu, "sigma": sigma, "bound": bound, "divergence": exact}, seconds, [])


def near(results: dict[str, Result]) -> bool:
    return all(
        abs(value - want) <= TOLERANCE
        for name, result in results.items()
        for metric, want in zip(("mu", "sigma"), FITS[name][2:], strict=True)
        for value in result.values(metric)
    )


def below(results: dict[str, Result]) -> bool:
    return all(
        bound <= exact + 0.02
        for result in results.values()
        for bound, exact in zip(result.values("bound"), result.values("divergence"), strict=True)
    )


def draw(path: Path, results: dict[str, Result]) -> None:
    """The data's density, and the fitted ones of the first seed beside the best there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    p = Mixture(*DATA)
    shown = (p.x > -5) & (p.x < 8)
    for ax, (name, result) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, results.items(), strict=True):
        _, _, mu, sigma = FITS[name]
        trial = result.trials[min(result.trials)]
        for law, colour, style, label in (
            (p, "0.7", "-", "data"),
            (normal(mu, sigma), "black", "--", "best normal law"),
            (normal(trial.numbers["mu"], trial.numbers["sigma"]), "#0072b2", "-", "fitted"),
        ):
            ax.plot(p.x[shown], law.log_density(p.x[shown]).exp(), color=colour, linestyle=style, linewidth=1.4, label=label)
        ax.set_title(name, fontsize=9)
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7, loc="upper right")
    figure.savefig(path)


TABLE = Table(
    name="fgan",
    source="Nowozin et al., f-GAN, NeurIPS 2016, table 1",
    setup=(
        "N(mu, sigma) fitted to 0.33 N(-1, var 0.065) + 0.67 N(2, var 2); critic 1-64-64-1 ReLU, 4 critic updates a step, batch "
        "256, the last third of the steps at a tenth of the rates (the paper: tanh, one update, batch 1024). Published is the best "
        f"normal law; by quadrature mu {FITS['hellinger'][2]} and sigma {FITS['hellinger'][3]} for squared Hellinger, and those of "
        "Jensen-Shannon for the GAN's divergence."
    ),
    metrics=("mu", "sigma", "bound", "divergence"),
    rows=tuple(
        Row(
            name,
            TrainConfig(
                loss=f"fgan-{name}",
                z_dim=1,
                n_critic=4,
                batch_size=256,
                lr_g=1e-2,
                lr_d=3e-3,
                ema=0.99,
                steps=700,
            ),
            PUBLISHED.get(name, {}),
        )
        for name in FITS
    ),
    trial=trial,
    claims=(
        Claim(f"mu and sigma within {TOLERANCE} of the optimum, each divergence and seed", near),
        Claim("no critic's bound above the divergence by more than 0.02", below),
    ),
    draw=draw,
    seeds=3,
    full_seeds=10,
)
