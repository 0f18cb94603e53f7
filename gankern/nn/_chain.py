"""Layer, activation and dropout, run as one op where they are called one after another.

`step(f, x)` stands for the call f(x). It puts off a layer that an op could fuse with what follows; `finish` runs what was put off:

    finish(step(dropout, step(act, step(linear, x))))    is    linear_lrelu(x, linear.weight, ...)

What is fused is decided at each call, by the objects called: a layer or activation that has hooks, or is none of the plain PyTorch
modules and functions, is called as it stands. Nothing is stored in a module, so nothing can go stale when one is changed later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _ALL_BACKWARD
from torch.nn.modules.module import _global_backward_pre_hooks as _ALL_BACKWARD_PRE
from torch.nn.modules.module import _global_forward_hooks as _ALL_FORWARD
from torch.nn.modules.module import _global_forward_pre_hooks as _ALL_FORWARD_PRE

from gankern import backend, checks
from gankern.nn import batchnorm
from gankern.nn.conv import conv_lrelu
from gankern.ops._activation import leaky_relu
from gankern.ops.bn_lrelu import bn_lrelu
from gankern.ops.linear_lrelu import _choose as chosen
from gankern.ops.linear_lrelu import _products as products
from gankern.ops.linear_lrelu import linear_lrelu


class Pending:
    """A layer that has not run yet, and the calls (f, args, kwargs) that are to run on its result: activation, then dropout."""

    __slots__ = ("calls", "layer", "p", "row", "slope", "training", "x")

    def __init__(self, row: Layer, layer: nn.Module, x: Any) -> None:
        self.row, self.layer, self.x = row, layer, x
        self.calls: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = ()
        self.slope, self.p, self.training = 1.0, 0.0, False

    def add(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Have f(_, *args, **kwargs) called after it; or say in words why the op has no place for that."""
        if not self.calls:
            slope = _slope(f, args, kwargs)
            if slope is None:
                return "no LeakyReLU or ReLU follows it"
            if has_hooks(self.layer):
                return "it has hooks, or a forward of its own"
            self.slope = slope
        else:
            drop = _dropout(f, args, kwargs) if self.row.dropout and len(self.calls) == 1 else None
            if drop is None:
                return "complete"
            self.p, self.training = drop
        if isinstance(f, nn.Module) and has_hooks(f):
            return f"the {type(f).__name__} after it has hooks, or a forward of its own"
        self.calls = (*self.calls, (f, args, kwargs))
        return ""


