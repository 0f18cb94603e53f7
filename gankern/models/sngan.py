"""The standard CNN of SN-GAN: z [B, z_dim] -> generator -> images [B, C, S, S]; images -> discriminator -> logits [B].

Both are one nn.Sequential of plain PyTorch layers, the discriminator without its spectral norm: `gankern.nn.spectral_norm_` adds
it, and `gankern.fuse` runs each BatchNorm or convolution with its activation as one op. Initialisation is PyTorch's.

Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018, table 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common

WIDTHS = (64, 128, 256, 512)


class SNGANGenerator(nn.Sequential):
    """Linear, then transposed 4x4 convolutions of stride 2 with BatchNorm and ReLU, then a 3x3 convolution and tanh.

    As in the table the linear layer has no activation. Parameters with the default widths: 3 811 907 for (3, 32, 32), 6 982 211
    for (3, 64, 64), and 2 274 497 for (1, 28, 28).

    Args:
        z_dim: length of a latent vector, >= 1.
        out_shape: (C, S, S), of one image.
        widths: channels after the linear layer and after each transposed convolution, at least one; S must be a multiple of two to
            the power of their number less one. None: the paper's (512, 256, 128, 64), or (256, 128, 64), which begins at 7 x 7 for
            28 pixels, where S is no multiple of 8.

    Shape: [B, z_dim] -> [B, C, S, S], values in [-1, 1].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(self, z_dim: int = 128, out_shape: Sequence[int] = (3, 32, 32), widths: Sequence[int] | None = None) -> None:
        op = "SNGANGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        channels, start, widths = _plan(op, "out_shape", out_shape, None if widths is None else widths[::-1])
        before = widths[-1]
        layers: list[nn.Module] = [nn.Linear(z_dim, before * start**2), nn.Unflatten(1, (before, start, start))]
        for after in widths[-2::-1]:
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        super().__init__(*layers, nn.Conv2d(before, channels, 3, 1, 1), nn.Tanh())
        self.z_dim = z_dim
        self.out_shape = tuple(out_shape)

    def forward(self, z: Tensor) -> Tensor:
        _common.rows("SNGANGenerator", "z", z, (self.z_dim,))
        return super().forward(z)


class SNGANDiscriminator(nn.Sequential):
    """Pairs of a 3x3 convolution and a 4x4 one of stride 2, a last 3x3 convolution, LeakyReLU after each, linear to one raw logit.

    The paper's widths make seven convolutions. Parameters with the default widths: 2 935 873 for (3, 32, 32), 2 960 449 for
    (3, 64, 64), and 710 081 for (1, 28, 28).

    Args:
        in_shape: (C, S, S), of one image.
        widths: channels of each pair and of the last convolution, at least one; S must be a multiple of two to the power of their
            number less one. None: the paper's (64, 128, 256, 512), or (64, 128, 256), which ends at 7 x 7 for 28 pixels, where S
            is no multiple of 8.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, C, S, S] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self, in_shape: Sequence[int] = (3, 32, 32), widths: Sequence[int] | None = None, negative_slope: float = 0.1
    ) -> None:
        op = "SNGANDiscriminator"
        checks.number(op, "negative_slope", negative_slope, 0.0)
        before, side, widths = _plan(op, "in_shape", in_shape, widths)
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Conv2d(before, width, 3, 1, 1), nn.LeakyReLU(negative_slope)]
            layers += [nn.Conv2d(width, width, 4, 2, 1), nn.LeakyReLU(negative_slope)]
            before = width
        layers += [nn.Conv2d(before, widths[-1], 3, 1, 1), nn.LeakyReLU(negative_slope)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 1))
        self.in_shape = tuple(in_shape)

    def forward(self, x: Tensor) -> Tensor:
        _common.rows("SNGANDiscriminator", "x", x, self.in_shape)
        return super().forward(x).squeeze(1)


def _plan(op: str, argument: str, shape: Sequence[int], widths: Sequence[int] | None) -> tuple[int, int, tuple[int, ...]]:
    """(channels of the image, smallest side, widths from the image's side)."""
    channels, side = _common.square(op, argument, shape)
    if widths is None:
        widths = WIDTHS if side % 8 == 0 else WIDTHS[:-1]
    if not widths:
        checks.fail(ValueError, op, "widths", "have at least one entry", "()")
    step = 2 ** (len(widths) - 1)
    if side % step:
        checks.fail(ValueError, op, argument, f"have a side that {len(widths)} widths divide by {step}", list(shape))
    return channels, side // step, _common.sizes(op, "widths", widths)
