"""The conditional MLP GAN: (z, labels) -> generator -> samples [B, *out_shape]; (samples, labels) -> discriminator -> logits [B].

A label's vector is concatenated to z, and to the flattened sample; then comes an MLP of plain PyTorch layers, the attribute
`layers`. `gankern.fuse` runs its linear layers with activation and dropout as one op each. Initialisation is PyTorch's.

Source: Mirza, Osindero, "Conditional generative adversarial nets", 2014 (one-hot labels: embed=0 here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.models import _common

NORMS = ("none", "batch")
OUTPUTS = ("tanh", "none")


class CGANGenerator(nn.Module):
    """Conditional generator: [z, vector of the label], hidden layers of LeakyReLU units, Linear, tanh.

    The default 110-256-512-1024-784 has 1 489 012 parameters with its embedding.

    Args:
        z_dim: length of a latent vector, >= 1.
        classes: number of labels, >= 1.
        widths: units of each hidden layer, from the latent side; may be empty.
        out_shape: shape of one sample, such as (1, 28, 28) or (2,).
        embed: length of a label's learned vector, >= 1; 0: the one-hot vector of length `classes`, a constant.
        norm: "batch" puts BatchNorm1d before each LeakyReLU, "none" does not.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.
        output: "tanh" for samples in [-1, 1], "none" for unbounded ones.

    Shape: z [B, z_dim], labels [B] int64 in 0 ... classes - 1 -> [B, *out_shape].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape or dtype.
        IndexError: a label out of range, on the CPU; CUDA reports it as an assertion of the device.
    """

    def __init__(
        self,
        z_dim: int = 100,
        classes: int = 10,
        widths: Sequence[int] = (256, 512, 1024),
        out_shape: Sequence[int] = (1, 28, 28),
        embed: int = 10,
        norm: str = "none",
        dropout: float = 0.0,
        negative_slope: float = 0.2,
        output: str = "tanh",
    ) -> None:
        super().__init__()
        op = "CGANGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        checks.one_of(op, "norm", norm, NORMS)
        checks.one_of(op, "output", output, OUTPUTS)
        self.z_dim = z_dim
        self.out_shape = _common.sample_shape(op, "out_shape", out_shape)
        self.embedding = _embedding(op, classes, embed)
        inputs = z_dim + self.embedding.embedding_dim
        hidden, last = _common.hidden(op, inputs, widths, norm == "batch", negative_slope, dropout)
        tail = [nn.Linear(last, math.prod(out_shape)), *([nn.Tanh()] if output == "tanh" else [])]
        self.layers = nn.Sequential(*hidden, *tail)

    def inputs(self, z: Tensor, labels: Tensor) -> Tensor:
        """What `layers` takes: [B, z_dim + length of a label's vector]."""
        _common.rows("CGANGenerator", "z", z, (self.z_dim,))
        _common.labels_of("CGANGenerator", labels, len(z))
        return torch.cat([z, self.embedding(labels)], 1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.layers(self.inputs(z, labels)).unflatten(1, self.out_shape)


class CGANDiscriminator(nn.Module):
    """Conditional discriminator: [flat sample, vector of the label], hidden layers of LeakyReLU units, one raw logit.

    The default 794-1024-512-256-1 has 1 470 565 parameters with its embedding.

        out = gankern.mlp_critic(critic.inputs(x, y), critic.inputs(fake, y), *gankern.nn.mlp_layers(critic.layers))

    is its objective in one pass, with embed=0 only: that pass trains nothing before the layers, and refuses learned vectors. Its
    gradient penalty counts the gradient in the label's vector too; `gankern.gradient_penalty(critic, real, fake, cond=labels)` that
    in the sample alone.

    Args:
        in_shape: shape of one sample, such as (1, 28, 28) or (2,).
        classes: number of labels, >= 1.
        widths: units of each hidden layer, from the sample's side; may be empty.
        embed: length of a label's learned vector, >= 1; 0: the one-hot vector of length `classes`, a constant.
        dropout: probability in [0, 1] of zeroing a hidden unit, in training mode only.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: x [B, *in_shape], labels [B] int64 in 0 ... classes - 1 -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape or dtype.
        IndexError: a label out of range, on the CPU; CUDA reports it as an assertion of the device.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        widths: Sequence[int] = (1024, 512, 256),
        embed: int = 10,
        dropout: float = 0.3,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        op = "CGANDiscriminator"
        self.in_shape = _common.sample_shape(op, "in_shape", in_shape)
        self.embedding = _embedding(op, classes, embed)
        inputs = math.prod(in_shape) + self.embedding.embedding_dim
        hidden, last = _common.hidden(op, inputs, widths, False, negative_slope, dropout)
        self.layers = nn.Sequential(*hidden, nn.Linear(last, 1))

    def inputs(self, x: Tensor, labels: Tensor) -> Tensor:
        """What `layers` takes: [B, size of a sample + length of a label's vector]."""
        _common.rows("CGANDiscriminator", "x", x, self.in_shape)
        _common.labels_of("CGANDiscriminator", labels, len(x))
        return torch.cat([x.flatten(1), self.embedding(labels)], 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(self.inputs(x, labels)).squeeze(1)


def _embedding(op: str, classes: int, embed: int) -> nn.Embedding:
    checks.integer(op, "classes", classes, 1)
    checks.integer(op, "embed", embed, 0)
    return nn.Embedding(classes, embed) if embed > 0 else nn.Embedding.from_pretrained(torch.eye(classes))
