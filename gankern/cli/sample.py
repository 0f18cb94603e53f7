"""gankern sample RUN: draw samples from a training run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from gankern.cli.common import Parser, Refused, need, pick_device, refusing
from gankern.data import Table
from gankern.training import pictures
from gankern.training.trained import Trained, load_data
from gankern.training.views import coverage_of, view_of


def command(arguments: list[str]) -> int:
    parser = Parser("gankern sample", description="Draw samples from a training run.")
    parser.add_argument("run", metavar="RUN", help="a run directory (its newest checkpoint is used) or one of its checkpoints")
    parser.add_argument("--n", type=int, default=64, help="how many samples (default: 64)")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="x.png: one picture with all; x.npz: array `samples` float32 [n, C, H, W] in [-1, 1], of points and tables "
        "float64 [n, F] in the units of the data; x.csv: these, under the names of the columns; a folder: one PNG each "
        "(default: samples.png)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the latent vectors (default: 0)")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "last"), default="auto", help="auto: the EMA weights if the run has them"
    )
    parser.add_argument("--class", dest="label", type=int, help="the class to draw (default: all in turn, one a column)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:number] (default: auto)")
    options = parser.parse_args(arguments)
    need("safetensors", "PIL")
    with refusing():
        out = Path(options.out)
        kind = out.suffix.lower()
        if options.n < 1:
            raise Refused(f"--n must be >= 1, got {options.n}")
        if not 0 <= options.seed < 2**62:
            raise Refused(f"--seed must be in [0, 2^62), got {options.seed}")
        device = pick_device(options.device)
        trained = Trained(Path(options.run), options.weights)
        run = trained.run
        images = len(run.shape) == 3
        if images and kind not in (".png", ".npz", "") and not out.is_dir():
            raise Refused(f"--out must end in .png or .npz or be a folder, got {options.out!r}")
        if not images and kind not in (".png", ".npz", ".csv"):
            raise Refused(f"--out must end in .png, .npz or .csv for samples that are no images, got {options.out!r}")
        if options.label is not None and not run.classes:
            raise Refused(f"--class must be left out: the model of preset {run.preset} has no classes, got {options.label}")
        if options.label is not None and not 0 <= options.label < run.classes:
            raise Refused(f"--class must be in [0, {run.classes - 1}], got {options.label}")
        columns = min(run.classes, options.n) if run.classes and options.label is None else None
        labels = None if options.label is None else torch.full((options.n,), options.label)
        trained.generator.to(device)
        samples = trained.sample(options.n, options.seed, labels)
        if not samples.isfinite().all():
            raise Refused(f"samples of {trained.path} must be finite, got NaN or infinity")
        table = run.table or Table.plain(run.shape[0])
        if images and (out.is_dir() or kind == ""):
            out.mkdir(parents=True, exist_ok=True)
            digits = len(str(options.n - 1))
            for i, picture in enumerate(pictures.to_uint8(samples)):
                pictures.save_png(out / f"{i:0{digits}d}.png", picture)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            if kind == ".npz":
                with out.open("wb") as file:
                    np.savez(file, samples=(samples if images else table.restore(samples)).numpy())
            elif kind == ".csv":
                with out.open("w", newline="", encoding="utf-8") as file:
                    rows = ([f"{value:.9g}" for value in row] for row in table.restore(samples).tolist())
                    csv.writer(file).writerows([table.columns, *rows])
            elif images:
                pictures.save_png(out, pictures.grid(samples, columns))
            else:
                need("matplotlib")
                dataset = load_data(run.config)
                picture = view_of(dataset).fakes(samples, trained.step, coverage=coverage_of(dataset, samples))
                pictures.save_png(out, picture)
    print(f"{options.n} samples of {run.path} after step {trained.step} ({trained.source} weights) in {out}")
    return 0
