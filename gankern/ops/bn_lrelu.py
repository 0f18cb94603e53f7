"""bn_lrelu: y = LeakyReLU(BatchNorm(x)), the block of DCGAN generators and critics. Correct to any derivative order.

Eager PyTorch keeps x and the normalised x; here only x is kept, and the mask of the backward pass is the sign of z, computed anew.
Every derivative is linear in what it reads, with coefficients from a few sums over a channel (csrc/bn_lrelu.h): each pass is one
reduction and one elementwise loop. The double backward pass has a kernel of its own; beyond it, and where its own derivative is
wanted, differentiable formulas run, with mean and variance as functions of x. (The third derivative of PyTorch's own batch_norm in
training mode is wrong without a word in torch 2.13: it takes the saved statistics for constants.)

Kernels, same names and tensors in `torch.ops.gankern` (csrc/bn_lrelu.*) and `gankern.triton.bn_lrelu`:
    bn_lrelu(x, weight | None, bias | None, running_mean | None, running_var | None, momentum, eps, slope) -> y, mean, var
    bn_lrelu_eval(x, mean, var, weight | None, bias | None, eps, slope) -> y
    bn_lrelu_grad(dy, x, mean, var, weight | None, bias | None, eps, slope, training) -> dx, dweight, dbias
    bn_lrelu_grad2(ddx, ddweight | None, ddbias | None, dy, x, mean, var, weight | None, bias | None, eps, slope, training)
        -> ddy, dx, dweight
x, y, dy, ddx ... are [B, C, ...], contiguous; all else is [C], contiguous, float64 for float64 x, else float32; var is the biased
one. The first kernel moves the running averages in place. Channels-last tensors come as [B * space, C].
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._activation import leaky_relu
from gankern.ops._function import apply
from gankern.ops._layout import accumulate

OP = "bn_lrelu"
_INFINITY, _LARGEST, _batch_norm, _cudnn = math.inf, sys.float_info.max, torch.batch_norm, torch._C._get_cudnn_enabled
_NUMBER, _UNIT = (float, int), (1,)
_KINDS = {d: (d, torch.float32) if d.itemsize == 2 else (d,) for d in checks.FLOATING}  # of x: those of averages and parameters
SMALL = 2**16  # elements up to which PyTorch's own calls are the automatic choice on the CPU: see `_choose`


def reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> Tensor:
    """The definition, in plain PyTorch; differentiable to any order."""
    v = x.to(accumulate(x.dtype))
    if training:
        mean, var = _statistics(v)
        if running_mean is not None and running_var is not None and x.numel():
            _move(running_mean, running_var, mean.detach(), var.detach(), _count(x), momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(v.dtype), running_var.to(v.dtype)
    scale = torch.rsqrt(var + eps)
    z = (v - _column(mean, x)) * _column(scale if weight is None else scale * weight, x)
    return leaky_relu(z if bias is None else z + _column(bias, x), negative_slope).to(x.dtype)


def _statistics(v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as functions of v. Of no values 0 and 1."""
    if v.numel() == 0:
        return v.new_zeros(v.shape[1]), v.new_ones(v.shape[1])
    dims = _dims(v)
    mean = v.mean(dims)
    return mean, (v - _column(mean, v)).square().mean(dims)


