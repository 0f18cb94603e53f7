"""Precision, recall, density and coverage: whether samples lie where the data lie, by balls to the k-th nearest neighbour."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs
from gankern.metrics.distances import blocks, centre_of, nearest_squared, rounding


class PRDC(NamedTuple):
    """What `prdc` finds; higher is better. A ball is what is nearer to a sample than its k-th nearest neighbour of the same set.

    precision: share of fake samples in the ball of at least one real sample, in [0, 1]: fidelity.
    recall: share of real samples in the ball of at least one fake sample, in [0, 1]: diversity.
    density: mean over the fake samples of the number of real balls they are in, divided by k, >= 0, about 1 for one law: fidelity.
    coverage: share of real samples whose ball holds at least one fake sample, in [0, 1]: diversity.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def prdc(*, real: Tensor, fake: Tensor, k: int = 5) -> PRDC:
    """Precision and recall (Kynkäänniemi et al. with k = 3), density and coverage (Naeem et al. with k = 5).

    Args:
        real: [N, D], floating, finite, N > k, not all the same.
        fake: [M, D], floating, finite, M > k.
        k: neighbours that make a ball, >= 1.

    Returns:
        PRDC, computed in float64 in O(N + M) memory. The ball of a sample with k copies is empty.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019, section 2;
    Naeem et al., "Reliable fidelity and diversity metrics for generative models", ICML 2020, section 3.
    """
    checks.integer("prdc", "k", k, 1)
    _inputs.points("prdc", k + 1, real=real, fake=fake)
    _inputs.not_constant("prdc", "real", real)
    centre = centre_of(real)
    around_real, around_fake = (
        nearest_squared(features, None, k, centre)[0][:, -1] - rounding(features, centre) for features in (real, fake)
    )
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    counts = torch.zeros(3, dtype=torch.int64, device=real.device)  # of real samples recalled and covered, of pairs inside a ball
    for rows, block in blocks(real, fake, centre):
        inside = block < around_real[rows].unsqueeze(1)
        precise |= inside.any(0)
        counts += torch.stack([(block < around_fake).any(1).sum(), inside.any(1).sum(), inside.count_nonzero()])
    recalled, covered, balls = counts.tolist()
    return PRDC(precise.double().mean().item(), recalled / len(real), balls / (k * len(fake)), covered / len(real))
