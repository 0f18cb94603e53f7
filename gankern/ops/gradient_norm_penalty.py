"""gradient_norm_penalty: weight * mean over the samples of (‖g‖ - target)², g a critic's input gradient, each norm over one sample.

Kernels, same names and tensors in `torch.ops.gankern` (csrc/gradient_norm_penalty.*) and `gankern.triton.gradient_norm_penalty`:
    gradient_norm_penalty(grad [B, ...], target, one_sided, weight) -> value [], norms [B], mean of the norms []
    gradient_norm_penalty_grad(c [], grad, norms, target, one_sided, weight) -> d<c, value>/dgrad [B, ...]
All contiguous; everything but [B, ...] is float64 for float64 gradients, else float32.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._function import apply
from gankern.ops._layout import accumulate, dense, is_channels_last, restored

OP = "gradient_norm_penalty"
SIDES = ("two", "one")


class NormPenalty(NamedTuple):
    """The penalty [], differentiable; the norm of each sample [B] and their mean [], detached."""

    value: Tensor
    norms: Tensor
    mean_norm: Tensor


def reference(grad: Tensor, target: float = 1.0, one_sided: bool = False, weight: float = 1.0) -> NormPenalty:
    """The definition, in plain PyTorch."""
    squares = _rows(grad).square().sum(1)
    norms = _norms(squares)
    paid = squares if target == 0.0 else _excess(norms, target, one_sided).square()
    return NormPenalty(weight * paid.mean(), norms.detach(), norms.detach().mean())


def _norms(squares: Tensor) -> Tensor:
    """Square roots; at zero their derivatives of every order are zero, and not NaN."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def _excess(norms: Tensor, target: float, one_sided: bool) -> Tensor:
    return torch.where(norms <= target, 0.0, norms - target) if one_sided else norms - target


def gradient_norm_penalty(grad: Tensor, target: float = 1.0, sided: str = "two", weight: float = 1.0) -> NormPenalty:
    """How far the norms of per-sample gradients are from a target: weight * mean_b (‖grad_b‖₂ - target)².

    The norm is taken over all dimensions but the first, in float32 for 16-bit gradients, also under autocast. A sample whose
    gradient is zero gets the gradient zero. The first derivative in `grad` is a kernel; higher ones are plain PyTorch formulas.

    Args:
        grad: [B, ...], float64, float32, bfloat16 or float16; any strides.
        target: the norm that costs nothing, >= 0; with 0 the penalty is the mean of the squared norms, smooth everywhere.
        sided: "two", or "one": norms below the target cost nothing, max(0, ‖grad_b‖ - target)².
        weight: factor of the penalty, >= 0.

    Returns:
        NormPenalty: `value` (float64 for float64, else float32), detached `norms` [B] and `mean_norm`. Of no samples the
        means are NaN.

    Raises:
        ValueError: a shape, name or number that does not fit.
        TypeError: a dtype that is not supported.
        RuntimeError: a backend was forced that cannot run here.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, eq. 3; one-sided: Petzka et al., "On the
    regularization of Wasserstein GANs", ICLR 2018; target 0: Mescheder et al., "Which training methods for GANs do actually
    converge?", ICML 2018, eq. 9.
    """
    _check(grad, target, sided, weight)
    one_sided, target, weight = sided == "one", float(target), float(weight)
    name = backend.forced()
    name = _choose(grad) if name is None else backend.require(OP, name, grad.device.type)
    if name == "reference":
        return reference(grad, target, one_sided, weight)
    return NormPenalty(*apply(_Penalty, grad, target, one_sided, weight, name))


def _check(grad: Any, target: Any, sided: Any, weight: Any) -> None:
    checks.tensor(OP, "grad", grad)
    checks.floating(OP, "grad", grad)
    if grad.dim() == 0:
        checks.fail(ValueError, OP, "grad", "have at least one dimension", "shape []")
    checks.number(OP, "target", target, 0.0)
    checks.one_of(OP, "sided", sided, SIDES)
    checks.number(OP, "weight", weight, 0.0)


