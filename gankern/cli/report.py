"""gankern report RUN: the page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

from gankern.cli.common import Parser, Refused, need, refusing
from gankern.data import Dataset
from gankern.report import page, show
from gankern.report.facts import MOST_FRAMES
from gankern.training.files import replacing

NAME = "report.html"
MOST_RUNS = 6


def command(arguments: list[str]) -> int:
    parser = Parser(
        "gankern report",
        description="Write one self-contained HTML page about a training run: samples over time, the training samples nearest to "
        "them, what lies between latents, curves, the critic's scores, settings. Several runs are shown side by side.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory (its newest checkpoint is asked) or a checkpoint")
    parser.add_argument("--out", help=f"the file to write (default: {NAME} in the run directory; of several runs, here)")
    options = parser.parse_args(arguments)
    need("safetensors", "PIL")
    if len(options.runs) > MOST_RUNS:
        raise Refused(f"RUN must be given at most {MOST_RUNS} times, got {len(options.runs)}")
    with refusing():
        runs = [Path(name) for name in options.runs]
        out = write(runs, None if options.out is None else Path(options.out))
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def write(runs: list[Path], out: Path | None = None, dataset: Dataset | None = None) -> Path:
    """Write the page of these runs or checkpoints; returns where.

    Args:
        dataset: what they were trained on; None: it is read again.

    Raises:
        ValueError: no run. OSError: it cannot be written.
    """
    shown = [show(run, dataset, MOST_FRAMES // len(runs)) for run in runs]
    if out is None:
        out = (shown[0].facts.run.path if len(runs) == 1 else Path()) / NAME
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(page(shown), encoding="utf-8")
    return out
