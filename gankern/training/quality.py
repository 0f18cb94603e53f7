"""The metrics that a run takes of its samples while it trains, and what they need of the data.

Features: of images those of the bundled digit classifier (`digit_features`), whatever they show, so that figures of other images
than digits compare only within one run or between runs of the same data; of points and tables the numbers themselves.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gankern import checks, metrics
from gankern.data import Dataset, to_float
from gankern.models import sample_latent

if TYPE_CHECKING:
    from gankern.training.config import TrainConfig
    from gankern.training.trainer import Trainer

OP = "train"
LEAST = 10  # samples: the splits of the inception score
TRANSPORTED = 500  # samples of each set between which the Wasserstein distance is taken: its time grows with their cube
SETS = {"mnist": 1, "stacked-mnist": 3}  # data of digits, and how many make a sample

Row = dict[str, float]  # "value", and what else a metric finds


class Samples:
    """Samples [N, ...], their features [N, D], and of images the probabilities of the ten digits in each channel [N, C, 10]."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = self.features = samples
        if samples.dim() == 4:
            self.features, self.probabilities = metrics.digit_features(samples)


class Metric(NamedTuple):
    """measure: of fake samples; rank: of what it finds, a smaller one is better."""

    measure: Callable[[Judge, Samples], Row]
    rank: Callable[[Row], tuple[float, ...]]


def _modes(judge: Judge, fake: Samples) -> Row:
    mixture = judge.dataset.mixture
    if mixture is not None:
        found = metrics.modes(fake.samples, *mixture)
        return {"value": found.found, "high_quality": found.high_quality, "reverse_kl": found.reverse_kl}
    digits = _classes(fake).argmax(1, keepdim=True) if SETS[judge.data] == 1 else fake.probabilities.argmax(2)
    number = sum(10**place * digit for place, digit in enumerate(reversed(digits.unbind(1))))
    count = 10 ** SETS[judge.data]
    shares = torch.bincount(number, minlength=count).double() / len(digits)
    return {"value": int((shares > 0).sum()), "reverse_kl": torch.xlogy(shares, shares * count).sum().item()}


def _classes(samples: Samples) -> Tensor:
    """Probabilities of the ten digits [N, 10], the mean over the channels."""
    return samples.probabilities.mean(1)


def _nearest(judge: Judge, fake: Samples) -> Row:
    found = metrics.nearest_neighbour_test(real=judge.real.features, fake=fake.features)
    return {"value": found.accuracy, "real": found.real, "fake": found.fake}


def _prdc(judge: Judge, fake: Samples) -> Row:
    found = metrics.prdc(real=judge.real.features, fake=fake.features)
    return {"value": found.coverage, "precision": found.precision, "recall": found.recall, "density": found.density}


def _inception(judge: Judge, fake: Samples) -> Row:
    found = metrics.inception_score(fake=_classes(fake))
    return {"value": found.mean, "std": found.std}


def _transport(judge: Judge, fake: Samples) -> Row:
    real, fakes = (samples.features[:TRANSPORTED] for samples in (judge.real, fake))
    return {"value": metrics.wasserstein(real=real, fake=fakes)}


def _lower(row: Row) -> tuple[float, ...]:
    return (row["value"],)


def _higher(row: Row) -> tuple[float, ...]:
    return (-row["value"],)


METRICS = {
    "fid": Metric(lambda judge, fake: {"value": metrics.fid(real=judge.real.features, fake=fake.features)}, _lower),
    "kid": Metric(lambda judge, fake: {"value": metrics.kid_full(real=judge.real.features, fake=fake.features)}, _lower),
    "1nn": Metric(_nearest, lambda row: (abs(row["value"] - 0.5),)),
    "prdc": Metric(_prdc, _higher),
    "wasserstein": Metric(_transport, _lower),
    "modes": Metric(_modes, lambda row: (-row["value"], -row.get("high_quality", 0.0), row["reverse_kl"])),
    "is": Metric(_inception, _higher),
    "mode-score": Metric(
        lambda judge, fake: {"value": metrics.mode_score(real=_classes(judge.real), fake=_classes(fake))}, _higher
    ),
}


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
    if "modes" in wanted and dataset.mixture is None and SETS.get(config.data) not in (1, dataset.shape[0]):
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
        config = trainer.config
        rng = torch.Generator().manual_seed(config.seed + 3)
        self.trainer, self.dataset, self.data, self.names = trainer, dataset, config.data, names(config.metrics)
        self.index = torch.randperm(len(dataset), generator=rng)[: config.metric_samples]
        self.labels = [dataset.labels[self.index]] if labelled and dataset.labels is not None else []
        self.z = sample_latent(len(self.index), config.z_dim, config.latent, rng)

    @functools.cached_property
    def real(self) -> Samples:
        return Samples(to_float(self.dataset.samples[self.index]).to(self.trainer.device))

    def measure(self) -> dict[str, Row]:
        """Each metric of samples of the present generator, of the EMA weights if there are any, with the "seconds" it took.

        What is not finite is left out.
        """
        samples = self.trainer.sample(self.z, *self.labels)
        rows: dict[str, Row] = {}
        if not samples.isfinite().all():
            return rows
        _, fake = self.real, Samples(samples)
        for name in self.names:
            start = time.perf_counter()
            row = METRICS[name].measure(self, fake)
            if all(map(math.isfinite, row.values())):
                rows[name] = row | {"seconds": round(time.perf_counter() - start, 3)}
        return rows
