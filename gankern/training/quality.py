"""The metrics that a run takes of its samples while it trains, and what they need of the data.

Features: of images those of the bundled digit classifier, whatever they show, so that figures of other images than digits compare
only within one run or between runs of the same data; of points and tables the numbers themselves.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.data import Dataset, to_float
from gankern.metrics import evaluation, kid_full, wasserstein
from gankern.metrics.evaluation import LEAST, Law, Samples
from gankern.metrics.features import Features
from gankern.models import sample_latent

if TYPE_CHECKING:
    from gankern.training.config import TrainConfig
    from gankern.training.trainer import Trainer

OP = "train"
TRANSPORTED = 500  # samples of each set between which the Wasserstein distance is taken: its time grows with their cube

Row = dict[str, float]  # "value", and what else a metric finds


class Metric(NamedTuple):
    """value: the number that stands for it, of those of `evaluation.measure`; rank: of a row, a smaller one is better."""

    value: str
    rank: Callable[[Row], tuple[float, ...]]


def _lower(row: Row) -> tuple[float, ...]:
    return (row["value"],)


def _higher(row: Row) -> tuple[float, ...]:
    return (-row["value"],)


METRICS = {
    "fid": Metric("fid", _lower),
    "kid": Metric("kid", _lower),
    "1nn": Metric("1nn", lambda row: (abs(row["value"] - 0.5),)),
    "prdc": Metric("coverage", _higher),
    "wasserstein": Metric("wasserstein", _lower),
    "modes": Metric("modes", lambda row: (-row["value"], -row.get("high_quality", 0.0), row.get("reverse_kl", math.inf))),
    "is": Metric("is", _higher),
    "mode-score": Metric("mode_score", _higher),
}


def measure(name: str, *, real: Samples, fake: Samples, law: Law) -> Row:
    """One of METRICS, as `evaluation.measure` has it, but of two a form that takes less time: kid of all samples at once, and
    wasserstein of the first TRANSPORTED."""
    if name == "kid":
        return {"value": kid_full(real=real.seen.features, fake=fake.seen.features)}
    if name == "wasserstein":
        return {"value": wasserstein(real=real.seen.features[:TRANSPORTED], fake=fake.seen.features[:TRANSPORTED])}
    found = evaluation.measure(name, real=real, fake=fake, law=law)
    return {"value": found.pop(METRICS[name].value), **found}


def names(words: str) -> tuple[str, ...]:
    """The metrics that a setting such as "fid,1nn" names, "" none.

    Raises:
        ValueError: one of them is unknown, or there twice.
    """
    found = tuple(word.strip() for word in words.split(",")) if words else ()
    for name in found:
        if name not in METRICS:
            checks.fail(ValueError, OP, "metrics", f"be names of {', '.join(METRICS)} with commas between", repr(name))
    if len(set(found)) < len(found):
        checks.fail(ValueError, OP, "metrics", "name each metric once", repr(words))
    return found


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse metrics that this data cannot have.

    Raises:
        ValueError: one whose modes or classes are not known, too few samples, or samples that are all the same.
        RuntimeError: a library is missing.
    """
    wanted = names(config.metrics)
    if "modes" in wanted and dataset.mixture is None and config.data != "mnist" and not _stacked(config, dataset):
        checks.fail(ValueError, OP, "metrics", f"leave out modes for {dataset.name}, whose modes are not known", config.metrics)
    for name in wanted:
        if name in ("is", "mode-score") and config.data != "mnist":
            checks.fail(ValueError, OP, "metrics", f"leave out {name} for {dataset.name}: its classes are digits", config.metrics)
    if wanted and len(dataset) < LEAST:
        checks.fail(ValueError, OP, "metrics", f"be left out for data of fewer than {LEAST} samples", f"{len(dataset)} samples")
    if wanted and bool((dataset.samples == dataset.samples[0]).all()):
        checks.fail(ValueError, OP, "metrics", "be left out for samples that are all the same", config.metrics)
    if "wasserstein" in wanted and importlib.util.find_spec("scipy") is None:
        raise RuntimeError('train: scipy must be installed for wasserstein, got none (pip install "gankern[metrics]")')


def _stacked(config: TrainConfig, dataset: Dataset) -> bool:
    return config.data == "stacked-mnist" and dataset.shape[0] == 3


class Judge:
    """Measures a trainer's samples against real ones: both sets, and the latent vectors, are the same at each look.

    None of the training's random numbers is taken.

    Args:
        trainer: its config has the data, the metrics, metric_samples and the seed.
        dataset: where the real samples are drawn from, metric_samples of them, or all if there are fewer; as many fakes are made,
            of the same classes where the generator takes classes.
        labelled: whether it does.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, labelled: bool) -> None:
        config, stacked = trainer.config, _stacked(trainer.config, dataset)
        rng = torch.Generator().manual_seed(config.seed + 3)
        self.trainer, self.dataset, self.names = trainer, dataset, names(config.metrics)
        self.features = Features("bundled" if dataset.kind == "images" else "pixels", stacked=stacked, device=trainer.device)
        self.law = Law(dataset.mixture, even=stacked)
        self.index = torch.randperm(len(dataset), generator=rng)[: config.metric_samples]
        self.labels = [dataset.labels[self.index]] if labelled and dataset.labels is not None else []
        self.z = sample_latent(len(self.index), config.z_dim, config.latent, rng)

    def prepare(self) -> None:
        """Look at the real samples, once before the first `measure`."""
        self.real = self._see(to_float(self.dataset.samples[self.index]).to(self.trainer.device))

    def _see(self, samples: Tensor) -> Samples:
        return Samples(samples, self.features(samples))

    def measure(self) -> dict[str, Row]:
        """Each metric of samples of the present generator, of the EMA weights if there are any, with the "seconds" it took.

        What is not finite is left out.
        """
        samples = self.trainer.sample(self.z, *self.labels)
        rows: dict[str, Row] = {}
        if not samples.isfinite().all():
            return rows
        fake = self._see(samples)
        for name in self.names:
            start = time.perf_counter()
            found = measure(name, real=self.real, fake=fake, law=self.law)
            row = {key: number for key, number in found.items() if math.isfinite(number)}
            if "value" in row:
                rows[name] = row | {"seconds": round(time.perf_counter() - start, 3)}
        return rows