def _move(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
    """running = (1 - momentum) running + momentum value; the variance that is kept is the unbiased one."""
    for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        running.copy_(running.to(value.dtype) * (1.0 - momentum) + value * momentum)


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _count(x: Tensor) -> int:
    """Values a channel."""
    return x.numel() // max(x.shape[1], 1)


def _column(t: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...]."""
    return t.reshape(1, -1, *([1] * (like.dim() - 2)))


def bn_lrelu(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> Tensor:
    """Batch normalisation and LeakyReLU in one: y = LeakyReLU((x - mean) / sqrt(var + eps) * weight + bias).

    The arguments up to eps are those of `torch.nn.functional.batch_norm`, in its order. In training mode mean and (biased) variance
    are those of x over all dimensions but the second, and the running averages, if given, move towards them (the variance: the
    unbiased one). In evaluation mode the running averages are used. Statistics are float32 for 16-bit x, which may come with
    float32 or 16-bit parameters. Autocast changes nothing, as for batch_norm. Differentiable to any order in x, weight and bias,
    with mean and variance as functions of x.

    Args:
        x: [B, C, *]; float64, float32, bfloat16 or float16; any strides (channels-last stays channels-last).
        running_mean, running_var: [C], both or neither; needed in evaluation mode.
        weight, bias: [C] or None.
        training: use the statistics of x.
        momentum: how far the running averages move, in a fraction of the way.
        eps: added to the variance, >= 0.
        negative_slope: factor for negative values, >= 0; 0 is ReLU, 1 leaves batch normalisation alone.

    Returns:
        [B, C, *], the dtype of x.

    Raises:
        ValueError: a shape, device or range that does not fit; one value a channel in training mode; a running average that
            requires a gradient.
        TypeError: a dtype that is not supported.
        RuntimeError: a backend was forced that cannot run here.

    Source: Ioffe, Szegedy, "Batch normalization", ICML 2015, algorithm 1; Radford, Metz, Chintala, "Unsupervised representation
    learning with deep convolutional generative adversarial networks", ICLR 2016 (with LeakyReLU).
    """
    if backend.automatic() and getattr(x, "is_cpu", False) and x.numel() <= SMALL:
        try:
            kinds = _KINDS[x.dtype]
            # batch_norm takes others too, and reads the gaps of a slice
            flat = weight is None or (weight.stride() == _UNIT and weight.dtype in kinds)
            flat = flat and (bias is None or (weight is not None and bias.stride() == _UNIT and bias.dtype in kinds))
            if running_mean is None or running_var is None:
                flat = flat and running_mean is running_var
            else:
                flat = flat and running_mean.stride() == _UNIT and running_var.stride() == _UNIT
                flat = flat and running_mean.dtype in kinds and running_var.dtype in kinds
            flat = (
                flat
                and type(momentum) in _NUMBER
                and -_LARGEST <= momentum <= _LARGEST
                and type(eps) in _NUMBER
                and type(negative_slope) in _NUMBER
            )
            if flat and x.dim() >= 2 and x.numel() > x.size(1) > 1 and 0.0 <= negative_slope < _INFINITY and 0.0 <= eps < _INFINITY:
                return _native(x, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope)
        except Exception:
            pass  # most bad input comes here; below, the checks name it, or the same call raises again
    _check(x, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope)
    name = backend.forced()
    name = _choose(x) if name is None else backend.require(OP, name, x.device.type)
    slope = float(negative_slope)
    if name == "reference":
        plain = _native if backend.automatic() and _readable(weight, bias, running_mean, running_var) else reference
        return plain(x, running_mean, running_var, weight, bias, training, momentum, eps, slope)
    dtype = accumulate(x.dtype)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(dtype), running_var.to(dtype)
        return apply(_Evaluation, x, mean, var, weight, bias, float(eps), slope, name)
    track = running_mean is not None and running_var is not None and x.numel() > 0
    if track and torch.compiler.is_compiling():  # a Function that is traced may not change its inputs
        y, mean, var = apply(_Training, x, weight, bias, None, None, 0.0, float(eps), slope, name)
        _move(running_mean, running_var, mean, var, _count(x), momentum)  # type: ignore[arg-type]
        return y
    running = (running_mean, running_var) if track else (None, None)
    return apply(_Training, x, weight, bias, *running, float(momentum), float(eps), slope, name)[0]


def _choose(x: Tensor) -> str:
    """The automatic choice; "reference" stands for PyTorch's own batch_norm and leaky_relu (`_native`).

    One CPU thread, against eager, alternating medians, forward, backward, double backward: 256x512 1.25, 1.3, 3.1; 64x64x16x16
    6.7, 3.2, 3.9, channels-last 1.3, 1.7, 10; 64x512x4x4 2.6, 2.7, 4.1, channels-last 1.0, 1.3, 6.2. Up to SMALL elements the two
    calls through autograd.Function cost more than they save: 16x256 0.42, 0.59, 1.2; 64x1024 0.68, 0.89, 2.0. On CUDA not measured
    yet.
    """
    if torch.compiler.is_compiling() or (x.is_cpu and x.numel() <= SMALL):
        return "reference"  # Inductor fuses it
    return next((name for name in ("compiled", "triton") if not backend.problem(name, x.device.type)), "reference")


def _readable(*given: Tensor | None) -> bool:
    """Whether PyTorch's batch_norm reads them right: it refuses different dtypes, and reads the gaps of a slice."""
    dtype = None
    for t in given:
        if t is not None:
            dtype = t.dtype if dtype is None else dtype
            if t.dtype != dtype or not t.is_contiguous():
                return False
    return True


def _native(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
) -> Tensor:
    """PyTorch's own two calls, kept from being wrong at the third derivative: see `_watch`."""
    if torch.compiler.is_compiling():
        return leaky_relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), slope)
    if x.numel() == 0:  # which PyTorch's own refuses without channels
        return reference(x, running_mean, running_var, weight, bias, training, momentum, eps, slope)
    if weight is None and bias is not None:  # its double backward would lose the derivative of the gradient of bias
        return reference(x, running_mean, running_var, weight, bias, training, momentum, eps, slope)
    if not training:
        return leaky_relu(_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, _cudnn()), slope)
    if not x.is_cpu or torch._C._are_functorch_transforms_active():
        return reference(x, running_mean, running_var, weight, bias, training, momentum, eps, slope)
    z = _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
    if z.grad_fn is not None:
        z.grad_fn.register_hook(functools.partial(_watch, x, weight, bias, eps))
    return leaky_relu(z, slope)


