"""Entry points: `gankern train|sample|evaluate|export|presets|explain|doctor|reproduce|bench` and `gankern-train`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from gankern.cli.common import Refused

USAGE = """usage: gankern COMMAND ...

commands:
  train PRESET ...   train a GAN; also called gankern-train
  sample RUN ...     draw samples from a run: a picture, a folder of pictures, a .npz or a .csv
  evaluate RUN ...   metrics of a run's samples, or of a folder or file, beside real samples
  export RUN ...     the generator alone in one file: safetensors, a torch.export program, or ONNX
  presets            list the presets
  report RUN ...     write one page about a run: samples over time, curves, settings; several runs are compared
  watch RUN          serve that page while the run trains
  explain LOSS       what an objective minimises, the values to expect in the log, signs of failure; without LOSS all are listed
  doctor             versions, devices, what is built, and what each op runs on
  reproduce TABLE    run a published table again, with a verdict
  bench              measure presets and ops against PyTorch (from a checkout)

gankern COMMAND --help says more; gankern --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command gankern. Returns the exit status: 0, 1 (something failed), 2 (bad input), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        import gankern

        print(gankern.__version__)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "export": _export,
        "presets": _presets,
        "report": _report,
        "watch": _watch,
        "explain": _explain,
        "doctor": _doctor,
        "bench": _bench,
        "reproduce": _reproduce,
    }
    if name not in commands:
        return _call("gankern", _no_command, name)
    return _call("gankern-train" if name == "train" else f"gankern {name}", commands[name], rest)


def train_main(argv: Sequence[str] | None = None) -> int:
    """The command gankern-train."""
    return _call("gankern-train", _train, list(sys.argv[1:] if argv is None else argv))


def _call(prog: str, command: Callable[..., int], *arguments: object) -> int:
    try:
        return command(*arguments)
    except Refused as refusal:
        print(f"{prog}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def _no_command(name: str) -> int:
    known = "train, sample, evaluate, export, presets, report, watch, explain, doctor, reproduce or bench"
    raise Refused(f"command must be {known}, got {name!r} (see gankern --help)")


def _train(arguments: list[str]) -> int:
    from gankern.cli import train

    return train.command(arguments)


def _sample(arguments: list[str]) -> int:
    from gankern.cli import sample

    return sample.command(arguments)


def _evaluate(arguments: list[str]) -> int:
    from gankern.cli import evaluate

    return evaluate.command(arguments)


def _export(arguments: list[str]) -> int:
    from gankern.cli import export

    return export.command(arguments)


def _presets(arguments: list[str]) -> int:
    from gankern.cli import train

    return train.list_presets(arguments)


def _report(arguments: list[str]) -> int:
    from gankern.cli import report

    return report.command(arguments)


def _watch(arguments: list[str]) -> int:
    from gankern.cli import watch

    return watch.command(arguments)


def _explain(arguments: list[str]) -> int:
    from gankern.cli import explain

    return explain.command(arguments)


def _doctor(arguments: list[str]) -> int:
    from gankern.cli import doctor

    return doctor.command(arguments)


def _bench(arguments: list[str]) -> int:
    from gankern.cli import bench

    return bench.command(arguments)


def _reproduce(arguments: list[str]) -> int:
    from gankern.cli import reproduce

    return reproduce.command(arguments)
