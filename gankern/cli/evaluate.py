"""gankern evaluate: judge the samples of a run, a folder or a file beside real ones."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import data
from gankern.cli.common import Parser, Refused, need, pick_device, refusing
from gankern.cli.train import versions
from gankern.data import Dataset, Mixture, Table, to_float
from gankern.data.images import to_channels
from gankern.metrics.evaluation import LEAST, METRICS, OF_FAKES, READINGS, Law, Samples, measure, problem
from gankern.metrics.features import NAMES, Features
from gankern.training.run_dir import CONFIG
from gankern.training.trained import Trained

MOST = 5_000  # samples of each by default
DIGITS = ("mnist", "stacked-mnist")

DESCRIPTION = """Judge generated samples beside real ones.

  gankern evaluate RUN                        the run's generator beside its data, of which a test part is taken where there is one
  gankern evaluate --real mnist --fake F.npz  two sources, of any kind that --data of gankern-train takes; --fake may be a run
  gankern evaluate REAL FAKE                  the same, the real ones first"""


def command(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    need("safetensors")
    start = time.perf_counter()
    with refusing():
        report = evaluate(options)
    report["seconds"]["total"] = time.perf_counter() - start
    if options.json:
        print(json.dumps(_plain(report), indent=1, allow_nan=False))
    else:
        _print(report)
    return 0


def _parser() -> Parser:
    parser = Parser("gankern evaluate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="what is judged, or REAL and FAKE")
    parser.add_argument("--real", help="real samples (default: the data of the run)")
    parser.add_argument("--fake", help="what is judged: a run directory, one of its checkpoints, or samples")
    parser.add_argument(
        "--split", choices=("test", "train"), help="part of the real source (default: test, where the source has that part)"
    )
    parser.add_argument("--features", help=f"{', '.join(NAMES)}, FILE.pt2, FILE.onnx (default: bundled for digits, else pixels)")
    parser.add_argument("--metrics", help=f"of {','.join(METRICS)} (default: all that the samples can have)")
    parser.add_argument("--n", type=int, help=f"samples of each (default: as many as there are, at most {MOST})")
    parser.add_argument(
        "--size", type=int, help="side to which images are cropped and resized (default: that of the run, or as is)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples drawn and of subsets (default: 0)")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "last"), default="auto", help="auto: the EMA weights if the run has them"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:number] (default: auto)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def evaluate(options: Any) -> dict[str, Any]:
    """All that --json prints; numbers may be infinite."""
    if options.n is not None and options.n < LEAST:
        raise Refused(f"--n must be >= {LEAST}, got {options.n}")
    if not 0 <= options.seed < 2**62:
        raise Refused(f"--seed must be in [0, 2^62), got {options.seed}")
    asked = list(METRICS) if options.metrics is None else options.metrics.split(",")
    for name in asked:
        if name not in METRICS:
            raise Refused(f"--metrics must be of {','.join(METRICS)}, got {name!r}")
    real_name, fake_name = _sources(options)
    trained = Trained(Path(fake_name), options.weights) if _is_run(fake_name) else None
    if not real_name:
        if trained is None and fake_name not in data.NAMES and not Path(fake_name).exists():
            raise Refused(f"run: {fake_name} must be a run directory or a checkpoint, got no such path")
        if trained is None:
            raise Refused(f"--real must name real samples, as {fake_name} is no run that knows its data, got none")
        real_name = trained.run.config.data
    device, stacked = pick_device(options.device), real_name == "stacked-mnist"
    features = Features(options.features or ("bundled" if real_name in DIGITS else "pixels"), stacked=stacked, device=device)
    mark = time.perf_counter()
    drawn = _draw(options, real_name, fake_name, trained, device)
    seconds = {"samples": time.perf_counter() - mark}
    mark = time.perf_counter()
    seen = {name: Samples(samples.to(device), features(samples)) for name, samples in drawn.sets.items()}
    seconds["features"] = time.perf_counter() - mark
    law = Law(drawn.mixture, even=stacked and features.name == "bundled")
    numbers: dict[str, float] = {}
    of_real: dict[str, float] = {}
    for name in asked:
        if why := problem(name, seen["real"], law):
            if options.metrics is None:
                continue
            raise Refused(f"--metrics must be those that the samples can have, got {name}, which needs {why}")
        mark = time.perf_counter()
        numbers |= measure(name, real=seen["real"], fake=seen["fake"], law=law, seed=options.seed)
        if "others" in seen or name in OF_FAKES:
            others = seen.get("others", seen["real"])
            of_real |= measure(name, real=seen["real"], fake=others, law=law, seed=options.seed)
        seconds[name] = time.perf_counter() - mark
    looked = seen["real"].seen
    return {
        "real": drawn.real,
        "fake": drawn.fake,
        "n": len(drawn.sets["real"]),
        "features": {"name": features.name, "dimensions": looked.features.shape[1], "note": features.note},
        "modes_of_data": len(law.mixture.centres) if law.mixture else looked.probabilities.shape[1],
        "metrics": numbers,
        "metrics_of_real": of_real,
        "seed": options.seed,
        "device": str(device),
        "versions": versions(),
        "seconds": seconds,
    }


def _sources(options: Any) -> tuple[str, str]:
    """The real source, "" if none is named, and what is judged."""
    words = options.sources
    if len(words) == 2 and not (options.real or options.fake):
        real, fake = words
    elif len(words) == 1 and not options.fake:
        real, fake = options.real or "", words[0]
    elif not words and options.fake:
        real, fake = options.real or "", options.fake
    else:
        named = [f"--{key} {value}" for key, value in (("real", options.real), ("fake", options.fake)) if value]
        got = " ".join([*words, *named]) or "none"
        raise Refused(f"sources must be a run, or --real X --fake Y, or REAL FAKE, got {got}")
    if _is_run(real):
        raise Refused(f"--real must be real samples, got the run {real}")
    return real, fake


def _is_run(name: str) -> bool:
    """Whether it is a run directory or, as RUN/best is, one of its checkpoints."""
    path = Path(name).resolve()
    return (path / CONFIG).is_file() or (path.is_file() and path.suffix == ".safetensors" and (path.parent / CONFIG).is_file())


class Drawn(NamedTuple):
    """As many real and fake samples, and "others", more real ones, where there are enough; and in words what they are."""

    sets: dict[str, Tensor]
    mixture: Mixture | None
    real: dict[str, Any]
    fake: dict[str, Any]


def _draw(options: Any, real_name: str, fake_name: str, trained: Trained | None, device: torch.device) -> Drawn:
    load, has_test = _reader(options, real_name, trained)
    part = options.split or ("test" if has_test else "train")
    real = load(part)
    fakes = None if trained else data.load(fake_name, size=options.size)
    least, source = min([(len(real), real_name)] + ([(len(fakes), fake_name)] if fakes else []))
    if least < LEAST:
        raise Refused(f"{source} must have at least {LEAST} samples, got {least}")
    n = options.n or min(least, MOST)
    if n > least:
        raise Refused(f"--n must be in [{LEAST}, {least}], as {source} has {least} samples, got {n}")
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(real), generator=generator)
    sets = {"real": real.samples[order[:n]]}
    if fakes is not None:
        sets["fake"], table = fakes.samples[torch.randperm(len(fakes), generator=generator)[:n]], fakes.table
        about: dict[str, Any] = {"source": fake_name, "samples": len(fakes)}
    else:
        assert trained is not None
        labels = real.labels[order[:n]] if real.labels is not None and len(real.classes) == trained.run.classes else None
        trained.generator.to(device)
        sets["fake"], table = trained.sample(n, options.seed, labels), trained.run.table
        about = {"source": fake_name, "step": trained.step, "weights": trained.source, "data": trained.run.config.data}
    others = real.samples[order[n : 2 * n]]
    if len(others) < n and part == "test" and has_test:
        train = load("train")
        others = train.samples[torch.randperm(len(train), generator=generator)[:n]]
    if len(others) == n:
        sets["others"] = others
    facts = {"source": real_name, "part": part if has_test else "all", "samples": len(real)}
    return Drawn(_alike(sets, real.table, table), real.mixture, facts, about)


def _reader(options: Any, name: str, trained: Trained | None) -> tuple[Callable[[str], Dataset], bool]:
    """What loads a part of the real source, and whether that has a test part. The data of a run are read as the run reads them."""
    settings: dict[str, Any] = {"size": options.size}
    limit = None
    if trained is not None:
        config, shape = trained.run.config, trained.run.shape
        if len(shape) == 3:
            settings = {"size": options.size or (shape[1] if shape[1] == shape[2] else None), "channels": shape[0]}
        if name == config.data:
            settings["seed"], limit = config.seed, config.limit or None

    def load(part: str) -> Dataset:
        return data.load(name, **settings, split=part, limit=limit if part == "train" else None)

    try:
        data.load(name, split="test", limit=1)
    except ValueError:
        return load, False
    return load, True


def _alike(sets: dict[str, Tensor], real: Table | None, fake: Table | None) -> dict[str, Tensor]:
    """All in the same units: images in as many channels, columns in the deviations of the real ones from their means."""
    sets = {name: to_float(samples) for name, samples in sets.items()}
    if sets["real"].dim() == sets["fake"].dim() == 4:
        channels = max(samples.shape[1] for samples in sets.values())
        sets = {name: to_channels(samples, channels) for name, samples in sets.items()}
    shapes = [list(sets[name].shape[1:]) for name in ("real", "fake")]
    if shapes[0] != shapes[1]:
        raise Refused(f"fake samples must have the shape of the real ones, {shapes[0]}, got {shapes[1]}")
    if real is None and fake is None:
        return sets
    plain = Table.plain(shapes[0][0])
    real, fake = real or plain, fake or plain
    if real.columns != fake.columns and plain.columns not in (real.columns, fake.columns):
        raise Refused(f"fake samples must have the columns {', '.join(real.columns)}, got {', '.join(fake.columns)}")
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (real.mean, real.std))
    restored = {name: (fake if name == "fake" else real).restore(samples) for name, samples in sets.items()}
    return {name: (samples - mean) / torch.where(std > 0, std, 1.0) for name, samples in restored.items()}


def _plain(value: Any) -> Any:
    """For JSON: infinite numbers as null, others to 6 digits."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _print(report: dict[str, Any]) -> None:
    real, fake, features = report["real"], report["fake"], report["features"]
    part = {"test": "its test part", "train": "its training part", "all": "all of it"}[real["part"]]
    if fake.get("data") == real["source"]:
        part += ", held out of the run's training" if real["part"] == "test" else ", which the run was trained on"
    made = f"after step {fake['step']}, {fake['weights']} weights" if "step" in fake else f"of {fake['samples']} samples"
    print(f"real      {report['n']} of the {real['samples']} samples of {real['source']}: {part}")
    print(f"fake      {report['n']} of {fake['source']}, {made}")
    print(f"features  {features['name']}, {features['dimensions']} numbers: {features['note']}")
    if "fid" in report["metrics"] and report["n"] <= features["dimensions"]:
        print(f"note      fid of {report['n']} samples with {features['dimensions']} features is far too high: take more samples")
    print(f"\n{'':<14}{'fake':>11}{'real':>11}  {'better':<9}what it tells")
    for name, value in report["metrics"].items():
        of_real = report["metrics_of_real"].get(name)
        shown = "-" if of_real is None else f"{of_real:.4g}"
        better, tells = READINGS[name]
        print(f"{name:<14}{value:>11.4g}{shown:>11}  {better:<9}{tells.format(report['modes_of_data'])}")
    print("\nreal: what as many other real samples score beside the same real ones" * bool(report["metrics_of_real"]))
    print(f"seed {report['seed']}, {report['device']}, {report['seconds']['total']:.1f} s")
