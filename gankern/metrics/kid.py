"""Kernel distance of two sets of features: the unbiased MMD² of the cubic polynomial kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs
from gankern.metrics.distances import ELEMENTS

STRIP = 250  # rows of a Gram matrix whose upper half alone is computed


class KID(NamedTuple):
    """What `kid` finds: mean and population standard deviation of the estimates of the subsets."""

    mean: float
    std: float


@torch.no_grad()
def kid(*, real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KID:
    """Unbiased MMD² of the kernel (x·y / D + 1)³, over random subsets.

    Args:
        real: [N, D], floating, finite, N >= subset_size, not all the same.
        fake: [M, D], floating, finite, M >= subset_size.
        subsets: how many random pairs of subsets are compared, >= 1.
        subset_size: samples in each, drawn without replacement, >= 2.
        seed: of the subsets; PyTorch's global random state is left as it was.

    Returns:
        KID: about 0 for two samples of one law, also less than 0; lower is better. Kernels in float32 (float64 for float64
        features), sums in float64.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4.
    """
    real, fake = _features("kid", real, fake)
    checks.integer("kid", "subsets", subsets, 1)
    checks.integer("kid", "subset_size", subset_size, 2)
    checks.number("kid", "subset_size", subset_size, 2, min(len(real), len(fake)))
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        mine, other = (
            features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]
            for features in (real, fake)
        )
        estimates.append(_mmd2(mine, other))
    each = torch.stack(estimates)
    return KID(each.mean().item(), each.std(correction=0).item())


@torch.no_grad()
def kid_full(*, real: Tensor, fake: Tensor) -> float:
    """The unbiased MMD² of `kid` of all samples at once: the estimate of least variance, in O((N + M)²) time and O(N + M) memory.

    Args:
        real: [N, D], floating, finite, N >= 2, not all the same.
        fake: [M, D], floating, finite, M >= 2.

    Returns:
        About 0 for two samples of one law, also less than 0; lower is better. Kernels in float32 (float64 for float64 features),
        sums in float64.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4.
    """
    return _mmd2(*_features("kid_full", real, fake)).item()


def _features(op: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    _inputs.points(op, real=real, fake=fake)
    _inputs.not_constant(op, "real", real)
    if real.dtype == fake.dtype == torch.float64:
        return real, fake
    return real.float(), fake.float()


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    n, m = len(x), len(y)
    return _pairs(x) / (n * (n - 1)) + _pairs(y) / (m * (m - 1)) - 2 * _sum(x, y) / (n * m)


def _pairs(x: Tensor) -> Tensor:
    """Sum of the kernel over all pairs i != j, float64: blocks on the diagonal, and twice what is right of them."""
    total = x.new_zeros((), dtype=torch.float64)
    for top in range(0, len(x), STRIP):
        mine, right = x[top : top + STRIP], x[top + STRIP :]
        total += _sum(mine, mine) - (mine.square().sum(1) / x.shape[1] + 1).pow(3).sum(dtype=torch.float64)
        if len(right):
            total += 2 * _sum(mine, right)
    return total


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel over all pairs of x and y, float64; float32 within a row, which costs a third and loses nothing."""
    one, height = x.new_ones(()), max(1, ELEMENTS // len(y))
    rows = [torch.addmm(one, part, y.mT, alpha=1 / x.shape[1]).pow_(3).sum(1) for part in x.split(height)]
    return torch.cat(rows).sum(dtype=torch.float64)
