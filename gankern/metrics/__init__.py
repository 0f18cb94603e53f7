"""Judges of samples: pure functions, nothing printed or written."""

from gankern.metrics.digits import (
    DigitClassifier,
    DigitFeatures,
    DigitVerdict,
    digit_features,
    judge_digits,
    load_digit_classifier,
    train_digit_classifier,
)
from gankern.metrics.distances import Neighbours, nearest_neighbours
from gankern.metrics.features import Features, Seen
from gankern.metrics.fid import fid
from gankern.metrics.inception import Inception, load_inception
from gankern.metrics.kid import KID, kid, kid_full
from gankern.metrics.modes import ModeCoverage, modes
from gankern.metrics.neighbour_test import NearestNeighbourTest, nearest_neighbour_test
from gankern.metrics.prdc import PRDC, prdc
from gankern.metrics.scores import InceptionScore, inception_score, mode_score
from gankern.metrics.ssim import ms_ssim, ms_ssim_diversity, ssim
from gankern.metrics.wasserstein import wasserstein

__all__ = [
    "KID",
    "PRDC",
    "DigitClassifier",
    "DigitFeatures",
    "DigitVerdict",
    "Features",
    "Inception",
    "InceptionScore",
    "ModeCoverage",
    "NearestNeighbourTest",
    "Neighbours",
    "Seen",
    "digit_features",
    "fid",
    "inception_score",
    "judge_digits",
    "kid",
    "kid_full",
    "load_digit_classifier",
    "load_inception",
    "mode_score",
    "modes",
    "ms_ssim",
    "ms_ssim_diversity",
    "nearest_neighbour_test",
    "nearest_neighbours",
    "prdc",
    "ssim",
    "train_digit_classifier",
    "wasserstein",
]