_Gradients = tuple[Tensor | None, ...]


def _watch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, grads: _Gradients, dz: _Gradients) -> None:
    """Called after PyTorch's backward pass of batch_norm: its double backward is right, but takes mean and variance for constants
    of x, so that differentiating it once more is not. Where that is asked for, `_exact` replaces it."""
    node = next((g.grad_fn for g in grads if g is not None and g.grad_fn is not None), None) if torch.is_grad_enabled() else None
    if node is not None and dz[0] is not None:
        node.register_hook(functools.partial(_exact, dz[0], x, weight, bias, eps))


def _exact(
    dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, grads: _Gradients, cotangents: _Gradients
) -> _Gradients | None:
    """The gradients in dz, x and weight of batch_norm's backward pass, as functions that can be differentiated."""
    if not torch.is_grad_enabled():
        return None
    ddx, ddweight, ddbias = cotangents
    ddx = torch.zeros_like(x) if ddx is None else ddx
    unused = x.new_empty(0)  # the statistics are found anew
    exact = _second_order(ddx, ddweight, ddbias, dz, x, weight, bias, unused, unused, eps, 1.0, True)
    found = tuple(None if g is None else e.to(g.dtype) for g, e in zip(grads, exact, strict=False))
    return found + (None,) * (len(grads) - len(found))


def _check(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any, negative_slope: Any
) -> None:
    checks.tensor(OP, "x", x)
    checks.floating(OP, "x", x)
    if x.dim() < 2:
        checks.fail(ValueError, OP, "x", "have at least 2 dimensions", f"shape {list(x.shape)}")
    channels, device, dtype = (x.shape[1],), x.device, x.dtype
    for argument, t in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        checks.tensor(OP, argument, t)
        if t.shape != channels:
            checks.shape(OP, argument, t, channels)
        if t.device != device:
            checks.same_device(OP, argument, t, device)
        if t.requires_grad and argument.startswith("running"):
            checks.fail(ValueError, OP, argument, "not require a gradient", "a tensor that does")
        if t.dtype != dtype and not (dtype.itemsize == 2 and t.dtype == torch.float32):
            wanted = f"have dtype {str(dtype).removeprefix('torch.')}{' or float32' * (dtype.itemsize == 2)}"
            checks.fail(TypeError, OP, argument, wanted, str(t.dtype).removeprefix("torch."))
    if (running_mean is None) != (running_var is None):
        checks.fail(ValueError, OP, "running_mean and running_var", "both be given or both be None", "one of them")
    if not training and running_mean is None:
        checks.fail(ValueError, OP, "running_mean", "be given when training is False", None)
    checks.number(OP, "momentum", momentum, -_INFINITY)
    checks.number(OP, "eps", eps, 0.0)
    checks.number(OP, "negative_slope", negative_slope, 0.0)
    if training and x.numel() == x.shape[1] != 0:
        checks.fail(ValueError, OP, "x", "have more than 1 value per channel when training", f"shape {list(x.shape)}")


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.bn_lrelu")


