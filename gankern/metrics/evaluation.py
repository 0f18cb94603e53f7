"""All metrics of one comparison: which of them two sets of samples can have, what numbers they give, and how to read these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.data.dataset import Mixture
from gankern.metrics.features import Seen
from gankern.metrics.fid import fid
from gankern.metrics.kid import kid, kid_full
from gankern.metrics.modes import modes
from gankern.metrics.neighbour_test import nearest_neighbour_test
from gankern.metrics.prdc import prdc
from gankern.metrics.scores import inception_score, mode_score
from gankern.metrics.ssim import WINDOW, ms_ssim_diversity
from gankern.metrics.wasserstein import wasserstein

OP = "evaluate"
LEAST = 10  # samples of each
TRANSPORTED = 2000  # samples of each that `wasserstein` takes: its time grows with their cube
SUBSET = 1000  # samples of a subset of `kid`
SPLITS = 10  # of the Inception Score


class Reading(NamedTuple):
    """How a number is read: which way is better, and what it tells."""

    better: str
    tells: str


READINGS = {
    "fid": Reading("lower", "distance of the Gaussians fitted to the features"),
    "kid": Reading("to 0", "squared kernel distance, unbiased: also below 0"),
    "kid_std": Reading("", "of the kid of its subsets"),
    "precision": Reading("higher", "share of fakes where the data lie"),
    "recall": Reading("higher", "share of the data where fakes lie"),
    "density": Reading("higher", "precision weighed by how many data lie there, about 1 for real samples"),
    "coverage": Reading("higher", "share of the data with a fake nearby"),
    "1nn": Reading("to 0.5", "share of samples told right by their nearest neighbour; towards 0: copies of the data"),
    "1nn_real": Reading("to 0.5", "of the real ones: low where fakes lie everywhere among them"),
    "1nn_fake": Reading("to 0.5", "of the fakes: high where they lie close together"),
    "is": Reading("higher", "Inception Score: of a clear class each, all classes occur"),
    "is_std": Reading("", "of the is of its splits"),
    "mode_score": Reading("higher", "as is, and lower where class shares differ from the data's"),
    "wasserstein": Reading("lower", "mean distance in the best matching of fakes and data"),
    "ms_ssim": Reading("as real", "how alike random pairs of fakes are: above real is less diverse"),
    "modes": Reading("higher", "of {} modes, those with a fake (in a mixture: within 3 standard deviations)"),
    "high_quality": Reading("higher", "share of fakes within 3 standard deviations of a mode"),
    "reverse_kl": Reading("lower", "of the shares of the modes among fakes from the data's, nats"),
}  # fmt: skip


class Samples(NamedTuple):
    """A set of samples, floating [N, ...] (images [N, C, H, W] in [-1, 1]), and what a feature network makes of them."""

    samples: Tensor
    seen: Seen


class Law(NamedTuple):
    """What is known of the data: the mixture that they are, or that all classes of the network are equally likely."""

    mixture: Mixture | None = None
    even: bool = False


def _fid(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    return {"fid": fid(real=real.seen.features, fake=fake.seen.features)}


def _kid(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    if min(len(real.samples), len(fake.samples)) <= SUBSET:  # a subset is all there is, and varies by nothing
        return {"kid": kid_full(real=real.seen.features, fake=fake.seen.features)}
    found = kid(real=real.seen.features, fake=fake.seen.features, subset_size=SUBSET, seed=seed)
    return {"kid": found.mean, "kid_std": found.std}


def _prdc(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    return prdc(real=real.seen.features, fake=fake.seen.features)._asdict()


def _neighbours(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    found = nearest_neighbour_test(real=real.seen.features, fake=fake.seen.features)
    return {"1nn": found.accuracy, "1nn_real": found.real, "1nn_fake": found.fake}


def _wasserstein(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    return {"wasserstein": wasserstein(real=real.seen.features[:TRANSPORTED], fake=fake.seen.features[:TRANSPORTED])}


def _inception_score(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    found = inception_score(fake=fake.seen.probabilities, splits=SPLITS, seed=seed)
    return {"is": found.mean, "is_std": found.std}


def _mode_score(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    return {"mode_score": mode_score(real=real.seen.probabilities, fake=fake.seen.probabilities)}


def _ms_ssim(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    return {"ms_ssim": ms_ssim_diversity(fake=fake.samples, seed=seed)}


def _modes(real: Samples, fake: Samples, law: Law, seed: int) -> dict[str, float]:
    if law.mixture is not None:
        found = modes(fake.samples, *law.mixture)
        return {"modes": found.found, "high_quality": found.high_quality, "reverse_kl": found.reverse_kl}
    real_shares, shares = (_shares(part.seen.probabilities) for part in (real, fake))
    if law.even:
        real_shares = torch.full_like(real_shares, 1 / len(real_shares))
    divergence = (torch.xlogy(shares, shares) - torch.xlogy(shares, real_shares)).sum().item()
    return {"modes": int(shares.count_nonzero()), "reverse_kl": divergence}


def _shares(probabilities: Tensor) -> Tensor:
    """The share of each class among the samples, by the likeliest class of each: float64 [K]."""
    return torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double() / len(probabilities)


METRICS: dict[str, Callable[[Samples, Samples, Law, int], dict[str, float]]] = {
    "fid": _fid,
    "kid": _kid,
    "prdc": _prdc,
    "1nn": _neighbours,
    "is": _inception_score,
    "mode-score": _mode_score,
    "wasserstein": _wasserstein,
    "ms-ssim": _ms_ssim,
    "modes": _modes,
}
OF_FAKES = ("is", "ms-ssim", "modes")  # look at the fakes alone: what real samples score needs no second set of them


def problem(metric: str, samples: Samples, law: Law) -> str:
    """What these samples lack for this metric, in words, or ""."""
    classes = samples.seen.probabilities.shape[1]
    if metric in ("is", "mode-score") and not classes:
        return "features with classes"
    if metric == "modes" and not classes and law.mixture is None:
        return "a mixture of Gaussians or features with classes"
    if metric == "ms-ssim" and (samples.samples.dim() != 4 or min(samples.samples.shape[2:]) < WINDOW):
        return f"images of at least {WINDOW} pixels a side"
    return ""


def measure(metric: str, *, real: Samples, fake: Samples, law: Law, seed: int = 0) -> dict[str, float]:
    """The numbers of one metric, named as in READINGS.

    Args:
        metric: one of METRICS.
        real, fake: two sets as large, each of at least 10 samples, seen by one network.
        law: of the data.
        seed: of the subsets, splits and pairs that some metrics draw.

    Returns:
        Finite numbers, but for a `reverse_kl` that is infinite: a class occurs among the fakes that no real sample has.

    Raises:
        ValueError, TypeError: sets of another size or shape, NaN, or real samples that are all the same.
        RuntimeError: a package that the metric needs is not installed.
    """
    checks.one_of(OP, "metrics", metric, METRICS)
    for name, samples in (("real", real), ("fake", fake)):
        checks.number(OP, f"samples of {name}", len(samples.samples), LEAST)
    return METRICS[metric](real, fake, law, seed)
