"""Benches without pytest, for `gankern bench`: which groups there are, measuring them, and a JSON as pytest-benchmark's."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import bench_train_step
from bench.report import TRAIN_STEP
from bench.support import Session, Settings, extra_info, machine, quartiles

HERE = Path(__file__).parent
OPS = tuple(sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py") if p.stem != f"bench_{TRAIN_STEP}"))
PRESETS = tuple(bench_train_step.BATCHES)


def run(
    settings: Settings, presets: Sequence[str], ops: Sequence[str], sizes: Sequence[int], say: Callable[[str], None]
) -> tuple[Session, list[str]]:
    """Measure the training step of these presets, at these batch sizes or the usual ones, then these ops.

    Returns:
        The session, and a line for each rival that failed its gate.
    """
    session, failures = Session(settings), []
    for group in bench_train_step.groups(settings, presets, sizes):
        session.groups[TRAIN_STEP, group.name] = group
    for op in ops:
        for group in importlib.import_module(f"bench.bench_{op}").groups(settings):
            session.groups[op, group.name] = group
    for number, ((file, name), group) in enumerate(session.groups.items(), 1):
        say(f"{number}/{len(session.groups)} {file} {name}")
        for rival in group.rivals:
            try:
                session.result(file, name, rival)
            except Exception as problem:
                failures.append(f"{file} {name} {rival}: {type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}")
    return session, failures


def as_json(session: Session) -> dict[str, Any]:
    """What pytest-benchmark's --benchmark-json has, so that bench.report and --benchmark-compare read it."""
    return {
        **circumstances(session.settings.device),
        "version": "gankern bench",
        "benchmarks": [benchmark(session, row) for row in session.rows],
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """Machine, commit and date, as pytest-benchmark notes them."""
    return {
        "machine_info": {
            "machine": platform.machine(),
            "system": platform.system(),
            "python_version": platform.python_version(),
            "cpu": {"brand_raw": cpu_name(), "count": os.cpu_count()},
            "gankern": machine(device),
        },
        "commit_info": {
            "id": git("rev-parse", "HEAD") or "unknown",
            "dirty": bool(git("status", "--porcelain")),
        },
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }


def benchmark(session: Session, row: dict[str, Any]) -> dict[str, Any]:
    file, group, rival = row["file"], row["group"], row["rival"]
    measured = session.measured[file, group]
    samples, param = measured.samples[rival], f"{group.replace(' ', '-')}-{rival}"
    name = f"bench_{file}[{param}]"
    low, median, high = quartiles(samples)
    mean = statistics.fmean(samples)
    inside = sorted(x for x in samples if low - 1.5 * (high - low) <= x <= high + 1.5 * (high - low))
    spread = statistics.stdev(samples) if len(samples) > 1 else 0.0
    far, outside = sum(abs(x - mean) > spread for x in samples), len(samples) - len(inside)
    stats = {
        "min": min(samples), "max": max(samples), "mean": mean, "stddev": spread, "rounds": len(samples), "median": median,
        "iqr": high - low, "q1": low, "q3": high, "iqr_outliers": outside, "stddev_outliers": far, "outliers": f"{far};{outside}",
        "ld15iqr": inside[0], "hd15iqr": inside[-1], "ops": 1 / mean, "total": sum(samples), "iterations": measured.inner[rival],
        "data": samples,
    }  # fmt: skip
    return {
        "group": f"{file} {group}",
        "name": name,
        "fullname": f"bench/bench_{file}.py::{name}",
        "params": {"group": group, "rival": rival},
        "param": param,
        "extra_info": extra_info(row),
        "options": {"timer": "clock", "warmup": True},
        "stats": stats,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
