"""The ResNets of WGAN-GP and SN-GAN: z [B, z_dim] -> generator -> images [B, C, S, S]; images -> critic -> scores [B].

Plain PyTorch layers; `gankern.fuse` runs each BatchNorm or convolution with its ReLU as one op. The critic has no spectral norm of
its own: `gankern.nn.spectral_norm_` adds it. Weights are Glorot uniform, times sqrt(2) in the blocks' 3x3 convolutions; biases are
0. The convolutions of the generator's blocks have none, as every way from them ends in a BatchNorm; 1x1 convolutions run at the
smaller of their two sizes, where they give the same numbers.

Sources: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, appendix F (width 128 in both, layer norm allowed
in the critic, its scores from the mean over all positions); Miyato et al., "Spectral normalization for generative adversarial
networks", ICLR 2018, table 4 and the authors' code (generator 256, critic 128, the sum over all positions: so here).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.dcgan import pyramid

NORMS = ("none", "layer")


class Block(nn.Module):
    """residual(x) + shortcut(x)."""

    def __init__(self, residual: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(*residual)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class ResNetGenerator(nn.Sequential):
    """Linear to 4 x 4 (7 x 7 for 28 pixels), residual blocks that double the side, BatchNorm, ReLU, 3x3 convolution, tanh.

    A block is BatchNorm, ReLU, nearest-neighbour upsampling, 3x3 convolution, BatchNorm, ReLU, 3x3 convolution; its shortcut a 1x1
    convolution and upsampling. Parameters: 4 274 435 for (3, 32, 32) and 4 113 409 for (1, 28, 28); 1 203 331 for (3, 32, 32) at
    WGAN-GP's width 128.

    Args:
        z_dim: length of a latent vector, >= 1.
        out_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of all blocks, >= 1.

    Shape: [B, z_dim] -> [B, C, S, S], values in [-1, 1].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(self, z_dim: int = 128, out_shape: Sequence[int] = (3, 32, 32), width: int = 256) -> None:
        op = "ResNetGenerator"
        checks.integer(op, "z_dim", z_dim, 1)
        checks.integer(op, "width", width, 1)
        channels, start, doublings = pyramid(op, "out_shape", out_shape)
        super().__init__(
            nn.Linear(z_dim, width * start**2),
            nn.Unflatten(1, (width, start, start)),
            *(_up(width) for _ in range(doublings)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, 1, 1),
            nn.Tanh(),
        )
        self.z_dim = z_dim
        self.out_shape = tuple(out_shape)
        _initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        _common.rows("ResNetGenerator", "z", z, (self.z_dim,))
        return super().forward(z)


class ResNetDiscriminator(nn.Module):
    """Residual blocks that halve the side to at most 8 x 8, two that keep it, ReLU, the sum over all positions, linear.

    A block is ReLU, 3x3 convolution, ReLU, 3x3 convolution and average pooling; its shortcut pooling and a 1x1 convolution. The
    first block leaves out the ReLU before its first convolution. Parameters: 1 053 825 for (3, 32, 32), 1 051 265 for (1, 28, 28).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of all blocks, >= 1.
        norm: "layer" puts layer norm (over channels and positions, with a weight and bias a channel) before each ReLU of all
            blocks but the first, as WGAN-GP may; "none" does not.

    Shape: [B, C, S, S] -> [B].

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(self, in_shape: Sequence[int] = (3, 32, 32), width: int = 128, norm: str = "none") -> None:
        super().__init__()
        op = "ResNetDiscriminator"
        checks.integer(op, "width", width, 1)
        checks.one_of(op, "norm", norm, NORMS)
        channels, start, halvings = pyramid(op, "in_shape", in_shape)
        if start == 4 and halvings > 1:
            halvings -= 1  # it ends at 8 x 8
        blocks = [
            _first(channels, width),
            *(_down(width, norm) for _ in range(halvings - 1)),
            *(_keep(width, norm) for _ in range(2)),
        ]
        self.in_shape = tuple(in_shape)
        self.blocks = nn.Sequential(*blocks, nn.ReLU())
        self.linear = nn.Linear(width, 1)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        _common.rows("ResNetDiscriminator", "x", x, self.in_shape)
        return self.linear(self.blocks(x).sum((2, 3))).squeeze(1)


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, 1, 1, bias=bias)


def _up(width: int) -> Block:
    """[B, width, S, S] -> [B, width, 2 S, 2 S]."""
    first = [nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
    second = [nn.BatchNorm2d(width), nn.ReLU(), _conv(width, width, bias=False)]
    return Block([*first, *second], [nn.Conv2d(width, width, 1, bias=False), nn.Upsample(scale_factor=2)])


def _keep(width: int, norm: str) -> Block:
    """[B, width, S, S] -> the same; the shortcut is x."""
    half = [[nn.GroupNorm(1, width)] if norm == "layer" else [] for _ in range(2)]
    return Block([*half[0], nn.ReLU(), _conv(width, width), *half[1], nn.ReLU(), _conv(width, width)], [])


def _down(width: int, norm: str) -> Block:
    """[B, width, S, S] -> [B, width, S / 2, S / 2]."""
    return Block([*_keep(width, norm).residual, nn.AvgPool2d(2)], [nn.AvgPool2d(2), nn.Conv2d(width, width, 1)])


def _first(channels: int, width: int) -> Block:
    """[B, channels, S, S] -> [B, width, S / 2, S / 2]."""
    residual = [_conv(channels, width), nn.ReLU(), _conv(width, width), nn.AvgPool2d(2)]
    return Block(residual, [nn.AvgPool2d(2), nn.Conv2d(channels, width, 1)])


def _initialise(network: nn.Module) -> None:
    in_residuals = {m for block in network.modules() if isinstance(block, Block) for m in block.residual}
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight, 2**0.5 if m in in_residuals else 1.0)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
