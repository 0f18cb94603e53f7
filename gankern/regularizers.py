"""Regularizers of a critic: the gradient penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gankern import checks
from gankern.ops.gradient_norm_penalty import SIDES, gradient_norm_penalty
from gankern.ops.interpolate import interpolate

OP = "gradient_penalty"
SAMPLES = ("line", "real", "fake", "dragan")

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
    | DRAGAN | `sample="dragan"` | real + 0.5 std(real) U, U uniform in [0, 1) for each element, std over the whole batch |

    The critic runs once, forward and backward, and its parameters get no gradient product in that pass: only the backward pass of
    the returned penalty makes those. `real` and `fake` are detached: the penalty trains the critic alone. A critic that mixes
    samples (BatchNorm) has no gradient of a sample by itself; use a norm that does not, as the paper says.

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
        sample: "line", "real", "fake" or "dragan".
        cond: what the critic takes besides x̂: a tensor, or a tuple of arguments; passed on as given.
        eps: [B], for `sample="line"`: instead of drawing.
        generator: source of eps or U; None is PyTorch's default generator on the samples' device.
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
    eq. 9 (R1, R2); Kodali et al., "On convergence and stability of GANs", 2017, and the authors' code (DRAGAN).
    """
    _check(critic, real, fake, sided, sample, eps)
    with torch.no_grad():
        x = _points(real, fake, sample, eps, generator)
    more = cond if isinstance(cond, tuple) else () if cond is None else (cond,)
    grad = _input_gradient(critic, x, more)
    result = gradient_norm_penalty(grad, target, sided, weight)
    return (result.value, result.mean_norm) if return_norm else result.value


def _check(critic: Any, real: Any, fake: Any, sided: Any, sample: Any, eps: Any) -> None:
    if not callable(critic):
        checks.fail(TypeError, OP, "critic", "be callable", type(critic).__name__)
    checks.one_of(OP, "sided", sided, SIDES)
    checks.one_of(OP, "sample", sample, SAMPLES)
    for argument, value, users in (("real", real, ("line", "real", "dragan")), ("fake", fake, ("line", "fake"))):
        if sample in users:
            checks.tensor(OP, argument, value)
            checks.floating(OP, argument, value)
            if value.dim() == 0:
                checks.fail(ValueError, OP, argument, "have at least one dimension", "shape []")
    if eps is not None and sample != "line":
        checks.fail(ValueError, OP, "eps", 'be None unless sample is "line"', f"sample={sample!r}")
    if sample == "line":
        checks.shape(OP, "fake", fake, real.shape)


def _points(real: Any, fake: Any, sample: str, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """x̂, detached."""
    if sample == "line":
        return interpolate(real.detach(), fake.detach(), eps, generator=generator)
    if sample == "dragan":
        x = real.detach()
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return x + 0.5 * x.std(correction=0) * noise
    return (real if sample == "real" else fake).detach()


def _input_gradient(critic: Critic, x: Tensor, more: tuple[Any, ...]) -> Tensor:
    """∇C(x) [B, ...], with a graph where gradients are enabled."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.func.grad(lambda v: _scores(critic, v, more).sum())(x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
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


def _scores(critic: Critic, x: Tensor, more: tuple[Any, ...]) -> Tensor:
    scores = critic(x, *more)
    if not isinstance(scores, Tensor):
        checks.fail(TypeError, OP, "critic", "return a torch.Tensor", type(scores).__name__)
    if scores.dim() == 0 or scores.shape[0] != x.shape[0]:
        wanted = f"return one row of scores for each of {x.shape[0]} samples"
        checks.fail(ValueError, OP, "critic", wanted, f"shape {list(scores.shape)}")
    return scores
