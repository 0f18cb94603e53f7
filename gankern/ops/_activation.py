"""LeakyReLU in plain PyTorch, as every op defines it."""

from __future__ import annotations

import torch
from torch import Tensor

_leaky_relu, _leaky_relu_ = torch._C._nn.leaky_relu, torch._C._nn.leaky_relu_


def leaky_relu(z: Tensor, slope: float) -> Tensor:
    """F.leaky_relu; with slope 0 F.relu, which is 0 at minus infinity too, where the product with the slope is NaN."""
    return torch.relu(z) if slope == 0 else _leaky_relu(z, slope)


def leaky_relu_(z: Tensor, slope: float) -> Tensor:
    """The same in place."""
    return torch.relu_(z) if slope == 0 else _leaky_relu_(z, slope)
