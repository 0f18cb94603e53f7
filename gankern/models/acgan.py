"""Discriminators with an auxiliary classifier: samples [B, ...] -> (logits [B], logits of the classes [B, classes]).

Their generators are CGANGenerator and CDCGANGenerator. Plain PyTorch layers, the attribute `layers`, whose last gives both;
`gankern.fuse` runs them with their activations (and dropout) as one op each.

Source: Odena, Olah, Shlens, "Conditional image synthesis with auxiliary classifier GANs", ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.dcgan import downward, initialise


class _Discriminator(nn.Module):
    """`layers` with 1 + classes outputs."""

    classifies = True  # the trainer adds the cross entropy of the classes
    layers: nn.Sequential

    def __init__(self, in_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        op = type(self).__name__
        self.in_shape = _common.sample_shape(op, "in_shape", in_shape)
        checks.integer(op, "classes", classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _common.rows(type(self).__name__, "x", x, self.in_shape)
        out = self.layers(x)
        return out[:, 0], out[:, 1:]


class ACGANDiscriminator(_Discriminator):
    """Fully connected: hidden layers of LeakyReLU units, then one raw logit and those of the classes.

    The default 784-1024-512-256-11 has 1 462 795 parameters. Initialisation is PyTorch's.

    Args:
        in_shape: shape of one sample, such as (1, 28, 28) or (2,).
        classes: number of labels, >= 1.
        widths: units of each hidden layer, from the sample's side; may be empty.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, *in_shape] -> ([B], [B, classes]).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        widths: Sequence[int] = (1024, 512, 256),
        dropout: float = 0.3,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(in_shape, classes)
        hidden, last = _common.hidden("ACGANDiscriminator", math.prod(in_shape), widths, False, negative_slope, dropout)
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(last, 1 + classes))


class ConvACGANDiscriminator(_Discriminator):
    """Convolutional: the stages of DCGANDiscriminator, then one raw logit and those of the classes; the DCGAN's initialisation.

    Parameters at the default width 64: 702 283 for (1, 32, 32), 201 419 for (1, 28, 28), 2 847 563 for (3, 64, 64).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        classes: number of labels, >= 1.
        width: channels of the first stage, >= 1.
        downsample: how a stage halves the side: "stride" or "pool", as in DCGANDiscriminator.
        norm: "batch", or "none" (for a gradient penalty, or under spectral norm).
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, C, S, S] -> ([B], [B, classes]).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 32, 32),
        classes: int = 10,
        width: int = 64,
        downsample: str = "stride",
        norm: str = "batch",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(in_shape, classes)
        layers, features = downward("ConvACGANDiscriminator", in_shape, width, downsample, norm, negative_slope)
        self.layers = nn.Sequential(*layers, nn.Linear(features, 1 + classes))
        initialise(self.layers)
