"""The pass of `mlp_critic` driven from Python: with Triton kernels, or in plain PyTorch calls where no kernel runs.

The C++ library drives the same pass itself (`mlp_critic_pass` in csrc/mlp_critic.cpp).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern.ops import linear_lrelu as layer
from gankern.ops._activation import leaky_relu_
from gankern.ops._layout import accumulate
from gankern.ops._objectives import Label
from gankern.ops._philox import dropout_keep
from gankern.ops.gan_loss import gan_loss


class Job(NamedTuple):
    """The settings of one pass. Objective "": the penalty alone. p: dropout of each hidden layer. name: a backend, or "torch"."""

    slopes: tuple[float, ...]
    p: tuple[float, ...]
    objective: str
    real_label: float
    fake_label: float
    weight: float
    target: float
    one_sided: bool
    sample: str
    wanted: tuple[bool, ...]  # of weights, then biases, then the fake samples
    name: str
    side: str = "discriminator"

    @property
    def layers(self) -> int:
        return len(self.p) + 1

    @property
    def penalises(self) -> bool:
        return not self.objective or self.weight > 0.0


class Rows(NamedTuple):
    """Which rows of [real; fake; x̂] are real, judged at all, and penalised."""

    real: int
    judged: int
    first: int
    penalised: int


Results = tuple[Tensor, Tensor, Tensor, Tensor, list[Any]]  # adversarial, penalty, norms, statistics, gradients


def rows_of(job: Job, real: Tensor | None, fake: Tensor | None, x_hat: Tensor | None) -> Rows:
    n_real = 0 if real is None else len(real)
    judged = n_real + (0 if fake is None else len(fake))
    if not job.penalises:
        return Rows(n_real, judged, judged, 0)
    first = {"real": 0, "both": 0, "fake": n_real}.get(job.sample, judged)
    count = {"real": n_real, "both": judged, "fake": judged - n_real, "line": n_real}.get(
        job.sample, 0 if x_hat is None else len(x_hat)
    )
    return Rows(n_real, judged, first, count)


def batch(real: Tensor | None, fake: Tensor | None, x_hat: Tensor | None, eps: Tensor | None) -> Tensor:
    """[real; fake; x̂], a fresh [R, K], of matrices."""
    given = [t for t in (real, fake, x_hat) if t is not None]
    if eps is None:
        return torch.cat(given)
    a, b = given
    n = len(a)
    x = a.new_empty(3 * n, a.shape[1])
    torch.cat(given, out=x[: 2 * n])
    torch.lerp(b, a, eps.reshape(n, 1).to(a.dtype), out=x[2 * n :])
    return x


def nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """The adversarial loss and the statistics of a penalty alone."""
    acc = accumulate(x.dtype)
    return x.new_zeros((), dtype=acc), x.new_full((3,), math.nan, dtype=acc)


def one_pass(
    job: Job, rows: Rows, x: Tensor, seeds: Sequence[Tensor | None], weights: list[Tensor], biases: list[Tensor | None],
    labels: tuple[Label, Label],
) -> Results:  # fmt: skip
    run, hidden, last = (
        (_PLAIN if job.name == "torch" else importlib.import_module("gankern.triton.mlp_critic")),
        job.layers - 1,
        weights[-1],
    )
    grads: list[Any] = [None] * len(job.wanted)
    # forward
    h, bits = [x], []
    for i in range(hidden):
        y, kept = _layer(job, i, run, h[i], weights[i], biases[i], seeds[i])
        h.append(y)
        bits.append(kept)
    first, count = rows.first, rows.penalised
    inside = count > 0 and first < rows.judged
    factor = row_factor = None
    if job.objective:
        logits = _linear(h[-1][: rows.judged], last, biases[-1])
        adversarial, stats, slope = _judge(job, logits, rows, labels)
        if job.wanted[-2]:
            grads[-2] = slope.sum(0, keepdim=True)
        if job.wanted[-1]:
            d = slope[rows.real : rows.judged, None].to(x.dtype)
            grads[-1] = _samples(job, rows, run, d, h, bits, weights)
        if not any(job.wanted[:-1]) and not job.penalises:
            return adversarial, adversarial.new_zeros(()), adversarial.new_zeros(0), stats, grads
        seed = slope.to(x.dtype)
        if inside:
            factor = slope[first : first + count]
            seed, row_factor = seed.clone(), torch.ones_like(slope)
            seed[first : first + count] = 1.0
            row_factor[first : first + count] = factor
        elif count:
            seed = torch.cat([seed, seed.new_ones(count)])
        d = torch.mm(seed[:, None], last)
    else:
        (adversarial, stats), seed = nothing(x), None
        d = last.expand(count, -1).contiguous()
    # adjoints
    adjoints = [d] * hidden
    for i in reversed(range(hidden)):
        summed = (rows.judged, row_factor) if job.wanted[job.layers + i] else (0, None)
        dbias = run.mlp_critic_adjoint(d, h[i + 1], bits[i], job.slopes[i], job.p[i], *summed)
        adjoints[i], grads[job.layers + i] = d, dbias
        if i:
            d = torch.mm(d, weights[i])
    # tangents
    if count:
        g = torch.mm(adjoints[0][first : first + count], weights[0]) if hidden else d[first : first + count]
        penalty, norms = run.mlp_critic_seed(g, x, first, factor, job.weight, job.target, job.one_sided)
        t = x[first : first + count] if factor is None else g
        for i in range(hidden):
            t = torch.mm(t, weights[i].t())
            run.mlp_critic_tangent(t, h[i + 1], bits[i], job.slopes[i], job.p[i], first, factor)
            t = h[i + 1][first : first + count] if factor is None else t
    else:
        penalty, norms = adversarial.new_zeros(()), adversarial.new_zeros(0)
        if job.penalises:
            penalty = penalty + math.nan  # the mean over no samples
    # weights
    for i in range(hidden):
        if job.wanted[i]:
            grads[i] = torch.mm(adjoints[i].t(), h[i])
    if job.wanted[hidden]:
        grads[hidden] = h[-1].sum(0, keepdim=True) if seed is None else torch.mm(seed[None], h[-1])
    return adversarial, penalty, norms, stats, grads


def _samples(job: Job, rows: Rows, run: Any, d: Tensor, h: list[Tensor], bits: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The gradient of the adversarial loss at the fake samples, from that at their logits, d [F, 1]."""
    fake = slice(rows.real, rows.judged)
    for i in reversed(range(job.layers)):
        d = torch.mm(d, weights[i])
        if i:
            kept = bits[i - 1][fake] if job.p[i - 1] > 0.0 else bits[i - 1]
            run.mlp_critic_adjoint(d, h[i][fake], kept, job.slopes[i - 1], job.p[i - 1], 0, None)
    return d


