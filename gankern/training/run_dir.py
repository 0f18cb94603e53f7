"""RunDir: the directory of one training run, `00000-gan-mnist-b64`, and all that is read from and written to it.

config.json (preset, settings, versions), log.jsonl, reals.png, fakes_init.png, fakes%06d.png, losses.png,
checkpoint-%06d/, TensorBoard event files, vitals.jsonl (the numbers of each look at the run's health) and health.jsonl (the signs
of trouble); of points and tables training.gif, of mixtures modes.jsonl too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from gankern import checks
from gankern.data import Table
from gankern.training import checkpoint
from gankern.training.config import TrainConfig

OP = "run"
CONFIG, LOG, MODES = "config.json", "log.jsonl", "modes.jsonl"
HEALTH, VITALS = "health.jsonl", "vitals.jsonl"
_RUN = re.compile(r"(\d{5,})-")
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
_FAKES = re.compile(r"fakes(_init|\d{6,})\.png")


class RunDir:
    """An existing run directory.

    Raises:
        ValueError: `path` has no readable config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path, content = path, _content(path)
        self.preset: str = content["preset"]
        self.shape: tuple[int, ...] = tuple(content["shape"])
        self.classes = content.get("classes", 0)  # of a conditional model
        if type(self.classes) is not int or self.classes < 0:
            checks.fail(ValueError, OP, str(path / CONFIG), "have classes >= 0", repr(self.classes))
        self.table = _table(content.get("table"), self.shape[0], path)
        self.config = TrainConfig.from_json(content.get("settings"), str(path / CONFIG))

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
        while True:
            path = outdir / f"{number:05d}-{slug}"
            try:
                path.mkdir()
                break
            except FileExistsError:  # another run took it meanwhile
                number += 1
        write_config(path, preset, config, shape, facts, classes, table)
        return cls(path)

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

    # --- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every complete checkpoint, oldest first."""
        found = ((_CHECKPOINT.fullmatch(p.name), p) for p in self.path.iterdir() if p.is_dir())
        return sorted((int(match[1]), p) for match, p in found if match)

    def save(self, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint of state["step"] and remove all but the newest `keep` (0: none)."""
        path = self.path / f"checkpoint-{state['step']:06d}"
        checkpoint.save(path, state)
        older = [p for step, p in self.checkpoints() if step < state["step"]]
        for p in older[: max(len(older) + 1 - keep, 0)] if keep else ():
            shutil.rmtree(p)
        return path

    # --- log

    def log(self, row: dict[str, Any], name: str = LOG) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self, name: str = LOG) -> list[dict[str, Any]]:
        """The rows of log.jsonl, or of another one; a last line cut short by a crash is left out."""
        path = self.path / name
        rows = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forget log rows, pictures and checkpoints after `step`, which the resumed run writes anew, and leavings of a crash."""
        for later in [p for s, p in self.checkpoints() if s > step] + [*self.path.glob(".tmp-*"), *self.path.glob(".old-*")]:
            shutil.rmtree(later)
        for later in [p for s, p in self.fakes() if s > step]:
            later.unlink()
        for name in (LOG, MODES, HEALTH, VITALS):
            kept = [json.dumps(row) + "\n" for row in self.rows(name) if row["step"] <= step]
            if (self.path / name).exists():
                temporary = self.path / f".{name}"
                temporary.write_text("".join(kept))
                os.replace(temporary, self.path / name)

    # --- pictures

    def fakes(self) -> list[tuple[int, Path]]:
        """(step, path) of every picture of generated samples, in order."""
        found = ((_FAKES.fullmatch(p.name), p) for p in self.path.iterdir())
        return sorted((0 if match[1] == "_init" else int(match[1]), p) for match, p in found if match)


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
    temporary = path / f".{CONFIG}"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path / CONFIG)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    match = _CHECKPOINT.fullmatch(path.resolve().name)
    assert match is not None
    return int(match[1])


def locate(path: Path) -> tuple[RunDir, Path | None]:
    """The run, and its newest checkpoint (None if there is none), of a path that is a run directory or one of its checkpoints.

    Raises:
        ValueError: it is neither.
    """
    if not path.is_dir():
        checks.fail(ValueError, OP, str(path), "be a run directory or a checkpoint", "no such directory")
    if _CHECKPOINT.fullmatch(path.resolve().name):
        return RunDir(path.resolve().parent), path
    run = RunDir(path)
    found = run.checkpoints()
    return run, found[-1][1] if found else None


def _numbered(outdir: Path) -> list[tuple[int, Path]]:
    if not outdir.is_dir():
        return []
    return [(int(match[1]), p) for p in outdir.iterdir() if (match := _RUN.match(p.name)) and p.is_dir()]


def _content(path: Path) -> dict[str, Any]:
    """What config.json of the run at `path` holds."""
    try:
        content = json.loads((path / CONFIG).read_text())
    except OSError:
        checks.fail(ValueError, OP, str(path), f"be a run directory with a {CONFIG}", "none there")
    except ValueError as error:
        checks.fail(ValueError, OP, str(path / CONFIG), "be JSON", str(error))
    if not isinstance(content, dict) or not isinstance(content.get("preset"), str) or not _is_shape(content.get("shape")):
        checks.fail(ValueError, OP, str(path / CONFIG), "name a preset and the shape of a sample", "neither or one of them")
    return content


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(v) is int and v > 0 for v in value)


def _table(value: Any, features: int, path: Path) -> Table | None:
    """What `write_config` wrote as "table", with an entry for each feature."""
    if value is None:
        return None
    try:
        table = Table(tuple(map(str, value["columns"])), tuple(map(float, value["mean"])), tuple(map(float, value["std"])))
    except (TypeError, KeyError, ValueError):
        table = Table((), (), ())
    if any(len(part) != features for part in table):
        checks.fail(ValueError, OP, str(path / CONFIG), f"have a table of {features} columns, mean and std", repr(value))
    return table
