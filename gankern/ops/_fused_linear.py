"""linear_lrelu with bias, LeakyReLU and dropout inside the products themselves (Triton), correct to any derivative order.

With the mask fixed, m(y, bits) = dropout factor times LeakyReLU slope, the layer is one form, linear in each of a, c and W:
    T(a, c, W) = sum over [M, N] of m * (a Wᵀ) * c
and its three partial derivatives are all the products that any order of differentiation needs:
    _Masked      m * (a Wᵀ + b)     [M, N]    the forward product again, for tangents
    _DataGrad    (m * c) W          [M, K]
    _WeightGrad  (m * c)ᵀ a         [N, K]    and the column sums of m * c, which belong to b
The derivatives of each are the other two with the cotangent put in, so three Functions are closed under differentiation.
LeakyReLU's second derivative is zero: y enters detached, as nothing but the source of m.

A backward is told that the weight needs a gradient even inside autograd.grad(output, x), where it is thrown away. The engine does
skip whole nodes, so the first derivative is split into two: _WeightPath has the parameters as its inputs and gives their gradients,
_DataPath has x and gives its gradient. Each needs the other's tensor for its own derivatives, but no edge to it: it is handed over
in a tuple, where autograd does not look for inputs, and saved with its history.

Kernels, in `gankern.triton.linear_lrelu`; a [M, K], c [M, N] of any strides, y contiguous; precision "ieee" or "tf32" (float32):
    linear_lrelu_forward(x, weight [N, K], bias | None, slope, p, seed | None, precision) -> y [M, N], bits
    linear_lrelu_masked(a, weight, bias | None, y, bits, slope, p, precision) -> [M, N]
    linear_lrelu_data_grad(c, weight, y, bits, slope, p, precision) -> [M, K]
    linear_lrelu_weight_grad(c, a, y, bits, slope, p, with_bias, precision) -> [N, K], [N] or [0]
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gankern import backend, checks


class _How(NamedTuple):
    """What the kernels take besides tensors."""

    slope: float
    p: float
    precision: str


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether `apply` can run: tensors that the Triton kernels take; no torch.func, forward mode or torch.compile at work.

    float64 only under the interpreter: Triton 3.7 fails to compile a float64 product whose operand is computed.
    """
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
    if not plain or backend.triton_problem(x.device.type):
        return False
    supported = checks.FLOATING if backend.triton_interpreted() else (torch.float32, torch.bfloat16, torch.float16)
    return _dtype(x) in supported and _dtype(x) == _dtype(weight)


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, p: float, seed: Tensor | None) -> Tensor:
    """y = dropout(LeakyReLU(x Wᵀ + b)).

    Args:
        x: [*, K], any strides.
        weight: [N, K], bias: [N] or None; all of one dtype, or as autocast makes them.
        slope, p: of LeakyReLU and of dropout.
        seed: int64 [1], needed when p > 0.

    Returns:
        [*, N].
    """
    x, weight = x.to(_dtype(x)), weight.to(_dtype(weight))
    bias = None if bias is None else bias.to(weight.dtype)
    how = _How(slope, p, "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")
    shape = x.shape[:-1]
    if x.dim() != 2:
        x = x.reshape(math.prod(shape), x.shape[-1])
    y, bits = _kernels().linear_lrelu_forward(x, weight, bias, slope, p, seed, how.precision)
    if torch.is_grad_enabled():
        mask, result = (y.detach(), bits, how), y
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            # what _DataPath sends its gradient on through: of y's shape, but one element of memory
            result = y.new_empty_strided(y.shape, (0, 0)) if x.requires_grad else y
            result = _WeightPath.apply(weight, bias, (x, *mask, result))
        if x.requires_grad:
            result = _DataPath.apply(x, None if result is y else result, (weight, *mask, y))
        y = result
    return y if len(shape) == 1 else y.reshape(*shape, y.shape[1])


