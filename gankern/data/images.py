"""ImageData: a whole image data set in memory, and the three conversions that every source shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import checks

OP = "data"


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of equally large images.

    Args:
        images: [N, C, H, W], N >= 1; uint8 (0 to 255, kept so to save memory) or float32 in [-1, 1].
        labels: [N], int64, an index into `classes`, or None.
        name: short, for run directories: "mnist", or the name of the folder or file.
        classes: the name of each class, () without labels.
        skipped: one "file: reason" for each file that could not be read.
        note: in words, what was found in the source and how it was taken.

    Raises:
        ValueError, TypeError: images or labels of another shape or dtype, or no image.
    """

    images: Tensor
    labels: Tensor | None = None
    name: str = "images"
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        checks.tensor(OP, "images", self.images)
        if self.images.dtype not in (torch.uint8, torch.float32):
            checks.fail(TypeError, OP, "images", "be uint8 or float32", str(self.images.dtype).removeprefix("torch."))
        checks.dims(OP, "images", self.images, 4)
        if self.images.numel() == 0:
            checks.fail(ValueError, OP, "images", "hold at least one pixel of one image", f"shape {list(self.images.shape)}")
        if self.labels is not None:
            checks.tensor(OP, "labels", self.labels)
            checks.shape(OP, "labels", self.labels, (len(self.images),))
            checks.same_dtype(OP, "labels", self.labels, torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        _, channels, height, width = self.images.shape
        return channels, height, width


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 x / 127.5 - 1 in [-1, 1], the ends exact; float32 is returned as it is."""
    return images.to(torch.float32).div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else images


def to_channels(images: Tensor, channels: int) -> Tensor:
    """To 1 or 3 channels: grey is repeated, colour becomes luma (0.299, 0.587, 0.114; ITU-R BT.601), in uint8 rounded."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weight = torch.tensor([0.299, 0.587, 0.114])
    grey = torch.cat([torch.einsum("nchw,c->nhw", part.to(torch.float32), weight) for part in images.split(1024)]).unsqueeze(1)
    return grey.round_().to(torch.uint8) if images.dtype == torch.uint8 else grey.clamp_(-1.0, 1.0)


def to_size(images: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, C, size, size]: the largest centred square, resized bilinearly with antialiasing (a triangle filter)."""
    height, width = images.shape[2:]
    if height == width == size:
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    resized = torch.cat([F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in square.split(1024)])
    return resized if images.dtype == torch.uint8 else resized.clamp_(-1.0, 1.0)
