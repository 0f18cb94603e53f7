"""Auto-encoder critics: samples [B, ...] -> their reconstruction [B, ...]; its error is the energy of a sample.

Both have `encode`, samples -> codes [B, code], of which EBGAN takes the pulling-away term (`gankern.pulling_away`), and `decode`.
Plain PyTorch layers, which `gankern.fuse` runs with their activations as one op each. No BatchNorm, so that the energy of a sample
is its own. Initialisation is PyTorch's.

Sources: Zhao, Mathieu, LeCun, "Energy-based generative adversarial network", ICLR 2017; Berthelot, Schumm, Metz, "BEGAN: boundary
equilibrium generative adversarial networks", 2017 (a linear layer to a short code, no tanh at the end).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gankern import checks
from gankern.models import _common
from gankern.models.dcgan import downward, upward

OUTPUTS = ("tanh", "none")


class _Autoencoder(nn.Module):
    """encoder and decoder, and the shape between which they run."""

    def __init__(self, in_shape: Sequence[int], code: int, encoder: list[nn.Module], decoder: list[nn.Module], output: str) -> None:
        super().__init__()
        checks.one_of(type(self).__name__, "output", output, OUTPUTS)
        self.in_shape = tuple(in_shape)
        self.code = code
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder, *([nn.Tanh()] if output == "tanh" else []))

    def encode(self, x: Tensor) -> Tensor:
        """The code of each sample, [B, *in_shape] -> [B, code]."""
        _common.rows(type(self).__name__, "x", x, self.in_shape)
        return self.encoder(x)

    def decode(self, h: Tensor) -> Tensor:
        """[B, code] -> [B, *in_shape]."""
        _common.rows(type(self).__name__, "h", h, (self.code,))
        return self.decoder(h).view(len(h), *self.in_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class MLPAutoencoder(_Autoencoder):
    """Fully connected: hidden layers of LeakyReLU units to a linear code, and back in mirror order.

    The default 784-512-256-64-256-512-784 has 1 100 112 parameters.

    Args:
        in_shape: shape of one sample, such as (1, 28, 28) or (2,).
        widths: units of each hidden layer, from the sample's side; may be empty.
        code: length of a code, >= 1.
        negative_slope: LeakyReLU's factor for negative inputs, >= 0; 0 is the ReLU of EBGAN.
        output: "tanh" for reconstructions in [-1, 1], "none" for unbounded ones.

    Shape: [B, *in_shape] -> the same.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 28, 28),
        widths: Sequence[int] = (512, 256),
        code: int = 64,
        negative_slope: float = 0.2,
        output: str = "none",
    ) -> None:
        op = "MLPAutoencoder"
        checks.integer(op, "code", code, 1)
        features = math.prod(_common.sample_shape(op, "in_shape", in_shape))
        down, narrow = _common.hidden(op, features, widths, False, negative_slope, 0.0)
        up, wide = _common.hidden(op, code, widths[::-1], False, negative_slope, 0.0)
        encoder = [nn.Flatten(), *down, nn.Linear(narrow, code)]
        super().__init__(in_shape, code, encoder, [*up, nn.Linear(wide, features)], output)


class ConvAutoencoder(_Autoencoder):
    """Convolutional: the stages of DCGANDiscriminator to a linear code, and those of DCGANGenerator back; no BatchNorm.

    Width channels at half the image's side, twice as many at a quarter, and so on. Parameters at the default width 64: 1 841 857
    for (1, 32, 32), 1 073 601 for (1, 28, 28), 6 569 411 for (3, 64, 64).

    Args:
        in_shape: (C, S, S), of one image; S is 4, 5, 6 or 7 times a power of two, such as 28, 32 and 64.
        width: channels of the first stage, >= 1.
        code: length of a code, >= 1.
        downsample, upsample: as DCGANDiscriminator and DCGANGenerator.
        negative_slope: LeakyReLU's factor for negative inputs in the encoder, >= 0; the decoder has ReLU.
        output: "tanh" for reconstructions in [-1, 1], "none" for unbounded ones.

    Shape: [B, C, S, S] -> the same.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; an input of another shape.
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (1, 32, 32),
        width: int = 64,
        code: int = 64,
        downsample: str = "stride",
        upsample: str = "transposed",
        negative_slope: float = 0.2,
        output: str = "none",
    ) -> None:
        op = "ConvAutoencoder"
        checks.integer(op, "code", code, 1)
        down, features = downward(op, in_shape, width, downsample, "none", negative_slope)
        encoder = [*down, nn.Linear(features, code)]
        super().__init__(in_shape, code, encoder, upward(op, code, in_shape, width, upsample, "none"), output)
