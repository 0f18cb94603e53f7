"""How a step's time grows, and what many GPUs would make of it: python -m bench.scaling [--device cpu] [--json F] [--markdown F]
[--plot F] [--measured RUN.json ...]

One setting is changed at a time: the batch of preset gan; width and depth of its hidden layers; the critic updates of preset
wgan-gp. Rivals are built and timed in turn as in bench_train_step.py, and pass its gate at batch 16 first. Before a point is
measured its time is predicted from the point before, by the products that it makes; one that would take longer than --point-seconds
is left out, and the table says so.

For the batch a line t = a + b * batch is fitted, relative errors least: a is what a step costs however few samples it has (calls,
and the passes of Adam over the weights), b what each sample costs; at batch a / b the two are equal.

The model of many GPUs is arithmetic, no measurement. Each GPU keeps its batch, and the float32 gradients of each update are reduced
over a ring: 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency seconds (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", JPDC 2009). Overlap hides at most what runs beside backward passes, BACKWARD of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.bench_train_step import BATCHES, SHAPE, SHAPES, TrainStep
from bench.report import AUTOMATIC, TRAIN_STEP, duration, machine_lines, rows, table_line
from bench.rivals import networks
from bench.run import circumstances
from bench.support import Settings, alternate, calls_per_sample, check, quartiles
from gankern.training import PRESETS

TUNED = "eager-tuned"
GATE_BATCH = 16
ROUNDS = (3, 15)
BACKWARD = 2 / 3  # of a step's products are made by backward passes

Point = dict[str, Any]


class Axis(NamedTuple):
    """One setting and its values; `changes(value)` are settings of TrainConfig, or {"batch": value}."""

    title: str
    preset: str
    values: tuple[int, ...]

    def changes(self, value: int) -> dict[str, Any]:
        if self.title == "batch":
            return {"batch": value}
        if self.title == "critic updates":
            return {"n_critic": value}
        width, depth = (value, 3) if self.title == "width" else (512, value)
        return {"g_widths": (width,) * depth, "d_widths": (width,) * depth}


AXES = (
    Axis("batch", "gan", (16, 64, 256, 1024, 4096, 16384)),
    Axis("width", "gan", (128, 256, 512, 1024, 2048, 4096)),
    Axis("depth", "gan", (2, 3, 4, 6, 8)),
    Axis("critic updates", "wgan-gp", (1, 2, 5, 10)),
)


# --- measuring ---------------------------------------------------------------------------------------------------------------


def sweep(axis: Axis, device: torch.device, rivals: Sequence[str], limit: float) -> list[Point]:
    """A point a value and rival; `skipped` says why one has no time."""
    points: list[Point] = []
    rate = 0.0  # seconds a flop of the slowest rival, at the value before
    for value in axis.values:
        changes = {"batch": 64, **axis.changes(value)}
        group = TrainStep(Settings(device), axis.preset, **changes)
        point = {"axis": axis.title, "value": value, "preset": axis.preset, "flops": group.work.flops}
        predicted = rate * group.work.flops * len(rivals) * (ROUNDS[0] + 4)
        if predicted > limit:
            reason = f"would take about {predicted:.0f} s, more than {limit:g} s"
            points += [{**point, "rival": rival, "skipped": reason} for rival in rivals]
            continue
        small = TrainStep(Settings(device), axis.preset, **{**changes, "batch": GATE_BATCH})
        calls, inner, total = {}, {}, 0.0
        with group.context(AUTOMATIC):
            for rival in rivals:
                check(small, rival)
                calls[rival] = group.build(rival)
                inner[rival], took = calls_per_sample(calls[rival], device)
                total += inner[rival] * took
            rounds = max(ROUNDS[0], min(ROUNDS[1], int(limit / 2 / total)))
            samples = alternate(calls, rounds, inner, device=device)
        for rival in rivals:
            low, median, high = quartiles(samples[rival])
            points.append({**point, "rival": rival, "median": median, "iqr": high - low, "rounds": rounds})
        rate = max(statistics.median(s) for s in samples.values()) / group.work.flops
    return points


def fit(values: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * value with the least sum of squared relative errors; of two values or more."""
    x, t = np.asarray(values, dtype=float), np.asarray(seconds, dtype=float)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], axis=1), np.ones_like(t), rcond=None)
    return float(a), float(b)


