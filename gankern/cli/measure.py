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
        self.spent = self.latest = 0.0  # seconds of all looks, and of the last one
        self.best: dict[str, float] | None = None  # the row of the checkpoint that is kept
        self.waited = 0  # looks since then
        if self.config.keep_best:
            rows, saved = self.run.rows(metric_log(self.config.keep_best)), dict(self.run.checkpoints())
            self.best = min((row for row in rows if row["step"] in saved), key=self.rank, default=None)
            if self.best is not None:
                self.run.mark_best(self.config.keep_best, self.best)
                self.waited = sum(row["step"] > self.best["step"] for row in rows)

    def look(self, reporter: Reporter) -> str:
        """Rows, or nothing if the look would take more than its share of the time of training. The time before a resume, and what
        the looks took then, are no part of it."""
        step, trained, share = reporter.trainer.steps_done, reporter.trained() - self.before, self.config.metric_budget
        last = step == self.config.steps
        if reporter.settle():
            return ""
        if share and self.looks and not last and self.spent + self.latest > share * trained:
            if not self.skipped:
                print(f"step {step}: no metrics here, nor wherever else they would take over {share:.0%} of the training time")
            self.skipped += 1
            self._tell(reporter, trained)
            return ""
        start = time.perf_counter()
        with reporter.off_the_clock():
            rows = self.judge.measure()
            for name, row in rows.items():
                self.run.log({"step": step, **row}, metric_log(name))
                reporter.progress.newest[name] = row["value"]
                for key in row.keys() - {"seconds"}:
                    reporter.board.add_scalar(f"metric/{name if key == 'value' else key}", row[key], step)
        ended = self._judge(reporter, step, rows.get(self.config.keep_best)) if self.config.keep_best else ""
        self.latest = time.perf_counter() - start
        self.spent += self.latest
        self.looks += 1
        reporter.board.add_scalar("metric/share_of_training_time", self.spent / trained, step)
        self._tell(reporter, trained)
        return "" if last else ended

    def rank(self, row: dict[str, float]) -> tuple[float, ...]:
        return METRICS[self.config.keep_best].rank(row)

    def _judge(self, reporter: Reporter, step: int, row: dict[str, float] | None) -> str:
        """Have a checkpoint kept if it is the best; the reason to end, if it has not been for long enough."""
        name, patience = self.config.keep_best, self.config.stop_after
        if row is not None and (self.best is None or self.rank(row) < self.rank(self.best)):
            self.best, self.waited = {"step": step, **row}, 0
            reporter.best = name, self.best
            return ""
        self.waited += 1
        if self.best is None or not patience or self.waited < patience:
            return ""
        return f"{name} is no better in {self.waited} looks than {self.best['value']:.4g} after step {self.best['step']}"

    def _tell(self, reporter: Reporter, trained: float) -> None:
        newest = ", ".join(f"{name} {value:.4g}" for name, value in reporter.progress.newest.items())
        words = f"metrics: {newest}; {self.looks} looks, {self.spent:.1f} s, {self.spent / trained:.1%} of the training time"
        if self.skipped:
            words += f", {self.skipped} more left out by --metric-budget {self.config.metric_budget:g}"
        if self.best is not None:
            best = f"{self.config.keep_best} {self.best['value']:.4g} after step {self.best['step']}"
            words += f"; best: {best}, {self.run.path / BEST}"
        reporter.closing["metrics"] = words
