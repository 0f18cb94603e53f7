"""The MLP GAN: z [B, z_dim] -> generator -> samples [B, *out_shape]; samples [B, *in_shape] -> discriminator -> logits [B].

Both are nn.Sequential, so a state_dict has the keys of the plain `nn.Sequential` of the same layers. Without batch norm that is
one of nn.Linear alone, `0.weight, 0.bias, 1.weight, ...`: LeakyReLU and dropout are part of the layer before them. With batch
norm a hidden layer is Linear, BatchNorm1d, LeakyReLU (and Dropout where dropout > 0), each with a number of its own.

Sources: Goodfellow et al., "Generative adversarial networks", 2014; Maas, Hannun, Ng, 2013 (LeakyReLU); Ioffe, Szegedy, 2015
(batch norm); Srivastava et al., 2014 (dropout). Initialisation is nn.Linear's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gankern import checks
from gankern.nn import LinearLeakyReLU

NORMS = ("none", "batch")
OUTPUTS = ("tanh", "none")


class MLPGenerator(nn.Sequential):
    """Fully connected generator: hidden layers of LeakyReLU units, then Linear and tanh.

    The default 100-256-512-1024-784 has 1 486 352 parameters, and 1 489 936 with norm="batch".

    Args:
        z_dim: length of a latent vector, >= 1.
        widths: units of each hidden layer, from the latent side; may be empty.
        out_shape: shape of one sample, such as (1, 28, 28) or (2,).
        norm: "batch" puts BatchNorm1d (PyTorch's eps and momentum) before each LeakyReLU, "none" does not.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.
        output: "tanh" for samples in [-1, 1], "none" for unbounded ones.

    Shape: [B, z_dim] -> [B, *out_shape].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        z_dim: int = 100,
        widths: Sequence[int] = (256, 512, 1024),
        out_shape: Sequence[int] = (1, 28, 28),
        norm: str = "none",
        dropout: float = 0.0,
        negative_slope: float = 0.2,
        output: str = "tanh",
    ) -> None:
        op = "MLPGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        checks.one_of(op, "norm", norm, NORMS)
        checks.one_of(op, "output", output, OUTPUTS)
        hidden = _hidden(op, z_dim, widths, "out_shape", out_shape, norm, dropout, negative_slope)
        super().__init__(*hidden, nn.Linear((z_dim, *widths)[-1], math.prod(out_shape)), *([nn.Tanh()] if output == "tanh" else []))
        self.z_dim = z_dim
        self.out_shape = tuple(out_shape)

    @classmethod
    def from_hidden(cls, hidden: int = 32, **options: Any) -> MLPGenerator:
        """The hidden-dim form, widths (h, 2h, 4h): h = 32 is 100-32-64-128-784, 114 800 parameters. Options as above."""
        checks.integer("MLPGenerator", "hidden", hidden, 1)
        return cls(widths=(hidden, 2 * hidden, 4 * hidden), **options)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            checks.fail(ValueError, "MLPGenerator", "z", f"have shape [B, {self.z_dim}]", list(z.shape))
        return super().forward(z).unflatten(1, self.out_shape)


class MLPDiscriminator(nn.Sequential):
    """Fully connected discriminator or critic: hidden layers of LeakyReLU units, then one raw logit (no sigmoid).

    The default 784-1024-512-256-1 has 1 460 225 parameters; widths=(512, 256) is 784-512-256-1 with 533 505.

    Args:
        in_shape: shape of one sample, such as (1, 28, 28) or (2,).
        widths: units of each hidden layer, from the sample's side; may be empty.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, *in_shape] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 28, 28),
        widths: Sequence[int] = (1024, 512, 256),
        dropout: float = 0.0,
        negative_slope: float = 0.2,
    ) -> None:
        inputs = math.prod(in_shape)
        hidden = _hidden("MLPDiscriminator", inputs, widths, "in_shape", in_shape, "none", dropout, negative_slope)
        super().__init__(*hidden, nn.Linear((inputs, *widths)[-1], 1))
        self.in_shape = tuple(in_shape)

    @classmethod
    def from_hidden(cls, hidden: int = 32, **options: Any) -> MLPDiscriminator:
        """The hidden-dim form, widths (4h, 2h, h): h = 32 is 784-128-64-32-1, 110 849 parameters. Options as above."""
        checks.integer("MLPDiscriminator", "hidden", hidden, 1)
        return cls(widths=(4 * hidden, 2 * hidden, hidden), **options)

    @property
    def layers(self) -> nn.Sequential:
        """All layers, [B, K] -> [B, 1], for `gankern.nn.mlp_layers`."""
        return nn.Sequential(*self)

    def inputs(self, x: Tensor) -> Tensor:
        """What `layers` take: x as [B, K]."""
        if tuple(x.shape[1:]) != self.in_shape:
            checks.fail(ValueError, "MLPDiscriminator", "x", f"have shape [B, {', '.join(map(str, self.in_shape))}]", list(x.shape))
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inputs(x)).squeeze(1)


def _hidden(
    op: str,
    inputs: int,
    widths: Sequence[int],
    shape_name: str,
    shape: Sequence[int],
    norm: str,
    dropout: float,
    negative_slope: float,
) -> list[nn.Module]:
    """The checked hidden layers inputs -> widths[0] -> ... -> widths[-1]."""
    for width in widths:
        checks.integer(op, "each of widths", width, 1)
    for size in shape:
        checks.integer(op, f"each of {shape_name}", size, 1)
    if not shape:
        checks.fail(ValueError, op, shape_name, "have at least one dimension", "()")
    checks.number(op, "dropout", dropout, 0.0, 1.0)
    checks.number(op, "negative_slope", negative_slope, 0.0)
    layers: list[nn.Module] = []
    for before, width in zip((inputs, *widths), widths, strict=False):
        if norm == "none":
            layers.append(LinearLeakyReLU(before, width, negative_slope=negative_slope, dropout=dropout))
        else:
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.LeakyReLU(negative_slope)]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
    return layers
