"""The loop of gankern-train: steps, log, pictures, checkpoints, and what looks at the run on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
import time
from collections import deque
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gankern import data
from gankern.cli import report
from gankern.cli.boards import Boards
from gankern.cli.explain import Reader
from gankern.cli.health import Health, LastGood
from gankern.cli.measure import Measure
from gankern.cli.progress import Progress
from gankern.models import sample_latent
from gankern.training import TrainConfig, Trainer, distributed, pictures
from gankern.training.graph import LOSSES, Eager, Pending
from gankern.training.health import Sign
from gankern.training.presets import flags
from gankern.training.run_dir import HEALTH, MODES, RunDir
from gankern.training.views import coverage_of, view_of

# The group of each column of log.jsonl on a board; the other columns are those of techniques.
TAGS = {"d_loss": "loss", "g_loss": "loss", "d_real": "score", "d_fake": "score"}


class Ready(NamedTuple):
    """All that `fit` needs; `seconds` is the training time before a resume, `watched` what the watchers had kept till then."""

    config: TrainConfig
    trainer: Trainer
    batches: data.Batches
    dataset: data.Dataset
    classes: int
    run: RunDir
    seconds: float
    engine: Eager
    watched: dict[str, Any]


class Watcher(Protocol):
    """Somebody who looks at a run while it trains: a metric, a check of its health."""

    every: int  # steps between two looks, the last step has one too; 0: none

    def look(self, reporter: Reporter) -> str:
        """Look at the run as it is after a step. Returns why it must end here, in words, or ""."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps for it, which a resumed run finds in `Ready.watched`."""


class Stop:
    """Notes the first SIGINT or SIGTERM, so that the loop ends after its step; the second one acts as usual.

    Of several processes any may get it, and torchrun sends one more to each: they end together, where all ask whether it is `over`.
    """

    def __init__(self) -> None:
        self.noted = self.signal = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted = number
        if distributed.world_size() == 1:
            self.signal = number
            self.__exit__()

    def over(self, ended: bool) -> bool:
        """Whether any process has got a signal, or the first one says that the run has ended."""
        answers = distributed.everyone((self.noted, ended))
        self.signal = max(noted for noted, _ in answers)
        return bool(self.signal) or answers[0][1]


def watchers(ready: Ready) -> list[Watcher]:
    """Those that the settings ask for."""
    return [Health(ready), *([Measure(ready)] if ready.config.metrics else [])]


def fit(preset: str, ready: Ready) -> int:
    """The loop: steps, log, looks, pictures, checkpoints. Returns the exit status."""
    config, trainer, run = ready.config, ready.trainer, ready.run
    reporter, looking, ended = Reporter(ready), [w for w in watchers(ready) if w.every], ""
    periods = [every for every in (config.log_every, config.sample_every, config.checkpoint_every) if every]
    periods = distributed.everyone(periods + [watcher.every for watcher in looking])[0]
    good = LastGood(ready)
    reporter.keepers = [*looking, good]
    with Stop() as stop, reporter:
        if trainer.steps_done == 0:
            reporter.begin()
        while trainer.steps_done < config.steps and not stop.over(bool(reporter.bad or ended)):
            advance(ready, periods, stop)
            reporter.streams = distributed.streams(trainer.device)
            step, last = trainer.steps_done, trainer.steps_done == config.steps
            if last or step % config.log_every == 0:
                reporter.log()
            looks = [watcher for watcher in looking if last or step % watcher.every == 0]
            saving = bool(config.checkpoint_every and step % config.checkpoint_every == 0)
            drawing = last or bool(config.sample_every and step % config.sample_every == 0)
            if (looks or saving or drawing) and not reporter.settle():  # what is not finite is neither looked at nor saved
                reporter.bad = good.keep(reporter.seconds_now())
            for watcher in looks:
                ended = ended or ("" if reporter.bad else distributed.alone()(watcher.look)(reporter))
            if reporter.bad:
                good.back(reporter)
                continue
            last = last or bool(ended)
            if last or drawing:
                reporter.sample(f"fakes{step:06d}.png")
            if not last and (saving or reporter.best):
                reporter.save()
        if not reporter.bad and reporter.settle():
            good.back(reporter)
        reporter.film()
        if reporter.bad:
            print(f"gankern-train: training diverged: {reporter.bad}; the log stops before it", file=sys.stderr)
            return 1
        reporter.save()
    for sentence in reporter.closing.values():
        print(sentence)
    if ended:
        print(f"ended after step {trainer.steps_done}, all saved: {ended}{_page(ready)}")
        return 0
    if trainer.steps_done < config.steps:
        print(f"stopped after step {trainer.steps_done}, all saved; to resume: {to_resume(preset, ready)}")
        return 128 + stop.signal
    losses = f": {Reader(config).losses(reporter.last)}" if reporter.last else ""
    where = f"samples: {run.path / f'fakes{config.steps:06d}.png'}; more: gankern sample {run.path}"
    print(f"finished {config.steps} steps{losses}; {where}{_page(ready)}")
    return 0


