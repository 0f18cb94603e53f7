"""Curves and histograms as inline SVG that stretches with the page, with labels in HTML, and data for the read-out."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gankern.report.facts import Curve
from gankern.training.pictures import smooth

WIDTH, HEIGHT = 1000, 300  # of the SVG's own units; the page stretches it
MOST_POINTS = 600  # of one curve
NOISY = 100  # points from which a curve is shown with its running mean
COLOURS = 6  # --c0 ... of the style sheet
BINS = 32


class Series(NamedTuple):
    """A colour, a name, and what the read-out says: ys at xs."""

    colour: int
    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def number(value: float) -> str:
    """Four digits; whole numbers with thin spaces."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def curves(title: str, named: dict[int, Curve]) -> str:
    """A chart of curves over the steps, by the numbers of their colours: long ones pale, under their running mean."""
    named = {i: curve for i, curve in named.items() if curve.steps}
    if not named:
        return ""
    x = (min(c.steps[0] for c in named.values()), max(c.steps[-1] for c in named.values()))
    y = _range([v for c in named.values() for v in c.values])
    parts, series = [], []
    for i, curve in named.items():
        raw = _thin(curve.steps, curve.values)
        if len(curve.steps) < NOISY:
            parts.append(_path(*raw, x, y, i))
        else:
            mean = smooth(curve.values, len(curve.values) // 50)
            parts += [_path(*raw, x, y, i, "pale"), _path(*_thin(curve.steps, mean), x, y, i)]
        series.append(Series(i, curve.name, *raw))
    last = "; ".join(f"{c.name} {number(c.values[-1])} at step {number(c.steps[-1])}" for c in named.values())
    return _figure(title, "step", series, parts, x, y, f"{title} over the steps: {last}")


def histogram(title: str, label: str, named: Sequence[tuple[str, Tensor]], words: str) -> str:
    """Densities of several samples over each other, in common bins; the outer bins hold all that lies outside."""
    both = torch.cat([values for _, values in named]).double()
    low, high = both.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64)).tolist()
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    shares = [torch.histogram(v.double().clamp(low, high), edges).hist / len(v) for _, v in named]
    x, y = (low, high), (0.0, 1.04 * max(s.max().item() for s in shares))
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    parts, series = [], []
    for i, ((name, _), share) in enumerate(zip(named, shares, strict=True)):
        corners = edges.repeat_interleave(2).tolist()
        parts.append(_path(corners, [0.0, *share.repeat_interleave(2).tolist(), 0.0], x, y, i, "filled"))
        series.append(Series(i, name, middles, share.tolist()))
    means = ", ".join(f"{name} has mean {number(float(f'{v.mean().item():.3g}'))}" for name, v in named)
    return _figure(title, label, series, parts, x, y, f"Histogram, {label}: {means}", words)


def paths(ways: Tensor, points: Tensor | None) -> str:
    """Ways [P, T, 2] through the plane over data [N, 2], as a square SVG."""
    shown = ways.flatten(0, 1) if points is None else torch.cat([ways.flatten(0, 1), points])
    low, high = shown.amin(0), shown.amax(0)
    middle, half = (low + high) / 2, 0.54 * (high - low).max().clamp_min(1e-6)

    def place(p: Tensor) -> list[list[float]]:
        return ((p - middle) / half * torch.tensor([150.0, -150.0]) + 150.0).tolist()

    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in place(points)) if points is not None else ""
    lines = []
    for i, way in enumerate(ways):
        corners = place(way)
        route = "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
        ends = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.6"/>' for a, b in corners)
        lines.append(f'<g class="c{i % COLOURS}"><path d="M{route}"/>{ends}</g>')
    alt = f"{len(ways)} ways through the plane, each between the samples of two latent vectors"
    return (
        f'<figure class="plane"><svg viewBox="0 0 300 300" role="img" '
        f'aria-label="{alt}"><path class="dots" d="{dots}"/>{"".join(lines)}</svg></figure>'
    )


def _figure(
    title: str,
    label: str,
    series: list[Series],
    parts: list[str],
    x: tuple[float, float],
    y: tuple[float, float],
    alt: str,
    words: str = "",
) -> str:
    keys = "".join(
        f'<span class="key c{one.colour % COLOURS}">{html.escape(one.name)}</span>' for one in series if one.name != title
    )
    grid = [f'<path class="grid" d="M0 {_at(v, y, HEIGHT, True):.1f}H{WIDTH}"/>' for v in _ticks(*y)]
    rows = "".join(f'<span style="top:{_at(v, y, 100, True):.2f}%">{number(v)}</span>' for v in _ticks(*y))
    columns = "".join(f'<span style="left:{_at(v, x, 100):.2f}%">{number(v)}</span>' for v in _ticks(*x))
    table = [[one.name, [_short(v) for v in one.xs], [_short(v) for v in one.ys]] for one in series]
    facts = html.escape(json.dumps({"x": label, "low": x[0], "high": x[1], "series": table}, separators=(",", ":")), quote=True)
    return (
        f'<figure class="chart" data-chart="{facts}"><figcaption>{html.escape(title)}</figcaption><div class="keys">{keys}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{html.escape(alt)}"><div class="rows" aria-hidden="true">{rows}'
        f'</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(grid)}'
        f'{"".join(parts)}</svg><div class="cursor" hidden></div></div><div class="columns" aria-hidden="true">{columns}</div>'
        f'<p class="read" aria-live="polite">{html.escape(words)}</p></figure>'
    )


def _path(xs: Sequence[float], ys: Sequence[float], x: tuple[float, float], y: tuple[float, float], i: int, kind: str = "") -> str:
    points = [f"{_at(a, x, WIDTH):.1f} {_at(b, y, HEIGHT, True):.1f}" for a, b in zip(xs, ys, strict=True)]
    route = "L".join(points) if len(points) > 1 else f"{points[0]}h0"
    return f'<path class="c{i % COLOURS} {kind}" d="M{route}"/>'


def _at(value: float, span: tuple[float, float], size: float, down: bool = False) -> float:
    """Where in [0, size] a value is; the middle, where all are the same."""
    share = (value - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5
    return size * (1.0 - share if down else share)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values reach."""
    low, high = min(values), max(values)
    around = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - around, high + around


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], at most six."""
    if not high > low or not math.isfinite(high - low):
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of a curve: the lowest and the highest of every few."""
    if len(xs) <= MOST_POINTS:
        return list(xs), list(ys)
    width = math.ceil(2 * len(xs) / MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(xs), width):
        among = range(start, min(start + width, len(xs)))
        kept += sorted({min(among, key=ys.__getitem__), max(among, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def _short(value: float) -> float:
    return float(f"{value:.5g}") if not float(value).is_integer() else int(value)
