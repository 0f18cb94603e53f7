"""Judges of samples: pure functions, nothing printed or written."""

from gankern.metrics.digits import DigitClassifier, DigitVerdict, judge_digits, load_digit_classifier, train_digit_classifier

__all__ = ["DigitClassifier", "DigitVerdict", "judge_digits", "load_digit_classifier", "train_digit_classifier"]
