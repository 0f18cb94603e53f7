"""Pictures of samples and of the losses. Pillow and matplotlib are imported when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


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
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, "PNG")


def plot_losses(path: Path, rows: list[dict[str, float]], title: str) -> None:
    """Write losses.png from rows of log.jsonl: both losses above, D(x) and D(G(z)) below, raw in pale and smoothed in full."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    curves = (
        (top, "d_loss", "discriminator loss", "#1f5fa8"),
        (top, "g_loss", "generator loss", "#d1602b"),
        (bottom, "d_real", "D(x)", "#1f5fa8"),
        (bottom, "d_fake", "D(G(z))", "#d1602b"),
    )
    steps = [row["step"] for row in rows]
    window = max(len(rows) // 50, 1)
    for axes, key, label, colour in curves:
        values = [row[key] for row in rows]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values, window), color=colour, linewidth=1.8, label=label)
    bottom.axhline(0.5, color="0.6", linewidth=0.8, linestyle="--")
    bottom.set_ylim(0.0, 1.0)
    bottom.set_xlabel("step")
    top.set_title(title, loc="left")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(frameon=False, ncols=2)
    figure.savefig(path)


def _smooth(values: list[float], window: int) -> list[float]:
    """Running mean of the last `window` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(i - window, 0)]) / (i - max(i - window, 0)) for i in range(1, len(sums))]
