"""Inception Score and Mode Score: closed forms, torchmetrics, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gankern.metrics import inception_score, mode_score
from tests.support import DEVICE, randn

InceptionScore = pytest.importorskip("torchmetrics.image.inception").InceptionScore
ONE_HOT = torch.eye(10, device=DEVICE)


def test_sure_and_even_has_the_number_of_classes() -> None:
    assert inception_score(fake=ONE_HOT.repeat(5, 1), splits=1) == pytest.approx((10, 0), abs=1e-9)
    assert inception_score(fake=torch.full((30, 10), 0.1, device=DEVICE)).mean == pytest.approx(1, abs=1e-9)
    assert inception_score(fake=ONE_HOT[:1].repeat(30, 1)).mean == pytest.approx(1, abs=1e-9)
    assert inception_score(fake=ONE_HOT[:3].repeat(8, 1), splits=1).mean == pytest.approx(3, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Inception", "ignore:std()")
@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_agrees_with_torchmetrics(splits: int) -> None:
    """The same order: both permute by one seed. Theirs has the sample standard deviation of the splits."""
    logits = 3 * randn(500, 7, seed=1)
    theirs = InceptionScore(nn.Identity(), splits=splits).set_dtype(torch.float64)
    theirs.update(logits.cpu())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, std = theirs.compute()
    state = torch.get_rng_state()
    got = inception_score(fake=logits.softmax(1), splits=splits, seed=5)
    assert got.mean == pytest.approx(mean.item(), rel=1e-4)
    assert got.std == pytest.approx(std.item() * math.sqrt(1 - 1 / splits) if splits > 1 else 0, rel=1e-4)
    assert torch.get_rng_state().equal(state)


def test_mode_score() -> None:
    """With the data's class shares the Inception Score of all samples; less without; 0 with a class the data do not have."""
    probabilities = (3 * randn(400, 10, seed=2)).softmax(1)
    whole = inception_score(fake=probabilities, splits=1).mean
    assert mode_score(real=probabilities, fake=probabilities.flip(0)) == pytest.approx(whole, rel=1e-12)
    assert mode_score(real=ONE_HOT, fake=ONE_HOT[:4]) == pytest.approx(4 * 4 / 10, rel=1e-9)  # exp(log 4 - log(10 / 4))
    assert mode_score(real=ONE_HOT[:5], fake=ONE_HOT) == 0
    # KL of the shares (3/4, 1/4) from (1/2, 1/2); every sample is sure
    uneven = torch.cat([ONE_HOT[:2], ONE_HOT[:1], ONE_HOT[:1]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    distance = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert mode_score(real=ONE_HOT[:2], fake=uneven) == pytest.approx(math.exp(entropy - distance), rel=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^inception_score: fake must be probabilities >= 0, got -1$"):
        inception_score(fake=-ONE_HOT)
    with pytest.raises(
        ValueError, match=r"^inception_score: fake must be probabilities that sum to 1 in each row, got a sum of 2$"
    ):
        inception_score(fake=2 * ONE_HOT)
    with pytest.raises(ValueError, match=r"^inception_score: splits must be in \[1, 9\], got 10$"):
        inception_score(fake=ONE_HOT[:9])
    with pytest.raises(ValueError, match=r"^mode_score: fake must have shape \[10, 10\], got \[10, 9\]$"):
        mode_score(real=ONE_HOT, fake=torch.full((10, 9), 1 / 9, device=DEVICE))
    with pytest.raises(ValueError, match=r"^mode_score: real must be finite, got NaN or infinity$"):
        mode_score(real=ONE_HOT / 0, fake=ONE_HOT)
    with pytest.raises(ValueError, match=r"^mode_score: real must hold at least 1 sample, got 0$"):
        mode_score(real=ONE_HOT[:0], fake=ONE_HOT)
