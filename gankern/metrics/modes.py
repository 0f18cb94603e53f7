"""Mode coverage: which of the Gaussians of a mixture generated samples fall into, and how evenly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks

NEAR = 3.0  # standard deviations


class ModeCoverage(NamedTuple):
    """What `modes` finds.

    found: modes that have a high-quality sample.
    high_quality: share of the samples that are less than 3 standard deviations away from a centre, in [0, 1].
    reverse_kl: KL(generated || data) of the shares of the modes, in nats; 0 if all have the same, log K if one has all.
    kl: KL(data || generated), in nats; infinite if a mode has no sample.
    shares: float32 [K] on the CPU, the share of the samples whose nearest centre is that of each mode; they sum to 1.
    """

    found: int
    high_quality: float
    reverse_kl: float
    kl: float
    shares: Tensor


@torch.no_grad()
def modes(samples: Tensor, centres: Tensor, std: float) -> ModeCoverage:
    """Compare samples with a mixture of equally likely Gaussians.

    Args:
        samples: [N, D], floating, finite, N >= 1.
        centres: [K, D], floating, finite, no two the same, K >= 1.
        std: standard deviation of every coordinate of every Gaussian, > 0.

    Returns:
        ModeCoverage, computed in float64 on the samples' device.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Lin et al., "PacGAN: the power of two samples in generative adversarial networks", NeurIPS 2018, section 4.1.
    """
    for name, points in (("samples", samples), ("centres", centres)):
        checks.tensor("modes", name, points)
        checks.floating("modes", name, points)
        checks.dims("modes", name, points, 2)
        if len(points) == 0:
            checks.fail(ValueError, "modes", name, "hold at least one point", "none")
        if not points.isfinite().all():
            checks.fail(ValueError, "modes", name, "be finite", "NaN or infinity")
    checks.shape("modes", "samples", samples, (len(samples), centres.shape[1]))
    checks.number("modes", "std", std, 0.0)
    if std == 0.0:
        checks.fail(ValueError, "modes", "std", "be > 0", std)
    count = len(centres)
    if len(different := centres.unique(dim=0)) < count:
        checks.fail(ValueError, "modes", "centres", "be different points", f"{len(different)} different ones of {count}")
    points, centres = samples.double(), centres.to(samples.device, torch.float64)
    distance, nearest = torch.cat([torch.cdist(part, centres) for part in points.split(1 << 16)]).min(1)
    near = distance < NEAR * std
    shares = torch.bincount(nearest, minlength=count).cpu().double() / len(samples)
    reverse_kl = torch.xlogy(shares, shares * count).sum().item()
    kl = (shares * count).reciprocal().log().mean().item()
    return ModeCoverage(len(nearest[near].unique()), near.double().mean().item(), reverse_kl, kl, shares.float())
