"""The progress line of a training run: live on a terminal, else one plain line at most every ten seconds."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from gankern.cli.explain import Reader

QUIET_S = 10.0


class Progress:
    """Redrawn by `update` only, so that no thread of its own runs beside the training.

    A plain line has room for the values to expect; the live one has only the numbers.
    """

    def __init__(self, steps: int, first: int, batch_size: int, reader: Reader) -> None:
        from rich import progress

        self.steps, self.batch_size, self.reader = steps, batch_size, reader
        self.printed = time.monotonic()
        self.newest: dict[str, float] = {}  # metrics
        self.bar: progress.Progress | None = None
        if sys.stdout.isatty():
            columns = ("{task.completed:.0f}/{task.total:.0f}", progress.BarColumn(bar_width=None), "{task.description}")
            self.bar = progress.Progress(*columns, auto_refresh=False, expand=True)
            self.task = self.bar.add_task("", total=steps, completed=first)

    def __enter__(self) -> None:
        if self.bar is not None:
            self.bar.start()

    def __exit__(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, row: dict[str, float]) -> None:
        """Show a row of log.jsonl."""
        step = int(row["step"])
        left = timedelta(seconds=round((self.steps - step) * self.batch_size / max(row["images_per_s"], 0.1)))
        speed = f"{row['images_per_s']:.0f} samples/s"
        scores = "".join(f" {name} {value:.2f}" for name, value in self.reader.scores(row))
        scores += "".join(f" {name} {value:.4g}" for name, value in self.newest.items())
        if self.bar is not None:
            words = f"{speed} D {row['d_loss']:.3f} G {row['g_loss']:.3f}{scores} ETA {left}"
            self.bar.update(self.task, completed=step, description=words, refresh=True)
        elif time.monotonic() - self.printed >= QUIET_S:
            self.printed = time.monotonic()
            print(f"step {step}/{self.steps}  {speed}, {self.reader.losses(row)},{scores}, ETA {left}", flush=True)
