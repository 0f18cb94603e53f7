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
from torch.nn.modules import module as torch_module

from gankern import checks
from gankern.ops.linear_lrelu import linear_lrelu


class Pending(NamedTuple):
    """A layer that has not run yet, and what is to run on its result; calls are (f, args, kwargs), of activation and dropout."""

    layer: nn.Module
    x: Any
    calls: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = ()
    slope: float = 1.0
    p: float = 0.0
    training: bool = False


def step(f: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """f(x, *args, **kwargs), or a Pending that stands for it; x may be one."""
    if type(x) is Pending:
        longer = extend(x, f, args, kwargs)
        if type(longer) is Pending:
            return longer
        x = finish(x)
    if not args and not kwargs and kind(f) is not None:
        return Pending(f, x)
    return f(x, *args, **kwargs)


def finish(x: Any) -> Any:
    """x, or the result that a Pending stands for."""
    if type(x) is not Pending:
        return x
    layer, x, calls, slope, p, training = x
    if calls and _fits(layer, x):
        return LAYERS[kind(layer)].run(layer, x, slope, p, training)
    x = layer(x)
    for f, args, kwargs in calls:
        x = f(x, *args, **kwargs)
    return x


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


def _linear(layer: nn.Linear, x: Tensor, slope: float, p: float, training: bool) -> Tensor:
    return linear_lrelu(x, layer.weight, layer.bias, slope, p, training)


LAYERS: dict[Any, Layer] = {nn.Linear: Layer("linear_lrelu", _linear, dropout=True)}


def kind(f: Any) -> type[nn.Module] | None:
    """The class of LAYERS that f is of, also where f is parametrised (spectral norm), or None."""
    cls = type(f)
    if cls in LAYERS:
        return cls
    if isinstance(f, nn.Module) and "parametrizations" in f._modules and cls.__bases__[0] in LAYERS:
        return cls.__bases__[0]
    return None


def extend(pending: Pending, f: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Pending | str:
    """With f(_, *args, **kwargs) called after it, or in words why the op has no place for that."""
    layer, x, calls, slope, p, training = pending
    kwargs = kwargs or {}
    if not calls:
        slope = _slope(f, args, kwargs)
        if slope is None:
            return "no LeakyReLU or ReLU follows it"
    else:
        drop = _dropout(f, args, kwargs) if len(calls) == 1 and LAYERS[kind(layer)].dropout else None
        if drop is None:
            return "complete"
        p, training = drop
    if has_hooks(layer):
        return "it has hooks, or a forward of its own"
    if isinstance(f, nn.Module) and has_hooks(f):
        return f"the {type(f).__name__} after it has hooks, or a forward of its own"
    return Pending(layer, x, (*calls, (f, args, kwargs)), slope, p, training)


def is_activation(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether f(_, *args, **kwargs) is an activation that an op has."""
    return _slope(f, args, kwargs) is not None


def relu(x: Any) -> Any:
    """The method call x.relu()."""
    return x.relu()


def relu_(x: Any) -> Any:
    """The method call x.relu_()."""
    return x.relu_()


_ARGUMENTS = {  # of activations and dropout, after the input: names and defaults; the last place of an activation is its slope
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
    known = _ARGUMENTS.get(f) if isinstance(f, (FunctionType, BuiltinFunctionType)) else None
    if known is None or len(args) > len(known):
        return None
    names = [name for name, _ in known]
    if any(name not in names[len(args) :] for name in kwargs):
        return None
    return {**dict(known), **dict(zip(names, args, strict=False)), **kwargs}


def _slope(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The negative slope of the activation f(_, *args, **kwargs), or None where it is none that an op has."""
    cls = type(f)
    if cls is nn.LeakyReLU or cls is nn.ReLU:
        slope = f.negative_slope if cls is nn.LeakyReLU else 0.0
        known = not args and not kwargs
    else:
        found = _arguments(f, args, kwargs)
        known = found is not None and "p" not in found
        slope = found.get("negative_slope", 0.0) if found is not None else None
    return slope if known and type(slope) in (float, int) and 0 <= slope < math.inf else None


def _dropout(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(p, training) of the dropout f(_, *args, **kwargs), or None where it is none."""
    if type(f) is nn.Dropout:
        p, training = (f.p, f.training) if not args and not kwargs else (None, None)
    else:
        found = _arguments(f, args, kwargs) or {}
        p, training = found.get("p"), found.get("training")
    return (p, training) if type(p) in (float, int) and 0 <= p <= 1 and type(training) is bool else None


def has_hooks(m: nn.Module) -> bool:
    """Whether a call of this module is more than its class's forward: hooks, compile(), a forward set on the instance."""
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in m.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _fits(layer: nn.Module, x: Any) -> bool:
    """Whether the ops take these tensors; any other is left to the layer."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and type(layer._parameters.get("weight")) in (nn.Parameter, Tensor, type(None))
        and x.dtype in checks.FLOATING
        and x.device.type in ("cpu", "cuda")
        and x.layout is torch.strided
    )