def _channels_innermost(x: Tensor) -> bool:
    """Whether x is channels-last, of any number of dimensions."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _matrix(t: Tensor) -> Tensor:
    """[B, C, *] as [B * space, C]; of a channels-last tensor a view."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _laid_out(x: Tensor, *others: Tensor) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """x and the others as the kernels take them, all in the layout of x, and what gives a result the shape of x again."""
    if not _channels_innermost(x):
        return [t.contiguous() for t in (x, *others)], lambda t: t
    moved = x.movedim(1, -1).shape
    return [_matrix(t).contiguous() for t in (x, *others)], lambda t: t.view(moved).movedim(-1, 1)


class _Training(Function):
    """y, mean and biased variance; moves the running averages."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        slope: float,
        name: str,
    ) -> Any:
        (v,), restored = _laid_out(x)
        run = _kernels(name).bn_lrelu
        in_place = running_mean is not None and _plain(running_mean, v) and running_var is not None and _plain(running_var, v)
        running = (running_mean, running_var) if in_place else (None, None)
        y, mean, var = run(v, _contiguous(weight), _contiguous(bias), *running, momentum, eps, slope)
        if running_mean is not None and running_var is not None:
            if not in_place:
                _move(running_mean, running_var, mean, var, _count(x), momentum)
            else:  # what autograd has kept of them is no longer what it was
                torch.autograd.graph.increment_version((running_mean, running_var))
        return restored(y), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, _, _, *settings = inputs
        _, mean, var = output
        _keep(ctx, x, weight, bias, mean, var, True, *settings)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Any:
        dx, dweight, dbias = _first_order(ctx, dy)
        return dx, dweight, dbias, *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if args[3] is not None and None in in_dims[3:5]:
            wanted = "be batched where x is (or be None): each sample would move the same running averages"
            checks.fail(RuntimeError, OP, "running_mean and running_var under vmap", wanted, "one pair for all samples")
        return _one_by_one(_Training, info, in_dims, args), (0, 0, 0)


class _Evaluation(Function):
    """y, with statistics that are constants."""

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float, name: str
    ) -> Tensor:
        (v,), restored = _laid_out(x)
        parameters = (_contiguous(t) for t in (mean, var, weight, bias))
        return restored(_kernels(name).bn_lrelu_eval(v, *parameters, eps, slope))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, mean, var, weight, bias, *settings = inputs
        _keep(ctx, x, weight, bias, mean, var, False, *settings)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        dx, dweight, dbias = _first_order(ctx, dy)
        return dx, None, None, dweight, dbias, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(_Evaluation, info, in_dims, args), 0


def _keep(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    slope: float,
    name: str,
) -> None:
    ctx.save_for_backward(x, weight, bias, mean, var)
    ctx.settings = (eps, slope, training, name)