def _judge(job: Job, logits: Tensor, rows: Rows, labels: tuple[Label, Label]) -> tuple[Tensor, Tensor, Tensor]:
    """The adversarial loss, its statistics and its slope at each logit, in the accumulation dtype."""
    with torch.enable_grad():
        a = logits.detach().flatten().to(accumulate(logits.dtype)).requires_grad_()
        out = gan_loss(a, None, job.objective, job.side, n_real=rows.real, real_label=labels[0], fake_label=labels[1])
        (slope,) = torch.autograd.grad(out.loss, a)
    return out.value, out.stats, slope


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _layer(
    job: Job, i: int, run: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output of hidden layer i and its dropout bits."""
    inside = x.is_cpu or x.dtype.itemsize == 2  # as in linear_lrelu
    z = _linear(x, weight, bias if inside else None)
    outside = None if inside or bias is None else bias.contiguous()
    return run.linear_lrelu_act(z, outside, job.slopes[i], job.p[i], seed)


# --- the kernels in plain PyTorch ------------------------------------------------------------------------------------------------


def _mask(y: Tensor, keep: Tensor, slope: float, p: float) -> Tensor:
    one = y.new_ones((), dtype=accumulate(y.dtype))
    factor = torch.where(y > 0, one, slope)
    return factor * (keep * (one * layer.dropout_scale(p))) if p > 0.0 else factor


def _plain_act(z: Tensor, bias: Tensor | None, slope: float, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    y = leaky_relu_(z if bias is None else z + bias, slope)
    if p == 0.0:
        return y, z.new_empty(0, dtype=torch.uint8)
    assert seed is not None
    keep = dropout_keep(seed, y.shape[0], y.shape[1], p)
    return y.mul_(keep.to(y.dtype) * layer.dropout_scale(p)), keep


def _plain_adjoint(d: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, bias_rows: int, factor: Tensor | None) -> Tensor:
    exact = d * _mask(y, bits, slope, p)
    d.copy_(exact)
    head = exact[:bias_rows]
    return (head if factor is None else head * factor[:, None]).sum(0).to(d.dtype)


def _plain_tangent(t: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, first: int, factor: Tensor | None) -> None:
    rows = slice(first, first + len(t))
    v = t * _mask(y[rows], bits[rows] if p > 0.0 else bits, slope, p)
    if factor is not None:
        t.copy_(v)
        v = v + factor[:, None] * y[rows]
    y[rows] = v.to(y.dtype)


def _plain_seed(
    g: Tensor, x: Tensor, first: int, factor: Tensor | None, weight: float, target: float, one_sided: bool
) -> tuple[Tensor, Tensor]:
    exact, rows = g.to(accumulate(g.dtype)), slice(first, first + len(g))
    norms = exact.square().sum(1).sqrt()
    gap = (norms - target).clamp_min(0.0) if one_sided else norms - target
    v = exact * torch.where(norms > 0, 2.0 * weight / len(g) * gap / norms, 0.0)[:, None]
    if factor is not None:
        g.copy_(v)
        v = v + factor[:, None] * x[rows]
    x[rows] = v.to(x.dtype)
    return weight * gap.square().mean(), norms


_PLAIN = SimpleNamespace(
    linear_lrelu_act=_plain_act,
    mlp_critic_adjoint=_plain_adjoint,
    mlp_critic_tangent=_plain_tangent,
    mlp_critic_seed=_plain_seed,
)
