"""Judges of samples: pure functions, nothing printed or written."""

from gankern.metrics.digits import DigitClassifier, DigitVerdict, judge_digits, load_digit_classifier, train_digit_classifier
from gankern.metrics.modes import ModeCoverage, modes

__all__ = [
    "DigitClassifier",
    "DigitVerdict",
    "ModeCoverage",
    "judge_digits",
    "load_digit_classifier",
    "modes",
    "train_digit_classifier",
]
