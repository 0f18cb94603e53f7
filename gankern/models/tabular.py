"""The networks of CTGAN: z [B, z_dim] -> generator -> rows [B, features]; packs of rows -> discriminator -> logits [B / pack].

Plain PyTorch layers; `gankern.fuse` runs each BatchNorm or linear layer with its activation (and dropout) as one op.
Initialisation is PyTorch's.

Source: Xu et al., "Modeling tabular data using conditional GAN", NeurIPS 2019, section 4.4; Lin et al., "PacGAN", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.packed import join

OUTPUTS = ("tanh", "none")


class Residual(nn.Sequential):
    """h -> [h, ReLU(BatchNorm(Linear(h)))], [B, inputs] -> [B, inputs + width]; the linear layer has no bias."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h, super().forward(h)], 1)


class TabularGenerator(nn.Sequential):
    """Blocks that append to their input h the units ReLU(BatchNorm(Linear(h))), then Linear.

    With z_dim 128, widths (256, 256) and 100 features it has 196 196 parameters.

    Args:
        features: of a row; or the shape of one sample, such as (1, 28, 28).
        z_dim: length of a latent vector, >= 1.
        widths: units that each block appends; may be empty.
        output: "tanh" for samples in [-1, 1], "none" for unbounded ones.

    Shape: [B, z_dim] -> [B, features], or [B, *features].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self, features: int | Sequence[int], z_dim: int = 128, widths: Sequence[int] = (256, 256), output: str = "tanh"
    ) -> None:
        op = "TabularGenerator"
        shape = _shape(op, features)
        checks.integer(op, "z_dim", z_dim, 1)
        checks.one_of(op, "output", output, OUTPUTS)
        blocks, inputs = [], z_dim
        for width in _common.sizes(op, "widths", widths):
            blocks.append(Residual(inputs, width))
            inputs += width
        super().__init__(*blocks, nn.Linear(inputs, math.prod(shape)), *([nn.Tanh()] if output == "tanh" else []))
        self.z_dim = z_dim
        self.out_shape = shape

    def forward(self, z: Tensor) -> Tensor:
        _common.rows("TabularGenerator", "z", z, (self.z_dim,))
        return super().forward(z).unflatten(1, self.out_shape)


class TabularDiscriminator(nn.Module):
    """A critic of packs: `pack` consecutive samples side by side, hidden layers of LeakyReLU units with dropout, one raw logit.

    With 100 features, pack 10 and widths (256, 256) it has 322 305 parameters.

        gankern.gradient_penalty(critic.layers, critic.inputs(real), critic.inputs(fake))
        gankern.mlp_critic(critic.inputs(real), critic.inputs(fake), *gankern.nn.mlp_layers(critic.layers), objective="wgan")

    are its gradient penalty, one norm and one interpolation a pack as in the authors' code, and its objective in one pass.

    Args:
        features: of a row; or the shape of one sample, such as (1, 28, 28).
        widths: units of each hidden layer; may be empty.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        pack: samples judged together, >= 1.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, features] or [B, *features], B a multiple of pack -> [B / pack].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        features: int | Sequence[int],
        widths: Sequence[int] = (256, 256),
        dropout: float = 0.5,
        pack: int = 10,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        op = "TabularDiscriminator"
        self.in_shape = _shape(op, features)
        checks.integer(op, "pack", pack, 1)
        self.pack = pack
        inputs = pack * math.prod(self.in_shape)
        hidden, last = _common.hidden(op, inputs, widths, False, negative_slope, dropout)
        self.layers = nn.Sequential(*hidden, nn.Linear(last, 1))

    def inputs(self, x: Tensor) -> Tensor:
        """What `layers` takes, the packs: [B / pack, pack * size of a sample]."""
        _common.rows("TabularDiscriminator", "x", x, self.in_shape)
        return join("TabularDiscriminator", x, self.pack).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.inputs(x)).squeeze(1)


def _shape(op: str, features: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(features, Sequence):
        return _common.sample_shape(op, "features", features)
    checks.integer(op, "features", features, 1)
    return (features,)
