"""Wasserstein distance of two samples of the same size, by exact optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs
from gankern.metrics.distances import blocks, centre_of


@torch.no_grad()
def wasserstein(*, real: Tensor, fake: Tensor, p: int = 1) -> float:
    """(min over permutations of the mean of ||x_i - y_π(i)||^p)^(1/p), Euclidean.

    Args:
        real: [N, D], floating, finite, N >= 1.
        fake: [N, D], floating, finite.
        p: 1 or 2.

    Returns:
        >= 0, lower is better, in the units of the samples; 0 for the same samples in any order. Computed in float64 on the CPU, in
        O(N²) memory and up to O(N³) time. Biased upwards: compare only figures of the same N.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.
        RuntimeError: scipy is not installed.

    Source: Arjovsky et al., "Wasserstein GAN", ICML 2017, section 2.
    """
    op = "wasserstein"
    _inputs.points(op, 1, real=real, fake=fake)
    checks.shape(op, "fake", fake, real.shape)
    checks.one_of(op, "p", p, (1, 2))
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RuntimeError('wasserstein: scipy must be installed, got none (pip install "gankern[metrics]")') from None
    squared = torch.cat([block for _, block in blocks(real, fake, centre_of(real))]).clamp_(min=0)
    _, match = linear_sum_assignment((squared.sqrt_() if p == 1 else squared).cpu().numpy())
    moved = (real.double() - fake.double()[torch.from_numpy(match).to(fake.device)]).norm(dim=1)  # without the rounding of `blocks`
    return moved.pow_(p).mean().item() ** (1 / p)
