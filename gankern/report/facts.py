"""What a run directory says of its run, read while another process may be writing to it."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from gankern.losses.explanations import EXPLANATIONS
from gankern.training.presets import PRESETS, flags
from gankern.training.quality import METRICS
from gankern.training.run_dir import CONFIG, MODES, RunDir

HEALTH = "health.jsonl"
MOST_FRAMES = 40  # pictures of samples over time on one page, evenly taken
PLAIN = 60_000  # bytes of a picture that is taken as it is; a larger one becomes a WebP
MOST_WIDTH = 720  # pixels of that
MOST_EVENTS = 50


class Picture(NamedTuple):
    """A data URI, and the size in pixels."""

    uri: str
    width: int
    height: int


class Curve(NamedTuple):
    """A name, and finite values at steps."""

    name: str
    steps: list[int]
    values: list[float]


class Frame(NamedTuple):
    step: int
    picture: Picture


class Facts:
    """All that the files of a run say.

    Args:
        run: the run.
        frames: most pictures of generated samples to take.

    Attributes:
        content: of config.json.
        rows: of log.jsonl, with a step and finite numbers.
        curves: what was logged, by column; of a metric by its file and column, "metric-fid value".
        events: rows of health.jsonl, the last MOST_EVENTS.
        frames: generated samples over time.
        reals: real samples, None if there is no such picture.
        step, seconds: how far training has come.
    """

    def __init__(self, run: RunDir, frames: int = MOST_FRAMES) -> None:
        self.run, self.config = run, run.config
        self.content: dict[str, Any] = json.loads((run.path / CONFIG).read_text())
        self.rows = run.numbers()
        found = [(s, p) for s, p in run.fakes() if s <= self.config.steps]
        if len(found) > frames:
            found = [found[round(i * (len(found) - 1) / (frames - 1))] for i in range(frames)]
        self.frames = [Frame(step, p) for step, path in found if (p := _embed(path)) is not None]
        self.reals = _embed(run.path / "reals.png")
        self.curves = self._curves()
        self.events = [row for row in run.rows(HEALTH) if isinstance(row, dict) and "kind" in row][-MOST_EVENTS:]
        last = self.rows[-1] if self.rows else {}
        saved = run.checkpoints()
        self.step = max(int(last.get("step", 0)), saved[-1][0] if saved else 0)
        self.seconds = last.get("time_s", 0.0)

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    def resume(self) -> str:
        """The command that goes on with the run, to twice its steps if they are all made; "" of an unknown preset."""
        preset, config = self.run.preset, self.config
        if preset not in PRESETS:
            return ""
        steps = config.steps if self.step < config.steps else 2 * config.steps
        config = dataclasses.replace(config, resume=str(self.run.path), steps=steps)
        return shlex.join(["gankern-train", preset, *flags(preset, config)])

    @property
    def scores(self) -> tuple[str, ...]:
        """What d_real and d_fake are called; nothing without a critic."""
        return EXPLANATIONS[self.config.objective].scores

    def _curves(self) -> dict[str, Curve]:
        names = {"d_loss": "critic's loss", "g_loss": "generator's loss", "images_per_s": f"{self.noun} a second"}
        names |= dict(zip(("d_real", "d_fake"), self.scores, strict=False))
        hidden = {"step", "time_s"} | (set() if self.scores else {"d_loss", "d_real", "d_fake"})
        names |= {"modes": "modes found", "high_quality": "share of samples within 3 s.d. of a mode", "reverse_kl": "reverse KL"}
        curves = {}
        for rows in (self.rows, self.run.numbers(MODES)):
            for key in dict.fromkeys(key for row in rows for key in row if key not in hidden):
                curves[key] = _curve(names.get(key, key.replace("_", " ")), rows, key)
        for path in sorted(self.run.path.glob("metric-*.jsonl")):
            name, rows = path.stem.removeprefix("metric-"), self.run.numbers(path.name)
            for key in dict.fromkeys(key for row in rows for key in row if key not in ("step", "seconds")):
                words = METRICS[name].value if key == "value" and name in METRICS else key.replace("_", " ")
                curves[f"{path.stem} {key}"] = _curve(name if words in ("value", name) else f"{name}: {words}", rows, key)
        return curves

    @property
    def noun(self) -> str:
        return "images" if len(self.run.shape) == 3 else "samples"


def _curve(name: str, rows: list[dict[str, float]], key: str) -> Curve:
    rows = [row for row in rows if key in row]
    return Curve(name, [int(row["step"]) for row in rows], [row[key] for row in rows])


def _embed(path: Path) -> Picture | None:
    """The picture of a file; None if there is none, or only half of one. A link may lead out of the run: it is none."""
    from PIL import Image

    if path.is_symlink() or not path.is_file():
        return None
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises on a damaged file
        return None


@functools.lru_cache(maxsize=4 * MOST_FRAMES)
def _read(path: Path, _: int) -> Picture:
    from PIL import Image

    content = path.read_bytes()
    image = Image.open(io.BytesIO(content), formats=("PNG",))
    image.load()
    if len(content) <= PLAIN:
        return Picture(uri(content, "png"), *image.size)
    return encode(image)


def encode(image: Any) -> Picture:
    """A WebP of a Pillow image, at most MOST_WIDTH wide."""
    if image.width > MOST_WIDTH:
        image = image.resize((MOST_WIDTH, max(1, round(image.height * MOST_WIDTH / image.width))))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return Picture(uri(file.getvalue(), "webp"), *image.size)


def uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
