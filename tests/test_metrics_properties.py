"""Which way each metric moves when digits lose classes, are blurred, noisy or repeated: beside other digits of the same set."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.data import load, to_float
from gankern.metrics import (
    fid,
    inception_score,
    kid,
    kid_full,
    load_digit_classifier,
    mode_score,
    ms_ssim,
    ms_ssim_diversity,
    nearest_neighbour_test,
    prdc,
    ssim,
    wasserstein,
)
from tests.support import DEVICE, randn

pytest.importorskip("scipy")
pytest.importorskip("safetensors")

COUNT = 500


@functools.cache
def digits() -> dict[str, Tensor]:
    """Real digits, others of the same set, and four ways in which these are worse."""
    data = load("mnist")
    images, labels = to_float(data.samples[: 5 * COUNT]).to(DEVICE), data.labels[: 5 * COUNT].to(DEVICE)
    real, other = images[:COUNT], images[COUNT : 2 * COUNT]
    return {
        "real": real,
        "other": other,
        "five classes": images[COUNT:][labels[COUNT:] < 5][:COUNT],
        "blurred": F.avg_pool2d(other, 5, 1, 2),
        "noisy": (other + 0.5 * randn(*other.shape, seed=1).float()).clamp(-1, 1),
        "repeated": other[: COUNT // 10].repeat(10, 1, 1, 1),
    }


@functools.cache
@torch.no_grad()
def features(kind: str) -> Tensor:
    """Mean over the places of the last convolution's 64 channels."""
    return nn.Sequential(*list(load_digit_classifier(DEVICE))[:11])(digits()[kind]).mean((2, 3))


@functools.cache
@torch.no_grad()
def probabilities(kind: str) -> Tensor:
    return load_digit_classifier(DEVICE)(digits()[kind]).softmax(1)


WORSE = ("five classes", "blurred", "noisy", "repeated")


@pytest.mark.parametrize("kind", WORSE)
def test_distances_grow(kind: str) -> None:
    real, other, worse = features("real"), features("other"), features(kind)
    assert fid(real=real, fake=worse) > 2 * fid(real=real, fake=other)
    before, after = (kid(real=real, fake=fake, subsets=10, subset_size=250) for fake in (other, worse))
    assert after.mean > 2 * before.mean
    assert kid_full(real=real, fake=worse) > 2 * kid_full(real=real, fake=other)
    assert wasserstein(real=real, fake=worse) > 1.05 * wasserstein(real=real, fake=other)


@pytest.mark.parametrize("kind", WORSE)
def test_neighbours_tell_worse_samples_from_real_ones(kind: str) -> None:
    before, after = (nearest_neighbour_test(real=features("real"), fake=features(fake)) for fake in ("other", kind))
    assert after.accuracy > before.accuracy + 0.05
    assert after.fake > before.fake + 0.05


def test_balls_see_fidelity_and_diversity() -> None:
    """Blur and noise cost precision and density; lost classes and repetition cost recall and coverage, hardly precision."""
    got = {kind: prdc(real=features("real"), fake=features(kind)) for kind in ("other", *WORSE)}
    other = got["other"]
    for kind in ("blurred", "noisy"):
        assert got[kind].precision < 0.75 * other.precision
        assert got[kind].density < 0.5 * other.density
    for kind in WORSE:
        assert got[kind].recall < 0.9 * other.recall
        assert got[kind].coverage < 0.8 * other.coverage
    for kind in ("five classes", "repeated"):
        assert got[kind].precision > 0.9 * other.precision


@pytest.mark.parametrize("kind", WORSE)
def test_scores_fall(kind: str) -> None:
    """Least with repeated digits, which are of a clear class each: the Inception Score sees no copies but their uneven classes."""
    before, after = (inception_score(fake=probabilities(fake), splits=1).mean for fake in ("other", kind))
    assert after < (0.97 if kind == "repeated" else 0.7) * before
    before, after = (mode_score(real=probabilities("real"), fake=probabilities(fake)) for fake in ("other", kind))
    assert after < (0.95 if kind == "repeated" else 0.5) * before


def test_similarity_of_images_falls_with_blur_and_noise() -> None:
    other = digits()["other"]
    for metric in (ssim, ms_ssim):
        weak, strong = (metric(real=other, fake=(other + s * randn(*other.shape, seed=2).float()).clamp(-1, 1)) for s in (0.1, 0.5))
        assert 1 > weak > strong > 0.3
        assert 1 > metric(real=other, fake=digits()["blurred"]) > 0.3


@pytest.mark.parametrize("kind", ["five classes", "blurred", "repeated"])
def test_less_diverse_images_are_more_alike(kind: str) -> None:
    assert ms_ssim_diversity(fake=digits()[kind], pairs=2000) > 1.05 * ms_ssim_diversity(fake=digits()["other"], pairs=2000)
