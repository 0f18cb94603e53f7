"""The DCGAN: z [B, z_dim] -> generator -> images [B, C, S, S]; images -> discriminator -> logits [B].

Both are one nn.Sequential of plain PyTorch layers; `gankern.fuse` runs each BatchNorm or convolution with its activation as one op.
All weights are drawn from N(0, 0.02), those of BatchNorm from N(1, 0.02), and biases are 0. No layer before a BatchNorm has a bias.

Source: Radford, Metz, Chintala, "Unsupervised representation learning with deep convolutional generative adversarial networks",
ICLR 2016, sections 3 and 4 (BatchNorm's weights: the authors' code); Shi et al., CVPR 2016 (pixel shuffle); Odena, Dumoulin,
Olah, "Deconvolution and checkerboard artifacts", 2016 (nearest). The paper has width 128 at 64 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common

UPSAMPLES = ("transposed", "shuffle", "nearest")
DOWNSAMPLES = ("stride", "pool")
NORMS = ("batch", "none")


class DCGANGenerator(nn.Sequential):
    """Convolutional generator: linear to 4 x 4 (7 x 7 for 28 pixels), then stages that double the side; BatchNorm, ReLU, tanh.

    The hidden stages have width channels at half the image's side, twice as many at a quarter, and so on. Parameters at the
    default width 64: 1 066 881 for (1, 32, 32), 759 681 for (1, 28, 28), 3 576 707 for (3, 64, 64).

    Args:
        z_dim: length of a latent vector, >= 1.
        out_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of the last hidden stage, >= 1.
        upsample: how a stage doubles the side: "transposed" is a transposed 4x4 convolution of stride 2, "shuffle" a 3x3
            convolution to four times the channels and PixelShuffle, "nearest" nearest-neighbour upsampling and a 3x3 convolution.

    Shape: [B, z_dim] -> [B, C, S, S], values in [-1, 1].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self, z_dim: int = 100, out_shape: Sequence[int] = (1, 32, 32), width: int = 64, upsample: str = "transposed"
    ) -> None:
        op = "DCGANGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        super().__init__(*upward(op, z_dim, out_shape, width, upsample), nn.Tanh())
        self.z_dim = z_dim
        self.out_shape = tuple(out_shape)
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        _common.rows("DCGANGenerator", "z", z, (self.z_dim,))
        return super().forward(z)


class DCGANDiscriminator(nn.Sequential):
    """Convolutional discriminator: stages that halve the side to 4 x 4 (7 x 7 for 28 pixels), then linear to one raw logit.

    Width channels at half the image's side, twice as many at a quarter, and so on; BatchNorm in all stages but the first.
    Parameters at the default width 64: 661 313 for (1, 32, 32), 138 689 for (1, 28, 28), 2 765 633 for (3, 64, 64).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of the first stage, >= 1.
        downsample: how a stage halves the side: "stride" is a 4x4 convolution of stride 2, "pool" a 3x3 convolution, and average
            pooling over 2x2 after the activation.
        norm: "batch", or "none" (for a gradient penalty, or under spectral norm).
        negative_slope: LeakyReLU's factor for negative inputs, >= 0.

    Shape: [B, C, S, S] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 32, 32),
        width: int = 64,
        downsample: str = "stride",
        norm: str = "batch",
        negative_slope: float = 0.2,
    ) -> None:
        op = "DCGANDiscriminator"
        layers, features = downward(op, in_shape, width, downsample, norm, negative_slope)
        super().__init__(*layers, nn.Linear(features, 1))
        self.in_shape = tuple(in_shape)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        _common.rows("DCGANDiscriminator", "x", x, self.in_shape)
        return super().forward(x).squeeze(1)


def upward(op: str, inputs: int, out_shape: Sequence[int], width: int, upsample: str, norm: str = "batch") -> list[nn.Module]:
    """[B, inputs] -> [B, *out_shape]: linear to the smallest image, then stages that double its side; without the tanh."""
    checks.integer(op, "width", width, 1)
    checks.one_of(op, "upsample", upsample, UPSAMPLES)
    channels, start, doublings = pyramid(op, "out_shape", out_shape)
    normed, before = norm == "batch", width * 2 ** (doublings - 1)
    layers: list[nn.Module] = [nn.Linear(inputs, before * start**2, bias=not normed), nn.Unflatten(1, (before, start, start))]
    for stage in range(doublings):
        last = stage == doublings - 1
        after = channels if last else before // 2
        layers += [*([nn.BatchNorm2d(before)] if normed else []), nn.ReLU()]
        layers += _double(upsample, before, after, bias=last or not normed)
        before = after
    return layers


def downward(
    op: str, in_shape: Sequence[int], width: int, downsample: str, norm: str, negative_slope: float, extra: int = 0
) -> tuple[list[nn.Module], int]:
    """Stages that halve the side of images, then Flatten, and how many features come out; `extra` more channels go in."""
    checks.integer(op, "width", width, 1)
    checks.one_of(op, "downsample", downsample, DOWNSAMPLES)
    checks.one_of(op, "norm", norm, NORMS)
    checks.number(op, "negative_slope", negative_slope, 0.0)
    channels, start, halvings = pyramid(op, "in_shape", in_shape)
    pooled, before = downsample == "pool", channels + extra
    layers: list[nn.Module] = []
    for stage in range(halvings):
        after, normed = width * 2**stage, stage > 0 and norm == "batch"
        layers.append(nn.Conv2d(before, after, 3 if pooled else 4, 1 if pooled else 2, 1, bias=not normed))
        layers += [nn.BatchNorm2d(after)] if normed else []
        layers += [nn.LeakyReLU(negative_slope), *([nn.AvgPool2d(2)] if pooled else [])]
        before = after
    return [*layers, nn.Flatten()], before * start**2


def pyramid(op: str, argument: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, start, doublings) of an image [C, S, S] whose side is start * 2^doublings, start in 4 ... 7."""
    channels, side = _common.square(op, argument, shape)
    start, doublings = side, 0
    while start > 7 and start % 2 == 0:
        start, doublings = start // 2, doublings + 1
    if doublings == 0 or start > 7:
        checks.fail(ValueError, op, argument, "have a side of 4, 5, 6 or 7 times 2, 4, 8, ...", list(shape))
    return channels, start, doublings


def _double(upsample: str, before: int, after: int, bias: bool) -> list[nn.Module]:
    """[B, before, S, S] -> [B, after, 2 S, 2 S]."""
    if upsample == "transposed":
        return [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias)]
    if upsample == "shuffle":
        return [nn.Conv2d(before, 4 * after, 3, 1, 1, bias=bias), nn.PixelShuffle(2)]
    return [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, 1, 1, bias=bias)]


def initialise(network: nn.Module) -> None:
    """The weights and biases of the DCGAN."""
    for m in network.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
