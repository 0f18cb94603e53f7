"""Pictures of samples in the plane: generated ones over the data, the critic's surface and its gradient field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gankern.data import Dataset
from gankern.metrics import ModeCoverage
from gankern.training.pictures import DATA, FAKE, canvas, to_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 480, 544  # pixels of a picture
LEFT, TOP, SIDE = 40, 26, 430  # of the square in it
MARGIN = 0.2  # around the data, as a share of their larger extent
FINE, COARSE = 64, 16  # points a side where the critic is asked for its surface, and for its arrows
LEVELS = 12
ROUNDS = 8  # packs over which the score of a point is averaged, for a critic of packs
ARROW, LOW, HIGH = "#51606b", "#ffffff", "#7fb7e6"


class Surface(NamedTuple):
    """A critic's scores of points, float32 [N], and their gradients, float32 [N, 2] (zeros unless asked for); both on the CPU."""

    score: Tensor
    gradient: Tensor


class Plane:
    """Pictures of one run, uint8 [HEIGHT, WIDTH, 3], all with the same limits.

    Args:
        dataset: of points [N, 2].
    """

    count = 2500  # samples in a picture (PacGAN, section 4.1)

    def __init__(self, dataset: Dataset) -> None:
        assert dataset.shape == (2,)
        points = dataset.samples
        self.points = points[torch.linspace(0, len(points) - 1, min(self.count, len(points))).long()]
        self.columns = f"{' × '.join(dataset.table.columns)}, standardised" if dataset.table else ""
        low, high = points.amin(0), points.amax(0)
        middle, half = (low + high) / 2, (0.5 + MARGIN) * (high - low).max().clamp_min(1e-6)
        self.low, self.high = (middle - half), (middle + half)

    def lattice(self, side: int) -> Tensor:
        """Points of the square that is shown: [side * side, 2], the first coordinate running fastest."""
        x, y = (torch.linspace(a, b, side) for a, b in zip(self.low.tolist(), self.high.tolist(), strict=True))
        return torch.cartesian_prod(y, x).flip(1)

    def reals(self) -> Tensor:
        return self._draw(None, "data", self.columns, None)

    def fakes(self, samples: Tensor, step: int, critic: nn.Module | None = None, coverage: ModeCoverage | None = None) -> Tensor:
        """Samples [N, 2] after `step`; with a critic that gives one number a sample (or pack), its surface and arrows."""
        found = self.columns
        if coverage is not None:
            found = f"{coverage.found} of {len(coverage.shares)} modes, {coverage.high_quality:.0%} within 3 s.d."
        fields = None
        if critic is not None:
            fine, coarse = (ask(critic, self.lattice(side), self.points, side == COARSE) for side in (FINE, COARSE))
            fields = None if fine is None or coarse is None else (fine, coarse)
        return self._draw(samples.detach().float().cpu(), f"step {step:,}".replace(",", " "), found, fields)

    def _draw(self, samples: Tensor | None, title: str, found: str, fields: tuple[Surface, Surface] | None) -> Tensor:
        from matplotlib.lines import Line2D

        figure = canvas(WIDTH, HEIGHT)
        axes = figure.add_axes((LEFT / WIDTH, 1 - (TOP + SIDE) / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
        legend = [Line2D([], [], color=DATA, marker="o", markersize=5, linestyle="", label="data")]
        if samples is not None:
            legend.append(Line2D([], [], color=FAKE, marker="o", markersize=5, linestyle="", label="generated"))
        if fields is not None:
            self._critic(figure, axes, *fields)
            legend.append(
                Line2D([], [], color=ARROW, marker=r"$\rightarrow$", markersize=12, linestyle="", label="critic's gradient")
            )
        axes.scatter(self.points[:, 0], self.points[:, 1], s=7, color=DATA, alpha=0.5, linewidths=0, zorder=3)
        if samples is not None:
            axes.scatter(samples[:, 0], samples[:, 1], s=5, color=FAKE, alpha=0.6, linewidths=0, zorder=3)
        axes.set_xlim(self.low[0].item(), self.high[0].item())
        axes.set_ylim(self.low[1].item(), self.high[1].item())
        axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
        axes.tick_params(labelsize=8, length=3, color=ARROW)
        axes.spines[:].set_color(ARROW)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_title(found, loc="right", fontsize=9.5)
        place: Any = {"loc": "lower left", "bbox_to_anchor": (LEFT / WIDTH, 26 / HEIGHT), "borderpad": 0, "borderaxespad": 0}
        figure.legend(handles=legend, ncols=3, frameon=False, fontsize=9, handletextpad=0.3, columnspacing=1.6, **place)
        return to_picture(figure)

    def _critic(self, figure: Figure, axes: Axes, fine: Surface, coarse: Surface) -> None:
        """Bands of the score, from its 2nd to its 98th percentile in the square, with their key; arrows uphill."""
        from matplotlib.colors import LinearSegmentedColormap

        low, high = fine.score.quantile(torch.tensor([0.02, 0.98])).tolist()
        span = max(high - low, 1e-6 * (1.0 + abs(low)))
        levels = [low + span * i / LEVELS for i in range(LEVELS + 1)]
        colours = LinearSegmentedColormap.from_list("critic", [LOW, HIGH])
        x, y = self.lattice(FINE).view(FINE, FINE, 2).unbind(2)
        score = fine.score.view(FINE, FINE)
        bands = axes.contourf(x, y, score, levels, cmap=colours, extend="both")
        if high > low:
            axes.contour(x, y, score, levels, colors="white", linewidths=0.6, linestyles="solid")
        length = coarse.gradient.norm(dim=1, keepdim=True)
        usual = length.quantile(0.9).clamp_min(1e-30)  # longer ones are drawn no longer, or a steep spot would hide the rest
        arrows = 0.9 * (self.high - self.low)[0] / COARSE * coarse.gradient / torch.maximum(length, usual)
        shape: Any = {"width": 0.0028, "headwidth": 4.5, "headlength": 5, "headaxislength": 4.5}
        where = self.lattice(COARSE).unbind(1)
        axes.quiver(*where, *arrows.unbind(1), angles="xy", scale_units="xy", scale=1, pivot="mid", color=ARROW, **shape)
        words: Any = {"fontsize": 9, "verticalalignment": "center"}
        y0 = 14 / HEIGHT
        figure.text((LEFT + 2) / WIDTH, y0, "critic's score C(x)", **words)
        figure.text((LEFT + 206) / WIDTH, y0, f"{low:.3g}", horizontalalignment="right", **words)
        key = figure.add_axes(((LEFT + 214) / WIDTH, 9 / HEIGHT, 130 / WIDTH, 10 / HEIGHT))
        figure.colorbar(bands, cax=key, orientation="horizontal", ticks=[], extendrect=True).outline.set_edgecolor(ARROW)
        figure.text((LEFT + 352) / WIDTH, y0, f"{high:.3g}", **words)


def ask(critic: nn.Module, points: Tensor, others: Tensor, gradients: bool = True) -> Surface | None:
    """A critic's scores of points [N, 2] in evaluation mode, without touching its weights' gradients; the mode is put back.

    A critic of packs (with an attribute `pack`) scores each point among the same few of `others`, averaged over ROUNDS such packs.
    The score of an auto-encoder is minus the mean squared error of its reconstruction.

    Returns:
        None if the critic does not give one finite number a point, or if that depends on the other points.
    """
    pack, device = getattr(critic, "pack", 1), next(critic.parameters()).device
    rounds = ROUNDS if pack > 1 else 1
    if rounds * (pack - 1) > len(others):
        return None
    companions = others[: rounds * (pack - 1)].view(rounds, pack - 1, 2)
    training = critic.training
    critic.eval()
    try:
        with torch.set_grad_enabled(gradients):
            x = points.to(device, copy=True).requires_grad_()
            packs = [torch.cat([x[:, None], c.to(device).expand(len(x), -1, 2)], 1).flatten(0, 1) for c in companions]
            scores = [_scores(critic, p) for p in packs]
            if any(s.shape != (len(x),) for s in scores):
                return None
            first = len(x) // 2
            alone = _scores(critic, packs[0][: first * pack])
            if (alone - scores[0][:first]).abs().max() > 1e-3 * scores[0].std(correction=0) + 1e-5 * alone.abs().max():
                return None
            score = torch.stack(scores).mean(0)
            (gradient,) = torch.autograd.grad(score.sum(), x) if gradients else (torch.zeros_like(x),)
    finally:
        critic.train(training)
    surface = Surface(score.detach().float().cpu(), gradient.float().cpu())
    return surface if all(t.isfinite().all() for t in surface) else None


def _scores(critic: nn.Module, points: Tensor) -> Tensor:
    """[N] of points (or packs of them), high where they are taken for real; [0] if the critic gives something else."""
    out = critic(points)
    if not isinstance(out, Tensor):
        return points.new_zeros(0)
    if out.shape == points.shape:
        return -(out - points).square().mean(1)
    return out.flatten()
