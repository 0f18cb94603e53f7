"""Points in the plane whose law is known: rings and grids of Gaussians, and the Swiss roll."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gankern.data.dataset import Dataset, Mixture

COUNT = 100_000


def ring(radius: float, std: float) -> Mixture:
    """Eight Gaussians on a circle. An angle of 2 pi would be that of 0 again: one mode counted twice."""
    angles = torch.arange(8, dtype=torch.float64) * (2.0 * math.pi / 8)
    return Mixture((radius * torch.stack([angles.cos(), angles.sin()], 1)).float(), std)


def grid(step: float, std: float) -> Mixture:
    """25 Gaussians, five in a row."""
    line = step * torch.arange(-2, 3, dtype=torch.float32)
    return Mixture(torch.cartesian_prod(line, line), std)


MIXTURES = {
    "ring": ring(1.0, 0.01),  # these two: Lin et al., "PacGAN", 2018, section 4.1
    "grid": grid(2.0, 0.05),
    "unrolled-ring": ring(2.0, 0.02),  # Metz et al., "Unrolled generative adversarial networks", 2017, section 3.1
    "8gaussians": ring(2.0 / 1.414, 0.02 / 1.414),  # these two: the authors' code of Gulrajani et al., 2017, divided by their s.d.
    "25gaussians": grid(2.0 / 2.828, 0.05 / 2.828),
}
TOYS = (*MIXTURES, "swissroll")


def toy(name: str, seed: int, split: str) -> Dataset:
    """COUNT points of one of TOYS, float32 [COUNT, 2], by `seed`; each mode of a mixture has as many, in random order."""
    rng = torch.Generator().manual_seed(2 * seed + (split == "test"))
    noise = torch.randn(COUNT, 2, generator=rng, dtype=torch.float32)
    if name == "swissroll":
        return Dataset(swiss_roll(noise, rng), name=name, note=f"{COUNT} points by seed {seed}")
    mixture = MIXTURES[name]
    mode = torch.randperm(COUNT, generator=rng) % len(mixture.centres)
    note = f"{COUNT} points by seed {seed}, of {len(mixture.centres)} Gaussians with s.d. {mixture.std:.3g}"
    return Dataset(mixture.centres[mode] + mixture.std * noise, name=name, note=note, mixture=mixture)


def swiss_roll(noise: Tensor, rng: torch.Generator) -> Tensor:
    """(t cos t, t sin t) with t uniform in [1.5 pi, 4.5 pi], plus noise of s.d. 0.25, divided by 7.5 (Gulrajani et al., 2017)."""
    t = 1.5 * math.pi * (1.0 + 2.0 * torch.rand(len(noise), generator=rng, dtype=noise.dtype))
    return (torch.stack([t * t.cos(), t * t.sin()], 1) + 0.25 * noise) / 7.5
