"""gankern.metrics.modes on samples whose modes are counted by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from gankern.data import load
from gankern.data.toys import MIXTURES
from gankern.metrics import modes
from tests.support import DEVICE

CENTRES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])


def at(*points: tuple[float, float], **options: Any) -> Tensor:
    return torch.tensor(points, device=DEVICE, **options)


def test_a_hand_made_set() -> None:
    """Three at the first centre, one just inside and one just outside of 3 s.d. of the second, one far from all."""
    got = modes(at((0, 0), (0.1, 0), (0, -0.1), (4.29, 0), (4.31, 0), (1.9, 2.2), dtype=torch.float32), CENTRES, 0.1)
    assert got.found == 2
    assert got.high_quality == pytest.approx(4 / 6, abs=1e-12)
    assert got.shares.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=1e-7)
    assert got.reverse_kl == pytest.approx(0.5 * math.log(2) + math.log(4 / 3) / 3 + math.log(4 / 6) / 6, abs=1e-12)
    assert got.kl == math.inf


def test_even_and_uneven_shares() -> None:
    even = modes(CENTRES.to(DEVICE), CENTRES, 0.1)
    assert (even.found, even.high_quality, even.reverse_kl, even.kl) == (4, 1.0, 0.0, 0.0)
    one = modes(CENTRES[:1].repeat(7, 1), CENTRES, 0.1)
    assert (one.found, one.high_quality, one.kl) == (1, 1.0, math.inf)
    assert one.reverse_kl == pytest.approx(math.log(4), abs=1e-12)
    uneven = modes(torch.cat([CENTRES, CENTRES[:1].repeat(4, 1)]), CENTRES, 0.1)  # shares 5, 1, 1, 1 of 8
    assert uneven.reverse_kl == pytest.approx(5 / 8 * math.log(5 / 2) + 3 / 8 * math.log(1 / 2), abs=1e-12)
    assert uneven.kl == pytest.approx(-(math.log(5 / 2) + 3 * math.log(1 / 2)) / 4, abs=1e-12)


def test_distance_is_that_of_all_coordinates() -> None:
    """Each coordinate within 3 s.d., the point itself not."""
    assert modes(at((0.25, 0.25)), CENTRES, 0.1).high_quality == 0.0
    assert modes(at((0.2, 0.2)), CENTRES, 0.1).high_quality == 1.0


@pytest.mark.parametrize("name", MIXTURES)
def test_the_data_themselves(name: str) -> None:
    """Of a Gaussian in the plane 1 - exp(-9 / 2) is within 3 s.d.; a mode that is left out is missed."""
    data = load(name)
    assert data.mixture is not None
    centres, std = data.mixture
    got = modes(data.samples.to(DEVICE), centres, std)
    assert got.found == len(centres)
    assert got.high_quality == pytest.approx(1 - math.exp(-4.5), abs=1e-3)  # s.d. of the share 3e-4
    assert got.shares.tolist() == pytest.approx([1 / len(centres)] * len(centres), abs=1e-7)
    assert 0 <= got.reverse_kl < 1e-12
    kept = data.samples[(data.samples - centres[3]).norm(dim=1) > 5 * std]
    dropped = modes(kept, centres, std)
    assert dropped.found == len(centres) - 1
    assert dropped.shares[3] == 0
    assert dropped.kl == math.inf
    assert dropped.reverse_kl == pytest.approx(math.log(len(centres) / (len(centres) - 1)), abs=1e-5)


def test_samples_of_any_float_and_many() -> None:
    samples = CENTRES.repeat(40_000, 1)
    for dtype in (torch.float64, torch.bfloat16):
        got = modes(samples.to(DEVICE, dtype), CENTRES, 0.1)
        assert (got.found, got.high_quality) == (4, 1.0)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"samples": at((0.0, float("nan")))}, ValueError, "samples must be finite, got NaN or infinity"),
        ({"samples": at((0.0, float("inf")))}, ValueError, "samples must be finite, got NaN or infinity"),
        ({"samples": torch.zeros(0, 2)}, ValueError, "samples must hold at least one point, got none"),
        ({"samples": torch.zeros(3, 3)}, ValueError, "samples must have shape [3, 2], got [3, 3]"),
        ({"samples": torch.zeros(3)}, ValueError, "samples must have 2 dimensions, got shape [3]"),
        (
            {"samples": torch.zeros(3, 2, dtype=torch.int64)},
            TypeError,
            "samples must be float64, float32, bfloat16 or float16, got int64",
        ),
        ({"samples": [[0.0, 0.0]]}, TypeError, "samples must be a torch.Tensor, got list"),
        ({"centres": CENTRES[[0, 1, 2, 0]]}, ValueError, "centres must be different points, got 3 different ones of 4"),
        ({"std": 0.0}, ValueError, "std must be > 0, got 0.0"),
        ({"std": float("nan")}, ValueError, "std must be a finite number >= 0, got nan"),
    ],
)
def test_refusals(changes: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^modes: " + re.escape(sentence) + "$"):
        modes(**{"samples": CENTRES, "centres": CENTRES, "std": 0.1, **changes})
