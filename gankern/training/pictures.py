"""Pictures of samples and of the losses. Pillow and matplotlib are imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gankern.training.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
DATA, FAKE = "#20303c", "#d55e00"  # dark against vermilion, which the colour-blind tell apart
BINS, MOST_COLUMNS, MOST_FRAMES = 40, 12, 100


def to_uint8(samples: Tensor) -> Tensor:
    """[..., C, H, W] in [-1, 1] -> uint8 [..., H, W, C] on the CPU; values outside are clipped."""
    return ((samples.detach().float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def grid(samples: Tensor, columns: int | None = None) -> Tensor:
    """Samples [N, C, H, W] in [-1, 1] in rows of `columns` (None: about square): uint8 [H', W', C]. Cells left over are black."""
    n, channels, height, width = samples.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    cells = torch.zeros(rows * columns, height, width, channels, dtype=torch.uint8)
    cells[:n] = to_uint8(samples)
    return cells.reshape(rows, columns, height, width, channels).transpose(1, 2).reshape(rows * height, columns * width, channels)


def save_png(path: Path, picture: Tensor) -> None:
    """Write uint8 [H, W, 1 or 3] as a PNG."""
    from PIL import Image

    array = picture.numpy()
    with replacing(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, "PNG")


def canvas(width: int, height: int, layout: Any = None) -> Figure:
    """An empty matplotlib figure of so many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def to_picture(figure: Figure) -> Tensor:
    """Render: uint8 [H, W, 3]."""
    canvas: Any = figure.canvas
    canvas.draw()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(*reversed(canvas.get_width_height()), 4)[
        ..., :3
    ]


def plot_losses(path: Path, rows: list[dict[str, float]], title: str, scores: Sequence[str] = ("D(x)", "D(G(z))")) -> None:
    """Write losses.png from rows of log.jsonl: both losses above, the scores below, raw in pale and smoothed in full.

    Args:
        scores: what d_real and d_fake are called; in [0, 1] if it is D that gives them. Nothing: there is no critic to show.
    """
    figure = canvas(990, 715, "constrained")
    top, bottom = figure.subplots(2, 1, sharex=True) if scores else [figure.subplots()] * 2
    curves = [(top, "g_loss", "generator loss", "#d1602b")]
    if scores:
        curves = [(top, "d_loss", "discriminator loss", "#1f5fa8"), *curves]
        curves += [(bottom, "d_real", scores[0], "#1f5fa8"), (bottom, "d_fake", scores[1], "#d1602b")]
    steps = [row["step"] for row in rows]
    window = max(len(rows) // 50, 1)
    for axes, key, label, colour in curves:
        values = [row[key] for row in rows]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, window), ".-" if len(rows) == 1 else "-", color=colour, linewidth=1.8, label=label)
    if scores and scores[0] == "D(x)":
        bottom.axhline(0.5, color="0.6", linewidth=0.8, linestyle="--")
        bottom.set_ylim(0.0, 1.0)
    bottom.set_xlabel("step")
    top.set_title(title, loc="left")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(frameon=False, ncols=2)
    save_png(path, to_picture(figure))


def smooth(values: list[float], window: int) -> list[float]:
    """Running mean of the last `window` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(i - window, 0)]) / (i - max(i - window, 0)) for i in range(1, len(sums))]


def histograms(real: Tensor, fake: Tensor | None, columns: Sequence[str], title: str) -> Tensor:
    """Each column of the tables [N, F] and [M, F] as densities over each other, the first MOST_COLUMNS: uint8 [H, W, 3].

    The bins of a column reach a little beyond the 0.5th and 99.5th percentile of `real`; the outer ones hold all that lies outside.
    """
    shown = min(len(columns), MOST_COLUMNS)
    across = min(shown, 3)
    down = math.ceil(shown / across)
    figure = canvas(240 * across, 150 * down + 60, "constrained")
    figure.suptitle(title + f", {shown} of {len(columns)} columns" * (shown < len(columns)), fontsize=11, fontweight="bold")
    cells = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in cells[shown:]:
        axes.set_axis_off()
    for i, axes in enumerate(cells[:shown]):
        axes.set_title(columns[i][:28], fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        low, high = real[:, i].quantile(torch.tensor([0.005, 0.995], dtype=real.dtype)).tolist()
        around = 0.05 * (high - low) or 0.5
        edges = torch.linspace(low - around, high + around, BINS + 1, dtype=torch.float64)
        axes.stairs(_shares(real[:, i], edges), edges, fill=True, color=DATA, alpha=0.35, label="data")
        if fake is not None:
            axes.stairs(_shares(fake[:, i], edges), edges, color=FAKE, label="generated")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return to_picture(figure)


def _shares(values: Tensor, edges: Tensor) -> Tensor:
    """The share of the finite values [N] that lies in each bin."""
    values = values[values.isfinite()].double().clamp(edges[0], edges[-1])
    return torch.histogram(values, edges).hist / max(len(values), 1)


def animate(path: Path, frames: Sequence[Path]) -> None:
    """Write PNG pictures as an endless GIF of about ten seconds, at most MOST_FRAMES of them, evenly taken; one palette.

    What cannot be read, or has another size than the last one, is left out.
    """
    from PIL import Image

    if len(frames) > MOST_FRAMES:
        frames = [frames[i] for i in torch.linspace(0, len(frames) - 1, MOST_FRAMES).long().tolist()]
    pictures: list[Image.Image] = []
    for frame in reversed(frames):
        with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises on a damaged file
            picture = Image.open(frame, formats=("PNG",))
            if not pictures or picture.size == pictures[0].size:
                pictures.insert(0, picture.convert("RGB"))
    if not pictures:
        return
    ends = pictures[0], pictures[-1]
    palette = Image.new("RGB", (ends[0].width, 2 * ends[0].height))
    palette.paste(ends[0])
    palette.paste(ends[1], (0, ends[0].height))
    palette = palette.quantize(128, Image.Quantize.FASTOCTREE)
    first, *rest = (p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures)
    pause = min(max(10_000 // len(pictures), 60), 500)
    with replacing(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=[*[pause] * len(rest), 2000], loop=0)
