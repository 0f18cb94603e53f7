"""Table: the rows of a published table, how one seed of a row is run, and what must hold; `run` runs and writes it.

Trials are independent: they run in `workers` processes of one thread each, and a trial's numbers do not depend on how many.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gankern
from gankern.training import TrainConfig


class Trial(NamedTuple):
    """One seed of one row: numbers by metric, seconds of training (on a CPU the process's own), samples for the figure, by look."""

    numbers: dict[str, float]
    seconds: float
    looks: list[Tensor]


class Row(NamedTuple):
    """A row of a table: its settings, and what is published for each metric, as it is printed there ("" where nothing is)."""

    name: str
    config: TrainConfig
    published: Mapping[str, str] = {}


@dataclass
class Result:
    """The trials of a row that have been run, by seed."""

    row: Row
    trials: dict[int, Trial] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        return [trial.numbers[metric] for _, trial in sorted(self.trials.items())]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values(metric))


class Claim(NamedTuple):
    """A sentence and the test of it on the results, by row name."""

    words: str
    holds: Callable[[dict[str, Result]], bool]


@dataclass(frozen=True)
class Table:
    """A published table.

    Args:
        name: of the command line.
        source: paper and table.
        setup: what is trained and measured, and what the short form leaves out.
        metrics: the columns.
        rows: with the settings of the short form; `steps` among them.
        seeds: of the short form; the full form takes `full_seeds`.
        full: the settings that differ in the full form, such as steps.
        trial: config -> one Trial; called in a process of its own.
        claims: what must hold.
        draw: (path, results) writes the figure.
    """

    name: str
    source: str
    setup: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    trial: Callable[[TrainConfig], Trial]
    claims: tuple[Claim, ...]
    draw: Callable[[Path, dict[str, Result]], None]
    seeds: int = 1
    full_seeds: int = 1
    full: Mapping[str, Any] = field(default_factory=dict)


def run(
    table: Table,
    out: Path,
    *,
    full: bool = False,
    seeds: int = 0,
    workers: int = 1,
    steps: int = 0,
    report: Callable[[str], None] = print,
) -> bool:
    """Run a table and write NAME.json, NAME.md and NAME.png under `out`.

    Args:
        full: the published length and number of trials.
        seeds: trials a row; 0: the table's.
        workers: processes, >= 1.
        steps: of each trial; 0: the table's.
        report: gets a line for each trial.

    Returns:
        Whether every claim holds.
    """
    seeds = seeds or (table.full_seeds if full else table.seeds)
    changes = {**(table.full if full else {}), **({"steps": steps} if steps else {})}
    rows = [row._replace(config=replace(row.config, **changes)) for row in table.rows]
    results = {row.name: Result(row) for row in rows}
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        tasks = {
            pool.submit(table.trial, replace(row.config, seed=seed)): (row.name, seed) for seed in range(seeds) for row in rows
        }
        for done in as_completed(tasks):
            name, seed = tasks[done]
            trial = results[name].trials[seed] = done.result()
            numbers = ", ".join(f"{metric} {value:.4g}" for metric, value in trial.numbers.items())
            report(f"{table.name} {name} seed {seed}: {numbers} ({trial.seconds:.0f} s)")
    verdict = write(table, results, out, full, time.perf_counter() - start, workers)
    for claim in verdict["claims"]:
        report(f"{table.name}: {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")
    return bool(verdict["pass"])


def write(table: Table, results: dict[str, Result], out: Path, full: bool, seconds: float, workers: int) -> dict[str, Any]:
    """NAME.json, NAME.md and NAME.png; returns what the JSON holds."""
    content: dict[str, Any] = {
        "table": table.name,
        "source": table.source,
        "setup": table.setup,
        "form": "full" if full else "short",
        "rows": [
            {
                "name": name,
                "steps": result.row.config.steps,
                "published": dict(result.row.published),
                "own": {metric: result.values(metric) for metric in table.metrics},
                "seeds": sorted(result.trials),
                "seconds": [round(trial.seconds, 1) for _, trial in sorted(result.trials.items())],
            }
            for name, result in results.items()
        ],
        "claims": [{"claim": claim.words, "holds": bool(claim.holds(results))} for claim in table.claims],
        "seconds": round(seconds, 1),
        "workers": workers,
        "machine": {
            "system": platform.system(),
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {"gankern": gankern.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    content["pass"] = all(claim["holds"] for claim in content["claims"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{table.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / f"{table.name}.md").write_text(markdown(table, content))
    table.draw(out / f"{table.name}.png", results)
    return content


def markdown(table: Table, content: dict[str, Any]) -> str:
    """The page of a table: its own numbers beside the published ones."""
    head = ["row", "steps", *(words for metric in table.metrics for words in (metric, "published")), "seconds a trial"]
    lines = [f"# {table.name}", "", f"{table.source}. {table.setup}", "", _line(head), _line(["---"] * len(head))]
    for row in content["rows"]:
        cells = [cell for m in table.metrics for cell in (spread(row["own"][m]), row["published"].get(m, "") or "-")]
        lines.append(_line([row["name"], str(row["steps"]), *cells, f"{statistics.fmean(row['seconds']):.0f}"]))
    trials = len(content["rows"][0]["seeds"])
    lines += ["", f"Mean ± sample standard deviation over {trials} trials." if trials > 1 else "One trial a row.", ""]
    lines += [f"- {'holds' if claim['holds'] else '**does not hold**'}: {claim['claim']}" for claim in content["claims"]]
    minutes, machine = content["seconds"] / 60, content["machine"]
    processes = "one process" if content["workers"] == 1 else f"{content['workers']} processes"
    lines += ["", f"{minutes:.1f} minutes in {processes} of one thread, {machine['device']}, {machine['system']}, "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in content["versions"].items()) + "."
    lines += ["", f"![{table.name}]({table.name}.png)", ""]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """ "7.80 ± 0.45", or the value alone."""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rising(metric: str, *names: str, strictly: bool = True) -> Claim:
    """The rows' means of this metric rise in this order."""
    sign = "<" if strictly else "<="

    def holds(results: dict[str, Result]) -> bool:
        means = [results[name].mean(metric) for name in names]
        return all(a < b if strictly else a <= b for a, b in itertools.pairwise(means))

    return Claim(f"mean {metric}: {f' {sign} '.join(names)}", holds)