def fits(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """rival -> (a, b) of the batch axis."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for p in points:
        if p["axis"] == "batch" and "median" in p:
            x, t = found.setdefault(p["rival"], ([], []))
            x.append(p["value"])
            t.append(p["median"])
    return {rival: fit(x, t) for rival, (x, t) in found.items() if len(x) > 1}


# --- many GPUs ---------------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """GPUs in the ring; bytes/s that each sends in one direction; seconds a message."""

    gpus: int
    bandwidth: float
    latency: float


def ring(bytes_: float, link: Link) -> float:
    """Seconds of one all-reduce."""
    n = link.gpus
    return 2 * (n - 1) / n * bytes_ / link.bandwidth + 2 * (n - 1) * link.latency


def reducing(critic: int, generator: int, n_critic: int, link: Link) -> float:
    """Seconds that all all-reduces of a step take, one an update; sizes in parameters."""
    return n_critic * ring(4 * critic, link) + ring(4 * generator, link)


def efficiency(step: float, reduce: float, overlap: bool) -> float:
    """The speed of each GPU beside others, over its speed alone: `step` and `reduce` in seconds."""
    return step / (step + max(0.0, reduce - BACKWARD * step if overlap else reduce))


def parameters(preset: str) -> tuple[int, int, int]:
    """(of the critic, of the generator, critic updates a step)."""
    config = PRESETS[preset].config
    generator, critic = networks(preset, config, SHAPES.get(preset, SHAPE), ours=False)
    return sum(p.numel() for p in critic.parameters()), sum(p.numel() for p in generator.parameters()), config.n_critic


def fastest_steps(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(preset, "dtype batch") -> seconds of the fastest row of ours, in JSONs of bench_train_step."""
    found: dict[tuple[str, str], float] = {}
    for row in (row for run in runs for row in rows(run) if row["file"] == TRAIN_STEP and row["rival"].startswith(AUTOMATIC)):
        preset, _, size = row["group"].partition(" ")
        found[preset, size] = min(row["median"], found.get((preset, size), row["median"]))
    return found


# --- tables and plot -----------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    points = result["points"]
    rivals = list(dict.fromkeys(p["rival"] for p in points))
    lines = ["# Scaling", "", *machine_lines(result), "", "Median time of a step, in brackets its interquartile range over it.", ""]
    for title in dict.fromkeys(p["axis"] for p in points):
        here = [p for p in points if p["axis"] == title]
        lines += [f"## {title} (preset {here[0]['preset']})", ""]
        lines += [table_line(title, *rivals, "GFLOP"), table_line(*["---"] * (len(rivals) + 2))]
        for value in dict.fromkeys(p["value"] for p in here):
            found = {p["rival"]: p for p in here if p["value"] == value}
            lines.append(table_line(str(value), *(cell(found[r]) for r in rivals), f"{found[rivals[0]]['flops'] / 1e9:.3g}"))
        lines.append("")
        if title == "batch" and result["fits"]:
            for rival, (a, b) in result["fits"].items():
                equal = f"{max(0, round(a / b)):,}" if b > 0 else "none"
                lines.append(f"- {rival}: {duration(max(a, 0.0))} + {duration(max(b, 0.0))} a sample; equal at batch {equal}")
            lines.append("")
    return "\n".join([*lines, *many_gpus(result["links"], result["steps"]), ""])


def cell(point: Point) -> str:
    if "skipped" in point:
        return f"skipped: {point['skipped']}"
    return f"{duration(point['median'])} ({point['iqr'] / point['median']:.0%})"


def many_gpus(links: Sequence[Sequence[float]], steps: Sequence[Sequence[Any]]) -> list[str]:
    """The model's tables. steps: (preset, size, seconds) of measured steps."""
    made = [Link(int(n), bandwidth, latency) for n, bandwidth, latency in links]
    assumed = "; ".join(f"{k.gpus} GPUs: {k.bandwidth / 1e9:g} GB/s, {k.latency * 1e6:g} us a message" for k in made)
    lines = ["## Many GPUs (a model, not a measurement)", "", f"Assumed links: {assumed}.", ""]
    heads = [f"{k.gpus} GPUs: {what}" for k in made for what in ("all-reduces", "step for 90 %")]
    lines += [table_line("preset", "MB a step", *heads), table_line(*["---"] * (len(heads) + 2))]
    sizes = {preset: parameters(preset) for preset in BATCHES}
    for preset, (critic, generator, n) in sizes.items():
        seconds = [reducing(critic, generator, n, link) for link in made]
        cells = [duration(s) for reduce in seconds for s in (reduce, 9 * reduce)]
        lines.append(table_line(preset, f"{4e-6 * (n * critic + generator):.1f}", *cells))
    lines += ["", "step for 90 %: the time alone from which on a GPU keeps 90 % of its speed without any overlap.", ""]
    if steps:
        heads = [f"{k.gpus} GPUs, {what}" for k in made for what in ("no overlap", "overlap")]
        lines += [table_line("measured step", "alone", *heads), table_line(*["---"] * (len(heads) + 2))]
        for preset, size, alone in steps:
            shares = [efficiency(alone, reducing(*sizes[preset], link), o) for link in made for o in (False, True)]
            lines.append(table_line(f"{preset} {size}", duration(alone), *(f"{share:.0%}" for share in shares)))
        lines.append("")
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Time of a step against each setting, both axes logarithmic; the fitted line dashed."""
    from matplotlib.figure import Figure

    points = [p for p in result["points"] if "median" in p]
    titles, rivals = (list(dict.fromkeys(p[key] for p in points)) for key in ("axis", "rival"))
    figure = Figure(figsize=(3.6 * len(titles), 3.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False).flat, titles, strict=True):
        for i, rival in enumerate(rivals):
            here = [(p["value"], 1e3 * p["median"]) for p in points if (p["axis"], p["rival"]) == (title, rival)]
            axes.plot(*zip(*here, strict=True), color=f"C{i}", marker="o^sv"[i % 4], linewidth=1.6, label=rival)
            if title == "batch" and rival in result["fits"]:
                a, b = result["fits"][rival]
                axes.plot([x for x, _ in here], [1e3 * (a + b * x) for x, _ in here], color=f"C{i}", linestyle="--", linewidth=1)
        values = sorted({p["value"] for p in points if p["axis"] == title})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(values, [str(v) for v in values], rotation=45)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("ms a step (dashed: a + b * batch)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rivals), frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axis", nargs="+", choices=[a.title for a in AXES], default=[a.title for a in AXES])
    parser.add_argument("--rivals", nargs="+", default=[TUNED, AUTOMATIC], help="rows of bench_train_step.py")
    parser.add_argument("--point-seconds", type=float, default=60.0, help="leave out points that would take longer")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s that a GPU sends to one of its 8 (default: 450, assumed)")
    parser.add_argument("--network", type=float, default=400.0, help="Gb/s of each GPU's network link (default: 400, assumed)")
    parser.add_argument("--latency", type=float, nargs=2, default=(3.0, 10.0), help="us a message: NVLink, network (assumed)")
    parser.add_argument(
        "--measured", nargs="+", type=Path, default=[], help="JSONs of bench_train_step.py on one GPU, for the model"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    device, points = torch.device(options.device), []
    runs = [json.loads(path.read_text()) for path in options.measured]
    for axis in AXES:
        if axis.title in options.axis:
            points += sweep(axis, device, options.rivals, options.point_seconds)
    result = {
        **circumstances(device),
        "points": points,
        "fits": fits(points),
        "links": [(8, options.nvlink * 1e9, options.latency[0] * 1e-6), (64, options.network / 8 * 1e9, options.latency[1] * 1e-6)],
        "steps": [(preset, size, seconds) for (preset, size), seconds in fastest_steps(runs).items()],
    }
    text = markdown(result)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