def follow(ready: Ready) -> int:
    """The loop of the processes beside the first, which alone writes: the same steps, and an end where it says so."""
    periods = distributed.everyone([0])[0]
    with Stop() as stop:
        while ready.trainer.steps_done < ready.config.steps and not stop.over(False):
            advance(ready, periods, stop)
            distributed.streams(ready.trainer.device)
    return 0


def advance(ready: Ready, periods: list[int], stop: Stop) -> None:
    """Make steps until there is something to do, which is every so many steps, or the signal to stop."""
    trainer = ready.trainer
    goal = min([ready.config.steps, *((trainer.steps_done // every + 1) * every for every in periods)])
    while trainer.steps_done < goal and not stop.signal:
        ready.engine.step(most=goal - trainer.steps_done)


def _page(ready: Ready) -> str:
    """Write report.html; returns where it is, in words. What goes wrong with it is no fault of the training."""
    if not ready.config.report:
        return ""
    try:
        return f"; page: {report.write([ready.run.path], dataset=ready.dataset)}"
    except (OSError, ValueError) as error:
        return f"; no page: {error}"


class Reporter:
    """All that a run writes: log.jsonl, boards, pictures, checkpoints, and the progress line."""

    def __init__(self, ready: Ready) -> None:
        self.config, self.trainer, self.batches, self.run = ready.config, ready.trainer, ready.batches, ready.run
        self.engine, self.seconds = ready.engine, ready.seconds
        config, trainer = self.config, self.trainer
        # Own generator: the same latents in each picture and after each resume, and none taken from the training's stream.
        latents = torch.Generator().manual_seed(config.seed + 2)
        self.dataset, self.view = ready.dataset, view_of(ready.dataset, ready.classes)
        self.labels = [torch.arange(self.view.count) % ready.classes] if ready.classes else []
        self.z = sample_latent(self.view.count, config.z_dim, config.latent, latents)
        first = trainer.steps_done
        self.board = Boards(self.run, config, first)
        self.progress = Progress(config.steps, first, config.batch_size, Reader(config))
        self.last: dict[str, float] = {}  # row of log.jsonl
        self.saved_step = first or -1
        self.logged_step = first
        self.pending: list[Pending] = []
        self.streams: dict[str, Tensor] = {}  # random states of the other processes after this step
        self.closing: dict[str, str] = {}  # what watchers have to say at the end
        self.best: tuple[str, dict[str, float]] | None = None  # metric and row that make this step the best, to be saved
        self.bad = ""  # what was not finite, and at which step
        self.keepers: list[Watcher | LastGood] = []  # whose state is a part of a checkpoint
        self.recent = deque(self.rows(), 256)
        self.mark = time.perf_counter()

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.__exit__()
        self.board.close()

    def rows(self) -> list[dict[str, float]]:
        """Those of log.jsonl; what is no row of this run's is passed over."""
        return [row for row in self.run.numbers() if row.keys() >= set(LOSSES)]

    @contextlib.contextmanager
    def off_the_clock(self) -> Any:
        """Writing does not count as training time."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def seconds_now(self) -> float:
        """Of training so far, also before a resume; waits for the device."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        return self.seconds + time.perf_counter() - self.mark

    def begin(self) -> None:
        """reals.png: real samples spread evenly over the data; fakes_init.png: samples before training."""
        with self.off_the_clock():
            self._picture("reals", "reals.png", self.view.reals())
        self.sample("fakes_init.png")

    def log(self) -> None:
        """A row for this step: now, or at the next call if the engine lets the device go on meanwhile (`lag`)."""
        self.pending.append(self.engine.losses.request())
        while len(self.pending) > self.engine.lag and not self.bad:
            self._row(self.pending.pop(0))

    def settle(self) -> str:
        """Write the rows under way and look at all steps made. Returns what is not finite in them, or ""."""
        while self.pending and not self.bad:
            self._row(self.pending.pop(0))
        self.bad = self.bad or self.engine.losses.request().read().bad
        return self.bad

    def _row(self, pending: Pending) -> None:
        step, values, self.bad = pending.read()
        if self.bad:
            return
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds += elapsed
        rate = (step - self.logged_step) * self.config.batch_size / elapsed
        self.logged_step = step
        row = {"step": step, "time_s": round(self.seconds, 3), "images_per_s": round(rate, 1), **values}
        self.run.log(row)
        self.last = row
        self.recent.append(row)
        for name, value in values.items():
            self.board.add_scalar(f"{TAGS.get(name, 'techniques')}/{name}", value, step)
        self.board.add_scalar("speed/images_per_s", row["images_per_s"], step)
        self.progress.update(row)

    def sample(self, name: str) -> None:
        """A picture; and a row of modes.jsonl where the modes of the data are known."""
        with self.off_the_clock():
            step, samples = self.trainer.steps_done, self.trainer.sample(self.z, *self.labels)
            coverage = coverage_of(self.dataset, samples)
            if coverage is not None:
                row = {"modes": coverage.found, "high_quality": coverage.high_quality, "reverse_kl": coverage.reverse_kl}
                self.run.log({"step": step, **row}, MODES)
                for key, value in row.items():
                    self.board.add_scalar(f"modes/{key}", value, step)
            critic = self.trainer.discriminator if self.trainer.critic.learns and not self.labels else None
            self._picture("fakes", name, self.view.fakes(samples, step, critic, coverage))

    def _picture(self, tag: str, name: str, picture: Tensor) -> None:
        pictures.save_png(self.run.path / name, picture)
        self.board.add_image(tag, picture, self.trainer.steps_done)

    def film(self) -> None:
        """training.gif, of points and tables."""
        frames = [path for _, path in self.run.fakes()]
        if frames and self.dataset.kind != "images":
            pictures.animate(self.run.path / "training.gif", frames)

    def warn(self, step: int, sign: Sign) -> None:
        """A row of health.jsonl, a text on the boards, a line."""
        self.run.log({"step": step, "kind": sign.kind, "saw": sign.saw, "try": sign.advice}, HEALTH)
        self.board.add_text(f"health/{sign.kind}", f"{sign.saw}; try {sign.advice}", step)
        print(f"step {step}: {sign.saw}; try {sign.advice}", flush=True)

    def rewind(self, step: int, seconds: float) -> None:
        """Forget all that was written after `step`, where the trainer stands again."""
        self.run.rewind(step)
        self.board.rewind(step)
        self.engine.losses.forget()
        self.pending, self.bad, self.best = [], "", None
        self.recent = deque((row for row in self.recent if row["step"] <= step), self.recent.maxlen)
        self.logged_step, self.seconds, self.mark = step, seconds, time.perf_counter()

    def save(self) -> None:
        """losses.png, and a checkpoint of the present step, unless it is there already: the last file, as a finished run stays as
        it is."""
        step = self.trainer.steps_done
        if step == self.saved_step:
            return
        with self.off_the_clock():
            rows = self.rows()
            if rows:
                pictures.plot_losses(self.run.path / "losses.png", rows, self.run.path.name, self.progress.reader.names)
            self.board.flush()
            state = self.trainer.state_dict() | {f"data.{k}": v for k, v in self.batches.state_dict().items()}
            state |= {f"watch.{k}": v for keeper in self.keepers for k, v in keeper.state().items()}
            self.run.save(state | self.streams | {"device": self.trainer.device.type}, self.config.keep, self.best)
        self.saved_step, self.best = step, None


def to_resume(preset: str, ready: Ready) -> str:
    """The command that continues the run."""
    return shlex.join(["gankern-train", preset, *flags(preset, dataclasses.replace(ready.config, resume=str(ready.run.path)))])
