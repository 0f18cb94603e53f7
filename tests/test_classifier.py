"""gankern.metrics.digits: the bundled classifier is good, its verdict means what it says, and it can be trained again."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from gankern.data import load, to_float
from gankern.metrics import DigitClassifier, judge_digits, load_digit_classifier, train_digit_classifier
from gankern.metrics.digits import WEIGHTS
from tests.support import DEVICE


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 10 000 test digits: [10000, 1, 28, 28] in [-1, 1], and their labels."""
    data = load("mnist", split="test")
    assert data.labels is not None
    return to_float(data.samples).to(DEVICE), data.labels.to(DEVICE)


def test_accuracy_on_the_test_digits(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    net = load_digit_classifier(DEVICE)
    with torch.no_grad():
        called = torch.cat([net(part).argmax(1) for part in images.split(500)])
    assert (called == labels).float().mean().item() >= 0.992


def test_verdict_on_real_digits_is_their_classes(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:2000], digits[1][:2000]
    shares, confidence = judge_digits(images)
    want = torch.bincount(labels, minlength=10).cpu() / 2000
    assert (shares.shape, shares.dtype, shares.device.type) == ((10,), torch.float32, "cpu")
    assert (shares - want).abs().max() <= 0.01
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert 0.98 < confidence <= 1.0


def test_a_collapsed_sample_shows(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    only = images[(labels == 3) | (labels == 8)][:500]
    shares = judge_digits(only).shares
    assert shares[[3, 8]].sum() > 0.98
    assert (shares > 0.03).sum() == 2


def passes(samples: Tensor) -> bool:
    """The bar for a trained generator: each class at least 3 % of the samples, mean confidence at least 0.85."""
    shares, confidence = judge_digits(samples)
    return shares.min().item() >= 0.03 and confidence >= 0.85


def test_the_bar_passes_digits_and_nothing_else(digits: tuple[Tensor, Tensor]) -> None:
    """Noise, constants, an untrained generator's grey mush, inverted or mixed digits: none may pass for digits."""
    images = digits[0][:400]
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(400, 1, 28, 28, generator=generator).to(DEVICE)
    impostors = {
        "uniform noise": 2 * uniform - 1,
        "binary noise": (uniform > 0.8).float() * 2 - 1,
        "faint noise": 0.1 * uniform - 0.05,
        "black": torch.full_like(images, -1.0),
        "grey": torch.zeros_like(images),
        "white": torch.ones_like(images),
        "every constant": torch.linspace(-1, 1, 400, device=DEVICE).view(-1, 1, 1, 1).expand_as(images),
        "inverted digits": -images,
        "mean digit with noise": (images.mean(0) + 0.2 * uniform - 0.1).clamp(-1, 1),
        "shuffled pixels": images.flatten(1)[:, torch.randperm(784, generator=generator).to(DEVICE)].view_as(images),
    }
    assert passes(images)
    assert [name for name, samples in impostors.items() if passes(samples)] == []
    constants = judge_digits(impostors["black"])
    assert constants.shares.max() == 1.0


def test_batching_and_dtype_do_not_change_the_verdict(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:70]
    want = judge_digits(images)
    for got in (judge_digits(images, batch_size=16), judge_digits(images.double()), judge_digits(images.transpose(2, 3).mT)):
        assert torch.equal(got.shares, want.shares)
        assert got.confidence == pytest.approx(want.confidence, abs=1e-5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert judge_digits(images).confidence == pytest.approx(want.confidence, abs=1e-6)


def test_the_bundled_classifier_is_frozen_small_and_shared() -> None:
    net = load_digit_classifier(DEVICE)
    assert net is load_digit_classifier(DEVICE)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 70_258
    assert "70 258" in (DigitClassifier.__doc__ or "")
    assert WEIGHTS.stat().st_size < 2_000_000


def test_training_learns_and_is_reproducible(digits: tuple[Tensor, Tensor]) -> None:
    data = load("mnist", limit=640)
    assert data.labels is not None
    images, labels = to_float(data.samples).to(DEVICE), data.labels.to(DEVICE)
    state = torch.get_rng_state()
    nets = [train_digit_classifier(images, labels, epochs=1, batch_size=16, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        logits = [net(digits[0][:500]) for net in nets]
    assert (logits[0].argmax(1) == digits[1][:500]).float().mean() > 0.8
    if DEVICE == "cpu":
        assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert not nets[0].training


@pytest.mark.parametrize(
    ("samples", "kind", "sentence"),
    [
        ([0.0], TypeError, "samples must be a torch.Tensor, got list"),
        (
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
            TypeError,
            "samples must be float64, float32, bfloat16 or float16, got uint8",
        ),
        (torch.zeros(2, 784), ValueError, "samples must have 4 dimensions, got shape [2, 784]"),
        (torch.zeros(2, 3, 28, 28), ValueError, "samples must have shape [2, 1, 28, 28], got [2, 3, 28, 28]"),
        (torch.zeros(0, 1, 28, 28), ValueError, "samples must hold at least one image, got none"),
        (torch.full((1, 1, 28, 28), 255.0), ValueError, "samples must lie in [-1, 1], got [255, 255]"),
        (torch.full((1, 1, 28, 28), torch.nan), ValueError, "samples must lie in [-1, 1], got [nan, nan]"),
    ],
)
def test_refusals(samples: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(f"judge_digits: {sentence}") + "$"):
        judge_digits(samples)
