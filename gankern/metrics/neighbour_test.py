"""The 1-nearest-neighbour two-sample test: can real and fake samples be told apart by their nearest neighbour?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs
from gankern.metrics.distances import blocks, centre_of, nearest_squared, rounding


class NearestNeighbourTest(NamedTuple):
    """What `nearest_neighbour_test` finds, each in [0, 1]: 0.5 is best.

    accuracy: of the leave-one-out classifier on all samples; towards 1 if the laws differ, towards 0 if fake samples are copies of
        real ones.
    real: its accuracy on the real samples: low where samples lie everywhere among the data.
    fake: its accuracy on the fake samples: high where they lie close to each other (mode collapse).
    """

    accuracy: float
    real: float
    fake: float


@torch.no_grad()
def nearest_neighbour_test(*, real: Tensor, fake: Tensor) -> NearestNeighbourTest:
    """Accuracy of the 1-nearest-neighbour classifier of real against fake, leave-one-out, Euclidean.

    Args:
        real: [N, D], floating, finite, N >= 2, not all the same.
        fake: [N, D], floating, finite; as many as real, or chance would not be 0.5.

    Returns:
        NearestNeighbourTest, computed in float64 in O(N) memory. A sample that is as near to both sets counts half.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", ICLR 2017, section 3; Xu et al., "An empirical study on
    evaluation metrics of generative adversarial networks", 2018, section 2.
    """
    op = "nearest_neighbour_test"
    _inputs.points(op, real=real, fake=fake)
    checks.shape(op, "fake", fake, real.shape)
    _inputs.not_constant(op, "real", real)
    centre = centre_of(real)
    to_fake = torch.empty(len(real), dtype=torch.float64, device=real.device)
    to_real = torch.full_like(to_fake, torch.inf)
    for rows, block in blocks(real, fake, centre):
        to_fake[rows] = block.amin(1)
        to_real = torch.minimum(to_real, block.amin(0))
    shares = []
    for features, other in ((real, to_fake), (fake, to_real)):
        nearer = other - nearest_squared(features, None, 1, centre)[0][:, 0]
        tie = nearer.abs() <= rounding(features, centre)
        shares.append(torch.where(tie, 0.5, (nearer > 0).double()).mean().item())
    return NearestNeighbourTest(sum(shares) / 2, *shares)
