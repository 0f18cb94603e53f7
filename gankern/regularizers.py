"""Regularizers of a critic: the gradient penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from gankern import backend, checks
from gankern.nn.mlp_critic import plain_layers
from gankern.ops._activation import leaky_relu
from gankern.ops._function import apply
from gankern.ops.gradient_norm_penalty import SIDES, gradient_norm_penalty
from gankern.ops.interpolate import interpolate
from gankern.ops.mlp_critic import mlp_critic_penalty

OP = "gradient_penalty"
SAMPLES = ("line", "real", "fake", "both", "dragan")
CLOSED_FORM = 2**20  # multiplications of one pass through the critic

Critic = Callable[..., Tensor]
Condition = Tensor | tuple[Any, ...] | None


@overload
def gradient_penalty(
    critic: Critic,
    real: Tensor | None,
    fake: Tensor | None,
    *,
    weight: float = ...,
    target: float = ...,
    sided: str = ...,
    sample: str = ...,
    cond: Condition = ...,
    eps: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    attached: bool = ...,
    return_norm: Literal[False] = ...,
) -> Tensor: ...


@overload
def gradient_penalty(
    critic: Critic,
    real: Tensor | None,
    fake: Tensor | None,
    *,
    weight: float = ...,
    target: float = ...,
    sided: str = ...,
    sample: str = ...,
    cond: Condition = ...,
    eps: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    attached: bool = ...,
    return_norm: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gradient_penalty(
    critic: Critic,
    real: Tensor | None,
    fake: Tensor | None,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    sided: str = "two",
    sample: str = "line",
    cond: Condition = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    attached: bool = False,
    return_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * mean_b (‖∇C(x̂_b)‖₂ - target)², the norm of each sample by itself; add it to the critic's loss.

    | penalty | settings | x̂ |
    |---|---|---|
    | WGAN-GP | the defaults | `sample="line"`: eps real + (1 - eps) fake, one eps a sample |
    | WGAN-LP | `sided="one"` | the same; norms below the target cost nothing |
    | 0-GP | `target=0` | the same |
    | R1 | `sample="real", target=0, weight=gamma / 2` | real |
    | R2 | `sample="fake", target=0, weight=gamma / 2` | fake |
    | R1 + R2 | `sample="both", target=0, weight=gamma / 2`: the sum of the two | real and fake |
    | DRAGAN | `sample="dragan"` | real + 0.5 std(real) U, U uniform in [0, 1) for each element, std over the whole batch |

    The critic runs once, forward and backward, and its parameters get no gradient product in that pass: only the backward pass of
    the returned penalty makes those. An MLP critic (`gankern.nn.mlp_problem`) without dropout, of float32 or float64 on the CPU, is
    not run at all where the closed form of its penalty is faster: the same numbers, in 4 (L - 1) products for L layers with all
    gradients. `real` and `fake` are detached, unless `attached`: the penalty trains the critic alone. A critic that mixes samples
    (BatchNorm) has no gradient of a sample by itself; use a norm that does not, as the paper says.

    - Autocast: the critic runs in the autocast dtype, its input gradient and the penalty are float32. With float16 small gradients
      may underflow: use bfloat16.
    - `torch.no_grad()`: the same value, without a graph.
    - DistributedDataParallel: pass the wrapped critic, and call `backward` once on adversarial loss plus penalty, so that every
      parameter has a gradient (the last bias has none from the penalty). Equal batches on all ranks give the gradients of one
      process at the global batch.
    - `torch.compile`: the input gradient is taken by `torch.func.grad`, which can be traced; drop-in modules with a
      forced kernel backend are refused there.
    - CUDA-graph capture: nothing waits for the device, and with the default generator each replay draws anew.

    Args:
        critic: x̂ [B, ...] (and `cond`) -> [B, ...], one score, or one map of scores, which are added, for each sample.
        real: [B, ...], any number of channels and dimensions; may be None where `sample` does not use it. Packed samples (PacGAN)
            are passed as the critic takes them, [B / m, m * C, ...]: the eps and the norm are then those of a pack.
        fake: the same shape; likewise.
        weight: factor, >= 0.
        target: gradient norm that costs nothing, >= 0.
        sided: "two" or "one".
        sample: "line", "real", "fake", "both" or "dragan".
        cond: what the critic takes besides x̂: a tensor, or a tuple of arguments; passed on as given. For "both"
            that of real, then that of fake.
        eps: [B], for `sample="line"`: instead of drawing.
        generator: source of eps or U; None is PyTorch's default generator on the samples' device.
        attached: keep the graph of real and fake, which then have a gradient from the penalty (an unrolled GAN's generator).
        return_norm: return (penalty, mean of the norms), the second one detached.

    Returns:
        The penalty [], float64 for float64 samples, else float32; differentiable in the critic's parameters to any order that the
        critic is.

    Raises:
        ValueError: a shape, name or number that does not fit; a critic that does not give one row of scores for each sample.
        TypeError: a dtype that is not supported.
        RuntimeError: a backend was forced that cannot run here; the critic's output does not depend on its input, or its input
            gradient has no graph although the critic has parameters to train: the penalty would contribute nothing.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, eq. 3; Petzka et al., "On the regularization of
    Wasserstein GANs", ICLR 2018 (one-sided); Mescheder et al., "Which training methods for GANs do actually converge?", ICML 2018,
    eq. 9 (R1, R2); Huang et al., "The GAN is dead; long live the GAN!", NeurIPS 2024
    (both); Kodali et al., "On convergence and stability of GANs", 2017, and the authors' code (DRAGAN).
    """
    _check(critic, real, fake, sided, sample, eps)
    if attached:
        x = _points(real, fake, sample, eps, generator)
    else:
        with torch.no_grad():
            x = _points(real, fake, sample, eps, generator).detach()
    weight = 2 * weight if sample == "both" else weight  # the mean is one over twice as many
    more = cond if isinstance(cond, tuple) else () if cond is None else (cond,)
    known = None if more or attached else _closed_form(critic, x, target, sided, weight)
    if known is not None:
        return known if return_norm else known[0]
    grad = _input_gradient(critic, x, more)
    result = gradient_norm_penalty(grad, target, sided, weight)
    return (result.value, result.mean_norm) if return_norm else result.value


