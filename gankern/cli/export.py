"""gankern export RUN: the generator alone, in one file."""

from __future__ import annotations

from pathlib import Path

from gankern.cli.common import Parser, Refused, need, refusing
from gankern.training.export import FORMATS, export
from gankern.training.trained import Trained


def command(arguments: list[str]) -> int:
    parser = Parser("gankern export", description="Write the generator of a run to one file, and a card that says how to use it.")
    parser.add_argument("run", metavar="RUN", help="a run directory (its newest checkpoint is used) or one of its checkpoints")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: weights and settings, for gankern.load_generator; pt2: a program for torch.export.load; onnx: one for "
        "ONNX runtimes; neither of these needs gankern (default: safetensors)",
    )
    parser.add_argument("--out", help="the file; its card is called the same with .md behind (default: generator.FORMAT)")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "last"), default="auto", help="auto: the EMA weights if the run has them"
    )
    options = parser.parse_args(arguments)
    need("safetensors")
    if options.format == "onnx":
        need("onnx", "onnxscript", extra="onnx")
    with refusing():
        out = Path(options.out or f"generator.{options.format}")
        if out.suffix[1:] in FORMATS and out.suffix[1:] != options.format:
            raise Refused(f"--format must be {out.suffix[1:]} for --out {options.out}, got {options.format}")
        trained = Trained(Path(options.run), options.weights)
        card = export(trained, out, options.format)
    size = out.stat().st_size / 1e6
    print(
        f"the generator of {trained.run.path} after step {trained.step} ({trained.source} weights) in {out}, {size:.2f} MB; {card}"
    )
    return 0