def _choose(grad: Tensor) -> str:
    """The automatic choice: a kernel wherever there is one. One CPU thread, against eager, alternating medians: with the backward
    pass 16x784 1.8, 64x784 2.6, 256x784 2.2, 64x3x32x32 2.5 times as fast; with a double backward pass 16x784 1.07, 64x784 1.6,
    256x784 2.1. On CUDA not yet measured."""
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses it
    return backend.preferred(grad.device.type)


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.gradient_norm_penalty")


class _Penalty(Function):
    """value, norms and their mean. Its backward is a Function itself: no cut graph."""

    @staticmethod
    def forward(grad: Tensor, target: float, one_sided: bool, weight: float, name: str) -> Any:
        return _kernels(name).gradient_norm_penalty(dense(grad, is_channels_last(grad)), target, one_sided, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, *ctx.settings = inputs
        _, norms, mean = output
        ctx.save_for_backward(grad, norms)
        ctx.mark_non_differentiable(norms, mean)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, *_: None) -> Any:
        if c is None:
            return (None,) * 5
        grad, norms = ctx.saved_tensors
        if torch.is_grad_enabled():
            d = apply(_Gradient, c, grad, norms, *ctx.settings)
        else:
            d = _Gradient.forward(c, grad, norms, *ctx.settings)
        return d, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(_Penalty, info, in_dims, args), (0, 0, 0)


class _Gradient(Function):
    """The derivative of c * value in grad; its own derivatives are plain PyTorch formulas."""

    @staticmethod
    def forward(c: Tensor, grad: Tensor, norms: Tensor, target: float, one_sided: bool, weight: float, name: str) -> Tensor:
        last = is_channels_last(grad)
        d = _kernels(name).gradient_norm_penalty_grad(
            c.contiguous(), dense(grad, last), norms.contiguous(), target, one_sided, weight
        )
        return restored(d, last)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        c, grad, norms, *ctx.settings, _ = inputs
        ctx.save_for_backward(c, grad, norms)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        c, grad, norms = ctx.saved_tensors
        target, one_sided, weight = ctx.settings
        g, u = _rows(grad), _rows(u)
        factor, dots = 2.0 * weight / max(len(g), 1), (u * g).sum(1)
        if target == 0.0:
            slope, d = None, (c * factor) * u
        else:
            if torch.is_grad_enabled():
                norms = _norms(g.square().sum(1))
            slope = _slope(norms, target, one_sided)
            bend = dots * target / norms.masked_fill(norms == 0, 1.0) ** 3  # where the norm is zero, so are dots and g
            if one_sided:
                bend = torch.where(slope == 0, 0.0, bend)
            d = torch.addcmul((c * factor * slope)[:, None] * u, (c * factor * bend)[:, None], g)
        dc = factor * (dots if slope is None else slope * dots).sum() if ctx.needs_input_grad[0] else None
        return dc, d.reshape(grad.shape).to(grad.dtype), *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(_Gradient, info, in_dims, args), 0


def _one_by_one(function: type[Function], info: Any, in_dims: Any, args: Any) -> Any:
    """vmap of a function of a whole batch: a call for each, the outputs stacked."""
    calls = [
        apply(
            function,
            *(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims, strict=True)),
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(calls) if isinstance(calls[0], Tensor) else tuple(map(torch.stack, zip(*calls, strict=True)))


def _slope(norms: Tensor, target: float, one_sided: bool) -> Tensor:
    """excess / norm; 0 at a norm of zero."""
    zero = norms == 0
    return (_excess(norms, target, one_sided) / norms.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def _rows(grad: Tensor) -> Tensor:
    """[B, elements of a sample], in the accumulation dtype."""
    return grad.to(accumulate(grad.dtype)).unsqueeze(-1).flatten(1)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::gradient_norm_penalty")
    def _(grad: Tensor, target: float, one_sided: bool, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        def new(*shape: int) -> Tensor:
            return grad.new_empty(shape, dtype=accumulate(grad.dtype))

        return new(), new(grad.shape[0]), new()

    @torch.library.register_fake("gankern::gradient_norm_penalty_grad")
    def _(c: Tensor, grad: Tensor, norms: Tensor, target: float, one_sided: bool, weight: float) -> Tensor:
        return torch.empty_like(grad)
