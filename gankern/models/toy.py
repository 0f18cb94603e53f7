"""The small networks of the published experiments on 2-D data: z [B, z_dim] -> samples [B, 2] -> logits [B].

Each of `pacgan_toy`, `unrolled_toy` and `wgan_gp_toy` is a pair (generator, discriminator) as its authors built and initialised it;
biases start at 0. Plain PyTorch layers, which `gankern.fuse` runs with their activations as one op each, and `gankern.nn.Maxout`.

Sources: Lin et al., "PacGAN", NeurIPS 2018, section 4.1, which takes them from Dumoulin et al., "Adversarially learned inference",
ICLR 2017; Metz et al., "Unrolled generative adversarial networks", ICLR 2017, appendix A; Gulrajani et al., "Improved training of
Wasserstein GANs", NeurIPS 2017, section 5.4; what is not in the papers, from the authors' code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.mlp import MLPDiscriminator
from gankern.models.packed import Packed
from gankern.nn import Maxout


class ToyGenerator(nn.Sequential):
    """Hidden layers of ReLU units, then Linear: samples have no bounds.

    The default, PacGAN's 2-400-400-400-400-2, has 484 802 parameters.

    Args:
        z_dim: length of a latent vector, >= 1.
        widths: units of each hidden layer; may be empty.
        out_shape: shape of one sample.
        norm: "batch" puts BatchNorm1d before each ReLU (its linear layer has no bias then), "none" does not.

    Shape: [B, z_dim] -> [B, *out_shape].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        z_dim: int = 2,
        widths: Sequence[int] = (400, 400, 400, 400),
        out_shape: Sequence[int] = (2,),
        norm: str = "batch",
    ) -> None:
        op = "ToyGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        checks.one_of(op, "norm", norm, ("none", "batch"))
        hidden, last = _common.hidden(op, z_dim, widths, norm == "batch", 0.0, 0.0)
        super().__init__(*hidden, nn.Linear(last, math.prod(_common.sample_shape(op, "out_shape", out_shape))))
        self.z_dim = z_dim
        self.out_shape = tuple(out_shape)

    def forward(self, z: Tensor) -> Tensor:
        _common.rows("ToyGenerator", "z", z, (self.z_dim,))
        return super().forward(z).unflatten(1, self.out_shape)


class MaxoutDiscriminator(nn.Sequential):
    """Hidden layers of maxout units, then one raw logit.

    The default, PacGAN's 2-200-200-200-1 of 5 pieces, has 405 201 parameters; for pairs of samples, in_shape (4,), 407 201.

    Args:
        in_shape: shape of one sample.
        widths: units of each hidden layer; may be empty.
        pieces: linear functions a unit, >= 1.

    Shape: [B, *in_shape] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(self, in_shape: Sequence[int] = (2,), widths: Sequence[int] = (200, 200, 200), pieces: int = 5) -> None:
        op = "MaxoutDiscriminator"
        sizes = [math.prod(_common.sample_shape(op, "in_shape", in_shape)), *_common.sizes(op, "widths", widths)]
        hidden = [Maxout(before, width, pieces) for before, width in itertools.pairwise(sizes)]
        super().__init__(*hidden, nn.Linear(sizes[-1], 1))
        self.in_shape = tuple(in_shape)

    def forward(self, x: Tensor) -> Tensor:
        _common.rows("MaxoutDiscriminator", "x", x, self.in_shape)
        return super().forward(x.flatten(1)).squeeze(1)


class UnrolledDiscriminator(nn.Sequential):
    """x / 4, which brings a ring of radius 2 into (-1, 1), one hidden layer of ReLU units, one raw logit.

    The default 2-128-1 has 513 parameters. It has no `inputs` for the one-pass critic, which would take the gradient in x / 4.

    Args:
        in_shape: shape of one sample.
        width: units of the hidden layer, >= 1.

    Shape: [B, *in_shape] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(self, in_shape: Sequence[int] = (2,), width: int = 128) -> None:
        op = "UnrolledDiscriminator"
        shape = _common.sample_shape(op, "in_shape", in_shape)
        hidden, last = _common.hidden(op, math.prod(shape), (width,), False, 0.0, 0.0)
        super().__init__(*hidden, nn.Linear(last, 1))
        self.in_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        _common.rows("UnrolledDiscriminator", "x", x, self.in_shape)
        return super().forward(0.25 * x.flatten(1)).squeeze(1)


def pacgan_toy(shape: Sequence[int] = (2,), pack: int = 1, z_dim: int = 2) -> tuple[nn.Module, nn.Module]:
    """PacGAN's: ToyGenerator, and MaxoutDiscriminator, Packed for pack > 1; weights from N(0, 0.02).

    Args:
        shape: of one sample.
        pack: samples that the discriminator judges together, >= 1.
        z_dim: length of a latent vector, >= 1; z is N(0, I).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
    """
    checks.integer("pacgan_toy", "pack", pack, 1)
    generator, critic = ToyGenerator(z_dim, out_shape=shape), MaxoutDiscriminator((pack * shape[0], *shape[1:]))
    for layer in _linear(generator, critic):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    return generator, critic if pack == 1 else Packed(critic, pack)


def unrolled_toy(shape: Sequence[int] = (2,), z_dim: int = 256) -> tuple[nn.Module, nn.Module]:
    """Metz et al.'s: ToyGenerator 256-128-128-2 without norm (49 666 parameters), and UnrolledDiscriminator.

    Weights are orthogonal, times 0.8.

    Args:
        shape: of one sample.
        z_dim: length of a latent vector, >= 1; z is N(0, I).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
    """
    generator, critic = ToyGenerator(z_dim, (128, 128), shape, "none"), UnrolledDiscriminator(shape)
    for layer in _linear(generator, critic):
        nn.init.orthogonal_(layer.weight, 0.8)
    return generator, critic


def wgan_gp_toy(shape: Sequence[int] = (2,), z_dim: int = 2) -> tuple[nn.Module, nn.Module]:
    """Gulrajani et al.'s: ToyGenerator 2-512-512-512-2 (527 874 parameters) and MLPDiscriminator 2-512-512-512-1 (527 361), ReLU.

    Weights are uniform, He et al.'s in the hidden layers and Glorot's in the last.

    Args:
        shape: of one sample.
        z_dim: length of a latent vector, >= 1; z is N(0, I).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
    """
    widths = (512, 512, 512)
    generator, critic = ToyGenerator(z_dim, widths, shape, "none"), MLPDiscriminator(shape, widths, negative_slope=0.0)
    for net in (generator, critic):
        *hidden, last = _linear(net)
        for layer in hidden:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(last.weight)
    return generator, critic


def _linear(*networks: nn.Module) -> list[nn.Linear]:
    """Their linear layers, in order, with the biases set to 0."""
    layers = [m for net in networks for m in net.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layers
