"""Fréchet distance of two sets of features, each taken for a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.metrics import _inputs
from gankern.metrics.distances import TILE, centre_of


@torch.no_grad()
def fid(*, real: Tensor, fake: Tensor) -> float:
    """Fréchet distance ||m_r - m_f||² + tr(S_r + S_f - 2 (S_r S_f)^½) of the means and covariances: not its square root.

    The trace of the root is the sum of the singular values of A_rᵀ A_f with S = A Aᵀ: no root of a matrix that is not symmetric is
    needed, and singular covariances (constant features, fewer samples than features) are no exception.

    Args:
        real: [N, D], floating, finite, N >= 2, not all the same.
        fake: [M, D], floating, finite, M >= 2.

    Returns:
        >= 0, lower is better; 0 for the same mean and covariance. Computed in float64. Biased upwards by an amount that grows with
        D / N: compare only figures of the same N and M.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017,
    section 3.
    """
    _inputs.points("fid", real=real, fake=fake)
    _inputs.not_constant("fid", "real", real)
    mean_real, root_real, trace_real = _gaussian(real)
    mean_fake, root_fake, trace_fake = _gaussian(fake)
    common = torch.linalg.svdvals(root_real.mT @ root_fake).sum()
    return max(0.0, ((mean_real - mean_fake).square().sum() + trace_real + trace_fake - 2 * common).item())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], a root A [D, D] of the unbiased covariance A Aᵀ, and its trace; float64."""
    mean = centre_of(features)
    covariance = features.new_zeros(len(mean), len(mean), dtype=torch.float64)
    for part in features.split(TILE):
        centred = part.double() - mean
        covariance.addmm_(centred.mT, centred)
    covariance /= len(features) - 1
    root, singular = torch.linalg.cholesky_ex(covariance)
    if singular:
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_(min=0).sqrt_()
    return mean, root, covariance.trace()
