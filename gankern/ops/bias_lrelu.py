"""bias_lrelu: y = LeakyReLU(x + bias), the bias one number a channel: what follows a convolution. Correct to any derivative order.

One kernel forward; one backward, which also sums the bias gradient. The mask of the backward pass is read off the sign of the
*detached* output: LeakyReLU's second derivative is zero, and a detached y keeps the engine from multiplying those zeros.

Kernels, same names and tensors in `torch.ops.gankern` (csrc/bias_lrelu.*) and `gankern.triton.bias_lrelu`:
    bias_lrelu(x [N, C, *], bias [C] | None, slope) -> y
    bias_lrelu_grad(dy [N, C, *], y, slope, with_bias) -> dx, dbias [C] or [0]
x contiguous or dense with the channels innermost (channels-last); y as x; dy as y. bias contiguous.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gankern import backend, checks
from gankern.ops._activation import leaky_relu, leaky_relu_
from gankern.ops._function import apply
from gankern.ops._layout import is_channels_last

OP = "bias_lrelu"
_INFINITY = math.inf
SMALL = 2**15  # elements, below which native calls are faster on the CPU; with gradients eight times as many


def reference(x: Tensor, bias: Tensor | None = None, negative_slope: float = 0.2) -> Tensor:
    """The definition, in plain PyTorch."""
    return leaky_relu(x if bias is None else x + _over_channels(bias, x), negative_slope)


def bias_lrelu(x: Tensor, bias: Tensor | None = None, negative_slope: float = 0.2) -> Tensor:
    """Channel bias and LeakyReLU in one: y = LeakyReLU(x + bias), bias[c] being added to channel c, dimension 1 of x.

    Differentiable to any order in x and bias. A channels-last x gives a channels-last y.

    Args:
        x: [N, C, *], two dimensions or more; float64, float32, bfloat16 or float16; any strides, also empty.
        bias: [C] or None, same dtype and device; under autocast any floating dtype, cast to that of x.
        negative_slope: factor for negative values, >= 0; 0 is ReLU, 1 is the identity.

    Returns:
        x's shape and dtype. In 16 bits the sum is rounded once, after the LeakyReLU.

    Raises:
        ValueError: a shape, device or range that does not fit.
        TypeError: a dtype that is not supported, or dtypes that differ outside autocast.
        RuntimeError: a backend was forced that cannot run here.

    Source: Maas, Hannun, Ng, "Rectifier nonlinearities improve neural network acoustic models", 2013 (LeakyReLU).
    """
    if backend.automatic() and getattr(x, "is_cpu", False):
        try:
            plain = bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.dim() == 1 and bias.size(0) == x.size(1))
            if (
                plain
                and x.layout is torch.strided
                and x.dim() > 1
                and x.dtype in checks.FLOATING
                and type(negative_slope) in (float, int)
                and 0.0 <= negative_slope < _INFINITY
            ):
                if _choose(x, bias) == "compiled":
                    return fused(x, bias, float(negative_slope), "compiled")
                if bias is None:
                    return leaky_relu(x, negative_slope)
                return leaky_relu_(x + _over_channels(bias, x), negative_slope)
        except Exception:
            pass  # bad input: below, the checks name it
    _check(x, bias, negative_slope)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    slope = float(negative_slope)
    name = backend.forced()
    name = _choose(x, bias) if name is None else backend.require(OP, name, x.device.type)
    return reference(x, bias, slope) if name == "reference" else fused(x, bias, slope, name)


def fused(x: Tensor, bias: Tensor | None, slope: float, name: str) -> Tensor:
    """`bias_lrelu` of checked arguments by one of the kernels, "compiled" or "triton"."""
    if not (_graph(x, bias) or _transformed()):
        return _Activation.forward(x, bias, slope, name)
    return apply(_Activation, x, bias, slope, name)


def _choose(x: Tensor, bias: Tensor | None) -> str:
    """The automatic choice; below SMALL on the CPU native calls, LeakyReLU in place on the sum.

    One thread, alternating medians against eager, forward under no_grad and forward+backward, batch x channels x side of the
    picture. Kernel: 16x8x4 0.6, 0.9; 16x16x8 0.7, 0.9; 16x32x8 0.9, 0.95; 64x32x8 1.4, 1.05; 16x64x16 2.2, 1.3; 64x64x16 1.9, 1.5;
    channels-last 64x64x16 1.9, 1.4. A double backward pass in its own inputs alone costs two Functions: 64x32x8 0.8, 64x64x16 1.2.
    On CUDA not measured yet.
    """
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses it
    if x.is_cpu:
        small = x.numel() < SMALL or (x.numel() < 8 * SMALL and _graph(x, bias))
        return "reference" if small or backend.CPU_PROBLEM else "compiled"
    return next((name for name in ("compiled", "triton") if not backend.problem(name, x.device.type)), "reference")


def _graph(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _transformed() -> bool:
    """Whether torch.func, forward-mode derivatives or torch.compile look at what is called."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _over_channels(bias: Tensor, x: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (x.dim() - 2))