def _check(critic: Any, real: Any, fake: Any, sided: Any, sample: Any, eps: Any) -> None:
    if not callable(critic):
        checks.fail(TypeError, OP, "critic", "be callable", type(critic).__name__)
    checks.one_of(OP, "sided", sided, SIDES)
    checks.one_of(OP, "sample", sample, SAMPLES)
    for argument, value, users in (("real", real, ("line", "real", "both", "dragan")), ("fake", fake, ("line", "fake", "both"))):
        if sample in users:
            checks.tensor(OP, argument, value)
            checks.floating(OP, argument, value)
            if value.dim() == 0:
                checks.fail(ValueError, OP, argument, "have at least one dimension", "shape []")
    if eps is not None and sample != "line":
        checks.fail(ValueError, OP, "eps", 'be None unless sample is "line"', f"sample={sample!r}")
    if sample in ("line", "both"):
        checks.shape(OP, "fake", fake, real.shape)


def _points(real: Any, fake: Any, sample: str, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """x̂."""
    if sample == "line":
        return interpolate(real, fake, eps, generator=generator)
    if sample == "dragan":
        noise = torch.rand(real.shape, dtype=real.dtype, device=real.device, generator=generator)
        return real + 0.5 * real.std(correction=0) * noise
    if sample == "both":
        return torch.cat([real, fake])
    return real if sample == "real" else fake


def _input_gradient(critic: Critic, x: Tensor, more: tuple[Any, ...]) -> Tensor:
    """∇C(x) [B, ...], with a graph where gradients are enabled."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.func.grad(lambda v: _scores(critic, v, more).sum())(x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # a node of its own: the critic may hang on x too
        scores = _scores(critic, x, more)
        try:
            (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=graph)
        except RuntimeError as error:
            if scores.requires_grad and "not have been used" not in str(error):
                raise
            checks.fail(RuntimeError, OP, "critic", "depend on its input", "an output that does not")
    if (
        graph
        and not grad.requires_grad
        and isinstance(critic, torch.nn.Module)
        and any(p.requires_grad for p in critic.parameters())
    ):
        checks.fail(RuntimeError, OP, "critic", "be twice differentiable", "an input gradient that no parameter can be trained by")
    return grad


class _Form(NamedTuple):
    """What a penalty of an MLP is made of, besides tensors."""

    slopes: tuple[float, ...]
    target: float
    sided: str
    weight: float


def _closed_form(critic: Any, x: Tensor, target: Any, sided: str, weight: Any) -> tuple[Tensor, Tensor] | None:
    """The penalty and the mean norm by `mlp_critic_penalty`, or None where it does not fit or is not measured to be faster.

    With the backward pass, one CPU thread, eager PyTorch's time / its time, by sizes and batch (in brackets that of the general
    path): 784-1024-512-256-1 16 1.45 (1.00), 64 1.58 (1.01), 256 1.59 (1.03); 784-512-256-1 4 1.54 (1.05), 256 1.49 (1.16);
    2-128-128-1 4 0.98 (0.95), 64 1.05 (0.87), 256 1.25 (0.98); 64-64-1 64 0.88 (1.05), 256 0.98 (0.98), 1024 1.30 (1.03). So from
    CLOSED_FORM multiplications on. On CUDA it is not measured yet, and not taken.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if not (
        isinstance(critic, nn.Sequential) and x.is_cpu and x.dtype in (torch.float32, torch.float64) and torch.is_grad_enabled()
    ):
        return None
    if torch.is_autocast_enabled("cpu") or backend.forced() not in (None, "compiled") or backend.CPU_PROBLEM:
        return None
    linears = (m for m in critic._modules.values() if isinstance(m, nn.Linear))
    if len(x) * sum(m.in_features * m.out_features for m in linears) < CLOSED_FORM:
        return None
    layers = plain_layers(critic, x)
    if layers is None:
        return None
    for name, value in (("target", target), ("weight", weight)):
        checks.number("gradient_norm_penalty", name, value, 0.0)
    with torch.no_grad():
        out = mlp_critic_penalty(x, *layers, target=target, sided=sided, weight=weight)
    form = _Form(tuple(layers.slopes), target, sided, weight)
    known = [g for g in out.grads if g is not None]
    return apply(_Known, out.value, form, known, x.flatten(1), *layers.weights, *layers.biases), out.norms.mean()


