"""SSIM and MS-SSIM: torchmetrics, an independent formula by scipy, closed forms, refusals."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.metrics import ms_ssim, ms_ssim_diversity, ssim
from tests.support import DEVICE, randn

gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter
torchmetrics_image = pytest.importorskip("torchmetrics.functional.image")

SHAPES = [(5, 1, 28, 28), (3, 3, 40, 31), (2, 3, 11, 64)]
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def pair(shape: tuple[int, ...], noise: float = 0.2) -> tuple[Tensor, Tensor]:
    image = F.avg_pool2d(randn(*shape, seed=1), 5, 1, 2) * 2
    return image.clamp(-1, 1), (image + noise * randn(*shape, seed=2)).clamp(-1, 1)


def by_scipy(x: Any, y: Any) -> tuple[float, float]:
    """SSIM of two planes in [-1, 1] and its factor of contrast and structure, where the window fits."""

    def mean(plane: Any) -> Any:
        return gaussian_filter(plane, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    contrast = (2 * vxy + 0.06**2) / (vx + vy + 0.06**2)
    return (contrast * (2 * mx * my + 0.02**2) / (mx * mx + my * my + 0.02**2)).mean(), contrast.mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_agrees_with_torchmetrics(shape: tuple[int, ...]) -> None:
    """Theirs also counts windows that reach over the edge, where it mirrors the image: so does ours on an image so enlarged."""
    x, y = pair(shape)
    theirs = torchmetrics_image.structural_similarity_index_measure(y, x, data_range=2.0).item()
    got = ssim(real=F.pad(x, (5,) * 4, mode="reflect"), fake=F.pad(y, (5,) * 4, mode="reflect"))
    assert got == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("batch", [1 << 20, 2000])
@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_is_what_the_paper_says(shape: tuple[int, ...], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["gankern.metrics.ssim"], "BATCH", batch)
    x, y = pair(shape)
    planes = (t.cpu().flatten(0, 1).numpy() for t in (x, y))
    want = np.mean([by_scipy(*both)[0] for both in zip(*planes, strict=True)])
    assert ssim(real=x, fake=y) == pytest.approx(want, rel=1e-9)
    assert ssim(real=y, fake=x) == pytest.approx(want, rel=1e-9)
    assert ssim(real=x.float(), fake=y.float()) == pytest.approx(want, rel=1e-5)
    assert ssim(real=127.5 * x, fake=127.5 * y, data_range=255) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "scales"), [((3, 1, 21, 40), 1), ((2, 3, 28, 28), 2), ((2, 1, 128, 90), 4), ((1, 1, 176, 180), 5)]
)
def test_ms_ssim_is_what_the_paper_says(shape: tuple[int, ...], scales: int) -> None:
    """As many scales as have 11 pixels, their weights made to sum to 1; the last with its brightness, negative ones 0."""
    x, y = pair(shape)
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    values = np.ones(shape[0])
    u, v = x, y
    for scale, weight in enumerate(weights):
        if scale:
            u, v = F.avg_pool2d(u, 2), F.avg_pool2d(v, 2)
        for i in range(shape[0]):
            planes = [by_scipy(*both) for both in zip(u[i].cpu().numpy(), v[i].cpu().numpy(), strict=True)]
            values[i] *= max(0.0, np.mean(planes, 0)[0 if scale == scales - 1 else 1]) ** weight
    assert ms_ssim(real=x, fake=y) == pytest.approx(values.mean(), rel=1e-9)


def test_ms_ssim_beside_torchmetrics() -> None:
    """Theirs mirrors the image at its edge in the last scale alone, so that the two differ in the fourth digit here."""
    x, y = pair((2, 3, 256, 256))
    theirs = torchmetrics_image.multiscale_structural_similarity_index_measure(y, x, data_range=2.0).item()
    assert ms_ssim(real=x, fake=y) == pytest.approx(theirs, rel=2e-3)


def test_closed_forms() -> None:
    """1 for the same images; for two even ones the factor of brightness alone; an inverted pattern is below 0, at many scales 0."""
    x, _ = pair((4, 1, 28, 28))
    assert ssim(real=x, fake=x) == pytest.approx(1, abs=1e-12)
    assert ms_ssim(real=x, fake=x) == pytest.approx(1, abs=1e-12)
    a, b = torch.full_like(x, 0.5), torch.full_like(x, 0.25)
    want = (2 * 0.5 * 0.25 + 4e-4) / (0.25 + 0.0625 + 4e-4)
    assert ssim(real=a, fake=b) == pytest.approx(want, rel=1e-9)
    pattern = (torch.arange(28, device=DEVICE) % 2 * 2.0 - 1).expand(1, 1, 28, 28)
    assert ssim(real=pattern, fake=-pattern) < -0.9
    assert ms_ssim(real=pattern, fake=-pattern) == 0


def test_diversity_is_the_mean_of_random_pairs() -> None:
    shapes, noise = pair((6, 1, 28, 28))
    images = shapes[:1] + 0.3 * (noise - shapes)
    first, second = torch.combinations(torch.arange(6, device=DEVICE)).unbind(1)
    state = torch.get_rng_state()
    got = ms_ssim_diversity(fake=images, pairs=3000)
    assert torch.get_rng_state().equal(state)
    assert got == pytest.approx(ms_ssim(real=images[first], fake=images[second]), abs=0.01)
    assert ms_ssim_diversity(fake=images[:1].repeat(3, 1, 1, 1)) == pytest.approx(1, abs=1e-12)
    assert ms_ssim_diversity(fake=images, pairs=3, seed=1) != ms_ssim_diversity(fake=images, pairs=3, seed=2)
    two = images[:2]
    assert ms_ssim_diversity(fake=two, pairs=5) == pytest.approx(
        ms_ssim(real=two[:1], fake=two[1:]), rel=1e-12
    )  # never with itself


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_refusals(metric: Any) -> None:
    name = metric.__name__
    x = torch.zeros(3, 1, 28, 28, device=DEVICE)
    for arguments, message in (
        ({"real": x, "fake": x[:2]}, "fake must have shape [3, 1, 28, 28], got [2, 1, 28, 28]"),
        ({"real": x[0], "fake": x[0]}, "real must have 4 dimensions, got shape [1, 28, 28]"),
        ({"real": x[..., :10], "fake": x}, "real must have a channel and 11 pixels a side, got shape [3, 1, 28, 10]"),
        ({"real": x, "fake": x / 0}, "fake must be finite, got NaN or infinity"),
        ({"real": x[:0], "fake": x[:0]}, "real must hold at least 1 image, got 0"),
        ({"real": x, "fake": x, "data_range": 0}, "data_range must be > 0, got 0"),
        ({"real": x, "fake": x, "data_range": math.nan}, "data_range must be a finite number >= 0, got nan"),
    ):
        with pytest.raises(ValueError) as caught:
            metric(**arguments)
        assert str(caught.value) == f"{name}: {message}"


def test_diversity_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ms_ssim_diversity: fake must hold at least 2 images, got 1$"):
        ms_ssim_diversity(fake=torch.zeros(1, 1, 28, 28, device=DEVICE))
