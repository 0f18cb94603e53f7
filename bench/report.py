"""Tables and a plot from the JSON of pytest-benchmark, or of `gankern bench`: `python -m bench.report run.json ...
[--markdown FILE] [--plot FILE] [--compact FILE]`.

A row is a dict with file, group, rival, median and iqr (seconds), and the entries of extra_info that support.py writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

EAGER, AUTOMATIC = "eager", "gankern"
TRAIN_STEP = "train_step"  # the file whose groups are "preset dtype batch"
LOSS = 0.95  # a ratio to eager under this is marked
BEATEN = 0.97  # and a ratio to the best rival under this is listed
FACTS = ("gpu", "driver", "cuda", "torch", "triton", "gankern", "compiler", "threads", "cpu_capability")

Row = dict[str, Any]


def rows(run: dict[str, Any]) -> list[Row]:
    """The rows of one JSON of pytest-benchmark."""
    return [
        {
            "file": b["group"].partition(" ")[0],
            **b["params"],
            "median": b["stats"]["median"],
            "iqr": b["stats"]["iqr"],
            **b["extra_info"],
        }
        for b in run["benchmarks"]
    ]


def by_group(all_rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(file, group) -> rival -> row, in the order of the rows."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in all_rows:
        found.setdefault((row["file"], row["group"]), {})[row["rival"]] = row
    return found


def duration(seconds: float) -> str:
    """Three figures and a unit."""
    value, unit = next((seconds * k, u) for k, u in ((1e6, "us"), (1e3, "ms"), (1.0, "s")) if seconds * k < 1000 or u == "s")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def ratio(row: Row) -> str:
    return f"{row['ratio_to_eager']:.2f}x{' LOSS' if row['ratio_to_eager'] < LOSS else ''}"


def short_table(all_rows: Sequence[Row], limit: int = 0) -> list[str]:
    """A line a group: eager's median, and every rival's ratio to it; the smallest ratio of the automatic choice first.

    Losses are marked; a forced backend may lose without harm, so only rivals that a user gets by default count for the order.
    """
    groups = sorted(by_group(all_rows).items(), key=lambda item: item[1].get(AUTOMATIC, {}).get("ratio_to_eager", float("inf")))
    names = list(dict.fromkeys(rival for _, found in groups for rival in found if rival != EAGER))
    names.sort(key=lambda n: (n != AUTOMATIC, not n.startswith(AUTOMATIC)))
    lines = [("group", "eager", *names)]
    for (file, group), found in groups[: limit or None]:
        eager = duration(found[EAGER]["median"]) if EAGER in found else "-"
        lines.append((f"{file} {group}", eager, *(ratio(found[n]) if n in found else "-" for n in names)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(groups) - limit if limit else 0
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines] + (
        [f"... and {left} more groups"] if left > 0 else []
    )


def counts(all_rows: Sequence[Row]) -> str:
    """One line about the automatic choice, and how far the figures can be trusted."""
    ratios = [row["ratio_to_eager"] for row in all_rows if row["rival"] == AUTOMATIC]
    if not ratios:
        return "no row of the automatic choice"
    low = sum(r < LOSS for r in ratios)
    spread = statistics.median(row["iqr"] / row["median"] for row in all_rows)
    return (
        f"automatic choice: {len(ratios)} groups, {low} below {LOSS}x eager, least {min(ratios):.2f}x, most {max(ratios):.2f}x; "
        f"half of all rows spread less than {spread:.0%} (IQR over median)"
    )


def beaten(all_rows: Sequence[Row]) -> list[str]:
    """A line for each group in which something else than gankern is faster than the automatic choice."""
    lines = []
    for (file, group), found in by_group(all_rows).items():
        others = [row for name, row in found.items() if not name.startswith(AUTOMATIC)]
        if AUTOMATIC in found and others:
            best = min(others, key=lambda row: row["median"])
            share = best["median"] / found[AUTOMATIC]["median"]
            if share < BEATEN:
                lines.append(f"{file} {group}: {AUTOMATIC} has {share:.2f}x the speed of {best['rival']}")
    return lines


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Everything: the machine, then a table for each file with a line a group; each cell is a median and its ratio to eager."""
    lines = ["# Bench results", "", *machine_lines(runs[0]), ""]
    for run in runs:
        if machine_lines(run)[:-1] != machine_lines(runs[0])[:-1]:
            raise ValueError("report: runs must come from one machine and one version, got several")
    groups = by_group(row for run in runs for row in rows(run))
    for file in dict.fromkeys(file for file, _ in groups):
        here = {group: found for (f, group), found in groups.items() if f == file}
        names = list(dict.fromkeys(rival for found in here.values() for rival in found))
        extra = [title for title, key in COLUMNS if any(key in found.get(AUTOMATIC, {}) for found in here.values())]
        lines += [
            f"## {file}",
            "",
            table_line("group", *names, "IQR", *extra),
            table_line(*["---"] * (len(names) + len(extra) + 2)),
        ]
        for group, found in here.items():
            cells = [markdown_cell(found[n]) if n in found else "" for n in names]
            spread = max(row["iqr"] / row["median"] for row in found.values())
            values = [column(found.get(AUTOMATIC, {}), key) for title, key in COLUMNS if title in extra]
            lines.append(table_line(group, *cells, f"{spread:.0%}", *values))
        if any("extra_memory_bytes" in row for found in here.values() for row in found.values()):
            lines += ["", table_line("group", *names), table_line(*["---"] * (len(names) + 1))]
            lines += [table_line(group, *(share_and_memory(found.get(n, {})) for n in names)) for group, found in here.items()]
        lines.append("")
    return "\n".join([*lines, LEGEND, ""])


