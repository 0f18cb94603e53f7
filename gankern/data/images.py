"""The three conversions that all images share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