def _dtype(t: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in, given this argument: autocast leaves float64 alone."""
    if t.dtype != torch.float64 and torch.is_autocast_enabled(t.device.type):
        return torch.get_autocast_dtype(t.device.type)
    return t.dtype


def _kernels() -> ModuleType:
    return importlib.import_module("gankern.triton.linear_lrelu")


class _WeightPath(Function):
    """Node of weight and bias: passes a given tensor through, and turns its gradient into theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, hidden: tuple[Tensor, Tensor, Tensor, _How, Tensor]) -> Tensor:
        x, y, bits, ctx.how, result = hidden
        ctx.save_for_backward(x, y, bits)
        return result

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        x, y, bits = ctx.saved_tensors
        for_weight, for_bias, _ = ctx.needs_input_grad
        # a frozen weight costs no product: its gradient is taken against no columns
        dw, db = _WeightGrad.apply(c, x if for_weight else x[:, :0], y, bits, for_bias, ctx.how)
        return dw if for_weight else None, db if for_bias else None, None


class _DataPath(Function):
    """Node of x: passes y through; x receives its gradient, the weight path the gradient of y as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_path: Tensor | None, hidden: tuple[Tensor, Tensor, Tensor, _How, Tensor]) -> Tensor:
        weight, y, bits, ctx.how, result = hidden
        ctx.save_for_backward(weight, y, bits)
        return result

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        return _DataGrad.apply(c, *ctx.saved_tensors, ctx.how), c if ctx.needs_input_grad[1] else None, None


class _Masked(Function):
    """m * (a Wᵀ + b)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, bits: Tensor, how: _How) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(a, weight, y, bits)
        return _kernels().linear_lrelu_masked(a, weight, bias, y, bits, *how)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        a, weight, y, bits = ctx.saved_tensors
        for_a, for_weight, for_bias, *_ = ctx.needs_input_grad
        da = _DataGrad.apply(c, weight, y, bits, ctx.how) if for_a else None
        dw = db = None
        if for_weight or for_bias:
            dw, db = _WeightGrad.apply(c, a if for_weight else a[:, :0], y, bits, for_bias, ctx.how)
        return da, dw if for_weight else None, db if for_bias else None, None, None, None


class _DataGrad(Function):
    """(m * c) W."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, weight: Tensor, y: Tensor, bits: Tensor, how: _How) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(c, weight, y, bits)
        return _kernels().linear_lrelu_data_grad(c, weight, y, bits, *how)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        c, weight, y, bits = ctx.saved_tensors
        for_c, for_weight, *_ = ctx.needs_input_grad
        dc = _Masked.apply(a, weight, None, y, bits, ctx.how) if for_c else None
        dw = _WeightGrad.apply(c, a, y, bits, False, ctx.how)[0] if for_weight else None
        return dc, dw, None, None, None


class _WeightGrad(Function):
    """(m * c)ᵀ a and, if asked for, the column sums of m * c."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, a: Tensor, y: Tensor, bits: Tensor, with_bias: bool, how: _How) -> Any:
        ctx.with_bias, ctx.how = with_bias, how
        ctx.save_for_backward(c, a, y, bits)
        ctx.set_materialize_grads(False)
        return _kernels().linear_lrelu_weight_grad(c, a, y, bits, how.slope, how.p, with_bias, how.precision)

    @staticmethod
    def backward(ctx: Any, weight: Tensor | None, bias: Tensor | None) -> Any:
        c, a, y, bits = ctx.saved_tensors
        if not ctx.with_bias:
            bias = None
        dc = da = None
        if weight is not None and ctx.needs_input_grad[1]:
            da = _DataGrad.apply(c, weight, y, bits, ctx.how)
        if weight is None:  # only the sums were differentiated: a product over no columns
            a, weight = a[:, :0], a.new_empty(y.shape[1], 0)
        if ctx.needs_input_grad[0] and (bias is not None or weight.shape[1]):
            dc = _Masked.apply(a, weight, bias, y, bits, ctx.how)
        return dc, da, None, None, None, None
