"""RunDir: the directory of one training run, `00000-gan-mnist-b64`, and all that is read from and written to it.

config.json (preset, settings, versions), log.jsonl, reals.png, fakes_init.png, fakes%06d.png, losses.png,
checkpoint-%06d.safetensors, TensorBoard event files, vitals.jsonl (the numbers of each look at the run's health), health.jsonl (the
signs of trouble), report.html; of points and tables training.gif, of mixtures modes.jsonl too. With --metrics metric-NAME.jsonl;
with --keep-best `best`, a link to the best checkpoint, and best.json (metric, step, value).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gankern import checks
from gankern.data import Table
from gankern.training import checkpoint
from gankern.training.config import TrainConfig
from gankern.training.files import TEMPORARY, locked, named, replacing, sync

OP = "run"
LARGEST = torch.finfo(torch.float32).max
CONFIG, LOG, MODES, BEST = "config.json", "log.jsonl", "modes.jsonl", "best"
HEALTH, VITALS = "health.jsonl", "vitals.jsonl"
_RUN = re.compile(r"(\d{5,})-")
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})\.safetensors")
_FAKES = re.compile(r"fakes(_init|\d{6,})\.png")


class Facts(NamedTuple):
    """What networks are made from, and what their samples are: preset, shape of a sample, classes (0 but for a conditional model),
    what restores the units of a table, settings."""

    preset: str
    shape: tuple[int, ...]
    classes: int
    table: Table | None
    config: TrainConfig


class RunDir:
    """An existing run directory.

    Raises:
        ValueError: `path` has no readable config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.preset, self.shape, self.classes, self.table, self.config = _facts(_content(path), str(path / CONFIG))

    @classmethod
    def create(
        cls,
        preset: str,
        config: TrainConfig,
        data_name: str,
        shape: tuple[int, ...],
        facts: dict[str, Any],
        classes: int = 0,
        table: Table | None = None,
    ) -> RunDir:
        """Make the next free directory under config.outdir.

        Raises:
            OSError: it cannot be made.
        """
        outdir = Path(config.outdir)
        outdir.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", f"{preset}-{data_name}-b{config.batch_size}".lower()).strip("-")
        number = max((n for n, _ in _numbered(outdir)), default=-1) + 1
        temporary = outdir / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_config(temporary, preset, config, shape, facts, classes, table)
        while True:
            path = outdir / f"{number:05d}-{slug}"
            try:
                temporary.rename(path)
                return cls(path)
            except OSError:
                if not path.exists():
                    raise
                number += 1  # another run took it meanwhile

    @classmethod
    def newest(cls, outdir: Path, preset: str, data: str) -> RunDir | None:
        """The run of this preset and data with the highest number under `outdir`; directories without a config are passed over.

        Raises:
            ValueError: a config.json on the way is damaged: it may be the very run that is asked for.
        """
        for _, path in sorted(_numbered(outdir), reverse=True):
            if not (path / CONFIG).is_file():
                continue
            content = _content(path)
            settings = content.get("settings")
            if not isinstance(settings, dict) or (content["preset"], settings.get("data")) == (preset, data):
                return cls(path)
        return None

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run, which nobody else may then continue.

        Raises:
            ValueError: another process holds it; or a symbolic link is there: what is written under its name would go elsewhere.
        """
        for path in self.path.iterdir():
            if path.is_symlink() and path.name.removeprefix(TEMPORARY) != BEST:  # through which nothing is written
                checks.fail(ValueError, OP, str(self.path), "hold no symbolic link when it is continued", path.name)
        return locked(self.path, OP)

    # --- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first."""
        found = ((_CHECKPOINT.fullmatch(p.name), p) for p in self.path.iterdir())
        return sorted((int(match[1]), p) for match, p in found if match and p.is_file())

    def save(self, state: dict[str, Any], keep: int, best: tuple[str, dict[str, float]] | None = None) -> Path:
        """Write a checkpoint of state["step"], after the logs, and remove all but the newest `keep` (0: none) and the best one.

        best: the metric and the row of it that make this one the best.
        """
        path = self.path / f"checkpoint-{state['step']:06d}.safetensors"
        for log in self.path.glob("*.jsonl"):
            sync(log)
        if best is not None:
            self.mark_best(*best)
        checkpoint.save(path, state)
        spared = (self.path / BEST).resolve().name
        older = [p for step, p in self.checkpoints() if step < state["step"]]
        for p in older[: max(len(older) + 1 - keep, 0)] if keep else ():
            if p.name != spared:
                p.unlink()
        return path

    def mark_best(self, metric: str, row: dict[str, float]) -> None:
        """Have `best` name the checkpoint of row["step"], and best.json say why. If a crash keeps that from being written, `rewind`
        takes both away."""
        temporary = self.path / f"{TEMPORARY}{BEST}"
        temporary.symlink_to(f"checkpoint-{row['step']:06d}.safetensors")
        os.replace(temporary, self.path / BEST)
        with replacing(self.path / f"{BEST}.json") as facts:
            facts.write_text(json.dumps({"metric": metric, "step": row["step"], "value": row["value"]}) + "\n")

    # --- log

    def log(self, row: dict[str, Any], name: str = LOG) -> None:
        with named(self.path / name), (self.path / name).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self, name: str = LOG) -> list[dict[str, Any]]:
        """The rows of log.jsonl, or of another log; what a crash left unreadable is left out."""
        path = self.path / name
        rows = []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int:
                    rows.append(row)
        return rows

    def numbers(self, name: str = LOG) -> list[dict[str, float]]:
        """The finite numbers of each of `rows`."""
        found = ({key: value for key, value in row.items() if is_number(value)} for row in self.rows(name))
        return [row for row in found if "step" in row]

    def rewind(self, step: int) -> None:
        """Forget log rows, pictures and checkpoints after `step`, which the resumed run writes anew, and leavings of a crash."""
        later = [p for s, p in self.checkpoints() + self.fakes() if s > step]
        for path in [*later, *self.path.glob(f"{TEMPORARY}*")]:
            path.unlink()
        if not (self.path / BEST).exists():
            for name in (BEST, f"{BEST}.json"):
                (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob("*.jsonl"):
            kept = "".join(json.dumps(row) + "\n" for row in self.rows(path.name) if row["step"] <= step)
            with replacing(path) as temporary:
                temporary.write_text(kept)

    # --- pictures

    def fakes(self) -> list[tuple[int, Path]]:
        """(step, path) of every picture of generated samples, in order."""
        found = ((_FAKES.fullmatch(p.name), p) for p in self.path.iterdir())
        return sorted((0 if match[1] == "_init" else int(match[1]), p) for match, p in found if match and p.is_file())


def is_number(value: object) -> bool:
    """Whether it is a finite number of float32, as training has them; curves of larger ones cannot be drawn."""
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[arg-type]


def metric_log(name: str) -> str:
    """The file with the rows of a metric."""
    return f"metric-{name}.jsonl"


def write_config(
    path: Path,
    preset: str,
    config: TrainConfig,
    shape: tuple[int, ...],
    facts: dict[str, Any],
    classes: int = 0,
    table: Table | None = None,
) -> None:
    """Write config.json: preset, shape of a sample, classes (0 but for a conditional model), what restores the units of a table,
    and settings, which a resume reads; and `facts` (versions, device) for people."""
    content = {"preset": preset, "shape": list(shape), "classes": classes, "settings": config.to_json(), **facts}
    if table is not None:
        content["table"] = table._asdict()
    with replacing(path / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    match = _CHECKPOINT.fullmatch(path.resolve().name)
    assert match is not None
    return int(match[1])


def locate(path: Path) -> tuple[RunDir, list[Path]]:
    """The run, and its checkpoints, newest first, of a path that is a run directory; or that one of a path that is a checkpoint,
    or the link to the best one.

    Raises:
        ValueError: it is neither.
    """
    if not path.exists():
        checks.fail(ValueError, OP, str(path), "be a run directory or a checkpoint", "no such path")
    if _CHECKPOINT.fullmatch(path.resolve().name):
        return RunDir(path.resolve().parent), [path]
    run = RunDir(path)
    return run, [saved for _, saved in reversed(run.checkpoints())]


def _numbered(outdir: Path) -> list[tuple[int, Path]]:
    if not outdir.is_dir():
        return []
    return [(int(match[1]), p) for p in outdir.iterdir() if (match := _RUN.match(p.name)) and p.is_dir()]


def read_facts(text: str, source: str) -> Facts:
    """The facts in JSON; other keys are passed over. `source` opens the sentence of a refusal.

    Raises:
        ValueError: no JSON, or a fact that is missing, of another type, or out of range.
    """
    return _facts(_parsed(text, source), source)


def _content(path: Path) -> dict[str, Any]:
    """What config.json of the run at `path` holds."""
    if not (path / CONFIG).is_file():
        checks.fail(ValueError, OP, str(path), f"be a run directory with a {CONFIG}", "none there")
    try:
        text = (path / CONFIG).read_text()
    except ValueError as error:
        checks.fail(ValueError, OP, str(path / CONFIG), "be JSON", str(error))
    return _parsed(text, str(path / CONFIG))


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        checks.fail(ValueError, OP, source, "be JSON", str(error))
    if not isinstance(content, dict) or not isinstance(content.get("preset"), str) or not _is_shape(content.get("shape")):
        checks.fail(ValueError, OP, source, "name a preset and the shape of a sample", "neither or one of them")
    return content


def _facts(content: dict[str, Any], source: str) -> Facts:
    shape, classes = tuple(content["shape"]), content.get("classes", 0)
    if type(classes) is not int or not 0 <= classes < 2**31:
        checks.fail(ValueError, OP, source, "have classes in [0, 2^31)", repr(classes))
    table = _table(content.get("table"), shape[0], source)
    return Facts(content["preset"], shape, classes, table, TrainConfig.from_json(content.get("settings"), source))


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(type(v) is int and 0 < v < 2**31 for v in value)


def _table(value: Any, features: int, source: str) -> Table | None:
    """What `write_config` wrote as "table", with an entry for each feature."""
    if value is None:
        return None
    try:
        table = Table(tuple(map(str, value["columns"])), tuple(map(float, value["mean"])), tuple(map(float, value["std"])))
    except (TypeError, KeyError, ValueError, OverflowError):
        table = Table((), (), ())
    if any(len(part) != features for part in table):
        checks.fail(ValueError, OP, source, f"have a table of {features} columns, mean and std", "another")
    return table