def _check(x: Any, bias: Any, negative_slope: Any) -> None:
    checks.tensor(OP, "x", x)
    checks.floating(OP, "x", x)
    if x.dim() < 2:
        checks.fail(ValueError, OP, "x", "have at least 2 dimensions", f"shape {list(x.shape)}")
    if bias is not None:
        checks.tensor(OP, "bias", bias)
        checks.shape(OP, "bias", bias, (x.shape[1],))
        checks.same_device(OP, "bias", bias, x.device)
        if bias.dtype != x.dtype:
            device = x.device.type
            autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if not autocast:
                checks.same_dtype(OP, "bias", bias, x.dtype)
            checks.floating(OP, "bias", bias)
    checks.number(OP, "negative_slope", negative_slope, 0.0)


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.bias_lrelu")


def _dense(t: Tensor) -> Tensor:
    """t, or its contiguous copy where it is neither contiguous nor channels-last."""
    return t if t.is_contiguous() or is_channels_last(t) else t.contiguous()


def _as(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory layout of `like`, which is contiguous or channels-last."""
    if like.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


class _Activation(Function):
    """y = LeakyReLU(x + bias). Its backward is a Function itself: no cut graph."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, slope: float, name: str) -> Any:
        return _kernels(name).bias_lrelu(_dense(x), None if bias is None else bias.contiguous(), slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, bias, ctx.slope, ctx.name = inputs
        ctx.with_bias = bias is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 4
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dbias = apply(_ActivationGrad, dy, y.detach(), ctx.slope, ctx.with_bias, ctx.name)
        else:
            dx, dbias = _ActivationGrad.forward(dy, y, ctx.slope, ctx.with_bias, ctx.name)
        return dx, dbias if ctx.with_bias else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, bias: Tensor | None, slope: float, name: str) -> Any:
        x = _batch_first(x, in_dims[0], info.batch_size)
        if bias is not None and in_dims[1] is not None:  # an ensemble: one bias a sample
            bias = bias.movedim(in_dims[1], 0)
            x, bias = x + bias.reshape(len(bias), 1, -1, *[1] * (x.dim() - 3)), None
        return apply(_Activation, x.flatten(0, 1), bias, slope, name).unflatten(0, x.shape[:2]), 0


class _ActivationGrad(Function):
    """dx = dy * (slope of the activation), dbias = its sum over all but the channels: linear in dy, so it is its own derivative."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor, slope: float, with_bias: bool, name: str) -> Any:
        y = _dense(y)
        return _kernels(name).bias_lrelu_grad(_as(dy, y), y, slope, with_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, y, ctx.slope, ctx.with_bias, ctx.name = inputs
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddbias: Tensor | None) -> Any:
        (y,) = ctx.saved_tensors
        if ctx.with_bias and ddbias is not None:
            ddbias = _over_channels(ddbias, y).expand_as(y)
            ddx = ddbias if ddx is None else ddx + ddbias
        if ddx is None:
            return (None,) * 5
        return apply(_ActivationGrad, ddx, y, ctx.slope, False, ctx.name)[0], None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, y: Tensor, slope: float, with_bias: bool, name: str) -> Any:
        dy, y = (_batch_first(t, d, info.batch_size) for t, d in zip((dy, y), in_dims, strict=False))
        dx, empty = apply(_ActivationGrad, dy.flatten(0, 1), y.flatten(0, 1), slope, False, name)
        dx = dx.unflatten(0, dy.shape[:2])
        if not with_bias:
            return (dx, empty), (0, None)
        return (dx, dx.sum([1, *range(3, dx.dim())])), (0, 0)


def _batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::bias_lrelu")
    def _(x: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("gankern::bias_lrelu_grad")
    def _(dy: Tensor, y: Tensor, slope: float, with_bias: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(dy), dy.new_empty(dy.shape[1] if with_bias else 0)