COLUMNS = (("images/s", "images_per_s"), ("GB/s", "gb_per_s"), ("of floor", "share_of_floor"))
LEGEND = (
    "Cells: median time of a call, and eager's median over it (above 1: faster than eager); **bold**: below "
    f"{LOSS}. IQR: the widest interquartile range of the line, over its median. The last columns are of `{AUTOMATIC}`, the "
    "automatic choice: bytes that the work must move over its time, and the time that the machine's measured copy bandwidth and "
    "matrix product rate allow over its time (above 100 %: the data came from caches). A second table: of each rival the share "
    "of the floor, and the memory that a call takes at its peak above what stays (weights, gradients, averages)."
)


def share_and_memory(row: Row) -> str:
    parts = [column(row, "share_of_floor")]
    if "extra_memory_bytes" in row:
        parts.append(f"{row['extra_memory_bytes'] / 2**20:.1f} MiB")
    return ", ".join(filter(None, parts))


def machine_lines(run: dict[str, Any]) -> list[str]:
    """What was measured on, as a list; its last line is the date."""
    info = run["machine_info"]
    facts = {key: info["gankern"].get(key) for key in FACTS}
    cpu = f"- CPU: {info['cpu'].get('brand_raw', info['machine'])}, {info['cpu'].get('count', '?')} cores, {info['system']}"
    return [
        cpu,
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        f"- python: {info['python_version']}",
        f"- commit: {run['commit_info'].get('id', 'unknown')}{' with changes' * bool(run['commit_info'].get('dirty'))}",
        f"- date: {run['datetime'][:10]}",
    ]


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_cell(row: Row) -> str:
    if row["rival"] == EAGER:
        return duration(row["median"])
    value = f"{row['ratio_to_eager']:.2f}x"
    return f"{duration(row['median'])} ({f'**{value}**' if row['ratio_to_eager'] < LOSS else value})"


def column(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    return f"{value:.0%}" if key == "share_of_floor" else f"{value:,.{1 if value < 100 else 0}f}"


def compact(runs: Sequence[dict[str, Any]]) -> str:
    """One JSON that pytest-benchmark can still compare with: without the single samples, a line a row."""
    head = {key: value for key, value in runs[0].items() if key != "benchmarks"}
    benchmarks = [b | {"stats": {k: v for k, v in b["stats"].items() if k != "data"}} for run in runs for b in run["benchmarks"]]
    body = ",\n".join(json.dumps(b) for b in benchmarks)
    return json.dumps(head)[:-1] + ', "benchmarks": [\n' + body + "\n]}\n"


def plot(all_rows: Sequence[Row], path: Path) -> None:
    """Speed-up over eager against batch size, a panel a preset, of the rows of bench_train_step.

    Raises:
        ValueError: there is none.
        ImportError: no matplotlib.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in all_rows:
        if row["file"] == TRAIN_STEP:
            preset, dtype, batch = row["group"].split()
            panel = panels.setdefault(preset if dtype == "fp32" else f"{preset} {dtype}", {})
            panel.setdefault(row["rival"], {})[int(batch)] = row["ratio_to_eager"]
    if not panels:
        raise ValueError(f"a plot needs rows of {TRAIN_STEP}, got none")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(n for panel in panels.values() for n in panel))
    names.sort(key=lambda n: (n != EAGER, n.startswith(AUTOMATIC), n))
    styles = {n: (f"C{i}", "o^svDPX*"[i % 8]) for i, n in enumerate(n for n in names if n != EAGER)}
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.4 * across, 3.0 * down + 0.7), layout="constrained")
    lines: dict[str, Any] = {}
    for axes, (title, panel) in zip(figure.subplots(down, across, squeeze=False).flat, panels.items(), strict=False):
        lines[EAGER] = axes.axhline(1.0, color="black", linewidth=1)
        for name in styles.keys() & panel.keys():
            color, marker = styles[name]
            points = sorted(panel[name].items())
            lines[name] = axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, linewidth=1.6)[0]
        sizes = sorted({batch for points in panel.values() for batch in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axes.set_ylim(0, 1.08 * max(1.2, *(value for points in panel.values() for value in points.values())))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("batch size")
        axes.set_ylabel("speed-up over eager")
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.legend([lines[n] for n in names], names, loc="outside lower center", ncols=min(len(names), 2 * across), frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", nargs="+", type=Path, help="files of --benchmark-json, of one machine")
    parser.add_argument("--markdown", type=Path, help="write the full tables here")
    parser.add_argument("--plot", type=Path, help="draw the training step's speed-up against batch size here (.png, .svg)")
    parser.add_argument("--compact", type=Path, help="write one JSON of all runs here, without the single samples")
    parser.add_argument("--limit", type=int, default=0, help="print only so many groups, the worst ones; 0: all")
    options = parser.parse_args(argv)
    try:
        runs = [json.loads(path.read_text()) for path in options.json]
        all_rows = [row for run in runs for row in rows(run)]
        if options.markdown:
            options.markdown.write_text(markdown(runs))
        if options.plot:
            plot(all_rows, options.plot)
        if options.compact:
            options.compact.write_text(compact(runs))
    except (OSError, KeyError, ValueError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print("\n".join([*short_table(all_rows, options.limit), counts(all_rows), *beaten(all_rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
