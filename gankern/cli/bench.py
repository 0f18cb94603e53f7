"""gankern bench: measure the training step of presets, and ops, against PyTorch. It runs the package `bench` of a checkout."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import gankern
from gankern import backend
from gankern.cli.common import Parser, Refused, need, pick_device, refusing
from gankern.training import PRESETS

ROOT = Path(gankern.__file__).parent.parent
DESCRIPTION = "Measure the training step of presets, and single ops, against PyTorch as people write it, tuned, and compiled."
EPILOG = """Every rival is first compared with the definition, then timed in turn with the others; printed are medians as ratios
to eager, losses marked. --json is of pytest-benchmark's format: `python -m bench.report` and `pytest bench --benchmark-compare`
read it. Exit status 1: a rival computed something else, and has no number."""


def command(arguments: list[str]) -> int:
    parser = Parser("gankern bench", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:number] (default: auto)")
    parser.add_argument("--preset", nargs="+", default=[], metavar="NAME", help="training step of these presets (default: all)")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="these ops; without --preset, no training step")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[], metavar="N", help="batch sizes of the presets (default: several)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="samples of each rival (default: as many as a group's time allows)")
    parser.add_argument("--all-rivals", action="store_true", help="torch.compile at every size (minutes more)")
    parser.add_argument("--json", type=Path, metavar="F", help="write everything here")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the full tables here")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw speed-up against batch size here (.png, .svg, .pdf)")
    options = parser.parse_args(arguments)
    with refusing():
        if backend.forced() is not None:
            raise Refused(f"GANKERN_BACKEND must be unset for benches, got {backend.forced()!r}")
        run, report, support = (_checkout(name) for name in ("run", "report", "support"))
        for name in options.preset:
            if name not in run.PRESETS:
                raise Refused(f"--preset must be one of {', '.join(run.PRESETS)}, got {name!r}")
        _check(options.op, options.preset or run.PRESETS, bool(options.preset), options.batch, options.rounds)
        for op in options.op:
            if op not in run.OPS:
                raise Refused(f"--op must be one of {', '.join(run.OPS)}, got {op!r}")
        presets = options.preset or ([] if options.op else list(run.PRESETS))
        if options.plot:
            need("matplotlib")
            if not presets:
                raise Refused("--plot must come with a training step: name a --preset")
        for path in filter(None, (options.json, options.markdown, options.plot)):
            if not path.parent.is_dir():
                raise Refused(f"{path.parent} must be a folder that exists, got {str(path)!r}")
        settings = support.Settings(pick_device(options.device), options.all_rivals, options.rounds)
    session, failures = run.run(settings, presets, options.op, options.batch, lambda line: print(line, file=sys.stderr, flush=True))
    rows = session.rows
    print("\n".join([*report.short_table(rows), report.counts(rows), *report.beaten(rows)]))
    result = run.as_json(session)
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown([result]))
    if options.plot and rows:
        report.plot(rows, options.plot)
    for line in failures:
        print(f"failed: {line}")
    return 1 if failures else 0


def _check(ops: list[str], presets: Sequence[str], named: bool, sizes: list[int], rounds: int) -> None:
    if rounds < 0:
        raise Refused(f"--rounds must be >= 0, got {rounds}")
    if sizes and ops and not named:
        raise Refused("--batch must come with a --preset: an op has sizes of its own")
    for size in sizes:
        if size < 2:  # of one sample BatchNorm has no variance
            raise Refused(f"--batch must be >= 2, got {size}")
        for name in presets:
            if size % (pack := PRESETS[name].config.pack):
                raise Refused(f"--batch must be a multiple of {pack}, the samples in a pack of {name}, got {size}")


def _checkout(name: str) -> ModuleType:
    """A module of the package `bench` beside this package's folder."""
    if not (ROOT / "bench" / f"{name}.py").is_file():
        raise Refused(
            "the benches must be beside the package, and an installed package has none: clone the repository, run `make build` "
            "there, then .venv/bin/gankern bench"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"bench.{name}")
