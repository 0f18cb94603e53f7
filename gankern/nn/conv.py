"""Convolutions with LeakyReLU: nn.ConvNd or nn.ConvTransposeNd and nn.LeakyReLU as one module, N = 1, 2, 3."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gankern import backend, checks
from gankern.ops._activation import leaky_relu, leaky_relu_
from gankern.ops.bias_lrelu import OP, fused

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _WithLeakyReLU(_ConvNd):
    """y = LeakyReLU(convolution(x)), with the convolution's parameters: a state_dict fits both ways.

    The convolution is the library's own, without its bias; bias and LeakyReLU are then one kernel (`gankern.bias_lrelu`), correct
    to any derivative order. On the CPU, without a forced backend, only large convolutions are computed so: see `_choose`.

    Args:
        *args, **kwargs: those of the convolution class.
        negative_slope: factor for negative values, >= 0 (0 is ReLU).

    Shape: that of the convolution, also unbatched.

    Raises:
        ValueError, TypeError: negative_slope is no finite number >= 0.
        RuntimeError: a backend was forced that cannot run here.
    """

    negative_slope: float

    def __init__(self, *args: Any, negative_slope: float = 0.2, **kwargs: Any) -> None:
        checks.number(type(self).__name__, "negative_slope", negative_slope, 0.0)
        super().__init__(*args, **kwargs)
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_lrelu(self, input, self.negative_slope, output_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"


class ConvLeakyReLU1d(_WithLeakyReLU, nn.Conv1d):
    """nn.Conv1d(..., negative_slope=0.2) and LeakyReLU in one."""


class ConvLeakyReLU2d(_WithLeakyReLU, nn.Conv2d):
    """nn.Conv2d(..., negative_slope=0.2) and LeakyReLU in one."""


class ConvLeakyReLU3d(_WithLeakyReLU, nn.Conv3d):
    """nn.Conv3d(..., negative_slope=0.2) and LeakyReLU in one."""


class ConvTransposeLeakyReLU1d(_WithLeakyReLU, nn.ConvTranspose1d):
    """nn.ConvTranspose1d(..., negative_slope=0.2) and LeakyReLU in one."""


class ConvTransposeLeakyReLU2d(_WithLeakyReLU, nn.ConvTranspose2d):
    """nn.ConvTranspose2d(..., negative_slope=0.2) and LeakyReLU in one."""


class ConvTransposeLeakyReLU3d(_WithLeakyReLU, nn.ConvTranspose3d):
    """nn.ConvTranspose3d(..., negative_slope=0.2) and LeakyReLU in one."""


def conv_lrelu(layer: _ConvNd, input: Tensor, slope: float, output_size: list[int] | None = None) -> Tensor:
    """LeakyReLU(layer(input)) of any convolution of PyTorch's, as `ConvLeakyReLU2d` and the like compute it."""
    # Each parameter is read once: a parametrised one is computed, and may change, whenever it is read.
    weight, bias = layer.weight, layer.bias
    name = _choose(layer, input, weight)
    if name == "reference":
        z = _product(layer, input, weight, bias, output_size)
        return leaky_relu(z, slope) if torch.compiler.is_compiling() else leaky_relu_(z, slope)
    # In 16 bits oneDNN adds the bias before it rounds; cuDNN's convolution is rounded before PyTorch adds it.
    inside = input.is_cpu and _low_precision(weight)
    z = _product(layer, input, weight, bias if inside else None, output_size)
    outside = None if inside or bias is None else bias.to(z.dtype)
    batched = z.dim() == weight.dim()
    y = fused(z if batched else z.unsqueeze(0), outside, float(slope), name)
    return y if batched else y.squeeze(0)


def _product(conv: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None) -> Tensor:
    layer: Any = conv
    if not layer.transposed:
        return layer._conv_forward(x, weight, bias)
    n = len(layer.kernel_size)
    padding = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, n, layer.dilation)
    return _TRANSPOSED[n](x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


def _choose(layer: _ConvNd, x: Tensor, weight: Tensor) -> str:
    """The automatic choice; "reference" stands for the library's convolution with its bias, and LeakyReLU in place.

    On the CPU the kernel is for what a gradient penalty may differentiate twice, where it keeps zeros from being convolved, and
    only where the convolution is so large that an autograd Function costs nothing beside it: from 512 multiplications an output
    and 2^26 in all. One thread, alternating medians against eager (convolution, F.leaky_relu), input of the layer (batch x
    channels x side) and, in this order, forward+backward and double backward. Kernel: 16x64x14 0.97, 1.21; 16x128x8 0.99, 1.56;
    transposed 16x128x7 1.05, 1.22; 16x16x16 0.93, 1.15; 16x8x8 0.87, 1.03. In place: 1.01, 1.01; 1.00, 1.20; 1.00, 1.06;
    1.00, 0.92; 0.99, 0.98. On CUDA not measured yet.
    """
    name = backend.forced()
    if name is not None:
        return backend.require(OP, name, x.device.type)
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses what surrounds the convolution
    if not x.is_cpu:
        return next((name for name in ("compiled", "triton") if not backend.problem(name, x.device.type)), "reference")
    if not (x.requires_grad and torch.is_grad_enabled()) or backend.CPU_PROBLEM:
        return "reference"
    strides = math.prod(layer.stride)
    outputs = layer.out_channels * (strides if layer.transposed else 1)  # per position at which the kernel is laid
    if weight.numel() < 512 * outputs or _low_precision(weight):
        return "reference"
    positions = x.numel() // (layer.in_channels * (1 if layer.transposed else strides))
    return "compiled" if positions * weight.numel() >= 2**26 else "reference"


def _low_precision(weight: Tensor) -> bool:
    """Whether a convolution with this weight computes in 16 bits."""
    return weight.dtype.itemsize == 2 or torch.is_autocast_enabled(weight.device.type)
