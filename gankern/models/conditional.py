"""Conditional GANs: (z, labels) -> generator -> samples [B, *out_shape]; (samples, labels) -> discriminator -> logits [B].

A label's vector is concatenated to z, and to the sample: to a flat one for MLPs, as one constant plane an entry for convolutions.
Then come plain PyTorch layers, the attribute `layers`, which `gankern.fuse` runs with activations (and dropout) as one op each.
Initialisation is PyTorch's for the MLPs and the vectors, the DCGAN's for the convolutional networks.

Sources: Mirza, Osindero, "Conditional generative adversarial nets", 2014 (one-hot labels: embed=0 here); Radford, Metz, Chintala,
ICLR 2016 (the convolutional networks; label planes: the authors' code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.dcgan import downward, initialise, upward

NORMS = ("none", "batch")
OUTPUTS = ("tanh", "none")


class _Generator(nn.Module):
    """embedding, and `layers` for [z, vector of the label]."""

    layers: nn.Sequential

    def __init__(self, z_dim: int, classes: int, out_shape: Sequence[int], embed: int) -> None:
        super().__init__()
        op = type(self).__name__
        checks.integer(op, "z_dim", z_dim, 1)
        self.z_dim = z_dim
        self.out_shape = _common.sample_shape(op, "out_shape", out_shape)
        self.embedding = _embedding(op, classes, embed)

    def inputs(self, z: Tensor, labels: Tensor) -> Tensor:
        """What `layers` takes: [B, z_dim + length of a label's vector]."""
        op = type(self).__name__
        _common.rows(op, "z", z, (self.z_dim,))
        _common.labels_of(op, labels, z.shape[0])
        return torch.cat([z, self.embedding(labels)], 1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.layers(self.inputs(z, labels)).view(z.shape[0], *self.out_shape)


class _Discriminator(nn.Module):
    """embedding, and `layers` for the sample with the vector of the label."""

    layers: nn.Sequential
    planes = False

    def __init__(self, in_shape: Sequence[int], classes: int, embed: int) -> None:
        super().__init__()
        op = type(self).__name__
        self.in_shape = _common.sample_shape(op, "in_shape", in_shape)
        self.embedding = _embedding(op, classes, embed)

    def inputs(self, x: Tensor, labels: Tensor) -> Tensor:
        """What `layers` takes: [B, size of a sample + length of a label's vector]; as planes, [B, C + length, S, S]."""
        op = type(self).__name__
        _common.rows(op, "x", x, self.in_shape)
        _common.labels_of(op, labels, len(x))
        vectors = self.embedding(labels)
        if self.planes:
            return torch.cat([x, vectors[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        return torch.cat([x.flatten(1), vectors], 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(self.inputs(x, labels)).squeeze(1)


class CGANGenerator(_Generator):
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
        super().__init__(z_dim, classes, out_shape, embed)
        op = "CGANGenerator"
        checks.one_of(op, "norm", norm, NORMS)
        checks.one_of(op, "output", output, OUTPUTS)
        inputs = z_dim + self.embedding.embedding_dim
        hidden, last = _common.hidden(op, inputs, widths, norm == "batch", negative_slope, dropout)
        tail = [nn.Linear(last, math.prod(out_shape)), *([nn.Tanh()] if output == "tanh" else [])]
        self.layers = nn.Sequential(*hidden, *tail)


class CGANDiscriminator(_Discriminator):
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
        super().__init__(in_shape, classes, embed)
        inputs = math.prod(in_shape) + self.embedding.embedding_dim
        hidden, last = _common.hidden("CGANDiscriminator", inputs, widths, False, negative_slope, dropout)
        self.layers = nn.Sequential(*hidden, nn.Linear(last, 1))


class CDCGANGenerator(_Generator):
    """Conditional DCGAN generator: that of `DCGANGenerator` for [z, vector of the label].

    Parameters at the default width 64, with the embedding: 1 107 941 for (1, 32, 32), 822 501 for (1, 28, 28), 3 658 727 for
    (3, 64, 64).

    Args:
        z_dim: length of a latent vector, >= 1.
        classes: number of labels, >= 1.
        out_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of the last hidden stage, >= 1.
        upsample: how a stage doubles the side: "transposed", "shuffle" or "nearest", as in DCGANGenerator.
        embed: length of a label's learned vector, >= 1; 0: the one-hot vector of length `classes`, a constant.

    Shape: z [B, z_dim], labels [B] int64 in 0 ... classes - 1 -> [B, C, S, S], values in [-1, 1].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape or dtype.
        IndexError: a label out of range, on the CPU; CUDA reports it as an assertion of the device.
    """

    def __init__(
        self,
        z_dim: int = 100,
        classes: int = 10,
        out_shape: Sequence[int] = (1, 32, 32),
        width: int = 64,
        upsample: str = "transposed",
        embed: int = 10,
    ) -> None:
        super().__init__(z_dim, classes, out_shape, embed)
        inputs = z_dim + self.embedding.embedding_dim
        self.layers = nn.Sequential(*upward("CDCGANGenerator", inputs, out_shape, width, upsample), nn.Tanh())
        initialise(self.layers)


class CDCGANDiscriminator(_Discriminator):
    """Conditional DCGAN discriminator: that of `DCGANDiscriminator` for the image and the planes of the label's vector.

    Parameters at the default width 64, with the embedding: 671 653 for (1, 32, 32), 149 029 for (1, 28, 28), 2 775 973 for
    (3, 64, 64).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        classes: number of labels, >= 1.
        width: channels of the first stage, >= 1.
        downsample: how a stage halves the side: "stride" or "pool", as in DCGANDiscriminator.
        norm: "batch", or "none" (for a gradient penalty, or under spectral norm).
        embed: length of a label's learned vector, >= 1; 0: the one-hot vector of length `classes`, a constant.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: x [B, C, S, S], labels [B] int64 in 0 ... classes - 1 -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape or dtype.
        IndexError: a label out of range, on the CPU; CUDA reports it as an assertion of the device.
    """

    planes = True

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 32, 32),
        classes: int = 10,
        width: int = 64,
        downsample: str = "stride",
        norm: str = "batch",
        embed: int = 10,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(in_shape, classes, embed)
        op, planes = "CDCGANDiscriminator", self.embedding.embedding_dim
        layers, features = downward(op, in_shape, width, downsample, norm, negative_slope, planes)
        self.layers = nn.Sequential(*layers, nn.Linear(features, 1))
        initialise(self.layers)


def _embedding(op: str, classes: int, embed: int) -> nn.Embedding:
    checks.integer(op, "classes", classes, 1)
    checks.integer(op, "embed", embed, 0)
    return nn.Embedding(classes, embed) if embed > 0 else nn.Embedding.from_pretrained(torch.eye(classes))
