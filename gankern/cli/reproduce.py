"""gankern reproduce TABLE: run a published table again, and say what holds."""

from __future__ import annotations

import os
from pathlib import Path

from gankern.cli.common import Parser, Refused, need, refusing
from gankern.reproduce import TABLES, run


def command(arguments: list[str]) -> int:
    parser = Parser(
        "gankern reproduce",
        description="Run published tables again: own and published numbers, a verdict, a figure. Without TABLE: a list.",
        epilog="Exit status 1: something that the table claims does not hold.",
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--full", action="store_true", help="the published number of steps and trials (hours to days on a CPU)")
    parser.add_argument("--seeds", type=int, metavar="N", help="trials of each row (default: the table's)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each trial (default: the table's)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("reproduce"), help="folder for TABLE.json, .md, .png (default: reproduce)")
    options = parser.parse_args(arguments)
    if not options.tables:
        for name, table in TABLES.items():
            print(f"  {name:<20} {table.source}; short form: {len(table.rows)} rows, {table.seeds} seed{'s' * (table.seeds > 1)}")
        return 0
    need("matplotlib", "safetensors")
    with refusing():
        for name in options.tables:
            if name not in TABLES:
                raise Refused(f"TABLE must be one of {', '.join(TABLES)}, got {name!r}")
        for flag in ("seeds", "steps", "workers"):
            if (value := getattr(options, flag)) is not None and value < 1:
                raise Refused(f"--{flag} must be >= 1, got {value}")
        options.out.mkdir(parents=True, exist_ok=True)
    passed = [
        run(
            TABLES[name], options.out, full=options.full, seeds=options.seeds or 0, steps=options.steps or 0,
            workers=options.workers, report=lambda line: print(line, flush=True),
        )
        for name in options.tables
    ]  # fmt: skip
    words = [f"{name} {'holds' if ok else 'does not hold'}" for name, ok in zip(options.tables, passed, strict=True)]
    print(f"{', '.join(words)}; written to {options.out}")
    return 0 if all(passed) else 1