def _first_order(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dy is None:
        return None, None, None
    x, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():
        dx, dweight, dbias = apply(_Gradient, dy, x, weight, bias, mean, var, *ctx.settings)
    else:
        dx, dweight, dbias = _Gradient.forward(dy, x, weight, bias, mean, var, *ctx.settings)
    return dx, None if weight is None else dweight, None if bias is None else dbias


class _Gradient(Function):
    """The derivatives of <dy, y> in x, weight and bias; differentiable in dy, x and weight."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        slope: float,
        training: bool,
        name: str,
    ) -> Any:
        (v, d), restored = _laid_out(x, dy)
        parameters = (_contiguous(t) for t in (mean, var, weight, bias))
        dx, dweight, dbias = _kernels(name).bn_lrelu_grad(d, v, *parameters, eps, slope, training)
        return restored(dx), dweight, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, eps, slope, training, name = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = (eps, slope, training, name)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None) -> Any:
        dy, x, weight, bias, mean, var = ctx.saved_tensors
        eps, slope, training, name = ctx.settings
        if ddx is None:
            ddx = torch.zeros_like(x)
        if torch.is_grad_enabled():
            found = _second_order(ddx, ddweight, ddbias, dy, x, weight, bias, mean, var, eps, slope, training)
        else:
            (v, p, d), restored = _laid_out(x, ddx, dy)
            cotangents = (_contiguous(t) for t in (ddweight, ddbias))
            parameters = (_contiguous(t) for t in (mean, var, weight, bias))
            ddy, dx, dweight = _kernels(name).bn_lrelu_grad2(p, *cotangents, d, v, *parameters, eps, slope, training)
            found = restored(ddy), restored(dx), dweight
        return found[0], found[1], None if weight is None else found[2], *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(_Gradient, info, in_dims, args), (0, 0, 0)


def _second_order(
    ddx: Tensor,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What bn_lrelu_grad2 computes (formulas and names: csrc/bn_lrelu.h), as differentiable functions of all its inputs."""
    dtype, dims = accumulate(x.dtype), _dims(x)
    v, p = x.to(dtype), ddx.to(dtype)
    if training:
        mean, var = _statistics(v)

    def column(t: Tensor | None, otherwise: float) -> Tensor:
        return v.new_full((1,) * v.dim(), otherwise) if t is None else _column(t, v)

    c, r = v - _column(mean, v), _column(torch.rsqrt(var + eps), v)
    scale, q, s = column(weight, 1.0) * r, column(ddweight, 0.0), column(ddbias, 0.0)
    mask = torch.where(c * scale + column(bias, 0.0) > 0, v.new_ones(()), v.new_full((), slope)).detach()
    g = dy.to(dtype) * mask
    if not training:
        ddy = p * scale + s if ddweight is None else p * scale + c * (q * r) + s
        return (mask * ddy).to(dy.dtype), (q * r * g).to(x.dtype), (r * p * g).sum(dims)
    count = max(_count(x), 1)

    def average(t: Tensor) -> Tensor:
        return _column(t.sum(dims), v) / count

    mp, a, mg, b, mpg = average(p), r * average(p * c), average(g), r * average(g * c), average(p * g)
    along, moment = r * (q - scale * a), mpg - mp * mg
    ddy = mask * (p * scale + c * along + (s - scale * mp))
    dx = along * g - (scale * r * b) * p - (r * r * (scale * (moment - 3 * a * b) + q * b)) * c
    dx = dx + r * (scale * (mp * b + mg * a) - q * mg)
    return ddy.to(dy.dtype), dx.to(x.dtype), (r * (moment - a * b) * count).flatten()


def _plain(t: Tensor, x: Tensor) -> bool:
    """Whether a kernel can write to it."""
    return t.dtype == accumulate(x.dtype) and t.is_contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


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


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::bn_lrelu")
    def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.new_empty(x.shape[1], dtype=accumulate(x.dtype))
        return torch.empty_like(x), mean, torch.empty_like(mean)

    @torch.library.register_fake("gankern::bn_lrelu_eval")
    def _(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("gankern::bn_lrelu_grad")
    def _(dy: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)

    @torch.library.register_fake("gankern::bn_lrelu_grad2")
    def _(
        ddx: Tensor, ddweight: Any, ddbias: Any, dy: Tensor, x: Tensor, mean: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x), torch.empty_like(mean)
