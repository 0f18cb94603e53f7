"""python -m bench.soak [STEPS]: a long run of a tiny GAN, whose memory, file handles and time a step must not grow. Linux only.

The run is gankern-train in a process of its own; what is printed at each tenth of it is what /proc says of that process. The exit
status is 1 if something has grown between the second tenth and the last. By then 20 pictures have been drawn: before, memory grows
to what malloc keeps for matplotlib's figures between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TINY = "--data ring --z-dim 2 --g-widths 16 16 --d-widths 16 16 --batch-size 8 --device cpu --ema 0.99 --d-dropout 0.1"
TENTHS = 10
MOST = {"memory_mib": 1.05, "files": 1.0, "threads": 1.0, "cpu_ms": 1.1}  # last tenth / second tenth


class Point(NamedTuple):
    """Resident memory, open files, threads, and processor time a step since the point before."""

    step: int
    memory_mib: float
    files: int
    threads: int
    cpu_ms: float


def cpu_seconds(process: Path) -> float:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(process: Path) -> int:
    """The least of ten looks: while a file is being written it is open too."""
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir(process / "fd")))
        time.sleep(0.01)
    return min(counts)


def last_step(log: Path) -> int:
    """Of the last whole line."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"\n")), 0)


def watch(steps: int, out: Path) -> list[Point]:
    """Make the run."""
    rhythm = ["--log-every", f"{steps // 1000}", "--sample-every", f"{steps // 100}", "--checkpoint-every", f"{steps // 100}"]
    words = [sys.executable, "-m", "gankern", "train", "gan", *TINY.split(), *rhythm, "--steps", f"{steps}", "--outdir", str(out)]
    log, points, at, spent = out / "00000-gan-ring-b8" / "log.jsonl", [], 0, 0.0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        process = Path("/proc") / str(run.pid)
        while run.poll() is None:
            time.sleep(0.2)
            step = last_step(log)
            if step * TENTHS // steps <= len(points) or (len(points) == TENTHS - 1 and step < steps * 0.99):
                continue
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            now = cpu_seconds(process)
            cost = (now - spent) / (step - at) * 1e3
            memory, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
            points.append(Point(step, memory, open_files(process), threads, cost))
            print(f"| {step} | {memory:.1f} | {points[-1].files} | {threads} | {cost:.3f} |", flush=True)
            at, spent = step, now
    if run.returncode:
        raise SystemExit(f"the run ended with status {run.returncode}")
    return points


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    print("| step | resident memory (MiB) | open files | threads | processor time a step (ms) |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as out:
        points = watch(steps, Path(out))
    second, last = points[1]._asdict(), points[-1]._asdict()
    grown = [f"{name}: {second[name]:.3f} -> {last[name]:.3f}" for name, most in MOST.items() if last[name] > most * second[name]]
    print("grown: " + ", ".join(grown) if grown else f"nothing has grown over {steps} steps")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
