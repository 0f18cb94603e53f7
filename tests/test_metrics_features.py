"""FID, KID, PRDC, the 1-NN test and the Wasserstein distance: closed forms, reference libraries, independent formulas, refusals."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gankern import metrics
from gankern.metrics import distances, fid, kid, kid_full, nearest_neighbour_test, prdc, wasserstein
from tests.support import DEVICE, randn

scipy_linalg = pytest.importorskip("scipy.linalg")
FrechetInceptionDistance = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
KernelInceptionDistance = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance

METRICS: dict[str, Callable[..., Any]] = {
    "fid": fid,
    "kid": lambda **sets: kid(**sets, subset_size=5),
    "kid_full": kid_full,
    "prdc": prdc,
    "nearest_neighbour_test": nearest_neighbour_test,
    "wasserstein": wasserstein,
}


def gaussian(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Samples whose own mean and unbiased covariance are these."""
    z = randn(count, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.mT.cov()), z.mT, upper=False).mT
    return mean + z @ torch.linalg.cholesky(covariance).mT


def features(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Rectified, correlated, of the size that networks give, float32 [count, 32]."""
    mixed = randn(count, 32, seed=seed) @ randn(32, 32, seed=99, scale=0.3)
    return (scale * mixed + shift).relu().float()


# --- FID ------------------------------------------------------------------------------------------------------------------------


def test_fid_of_gaussians_with_independent_coordinates() -> None:
    """||m - m'||² + sum (s - s')²."""
    m, n = randn(2, 6, seed=1)
    s, t = randn(2, 6, seed=2).abs() + 0.1
    real, fake = gaussian(m, torch.diag(s**2), 50, 3), gaussian(n, torch.diag(t**2), 80, 4)
    want = ((m - n) ** 2).sum() + ((s - t) ** 2).sum()
    assert fid(real=real, fake=fake) == pytest.approx(want.item(), rel=1e-10)


def test_fid_of_gaussians_with_other_axes() -> None:
    """In the plane tr (S S')^½ = (tr S S' + 2 (det S S')^½)^½; in more dimensions, scipy's root of a matrix."""
    for dim in (2, 9):
        s, t = (a @ a.mT + 0.1 * torch.eye(dim, device=DEVICE) for a in randn(2, dim, dim, seed=5))
        zero = torch.zeros(dim, dtype=torch.float64, device=DEVICE)
        got = fid(real=gaussian(zero, s, 60, 6), fake=gaussian(zero, t, 60, 7))
        product = s @ t
        root = scipy_linalg.sqrtm(product.cpu().numpy()).real.trace()
        if dim == 2:
            assert root == pytest.approx((product.trace() + 2 * product.det().sqrt()).sqrt().item(), rel=1e-10)
        assert got == pytest.approx((s.trace() + t.trace()).item() - 2 * root, rel=1e-9)


def test_fid_of_the_same_samples_is_0() -> None:
    """Also with fewer samples than features, and with constant features."""
    few = randn(10, 40, seed=8)
    constant = randn(30, 5, seed=9)
    constant[:, 2] = 3.0
    for samples in (few, constant, 1e4 + few):
        assert fid(real=samples, fake=samples.flip(0)) == pytest.approx(0, abs=1e-10)


def test_fid_is_not_its_square_root_and_is_symmetric() -> None:
    real = randn(100, 3, seed=1)
    assert fid(real=real, fake=real + 2) == pytest.approx(12, rel=1e-9)
    other = features(90, 2)[:, :3]
    assert fid(real=real, fake=other) == pytest.approx(fid(real=other, fake=real), rel=1e-6)


@pytest.mark.parametrize("counts", [(300, 400), (20, 25)])
def test_fid_agrees_with_torchmetrics(counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has fewer samples than features."""
    monkeypatch.setattr(distances, "TILE", 64)
    real, fake = features(counts[0], 1), features(counts[1], 2, 0.8, 0.1)
    network = nn.Identity()
    network.num_features = 32
    theirs = FrechetInceptionDistance(network).set_dtype(torch.float64)
    theirs.update(real.cpu(), real=True)
    theirs.update(fake.cpu(), real=False)
    assert fid(real=real, fake=fake) == pytest.approx(theirs.compute().item(), rel=1e-4)


# --- KID ------------------------------------------------------------------------------------------------------------------------


def test_kid_is_the_unbiased_estimate() -> None:
    """Pair by pair, in float64."""
    real, fake = randn(7, 3, seed=1), randn(5, 3, seed=2) + 1

    def mean(pairs: Any) -> float:
        return float(np.mean([(float(x @ y) / 3 + 1) ** 3 for x, y in pairs]))

    want = mean(itertools.permutations(real, 2)) + mean(itertools.permutations(fake, 2)) - 2 * mean(itertools.product(real, fake))
    assert kid_full(real=real, fake=fake) == pytest.approx(want, rel=1e-10)


def test_kid_of_two_samples_of_one_law_is_about_0() -> None:
    got = kid(real=features(2000, 1), fake=features(2000, 2), subsets=50, subset_size=300)
    apart = kid(real=features(2000, 1), fake=features(2000, 2, 0.8), subsets=50, subset_size=300)
    whole, whole_apart = (kid_full(real=features(2000, 1), fake=features(2000, 2, scale)) for scale in (1.0, 0.8))
    assert abs(whole) < 0.01 * whole_apart
    assert abs(got.mean) < 4 * got.std / math.sqrt(6)  # six disjoint subsets
    assert apart.mean == pytest.approx(whole_apart, abs=4 * apart.std / math.sqrt(6))


def test_kid_of_all_samples_in_one_subset() -> None:
    real, fake = features(40, 1).double(), features(40, 2).double()
    got, whole = kid(real=real, fake=fake, subsets=3, subset_size=40), kid_full(real=real, fake=fake)
    assert got.mean == pytest.approx(whole, rel=1e-9)
    assert got.std < 1e-9 * abs(whole)


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
@pytest.mark.parametrize("strip", [250, 32])
def test_kid_agrees_with_torchmetrics(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same subsets: both draw them one after the other from one seed."""
    monkeypatch.setattr(sys.modules["gankern.metrics.kid"], "STRIP", strip)
    real, fake = features(300, 1), features(400, 2, 0.8, 0.1)
    theirs = KernelInceptionDistance(nn.Identity(), subsets=20, subset_size=100).set_dtype(torch.float64)
    theirs.update(real.cpu().double(), real=True)
    theirs.update(fake.cpu().double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, std = theirs.compute()
    state = torch.get_rng_state()
    got = kid(real=real, fake=fake, subsets=20, subset_size=100, seed=3)
    assert got.mean == pytest.approx(mean.item(), rel=1e-4)
    assert got.std == pytest.approx(std.item(), rel=1e-4)
    assert torch.get_rng_state().equal(state)


def test_kid_refuses_subsets_larger_than_the_sets() -> None:
    with pytest.raises(ValueError, match=r"^kid: subset_size must be in \[2, 40\], got 1000$"):
        kid(real=features(50, 1), fake=features(40, 2))


# --- precision, recall, density, coverage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 24, 1000])
def test_prdc_is_what_the_papers_say(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ELEMENTS", block)
    real, fake = features(150, 1), features(120, 2, 0.9, 0.05)
    x, y = real.cpu().double().numpy(), fake.cpu().double().numpy()

    def apart(a: Any, b: Any) -> Any:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    for k in (1, 5):
        ball_x, ball_y = (np.sort(apart(a, a), 1)[:, k] for a in (x, y))
        inside = apart(x, y) < ball_x[:, None]
        got = prdc(real=real, fake=fake, k=k)
        assert got.precision == pytest.approx(inside.any(0).mean(), abs=1e-12)
        assert got.recall == pytest.approx((apart(x, y) < ball_y[None]).any(1).mean(), abs=1e-12)
        assert got.density == pytest.approx(inside.sum() / (k * len(y)), abs=1e-12)
        assert got.coverage == pytest.approx(inside.any(1).mean(), abs=1e-12)


def test_prdc_of_the_same_samples_is_1() -> None:
    """The edge of each ball is a distance of the other matrix: rounding must not decide."""
    samples = features(400, 1)
    assert prdc(real=samples, fake=samples.clone()) == (1, 1, 1, 1)
    assert prdc(real=samples, fake=samples[torch.randperm(400)]) == (1, 1, 1, 1)


def test_prdc_on_a_line() -> None:
    """Real 0, 1, 2, 3 with k = 1: balls of radius 1. Fake 0.5 and 1.5 lie in two each; 9 and 9.25 in none."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]], device=DEVICE)
    fake = torch.tensor([[0.5], [1.5], [9.0], [9.25]], device=DEVICE)
    got = prdc(real=real, fake=fake, k=1)
    assert got == (0.5, 0.75, 1.0, 0.75)  # the fake balls, radius 1 around 0.5 and 1.5, hold 0, 1, 2


def test_precision_and_recall_are_not_swapped() -> None:
    """The fault: which is which hangs on the order of two arguments. Half of the law, well made, has precision 1."""
    near, far = features(100, 1), features(100, 2) + 100
    assert prdc(real=torch.cat([near, far]), fake=near)[:2] == (1.0, 0.5)
    assert prdc(fake=torch.cat([near, far]), real=near)[:2] == (0.5, 1.0)


def test_one_sample_far_away_does_not_blind_prdc() -> None:
    real, fake = features(200, 1), features(200, 2)
    far = torch.cat([fake, torch.full_like(fake[:1], 1e8)])
    want, got = prdc(real=real, fake=fake), prdc(real=real, fake=far)
    assert got.precision == pytest.approx(want.precision * 200 / 201)
    assert got.coverage == want.coverage


# --- 1-NN test ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 24, 1000])
def test_nearest_neighbours_one_by_one(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ELEMENTS", block)
    real, fake = features(90, 1), features(90, 2, 1.2)
    both = torch.cat([real, fake]).double()
    apart = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    right = ((apart.argmin(1) < 90) == (torch.arange(180, device=DEVICE) < 90)).double()
    got = nearest_neighbour_test(real=real, fake=fake)
    assert got == pytest.approx([part.mean().item() for part in (right, right[:90], right[90:])], abs=1e-12)


def test_one_law_has_accuracy_one_half() -> None:
    """Within four standard deviations of as many fair coins."""
    got = nearest_neighbour_test(real=randn(2000, 2, seed=1), fake=randn(2000, 2, seed=2))
    for share, count in zip(got, (4000, 2000, 2000), strict=True):
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(count)


def test_apart_copied_and_collapsed() -> None:
    real = randn(100, 3, seed=1)
    assert nearest_neighbour_test(real=real, fake=real + 50) == (1, 1, 1)
    assert nearest_neighbour_test(real=real, fake=real.flip(0)) == (0, 0, 0)
    collapsed = nearest_neighbour_test(real=real, fake=real[:1].expand(100, 3))
    assert collapsed.real > 0.9
    assert collapsed.fake == 0.5  # each is as near to its copies as to the real sample that they copy


def test_as_near_to_both_counts_half() -> None:
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=DEVICE).repeat(10, 1)
    assert nearest_neighbour_test(real=corners, fake=corners) == (0.5, 0.5, 0.5)


# --- Wasserstein distance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
def test_on_a_line_sorting_is_optimal(p: int) -> None:
    x, y = randn(60, 1, seed=1), 2 * randn(60, 1, seed=2) + 1
    want = (x.sort(0)[0] - y.sort(0)[0]).abs().pow(p).mean().pow(1 / p)
    assert wasserstein(real=x, fake=y, p=p) == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_the_best_of_all_permutations(p: int) -> None:
    x, y = randn(6, 3, seed=1), randn(6, 3, seed=2)
    cost = (x.unsqueeze(1) - y).norm(dim=2).pow(p)
    want = min(cost[range(6), order].mean().item() for order in map(list, itertools.permutations(range(6))))
    assert wasserstein(real=x, fake=y, p=p) == pytest.approx(want ** (1 / p), rel=1e-12)


def test_wasserstein_of_a_shift_and_of_another_order() -> None:
    x = randn(50, 4, seed=1)
    assert wasserstein(real=x, fake=x.flip(0) + 3) == pytest.approx(6, rel=1e-12)
    assert wasserstein(real=x, fake=x.flip(0)) == 0


def test_wasserstein_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(RuntimeError, match=r"^wasserstein: scipy must be installed, got none \(pip install "):
        wasserstein(real=randn(4, 2, seed=1), fake=randn(4, 2, seed=2))


# --- what all refuse ------------------------------------------------------------------------------------------------------------


def test_arguments_are_named_real_and_fake() -> None:
    for name in (*METRICS, "mode_score", "ssim", "ms_ssim", "inception_score", "ms_ssim_diversity"):
        parameters = inspect.signature(getattr(metrics, name)).parameters
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values()), name
        sets = [parameter for parameter in parameters if parameters[parameter].annotation == "Tensor"]
        assert sets == (["fake"] if name in ("inception_score", "ms_ssim_diversity") else ["real", "fake"]), name


def bad(kind: str) -> tuple[dict[str, Tensor], str]:
    x = randn(20, 3, seed=1)
    nan = x.clone()
    nan[3, 1] = torch.nan
    return {
        "nan": ({"real": x, "fake": nan}, "fake must be finite, got NaN or infinity"),
        "features": ({"real": x, "fake": x[:, :2]}, "fake must have shape [20, 3], got [20, 2]"),
        "images": ({"real": x[None], "fake": x}, "real must have 2 dimensions, got shape [1, 20, 3]"),
        "no feature": ({"real": x[:, :0], "fake": x[:, :0]}, "real must have at least one feature, got none"),
    }[kind]


@pytest.mark.parametrize("kind", ["nan", "features", "images", "no feature"])
@pytest.mark.parametrize("name", METRICS)
def test_bad_input(name: str, kind: str) -> None:
    arguments, message = bad(kind)
    with pytest.raises(ValueError) as caught:
        METRICS[name](**arguments)
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.parametrize("name", METRICS)
def test_integers_and_too_few(name: str) -> None:
    x = randn(20, 3, seed=1)
    with pytest.raises(TypeError) as caught:
        METRICS[name](real=x.long(), fake=x)
    assert str(caught.value) == f"{name}: real must be float64, float32, bfloat16 or float16, got int64"
    least = {"prdc": "6 samples", "wasserstein": "1 sample"}.get(name, "2 samples")
    with pytest.raises(ValueError) as caught_:
        METRICS[name](real=x[:0], fake=x)
    assert str(caught_.value) == f"{name}: real must hold at least {least}, got 0"


@pytest.mark.parametrize("name", [name for name in METRICS if name != "wasserstein"])
def test_real_samples_that_are_all_the_same(name: str) -> None:
    same, x = torch.ones(20, 3, device=DEVICE), randn(20, 3, seed=1).float()
    with pytest.raises(ValueError) as caught:
        METRICS[name](real=same, fake=x)
    assert str(caught.value) == f"{name}: real must hold samples that differ, got 20 copies of one"
    result = METRICS[name](real=x, fake=same)  # a collapsed generator is a result
    assert all(map(math.isfinite, result if isinstance(result, tuple) else [result]))


@pytest.mark.parametrize("name", ["nearest_neighbour_test", "wasserstein"])
def test_sets_of_other_sizes(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        METRICS[name](real=randn(20, 3, seed=1), fake=randn(19, 3, seed=1))
    assert str(caught.value) == f"{name}: fake must have shape [20, 3], got [19, 3]"
