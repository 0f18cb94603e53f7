"""Encoders of a VAE-GAN: samples [B, ...] -> (mean [B, z_dim], log variance [B, z_dim]) of the latent vectors they may come from.

The generator is the decoder: MLPGenerator, or DCGANGenerator, whose mirror images these are. Plain PyTorch layers, the attribute
`layers`, which `gankern.fuse` runs with their activations as one op each; the last gives both halves.

Sources: Larsen, Sønderby, Larochelle, Winther, "Autoencoding beyond pixels using a learned similarity metric", ICML 2016; Kingma,
Welling, "Auto-encoding variational Bayes", ICLR 2014 (`rsample`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.dcgan import downward, initialise


class _Encoder(nn.Module):
    """`layers` with 2 * z_dim outputs."""

    layers: nn.Sequential

    def __init__(self, in_shape: Sequence[int], z_dim: int) -> None:
        super().__init__()
        op = type(self).__name__
        self.in_shape = _common.sample_shape(op, "in_shape", in_shape)
        checks.integer(op, "z_dim", z_dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _common.rows(type(self).__name__, "x", x, self.in_shape)
        mean, log_variance = self.layers(x).chunk(2, 1)
        return mean, log_variance


class MLPEncoder(_Encoder):
    """Fully connected: hidden layers of LeakyReLU units, then Linear. The mirror image of MLPGenerator; PyTorch's initialisation.

    The default 784-1024-512-256-200 has 1 511 368 parameters.

    Args:
        in_shape: shape of one sample, such as (1, 28, 28) or (2,).
        z_dim: length of a latent vector, >= 1.
        widths: units of each hidden layer, from the sample's side; may be empty.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, *in_shape] -> ([B, z_dim], [B, z_dim]).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 28, 28),
        z_dim: int = 100,
        widths: Sequence[int] = (1024, 512, 256),
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(in_shape, z_dim)
        hidden, last = _common.hidden("MLPEncoder", math.prod(in_shape), widths, False, negative_slope, 0.0)
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(last, 2 * z_dim))


class ConvEncoder(_Encoder):
    """Convolutional: the stages of DCGANDiscriminator, then Linear. The mirror image of DCGANGenerator; the DCGAN's initialisation.

    Parameters at the default width 64: 1 476 616 for (1, 32, 32), 1 387 016 for (1, 28, 28), 4 396 040 for (3, 64, 64).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        z_dim: length of a latent vector, >= 1.
        width: channels of the first stage, >= 1.
        downsample: how a stage halves the side: "stride" or "pool", as in DCGANDiscriminator.
        norm: "batch", as in the paper, or "none".
        negative_slope: LeakyReLU's factor for negative inputs, >= 0; the paper has ReLU, 0.

    Shape: [B, C, S, S] -> ([B, z_dim], [B, z_dim]).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 32, 32),
        z_dim: int = 100,
        width: int = 64,
        downsample: str = "stride",
        norm: str = "batch",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(in_shape, z_dim)
        layers, features = downward("ConvEncoder", in_shape, width, downsample, norm, negative_slope)
        self.layers = nn.Sequential(*layers, nn.Linear(features, 2 * z_dim))
        initialise(self.layers)


def rsample(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from N(mean, exp(log_variance)) in each entry, differentiable in both: mean + exp(log_variance / 2) e, e from N(0, 1).

    Args:
        mean: [*], float64, float32, bfloat16 or float16.
        log_variance: of the same shape and dtype.
        generator: source of randomness, on their device; None is PyTorch's default generator there.

    Returns:
        [*], the same dtype.

    Raises:
        ValueError, TypeError: shapes or dtypes that differ or are not supported.
    """
    op = "rsample"
    for name, value in (("mean", mean), ("log_variance", log_variance)):
        checks.tensor(op, name, value)
        checks.floating(op, name, value)
    checks.shape(op, "log_variance", log_variance, mean.shape)
    checks.same_dtype(op, "log_variance", log_variance, mean.dtype)
    noise = torch.empty_like(mean).normal_(generator=generator)
    return mean + noise * torch.exp(0.5 * log_variance)
