"""Nearest neighbours of gankern.metrics against torch.cdist, in one block and in many."""

from __future__ import annotations

import pytest
import torch

from gankern.metrics import distances, nearest_neighbours
from tests.support import DEVICE, randn


@pytest.fixture(params=[(1 << 24, 4096), (100, 7)], ids=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ELEMENTS", request.param[0])
    monkeypatch.setattr(distances, "TILE", request.param[1])


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neighbours_among_other_points(k: int, dtype: torch.dtype) -> None:
    queries, points = randn(23, 4, seed=1, dtype=dtype), randn(41, 4, seed=2, dtype=dtype)
    want = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False)
    got = nearest_neighbours(queries, points, k)
    torch.testing.assert_close(got.distance, want.values, rtol=1e-9, atol=0)
    assert got.indices.equal(want.indices)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_but_itself(k: int) -> None:
    points = randn(57, 3, seed=3)
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    want = apart.topk(k, largest=False)
    got = nearest_neighbours(points, k=k)
    torch.testing.assert_close(got.distance, want.values, rtol=1e-9, atol=0)
    assert got.indices.equal(want.indices)


def test_a_narrow_mode_far_from_zero() -> None:
    """Float32 products would lose distances of 1e-3 beside norms of 100."""
    points = 100 + 1e-3 * torch.arange(50.0, dtype=torch.float64, device=DEVICE).unsqueeze(1)
    torch.testing.assert_close(nearest_neighbours(points).distance, torch.full_like(points, 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": randn(3, 2, seed=1)[:, 0]}, "nearest_neighbours: queries must have 2 dimensions, got shape [3]"),
        ({"queries": randn(3, 2, seed=1), "k": 3}, "nearest_neighbours: queries must hold at least 4 samples, got 3"),
        ({"queries": randn(3, 2, seed=1), "k": 0}, "nearest_neighbours: k must be a finite number >= 1, got 0"),
        (
            {"queries": randn(3, 2, seed=1), "points": randn(1, 2, seed=1), "k": 2},
            "nearest_neighbours: points must hold at least 2 samples, got 1",
        ),
        (
            {"queries": randn(3, 2, seed=1), "points": randn(3, 4, seed=1)},
            "nearest_neighbours: points must have shape [3, 2], got [3, 4]",
        ),
        ({"queries": randn(3, 2, seed=1) / 0}, "nearest_neighbours: queries must be finite, got NaN or infinity"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        nearest_neighbours(**arguments)
    assert str(caught.value) == message
