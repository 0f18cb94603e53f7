"""A run as the page shows it: what its files say, and what its newest checkpoint says when asked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gankern.data import Dataset
from gankern.report.facts import MOST_FRAMES, Facts
from gankern.report.probe import Probe, probe
from gankern.training import run_dir
from gankern.training.trained import load_data


class Shown(NamedTuple):
    """A run on the page; `note`: why something of it is missing, in words, or ""."""

    facts: Facts
    probe: Probe | None
    note: str = ""


def show(path: Path, dataset: Dataset | None = None, frames: int = MOST_FRAMES) -> Shown:
    """Read a run and ask its newest checkpoint, or the one at `path`.

    Args:
        dataset: the training data; None: they are read again, and what needs them is left out where they cannot be.
        frames: most pictures of generated samples to take.

    Raises:
        ValueError: `path` is no run and no checkpoint.
    """
    run, saved = run_dir.locate(path)
    facts, note = Facts(run, frames), ""
    if not saved:
        return Shown(facts, None, "There is no checkpoint yet: what is asked of one is missing.")
    if dataset is None:
        try:
            dataset = load_data(run.config)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            note = f"The training data cannot be read, so what needs them is missing: {error}"
    try:
        return Shown(facts, probe(path, dataset), note)
    except (OSError, ValueError, RuntimeError) as error:
        return Shown(facts, None, f"The checkpoint cannot be asked: {' '.join(str(error).split())}")
