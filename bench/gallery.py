"""docs/gallery.md: presets trained on the bundled digits, in ten minutes of a CPU core or little more, and what a classifier says.

python -m bench.gallery              all entries (an hour), into docs/gallery/
python -m bench.gallery dcgan ring   these, beside what is there
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gankern.metrics.digits import judge_digits, load_digit_classifier
from gankern.training import PRESETS
from gankern.training.trained import Trained

OUT = Path(__file__).parent.parent / "docs" / "gallery"
SAMPLES = 2000
# At half the width and a larger rate than the papers', a CPU makes enough steps for digits in ten minutes.
_CONVOLUTIONS = ["--conv-width", "32", "--batch-size", "64", "--lr-g", "1e-3", "--lr-d", "1e-3"]
STEPS = {
    "dcgan": 6000,
    "cgan": 12000,
    "wgan-gp": 6000,
    "sngan": 1000,
    "lsgan": 6000,
    "hinge": 6000,
    "rsgan": 6000,
    "swissroll": 3000,
    "ring": 8000,
    "unrolled": 4000,
}
FLAGS = {
    "dcgan": _CONVOLUTIONS,
    "sngan": ["--conv-width", "16", "--lr-g", "5e-4", "--lr-d", "1e-3"],
    "lsgan": _CONVOLUTIONS,
    "hinge": ["--conv-width", "32", "--batch-size", "64", "--lr-g", "5e-4", "--lr-d", "1e-3"],
    "rsgan": _CONVOLUTIONS,
}


def entry(name: str, runs: Path) -> dict[str, Any]:
    """Train, keep the last picture or the film, and judge the samples."""
    words = [name, *FLAGS.get(name, []), "--steps", str(STEPS[name]), "--seed", "0"]
    command = [sys.executable, "-m", "gankern", "train", *words, "--outdir", str(runs), "--device", "cpu"]
    command += ["--checkpoint-every", "0", "--sample-every", str(STEPS[name] // 20)]
    before = processor_seconds()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True)
    seconds = processor_seconds() - before
    (path,) = runs.glob(f"*-{name}-*")
    film = path / "training.gif"
    picture = film if film.exists() else path / f"fakes{STEPS[name]:06d}.png"
    kept = OUT / f"{name}{picture.suffix}"
    shutil.copy(picture, kept)
    found = {"name": name, "command": " ".join(["gankern-train", *words]), "seconds": round(seconds), "picture": kept.name}
    return found | (judged(path) if PRESETS[name].config.data == "mnist" else {})


def processor_seconds() -> float:
    """Of the runs so far. Each has one thread, so that this is its time on an idle machine, whatever else ran."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def judged(path: Path) -> dict[str, Any]:
    trained = Trained(path)
    samples = trained.sample(SAMPLES, seed=1)
    if samples.shape[-1] != 28:
        samples = torch.nn.functional.interpolate(samples, (28, 28), mode="bilinear", antialias=True).clamp(-1.0, 1.0)
    verdict = judge_digits(samples)
    numbers = {"confidence": round(verdict.confidence, 3), "rarest_class": round(verdict.shares.min().item(), 4)}
    if trained.run.classes:
        asked = torch.arange(SAMPLES) % trained.run.classes
        with torch.no_grad():
            net = load_digit_classifier()
            right = torch.cat([net(part).argmax(1) for part in samples.split(500)]) == asked
        numbers["asked_digit"] = round(right.float().mean().item(), 4)
    return numbers


def page(entries: list[dict[str, Any]]) -> str:
    lines = [
        "# Gallery",
        "",
        "Written by `python -m bench.gallery`, on one CPU core. Under each picture: its command, the processor time it took, and",
        f"of {SAMPLES} samples what the bundled classifier says: its mean confidence in the digit it sees (of real ones 0.995),",
        "the share of the digit that it sees least often (of real ones 8.9 %), and for conditional presets how often it is the one",
        "that was asked for. The convolutional ones have half the width of their presets or less, and larger rates, so that ten",
        "minutes of a CPU are enough.",
    ]
    for e in entries:
        numbers = [f"confidence {e['confidence']}", f"rarest digit {100 * e['rarest_class']:.1f} %"] if "confidence" in e else []
        numbers += [f"asked digit {100 * e['asked_digit']:.1f} %"] if "asked_digit" in e else []
        preset = PRESETS[e["name"]]
        lines += ["", f"## {e['name']}", "", f"{preset.summary[0].upper()}{preset.summary[1:]} ({preset.source}).", ""]
        lines += [f'<img src="gallery/{e["picture"]}" width="448" alt="{e["name"]}: samples after training">', ""]
        words = "; ".join([f"{e['seconds'] / 60:.1f} minutes", *numbers])
        lines += [f"`{e['command']}`: {words}."]
    return "\n".join([*lines, ""])


def main(names: list[str]) -> None:
    for name in names:
        if name not in STEPS:
            sys.exit(f"bench.gallery: names must be among {', '.join(STEPS)}, got {name!r}")
    OUT.mkdir(parents=True, exist_ok=True)
    kept = OUT / "gallery.json"
    entries = {e["name"]: e for e in json.loads(kept.read_text())} if kept.exists() else {}
    for name in names or list(STEPS):
        with tempfile.TemporaryDirectory() as runs:
            entries[name] = entry(name, Path(runs))
        ordered = [entries[n] for n in STEPS if n in entries]
        kept.write_text(json.dumps(ordered, indent=1) + "\n")
        (OUT.parent / "gallery.md").write_text(page(ordered))
        print(entries[name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
