"""The Inception-v3 of FID, Inception Score and KID as they are published, with weights from a file of the user's own.

The network is TensorFlow's of December 2015 (1008 classes), so it differs from torchvision's: average pooling leaves the padding
out, the last block pools by the maximum, and images are resized without antialiasing and without half-pixel centres.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import checks

OP = "inception"
FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name; pytorch-fid calls the same file pt_inception-...
CHECKSUM = "6726825d"  # the SHA-256 of the file begins so
VARIABLE = "GANKERN_INCEPTION"
SIDE = 299
FEATURES = 2048

# A block is parallel paths whose outputs are concatenated; a path is convolutions "name channels kernel" one after another, where
# ",/2" means stride 2 without padding, "avg" or "max" pools first, and "a | b" are two convolutions of one input, concatenated.
_A = "branch1x1 64 1x1; branch5x5_1 48 1x1, branch5x5_2 64 5x5; branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3"
_B = "branch3x3 384 3x3/2; branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3/2; max/2"
_C = (
    "branch1x1 192 1x1; branch7x7_1 {0} 1x1, branch7x7_2 {0} 1x7, branch7x7_3 192 7x1; branch7x7dbl_1 {0} 1x1, "
    "branch7x7dbl_2 {0} 7x1, branch7x7dbl_3 {0} 1x7, branch7x7dbl_4 {0} 7x1, branch7x7dbl_5 192 1x7; avg, branch_pool 192 1x1"
)
_D = (
    "branch3x3_1 192 1x1, branch3x3_2 320 3x3/2; "
    "branch7x7x3_1 192 1x1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3/2; max/2"
)
_E = (
    "branch1x1 320 1x1; branch3x3_1 384 1x1, branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1; "
    "branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1; {0}, branch_pool 192 1x1"
)
_BLOCKS = {
    **{f"Mixed_{name}": f"{_A}; avg, branch_pool {pool} 1x1" for name, pool in (("5b", 32), ("5c", 64), ("5d", 64))},
    "Mixed_6a": _B,
    **{f"Mixed_{name}": _C.format(width) for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192))},
    "Mixed_7a": _D,
    "Mixed_7b": _E.format("avg"),
    "Mixed_7c": _E.format("max"),
}


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: str, padded: bool = True) -> None:
        super().__init__()
        kernel, _, stride = kernel.partition("/")
        height, width = map(int, kernel.split("x"))
        padding = (height // 2, width // 2) if padded and not stride else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    def __init__(self, inputs: int, text: str) -> None:
        super().__init__()
        self.paths = [[step.split(" | ") for step in path.split(", ")] for path in text.split("; ")]
        self.outputs = 0
        for path in self.paths:
            channels = inputs
            for step in path:
                if " " in step[0]:
                    before, channels = channels, 0
                    for name, outputs, kernel in map(str.split, step):
                        self.add_module(name, _Conv(before, int(outputs), kernel))
                        channels += int(outputs)
            self.outputs += channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._path(path, x) for path in self.paths], 1)

    def _path(self, path: list[list[str]], x: Tensor) -> Tensor:
        for step in path:
            if step == ["avg"]:
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif step == ["max"]:
                x = F.max_pool2d(x, 3, 1, 1)
            elif step == ["max/2"]:
                x = F.max_pool2d(x, 3, 2)
            else:
                x = torch.cat([self.get_submodule(name.split()[0])(x) for name in step], 1)
        return x


class Inception(nn.Module):
    """Colour images in [-1, 1], any size -> 2048 features, and the probabilities of 1008 classes.

    Shape: float32 [B, 3, H, W] -> (features [B, 2048], probabilities [B, 1008]). The values are quantised to 8 bits, as the
    published figures are of 8-bit images; the probabilities leave out the bias of the last layer, as the published scores do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = _Conv(32, 32, "3x3", padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, "3x3")
        self.Conv2d_3b_1x1 = _Conv(64, 80, "1x1")
        self.Conv2d_4a_3x3 = _Conv(80, 192, "3x3", padded=False)
        channels = 192
        for name, text in _BLOCKS.items():
            self.add_module(name, block := _Block(channels, text))
            channels = block.outputs
        self.fc = nn.Linear(FEATURES, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() + 1).mul(127.5).round_().clamp_(0, 255)
        x = _resize(_resize(x, 2), 3).sub_(128).div_(128)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight).softmax(1)


def _resize(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation to SIDE along `dim`: output i lies at i * size / SIDE of the input, as TensorFlow 1 has it."""
    size = x.shape[dim]
    at = torch.arange(SIDE, dtype=torch.float32, device=x.device) * (size / SIDE)
    low = at.long()
    weight = (at - low).view([-1, 1] if dim == 2 else [-1])
    here, there = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
    return here + (there - here) * weight


def load_inception(path: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> Inception:
    """The network with the published weights, in evaluation mode.

    Args:
        path: the weights file; None is the path in the environment variable GANKERN_INCEPTION.
        device: where it is wanted.

    Raises:
        ValueError: no such file, or another file than the published one (its SHA-256 begins with 6726825d).

    Source: Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, in the form of Heusel et al.,
    "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017.
    """
    path = path or os.environ.get(VARIABLE)
    if not path or not Path(path).is_file():
        checks.fail(
            ValueError, OP, "weights",
            f"be the file {FILE}, which the releases of torch-fidelity on GitHub (v0.2.0) have, "
            f"named by its path or by the variable {VARIABLE}",
            f"{str(path)!r}, which is no file" if path else "none",
        )  # fmt: skip
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(CHECKSUM):
        checks.fail(ValueError, OP, "weights", f"be {FILE}, whose SHA-256 begins with {CHECKSUM}", f"{digest[:8]} of {path}")
    net = Inception()
    net.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return net.requires_grad_(False).eval().to(device)