def step(f: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """f(x, *args, **kwargs), or a Pending that stands for it; x may be one."""
    if type(x) is Pending:
        if not x.add(f, args, kwargs):
            return x
        x = finish(x, plain=_in_place(f, args, kwargs))
    if not args and not kwargs:
        row = layer_row(f)
        if row is not None:
            return Pending(row, f, x)
    return f(x, *args, **kwargs)


def finish(x: Any, plain: bool = False) -> Any:
    """x, or the result that a Pending stands for; `plain`: by the calls as they stand, as its result will be changed in place."""
    if type(x) is not Pending:
        return x
    if x.calls and not plain and _fits(x):
        return x.row.run(x.layer, x.x, x.slope, x.p, x.training)
    y = x.layer(x.x)
    for f, args, kwargs in x.calls:
        y = f(y, *args, **kwargs)
    return y


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs its modules by `step`."""

    def forward(self, input: Any) -> Any:
        for module in self:
            input = step(module, input)
        return finish(input)


# --- what can be fused ----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """How a layer is run with what follows it: run(layer, x, slope, p, training)."""

    op: str
    run: Callable[[Any, Tensor, float, float, bool], Tensor]
    dropout: bool = False  # whether the op has one
    overflows: bool = True  # whether sums of the layer reach infinity in float16


def parameter(layer: nn.Module, name: str) -> Any:
    """layer.weight or layer.bias; the dictionary of parameters answers five times faster than `nn.Module.__getattr__`."""
    value = layer._parameters.get(name)
    return getattr(layer, name) if value is None else value


def _linear(layer: nn.Module, x: Tensor, slope: float, p: float, training: bool) -> Tensor:
    weight, bias = parameter(layer, "weight"), parameter(layer, "bias")
    if training and p > 0 and x.is_cpu and backend.automatic() and chosen("cpu", p, products(x, weight)) == "reference":
        return F.dropout(leaky_relu(F.linear(x, weight, bias), slope), p)  # what the op would do, without its checks
    return linear_lrelu(x, weight, bias, slope, p, training)


def _conv(layer: Any, x: Tensor, slope: float, p: float, training: bool) -> Tensor:
    return conv_lrelu(layer, x, slope)


def _batchnorm(layer: Any, x: Tensor, slope: float, p: float, training: bool) -> Tensor:
    layer._check_input_dim(x)
    mean, var = batchnorm._LeakyReLU._averages(layer)
    weight, bias, of_batch, momentum, eps = batchnorm._LeakyReLU._settings(layer)
    return bn_lrelu(x, mean, var, weight, bias, of_batch, momentum, eps, slope)


LAYERS: dict[Any, Layer] = {
    nn.Linear: Layer("linear_lrelu", _linear, dropout=True),
    nn.Conv1d: Layer("bias_lrelu", _conv),
    nn.Conv2d: Layer("bias_lrelu", _conv),
    nn.Conv3d: Layer("bias_lrelu", _conv),
    nn.ConvTranspose1d: Layer("bias_lrelu", _conv),
    nn.ConvTranspose2d: Layer("bias_lrelu", _conv),
    nn.ConvTranspose3d: Layer("bias_lrelu", _conv),
    nn.BatchNorm1d: Layer("bn_lrelu", _batchnorm, overflows=False),
    nn.BatchNorm2d: Layer("bn_lrelu", _batchnorm, overflows=False),
    nn.BatchNorm3d: Layer("bn_lrelu", _batchnorm, overflows=False),
}


def layer_row(f: Any) -> Layer | None:
    """The row of a layer, also of a parametrised one (spectral norm), or None."""
    row = LAYERS.get(type(f))
    if row is None and isinstance(f, nn.Module) and "parametrizations" in f._modules:
        return LAYERS.get(type(f).__bases__[0])
    return row


def is_activation(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether f(_, *args, **kwargs) is an activation that an op has."""
    return _slope(f, args, kwargs) is not None


def relu(x: Any) -> Any:
    """The method call x.relu()."""
    return x.relu()


def relu_(x: Any) -> Any:
    """The method call x.relu_()."""
    return x.relu_()


# Of activations and dropout, after the input: names and defaults.
_ARGUMENTS: dict[Any, tuple[tuple[str, Any], ...]] = {
    F.leaky_relu: (("negative_slope", 0.01), ("inplace", False)),
    F.leaky_relu_: (("negative_slope", 0.01),),
    F.relu: (("inplace", False),),
    F.relu_: (),
    torch.relu: (),
    relu: (),
    relu_: (),
    F.dropout: (("p", 0.5), ("training", True), ("inplace", False)),
}


def _arguments(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a function of _ARGUMENTS is called with, or None for any other call."""
    known = _ARGUMENTS.get(f) if type(f) is FunctionType or type(f) is BuiltinFunctionType else None
    if known is None or len(args) > len(known):
        return None
    names = [name for name, _ in known]
    if any(name not in names[len(args) :] for name in kwargs):
        return None
    return {**dict(known), **dict(zip(names, args, strict=False)), **kwargs}


def _slope(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The negative slope of the activation f(_, *args, **kwargs), or None where it is none that an op has."""
    cls = type(f)
    slope: Any = None
    if cls is nn.LeakyReLU or cls is nn.ReLU:
        if not args and not kwargs:
            slope = 0.0 if cls is nn.ReLU else f.negative_slope
    elif f is F.leaky_relu and len(args) == 1 and not kwargs:  # the call most often met, without a dictionary
        slope = args[0]
    else:
        found = _arguments(f, args, kwargs)
        if found is not None and "p" not in found:
            slope = found.get("negative_slope", 0.0)
    return slope if type(slope) in (float, int) and 0 <= slope < math.inf else None


def _dropout(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(p, training) of the dropout f(_, *args, **kwargs), or None where it is none."""
    if type(f) is nn.Dropout:
        found: dict[str, Any] = {} if args or kwargs else {"p": f.p, "training": f.training}
    else:
        found = _arguments(f, args, kwargs) or {}
    p: Any = found.get("p")
    training = found.get("training")
    return (p, training) if type(p) in (float, int) and 0 <= p <= 1 and type(training) is bool else None


def has_hooks(m: nn.Module) -> bool:
    """Whether a call of this module is more than its class's forward: hooks, compile(), a forward set on the instance."""
    own = m.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or _ALL_FORWARD
        or _ALL_FORWARD_PRE
        or _ALL_BACKWARD
        or _ALL_BACKWARD_PRE
    )


def _in_place(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether f(x, *args, **kwargs) may change x: autograd must not have kept it, as it keeps the result of most ops here."""
    return bool(getattr(f, "inplace", False) or kwargs.get("inplace") or True in args or f is F.leaky_relu_ or f is torch.relu_)


def _fits(pending: Pending) -> bool:
    """Whether the op takes the tensors; any others are left to the layer.

    So is ReLU in float16, where sums do overflow: of -inf ReLU makes 0, LeakyReLU of slope 0 makes NaN.
    """
    x = pending.x
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and type(pending.layer._parameters.get("weight")) in _PLAIN
        and (x.is_cpu or x.is_cuda)
        and x.dtype in checks.FLOATING
        and not x.is_mkldnn
        and (pending.slope > 0 or not pending.row.overflows or not _float16(x))
    )


def _float16(x: Tensor) -> bool:
    """Whether a layer computes in float16."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return x.dtype == torch.float16


_PLAIN = (nn.Parameter, Tensor, type(None))
