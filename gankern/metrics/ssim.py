"""Structural similarity of images, at one scale and at several, and the diversity of a set by it.

As in the papers, only places where the whole window lies inside the image count: there is no padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs

WINDOW = 11  # pixels of the Gaussian window, standard deviation 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first
BATCH = 1 << 20  # pixels compared at once


@torch.no_grad()
def ssim(*, real: Tensor, fake: Tensor, data_range: float = 2.0) -> float:
    """Mean structural similarity of pairs of images, over all channels and all places where the window fits.

    Args:
        real: [N, C, H, W], floating, finite, N >= 1, H and W >= 11.
        fake: [N, C, H, W]: image i is compared with image i of `real`.
        data_range: largest minus smallest value that a pixel can have, > 0: 2 for images in [-1, 1].

    Returns:
        In [-1, 1], higher is more similar, 1 for the same images; the arguments may be exchanged. In float64.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, section III.
    """
    _images("ssim", 1, data_range, real=real, fake=fake)
    size = max(1, BATCH // real[0].numel())
    each = [_similarity(x.double(), y.double(), data_range)[0] for x, y in zip(real.split(size), fake.split(size), strict=True)]
    return torch.cat(each).mean().item()


@torch.no_grad()
def ms_ssim(*, real: Tensor, fake: Tensor, data_range: float = 2.0) -> float:
    """Mean multi-scale structural similarity of pairs of images.

    Five scales, each half the one before, where the smallest still has 11 pixels a side: from 176 pixels on. Smaller images have as
    many scales as fit (28 pixels: 2, 32: 2, 64: 3, 128: 4), the published weights of these divided by their sum.

    Args:
        real: [N, C, H, W], floating, finite, N >= 1, H and W >= 11.
        fake: [N, C, H, W]: image i is compared with image i of `real`.
        data_range: largest minus smallest value that a pixel can have, > 0: 2 for images in [-1, 1].

    Returns:
        In [0, 1] (a scale less than 0 counts as 0), higher is more similar, 1 for the same images. In float64.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Wang et al., "Multiscale structural similarity for image quality assessment", 2003.
    """
    _images("ms_ssim", 1, data_range, real=real, fake=fake)
    return _multi_scale(real, fake, data_range)


@torch.no_grad()
def ms_ssim_diversity(*, fake: Tensor, pairs: int = 1000, seed: int = 0, data_range: float = 2.0) -> float:
    """Mean `ms_ssim` of random pairs of different samples: how much alike they are. Meant for the samples of one class.

    Args:
        fake: [N, C, H, W], floating, finite, N >= 2, H and W >= 11.
        pairs: how many, >= 1.
        seed: of the pairs; PyTorch's global random state is left as it was.
        data_range: largest minus smallest value that a pixel can have, > 0: 2 for images in [-1, 1].

    Returns:
        In [0, 1]: lower is more diverse, 1 if all are the same. Compare with the figure of real images.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Odena et al., "Conditional image synthesis with auxiliary classifier GANs", ICML 2017, section 4.2.
    """
    op = "ms_ssim_diversity"
    _images(op, 2, data_range, fake=fake)
    checks.integer(op, "pairs", pairs, 1)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(fake), (pairs,), generator=generator)
    second = (first + torch.randint(1, len(fake), (pairs,), generator=generator)) % len(fake)
    return _multi_scale(fake[first.to(fake.device)], fake[second.to(fake.device)], data_range)


def _images(op: str, least: int, data_range: float, **sets: Tensor) -> None:
    _inputs.images(op, least, WINDOW, **sets)
    checks.number(op, "data_range", data_range, 0)
    if data_range == 0:
        checks.fail(ValueError, op, "data_range", "be > 0", data_range)


def _multi_scale(real: Tensor, fake: Tensor, data_range: float) -> float:
    scales = sum(min(real.shape[2:]) >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    size = max(1, BATCH // real[0].numel())
    each = []
    for x, y in zip(real.split(size), fake.split(size), strict=True):
        x, y = x.double(), y.double()
        product = torch.ones((), dtype=torch.float64, device=x.device)
        for scale, weight in enumerate(WEIGHTS[:scales]):
            if scale > 0:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            similarity, contrast = _similarity(x, y, data_range)
            term = similarity if scale == scales - 1 else contrast
            product = product * term.clamp(min=0) ** (weight / sum(WEIGHTS[:scales]))
        each.append(product)
    return torch.cat(each).mean().item()


def _similarity(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """SSIM [N], and its factor of contrast and structure [N]; x, y float64 [N, C, H, W]."""
    down, across = (_window(side, x.device) for side in x.shape[2:])
    maps = down @ torch.stack([x, y, x * x, y * y, x * y]) @ across.mT
    mean_x, mean_y, xx, yy, xy = maps.flatten(2)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    squares = mean_x.square() + mean_y.square()
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (xx + yy - squares + c2)
    similarity = contrast * (2 * mean_x * mean_y + c1) / (squares + c1)
    return similarity.mean(1), contrast.mean(1)


def _window(side: int, device: torch.device) -> Tensor:
    """Band matrix [side - 10, side] of the Gaussian window: a product of matrices, 10 times as fast as the convolution on a CPU."""
    offset = torch.arange(side, dtype=torch.float64, device=device) - torch.arange(side - WINDOW + 1, device=device).unsqueeze(1)
    inside = (offset >= 0) & (offset < WINDOW)
    return torch.where(inside, -(offset - WINDOW // 2).square() / (2 * 1.5**2), -torch.inf).softmax(1)