class _Known(Function):
    """(value, form, gradients of the weights that want one, x, L weights, L biases) -> value.

    The gradients are handed out by the first backward pass, as they are. A second one, or one that is to be differentiated itself,
    makes them anew by autograd, whose graph has every order.
    """

    @staticmethod
    def forward(value: Tensor, form: _Form, known: list[Tensor], x: Tensor, *layers: Tensor | None) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.form, ctx.known, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *layers = ctx.saved_tensors
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        if torch.is_grad_enabled() or not ctx.known:
            found = iter(_gradients(ctx.form, x, weights, biases, g))
        elif torch._C._functorch.is_legacy_batchedtensor(g):  # autograd.grad(..., is_grads_batched=True)
            found = iter([g * k for k in ctx.known])
        else:
            if g != 1.0:
                torch._foreach_mul_(ctx.known, g.item())
            found, ctx.known = iter(ctx.known), []
        grads = [next(found) if w.requires_grad else None for w in weights]
        zeros = [torch.zeros_like(b) if b is not None else None for b in biases[:-1]]  # as autograd: the last bias has none
        return (None, None, None, None, *grads, *zeros, None)


@torch.enable_grad()
def _gradients(form: _Form, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], g: Tensor) -> tuple[Tensor, ...]:
    """g times the gradient of the penalty in each weight that wants one, with a graph."""
    weights = [w.view_as(w) for w in weights]  # a weight may be in two layers

    def critic(h: Tensor) -> Tensor:
        for w, b, slope in zip(weights[:-1], biases[:-1], form.slopes, strict=True):
            h = leaky_relu(F.linear(h, w, b), slope)
        return F.linear(h, weights[-1], biases[-1])

    value = gradient_norm_penalty(_input_gradient(critic, x, ()), form.target, form.sided, form.weight).value
    return torch.autograd.grad(value, [w for w in weights if w.requires_grad], g, create_graph=True)


def _scores(critic: Critic, x: Tensor, more: tuple[Any, ...]) -> Tensor:
    scores = critic(x, *more)
    if not isinstance(scores, Tensor):
        checks.fail(TypeError, OP, "critic", "return a torch.Tensor", type(scores).__name__)
    if scores.dim() == 0 or scores.shape[0] != x.shape[0]:
        wanted = f"return one row of scores for each of {x.shape[0]} samples"
        checks.fail(ValueError, OP, "critic", wanted, f"shape {list(scores.shape)}")
    return scores
