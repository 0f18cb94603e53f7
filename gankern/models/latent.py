"""sample_latent: the noise vectors z that a generator turns into samples."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import checks

KINDS = ("normal", "uniform")


def sample_latent(
    n: int,
    z_dim: int = 100,
    kind: str = "normal",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw n latent vectors.

    Args:
        n: how many, >= 0.
        z_dim: entries of each, >= 1.
        kind: "normal" is N(0, 1), "uniform" is U(-1, 1), each entry independent.
        generator: source of randomness, on `device`; None is PyTorch's default generator there.
        device: where to draw; None is the generator's device, else PyTorch's default device.

    Returns:
        [n, z_dim], float32.

    Raises:
        ValueError: n, z_dim or kind out of range.
        TypeError: n or z_dim is not an int.
    """
    checks.integer("sample_latent", "n", n, 0)
    checks.integer("sample_latent", "z_dim", z_dim, 1)
    checks.one_of("sample_latent", "kind", kind, KINDS)
    if device is None and generator is not None:
        device = generator.device
    z = torch.empty(n, z_dim, device=device, dtype=torch.float32)
    return z.normal_(generator=generator) if kind == "normal" else z.uniform_(-1.0, 1.0, generator=generator)
