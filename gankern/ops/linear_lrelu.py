"""linear_lrelu: y = dropout(LeakyReLU(x Wᵀ + b)), the block that every MLP GAN is made of. Correct to any derivative order.

The product stays a native matrix product, so that autograd computes only the products that are asked for; what surrounds it
(bias, LeakyReLU, dropout) is one kernel forward and one backward. The mask of the backward pass is read off the sign of the
*detached* output and the stored dropout bits: LeakyReLU's second derivative is zero, and a detached y keeps the engine from
multiplying those zeros. On CUDA the Triton backend can also put all of it into the product itself (`_fused_linear.py`).

Kernels, same names and tensors in `torch.ops.gankern` (csrc/linear_lrelu.*) and `gankern.triton.linear_lrelu`:
    linear_lrelu_act(z [..., N], bias [N] | None, slope, p, seed int64 [1] | None) -> y [..., N], bits uint8
    linear_lrelu_act_grad(dy [..., N], y [..., N], bits, slope, p, with_bias) -> dz [..., N], dbias [N] or [0]
All contiguous. bits is [rows, ceil(N / 8)], bit n % 8 of byte n // 8 says that element n was kept; [0] when p == 0.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._activation import leaky_relu, leaky_relu_
from gankern.ops._function import apply
from gankern.ops._philox import draw_seed, dropout_keep

OP = "linear_lrelu"
_INFINITY, _linear = math.inf, F.linear


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, in plain PyTorch. `seed` (int64 [1]) fixes the dropout mask and is needed when dropout > 0."""
    y = leaky_relu(F.linear(x, weight, bias), negative_slope)
    if dropout == 0.0:
        return y
    assert seed is not None
    keep = dropout_keep(seed, math.prod(y.shape[:-1]), y.shape[-1], dropout).reshape(y.shape)
    return y * (keep.to(y.dtype) * dropout_scale(dropout))


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), as torch.nn.Dropout; 0 where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def linear_lrelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Linear layer, LeakyReLU and dropout in one: y = dropout(LeakyReLU(x Wᵀ + b)).

    Differentiable to any order in x, weight and bias; under autocast it computes in the autocast dtype, as `F.linear` does.

    Args:
        x: [*, in_features]; float64, float32, bfloat16 or float16; any strides, any leading dimensions, also empty ones.
        weight: [out_features, in_features], same dtype and device.
        bias: [out_features] or None.
        negative_slope: factor for negative inputs, >= 0; 0 is ReLU, 1 is the identity.
        dropout: probability in [0, 1] that an element is zeroed (drawn in steps of 1/65536); kept ones are scaled by 1 / (1 - p).
        training: dropout does nothing when False.
        generator: source of the dropout mask; None is PyTorch's default generator on x's device.

    Returns:
        [*, out_features].

    Raises:
        ValueError: a shape, device or range that does not fit.
        TypeError: a dtype that is not supported, or dtypes that differ outside autocast.
        RuntimeError: a backend was forced that cannot run here.

    Source: Maas, Hannun, Ng, "Rectifier nonlinearities improve neural network acoustic models", 2013 (LeakyReLU);
    Srivastava et al., "Dropout", JMLR 2014.
    """
    if backend.automatic() and getattr(x, "is_cpu", False):
        try:
            drops = training and dropout > 0.0
            native = not drops or (generator is None and _choose("cpu", dropout, _products(x, weight)) == "reference")
            # F.linear takes others too
            plain_bias = bias is None or (
                bias.dim() == 1 and bias.size(0) == weight.size(0) and bias.dtype == weight.dtype and bias.is_cpu
            )
            numbers = type(negative_slope) in (float, int) and type(dropout) in (float, int)
            if (
                native
                and numbers
                and plain_bias
                and weight.dim() == 2
                and weight.is_cpu
                and 0.0 <= negative_slope < _INFINITY
                and 0.0 <= dropout <= 1.0
            ):
                z = _linear(x, weight, bias)
                y = _activate_cpu(z, weight, negative_slope) if z.requires_grad else leaky_relu_(z, negative_slope)
                return F.dropout(y, dropout) if drops else y
        except Exception:
            pass  # most bad input comes here; below, the checks name it, or the same call raises again
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    _check(x, weight, bias, negative_slope, dropout, autocast)
    p = float(dropout) if training else 0.0
    slope = float(negative_slope)
    name = backend.forced()
    if name is None:
        name = _choose(device, p, _products(x, weight))
        if name == "reference":
            y = leaky_relu(F.linear(x, weight, bias), slope)
            if generator is None or p == 0.0:
                return F.dropout(y, p) if p > 0.0 else y
            return y * torch.empty_like(y).bernoulli_(1.0 - p, generator=generator).mul_(dropout_scale(p))
    else:
        backend.require(OP, name, device)
    seed = draw_seed(x.device, generator) if p > 0.0 else None
    if name == "reference":
        return reference(x, weight, bias, slope, p, seed)
    if name == "triton" and _product_in_triton(x, weight):
        from gankern.ops import _fused_linear

        return _fused_linear.apply(x, weight, bias, slope, p, seed)
    # In 16 bits the product adds the bias before it rounds, as eager does: a bias added to the rounded product turns signs near 0,
    # and with them the mask (error of dx in bfloat16: 15 times eager's). Under autocast F.linear casts all three. On the CPU the
    # product with bias is the faster one.
    inside = autocast or x.dtype.itemsize == 2 or (device == "cpu" and name == "compiled")
    z = F.linear(x, weight, bias if inside else None)
    return apply(_Activation, z, None if inside else bias, seed, slope, p, name)[0]


def _products(x: Tensor, weight: Tensor) -> int:
    """Elements of the product."""
    return x.numel() // max(weight.size(1), 1) * weight.size(0)


def _choose(device: str, p: float, elements: int) -> str:
    """The automatic choice; "reference" stands for plain PyTorch calls (on the CPU without dropout: `_activate_cpu`).

    On two cores with dropout 0.3, forward and forward+backward against eager: 16x128 1.0, 0.87; 16x256 1.4, 0.88; 16x512 1.3, 0.96;
    64x256 2.0, 1.07; 64x512 1.6, 1.10; 1024x256 2.5, 1.3. On CUDA not measured yet.
    """
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses what surrounds the product itself
    if device == "cpu":
        return "compiled" if p > 0.0 and elements >= 2**14 and not backend.CPU_PROBLEM else "reference"
    return next((name for name in ("compiled", "triton") if not backend.problem(name, device)), "reference")


def _activate_cpu(z: Tensor, weight: Tensor, slope: float) -> Tensor:
    """LeakyReLU of a product that wants gradients, in native PyTorch calls: the automatic choice on the CPU without dropout.

    Where the product is large it is a multiplication by a constant: its derivatives of every order are that constant, so the double
    backward of a gradient penalty multiplies no zeros. Measured on two cores (batch x width; forward+backward and double backward
    against eager, alternating medians): 16x512 0.94, 2.1; 64x256 0.92, 1.5; 256x128 0.90, 1.4; 64x512 1.00, 2.0; 16x1024 0.99, 2.9;
    so from 512 inputs and 2^23 multiplications on. An autograd Function of ours costs 40 us more a call, at 16x128 half the speed.
    Both write over z, which nobody else holds and its product does not need: 500x512 to 1024 0.97, and 0.92 with memory of its own.
    """
    inputs = weight.size(1)
    if inputs < 512 or z.numel() * inputs < 2**23 or slope > 1.0 or z.dtype.itemsize == 2:
        return leaky_relu_(z, slope)
    return z.mul_(z.detach().sign().clamp_min_(slope))


def _check(x: Any, weight: Any, bias: Any, negative_slope: float, dropout: float, autocast: bool) -> None:
    checks.tensor(OP, "x", x)
    checks.floating(OP, "x", x)
    checks.tensor(OP, "weight", weight)
    checks.dims(OP, "weight", weight, 2)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        checks.fail(ValueError, OP, "x", f"have {weight.shape[1]} as its last dimension", f"shape {list(x.shape)}")
    checks.same_device(OP, "weight", weight, x.device)
    (checks.floating if autocast else functools.partial(checks.same_dtype, dtype=x.dtype))(OP, "weight", weight)
    if bias is not None:
        checks.tensor(OP, "bias", bias)
        checks.shape(OP, "bias", bias, (weight.shape[0],))
        checks.same_device(OP, "bias", bias, x.device)
        (checks.floating if autocast else functools.partial(checks.same_dtype, dtype=x.dtype))(OP, "bias", bias)
    checks.number(OP, "negative_slope", negative_slope, 0.0)
    checks.number(OP, "dropout", dropout, 0.0, 1.0)


FUSED_ROWS = 0  # up to so many rows of x the triton backend makes the product itself; 0 until a GPU has been measured


def _product_in_triton(x: Tensor, weight: Tensor) -> bool:
    if x.numel() > FUSED_ROWS * weight.size(1):
        return False
    from gankern.ops import _fused_linear

    return _fused_linear.usable(x, weight)


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.linear_lrelu")


class _Activation(Function):
    """y = dropout(LeakyReLU(z + bias)), and the kept bits. Its backward is a Function itself: no cut graph."""

    @staticmethod
    def forward(z: Tensor, bias: Tensor | None, seed: Tensor | None, slope: float, p: float, name: str) -> Any:
        return _kernels(name).linear_lrelu_act(z.contiguous(), None if bias is None else bias.contiguous(), slope, p, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, bias, _, ctx.slope, ctx.p, ctx.name = inputs
        y, bits = output
        ctx.with_bias = bias is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(y, bits)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:
        if dy is None:
            return (None,) * 6
        y, bits = ctx.saved_tensors
        if torch.is_grad_enabled():
            dz, dbias = apply(_ActivationGrad, dy, y.detach(), bits, ctx.slope, ctx.p, ctx.with_bias, ctx.name)
        else:
            dz, dbias = _ActivationGrad.forward(dy, y, bits, ctx.slope, ctx.p, ctx.with_bias, ctx.name)
        return dz, dbias if ctx.with_bias else None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, z: Tensor, bias: Tensor | None, seed: Tensor | None, slope: float, p: float, name: str
    ) -> Any:
        z = _batch_first(z, in_dims[0], info.batch_size)
        if bias is not None and in_dims[1] is not None:  # an ensemble: one bias a sample
            bias = bias.movedim(in_dims[1], 0)
            z, bias = z + bias.reshape(bias.shape[0], *([1] * (z.dim() - 2)), bias.shape[1]), None
        if p == 0.0:
            return apply(_Activation, z, bias, None, slope, p, name), (0, None)
        assert seed is not None
        seeds = _batch_first(seed, in_dims[2], info.batch_size)
        outputs = [apply(_Activation, z[i], bias, seeds[i], slope, p, name) for i in range(info.batch_size)]
        return (torch.stack([y for y, _ in outputs]), torch.stack([bits for _, bits in outputs])), (0, 0)


class _ActivationGrad(Function):
    """dz = dy * (slope of the activation), dbias = its sum over the rows: linear in dy, so it is its own derivative."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, with_bias: bool, name: str) -> Any:
        return _kernels(name).linear_lrelu_act_grad(dy.contiguous(), y, bits, slope, p, with_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, y, bits, ctx.slope, ctx.p, ctx.with_bias, ctx.name = inputs
        ctx.save_for_backward(y, bits)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddz: Tensor | None, ddbias: Tensor | None) -> Any:
        y, bits = ctx.saved_tensors
        if ctx.with_bias and ddbias is not None:
            ddz = ddbias.expand_as(y) if ddz is None else ddz + ddbias
        if ddz is None:
            return (None,) * 7
        ddy, _ = apply(_ActivationGrad, ddz, y, bits, ctx.slope, ctx.p, False, ctx.name)
        return ddy, None, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dy: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, with_bias: bool, name: str
    ) -> Any:
        dy, y = (_batch_first(t, d, info.batch_size).contiguous() for t, d in zip((dy, y), in_dims, strict=False))
        if p > 0.0:
            bits = _batch_first(bits, in_dims[2], info.batch_size).flatten(0, 1).contiguous()
        dz, empty = apply(_ActivationGrad, dy, y, bits, slope, p, False, name)
        if not with_bias:
            return (dz, empty), (0, None)
        return (dz, dz.flatten(1, -2).sum(1) if dz.dim() > 2 else dz), (0, 0)


def _batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::linear_lrelu_act")
    def _(z: Tensor, bias: Tensor | None, slope: float, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        columns = z.shape[-1]
        bits = (math.prod(z.shape[:-1]), (columns + 7) // 8) if p > 0 else (0,)
        return torch.empty_like(z), z.new_empty(bits, dtype=torch.uint8)

    @torch.library.register_fake("gankern::linear_lrelu_act_grad")
    def _(dy: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, with_bias: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(dy), dy.new_empty(dy.shape[-1] if with_bias else 0)
