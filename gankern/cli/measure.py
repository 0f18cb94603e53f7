"""The metrics of a run while it trains: rows, events, the best checkpoint, an early end, and what all that costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gankern.training.quality import METRICS, Judge
from gankern.training.run_dir import BEST, metric_log

if TYPE_CHECKING:
    from gankern.cli.fit import Ready, Reporter


class Measure:
    """Looks at samples every metric_every steps, as often as metric_budget allows."""

    def __init__(self, ready: Ready) -> None:
        self.config, self.run, self.before = ready.config, ready.run, ready.seconds
        self.every = self.config.metric_every
        self.judge = Judge(ready.trainer, ready.dataset, ready.classes > 0)
        self.looks = self.skipped = 0
        self.spent = self.latest = 0.0  # seconds of all looks, and of the last one, without what is done but once
        self.best: dict[str, float] | None = None  # the row of the checkpoint that is kept

    def look(self, reporter: Reporter) -> str:
        """Rows, or nothing if the look would take more than its share of the time of training. The time before a resume, and what
        the looks took then, are no part of it."""
        step, trained, share = reporter.trainer.steps_done, reporter.seconds_now() - self.before, self.config.metric_budget
        last = step == self.config.steps
        if share and self.looks and not last and self.spent + self.latest > share * trained:
            if not self.skipped:
                print(f"step {step}: no metrics here, nor wherever else they would take over {share:.0%} of the training time")
            self.skipped += 1
            self._tell(reporter, trained)
            return ""
        start = begun = time.perf_counter()
        with reporter.off_the_clock():
            if not self.looks:
                self.judge.prepare()
                begun = time.perf_counter()
            rows = self.judge.measure()
            for name, row in rows.items():
                self.run.log({"step": step, **row}, metric_log(name))
                reporter.progress.newest[name] = row["value"]
                for key in row.keys() - {"seconds"}:
                    reporter.board.add_scalar(f"metric/{name if key == 'value' else key}", row[key], step)
        ended = self._judge(reporter, step, rows.get(self.config.keep_best)) if self.config.keep_best else ""
        end = time.perf_counter()
        self.latest, self.spent, self.looks = end - begun, self.spent + end - start, self.looks + 1
        reporter.board.add_scalar("metric/share_of_training_time", self.spent / trained, step)
        self._tell(reporter, trained)
        return "" if last else ended

    def state(self) -> dict[str, float]:
        return {}

    def _judge(self, reporter: Reporter, step: int, row: dict[str, float] | None) -> str:
        """Have a checkpoint kept if it is the best; the reason to end, if none has been for long enough.

        What there was before is read from the files: a resume or a rollback may have taken some of it away.
        """
        name, patience = self.config.keep_best, self.config.stop_after
        rank, saved = METRICS[name].rank, dict(self.run.checkpoints())
        earlier = [r for r in self.run.numbers(metric_log(name)) if r["step"] < step and "value" in r]
        self.best = min((r for r in earlier if r["step"] in saved), key=rank, default=None)
        if self.best is not None:
            self.run.mark_best(name, self.best)
        if row is not None and (self.best is None or rank(row) < rank(self.best)):
            self.best = {"step": step, **row}
            reporter.best = name, self.best
        if self.best is None or self.best["step"] == step:
            return ""
        waited = 1 + sum(r["step"] > self.best["step"] for r in earlier)
        worse = f"{name} is no better in {waited} looks than {self.best['value']:.4g} after step {self.best['step']}"
        return worse if 0 < patience <= waited else ""

    def _tell(self, reporter: Reporter, trained: float) -> None:
        newest = ", ".join(f"{name} {value:.4g}" for name, value in reporter.progress.newest.items())
        cost = f"{self.spent:.1f} s, {self.spent / trained:.1%} of the training time"
        words = f"metrics: {newest}; {self.looks} look{'s' * (self.looks > 1)}, {cost}"
        if self.skipped:
            words += f", {self.skipped} more left out by --metric-budget {self.config.metric_budget:g}"
        if self.best is not None:
            best = f"{self.config.keep_best} {self.best['value']:.4g} after step {self.best['step']}"
            words += f"; best: {best}, {self.run.path / BEST}"
        reporter.closing["metrics"] = words
