"""mlp_critic: the whole objective of an MLP critic, adversarial loss and input-gradient penalty, with every parameter gradient,
in one pass of 4 L - 1 matrix products for L layers (eager WGAN-GP with L = 4: 43).

With its masks fixed, a critic of linear, LeakyReLU and dropout layers is linear in its input, so that the penalty
P = weight * mean_i (|g_i| - target)², g_i = dC(x_i)/dx_i, needs no second-order graph: dP/dW_l = adjoint_lᵀ tangent_(l-1), where
the adjoints are those of C and the tangent is v_i = dP/dg_i pushed forward through the masked layers. The pass is therefore
    forward      of all rows [real; fake; x̂], L products;
    adjoints     of all rows, L products; seed: the slope of the adversarial loss, and 1 for penalised rows; the last one gives g;
    tangents     of the penalised rows, L - 1 products, written over their activations, which are no longer needed;
    weights      adjoint_lᵀ [activations; tangents], L products.
Rows that are penalised *and* judged (R1, R2) are not passed twice: with seed 1 their activations are scaled by the slope instead,
dW_l = adjoint_lᵀ (slope * activation + tangent). The penalty alone has the seed 1 everywhere: 4 (L - 1) products.
The generator's side of the objective needs the first two stages alone, and of the adjoints only the rows of the fakes, one layer
further, to the samples: 2 L products.

Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, eq. 3 (target 1); Mescheder, Geiger, Nowozin,
"Which training methods for GANs do actually converge?", ICML 2018, eq. 9 and 10 (R1 and R2: target 0, weight gamma / 2); Goodfellow
et al., "Generative adversarial nets", NeurIPS 2014, algorithm 1 (the generator's step).

Kernels, same names and tensors in `torch.ops.gankern` (csrc/mlp_critic.*) and `gankern.triton.mlp_critic`; those marked ! are
written in place; bits as in `linear_lrelu`, m(y, bits) its dropout factor times slope; sums in float64 or float32:
    mlp_critic_adjoint(d! [R, N], y [R, N], bits, slope, p, bias_rows, factor [bias_rows] | None) -> dbias [N]
        d = m(y, bits) * d; dbias = sum over the first bias_rows rows of factor * d
    mlp_critic_tangent(t! [P, N], y! [R, N], bits, slope, p, first, factor [P] | None)
        rows first ... first + P - 1: y = m(y, bits) * t; with a factor t = m(y, bits) * t, y = factor * y + t
    mlp_critic_seed(g! [P, K], x! [R, K], first, factor [P] | None, weight, target, one_sided) -> penalty, norms [P]
        rows likewise: x = v; with a factor g = v, x = factor * x + v
In C++ one operator more drives these, `linear_lrelu_act`, `gan_loss` and the products; elsewhere `_one_pass.py` does:
    mlp_critic_pass(real, fake, x_hat, eps, seeds, weights, biases, slopes, p, <gan_loss's eight from term_real on>, relative,
                    penalise, first, count, weight, target, one_sided, wanted, autocast)
        -> loss, adversarial, penalty, norms, stats, then the gradients that are wanted (of weights, biases, the fake samples)
It makes the first layer of x̂ = eps real + (1 - eps) fake from that of real and fake, but for 16 bits: a sixteenth of the work less.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from gankern import backend, checks
from gankern.ops import linear_lrelu as layer
from gankern.ops._critic_checks import check_layers, check_penalty, check_rows
from gankern.ops._critic_loss import OP, MLPCriticLoss, Scaled
from gankern.ops._layout import accumulate
from gankern.ops._objectives import NOTHING, OBJECTIVES, Label, Spec
from gankern.ops._one_pass import Job, Results, Rows, batch, nothing, one_pass, rows_of
from gankern.ops._philox import draw_seed
from gankern.ops.gan_loss import gan_loss, settle

SAMPLES = ("line", "real", "fake", "both")
Numbers = float | Sequence[float]
_NO_LOSS = (*Spec(NOTHING, NOTHING, 1).arguments(None, None)[:-1], 0)


def mlp_critic(
    real: Tensor,
    fake: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Numbers = 0.2,
    dropout: Numbers = 0.0,
    training: bool = True,
    objective: str = "non-saturating",
    *,
    real_label: Label = 1.0,
    fake_label: Label = 0.0,
    penalty_weight: float = 0.0,
    target: float = 1.0,
    sided: str = "two",
    sample: str = "line",
    x_hat: Tensor | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MLPCriticLoss:
    """The critic's objective and all its parameter gradients in one pass, for a critic of linear, LeakyReLU and dropout layers.

    C(x) = w_L h_(L-1) + b_L, h_l = dropout(LeakyReLU(W_l h_(l-1) + b_l)), h_0 = x flattened to [B, K];
    loss = adversarial(C(real), C(fake)) + penalty_weight * mean_i (|dC(x_i)/dx_i| - target)².
    All rows are one batch [real; fake; x̂] for dropout; each row has its own mask.

    WGAN-GP: objective "wgan", penalty_weight 10. R1: sample "real", target 0, penalty_weight gamma / 2; R2 the same with "fake";
    their sum "both".
    DRAGAN and any other choice of points: pass them as x_hat. Exact: the same numbers as autograd, up to rounding. On CUDA not yet
    measured.

    Args:
        real: [B, *], K elements a sample; float64, float32, bfloat16 or float16; must not require a gradient.
        fake: [B', *], likewise; B' = B for the line.
        weights: L >= 1 matrices [N_l, N_(l-1)], N_0 = K, N_L = 1, of real's dtype (any under autocast) and device.
        biases: L vectors [N_l] or None.
        slopes: of LeakyReLU, >= 0 (0: ReLU, 1: none), one number or one for each of the L - 1 hidden layers.
        dropout: probability in [0, 1], one number or one for each hidden layer; drawn as `linear_lrelu` draws it.
        training: dropout does nothing when False.
        objective: a name of `gan_loss`; the critic's side of it, with real_label and fake_label.
        penalty_weight: >= 0; 0 is no penalty.
        target: of the norm, >= 0. The norm is the 2-norm over all of a sample; its derivative at 0 is 0.
        sided: "two", or "one": norms below the target pay nothing.
        sample: what is penalised: points eps * real + (1 - eps) * fake on the "line", the "real" or the "fake" samples;
            or "both", as many of each: the sum of the two penalties.
        x_hat: [P, *], penalised instead.
        eps: [B] or [B, 1], for the line; drawn uniformly, one a sample, when None.
        generator: source of eps and then of the dropout masks; None is PyTorch's default generator.

    Returns:
        MLPCriticLoss: `.backward()`, `loss`, and detached `adversarial`, `penalty` (with its weight), `norms` [P], `d_real`,
        `d_fake`, `accuracy`, `grads` (of the weights, then of the biases; None for those that do not require one).

    Raises:
        ValueError: a shape, device, name or range that does not fit; an input that requires a gradient.
        TypeError: a dtype that is not supported or differs.
        RuntimeError: a backend was forced that cannot run here; a derivative that is not a parameter gradient was asked for.
    """
    autocast = check_layers(OP, "real", real, weights, biases, slopes, dropout)
    check_penalty(OP, penalty_weight, target, sided)
    check_rows(OP, "fake", fake, "real", real)
    checks.one_of(OP, "sample", sample, SAMPLES)
    checks.one_of(OP, "objective", objective, OBJECTIVES)
    if OBJECTIVES[objective].relative == "pair" and len(fake) != len(real):
        checks.fail(ValueError, OP, "fake", f"have {len(real)} samples, as real, to pair with", len(fake))
    if x_hat is not None:
        check_rows(OP, "x_hat", x_hat, "real", real)
        sample = "given"
    elif sample == "line" and penalty_weight:
        if len(fake) != len(real):
            checks.fail(ValueError, OP, "fake", f"have {len(real)} samples, as real, for the line between them", len(fake))
        if eps is None:
            eps = torch.rand(len(real), 1, dtype=real.dtype, device=real.device, generator=generator)
        else:
            checks.tensor(OP, "eps", eps)
            checks.floating(OP, "eps", eps)
            checks.same_device(OP, "eps", eps, real.device)
            if eps.numel() != len(real):
                checks.fail(ValueError, OP, "eps", f"have one value for each of {len(real)} samples", eps.numel())
    elif sample == "both":
        if len(fake) != len(real):
            checks.fail(ValueError, OP, "fake", f"have {len(real)} samples, as real, to penalise both", len(fake))
        penalty_weight = 2 * penalty_weight  # the mean is one over twice as many
    job, seeds = _job(OP, real, weights, biases, slopes, dropout if training else 0.0, generator)
    labels = [label if isinstance(label, Tensor) else None for label in (real_label, fake_label)]
    numbers = [0.0 if isinstance(label, Tensor) else label for label in (real_label, fake_label)]
    job = job._replace(
        objective=objective, real_label=numbers[0], fake_label=numbers[1], weight=float(penalty_weight), target=float(target),
        one_sided=sided == "one", sample=sample,
    )  # fmt: skip
    inputs = (real, fake, x_hat if penalty_weight else None, eps if sample == "line" and penalty_weight else None, *labels)
    return _call(OP, job, inputs, seeds, list(weights), list(biases), autocast)


def mlp_critic_generator(
    fake: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Numbers = 0.2,
    dropout: Numbers = 0.0,
    training: bool = True,
    objective: str = "non-saturating",
    *,
    real: Tensor | None = None,
    real_label: Label = 1.0,
    generator: torch.Generator | None = None,
) -> MLPCriticLoss:
    """The generator's loss through the critic of `mlp_critic`, and its gradient at the fake samples, in one pass of 2 L products.

    Only `fake` gets a gradient, whether or not the critic's parameters require one; they are not changed, and need not be frozen.
    `.backward()` sends it on into the graph that made `fake`. Exact: the same numbers as autograd, up to rounding. Where `fake`
    requires no gradient the pass is the loss alone, L products.

    Args:
        fake: [B, *], K elements a sample; float64, float32, bfloat16 or float16; usually attached to the generator's graph.
        weights, biases, slopes, dropout, training: as in `mlp_critic`.
        objective: a name of `gan_loss`; the generator's side of it.
        real: [B', *], of fake's dtype and device; must not require a gradient. Relativistic objectives need it; with others its
            logits only enter the statistics. All rows are then one batch [real; fake] for dropout.
        real_label: the generator's target, a number or one for each fake sample; where the objective has the real half pay too, or
            pairs, as in `gan_loss`.
        generator: source of the dropout masks; None is PyTorch's default generator.

    Returns:
        MLPCriticLoss: `.backward()`, `loss`, and detached `d_real` (NaN without real), `d_fake`, `accuracy`, `grads`: one, of the
        shape and dtype of fake, or None; `penalty` is 0, `norms` empty.

    Raises:
        ValueError: a shape, device, name or range that does not fit; `real` is missing or requires a gradient.
        TypeError: a dtype that is not supported or differs.
        RuntimeError: a backend was forced that cannot run here; a derivative of second order, or of a parameter under torch.func,
            was asked for.

    Source: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014, algorithm 1.
    """
    op = "mlp_critic_generator"
    autocast = check_layers(op, "fake", fake, weights, biases, slopes, dropout)
    checks.one_of(op, "objective", objective, OBJECTIVES)
    if real is not None:
        check_rows(op, "real", real, "fake", fake)
    elif OBJECTIVES[objective].relative != "no":
        checks.fail(ValueError, op, "real", "be given for a relativistic objective", None)
    job, seeds = _job(op, fake, weights, biases, slopes, dropout if training else 0.0, generator)
    labels, number = (real_label, 0.0) if isinstance(real_label, Tensor) else (None, real_label)
    wanted = (*(False,) * (2 * len(weights)), fake.requires_grad or _traced())
    job = job._replace(objective=objective, real_label=number, wanted=wanted, side="generator")
    return _call(op, job, (real, fake, None, None, labels, None), seeds, list(weights), list(biases), autocast)


def mlp_critic_penalty(
    x_hat: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Numbers = 0.2,
    dropout: Numbers = 0.0,
    training: bool = True,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    sided: str = "two",
    generator: torch.Generator | None = None,
) -> MLPCriticLoss:
    """The penalty of `mlp_critic` alone, weight * mean_i (|dC(x_i)/dx_i| - target)², in 4 (L - 1) products (eager, L = 4: 21).

    Arguments, results and errors as there; `loss` is the penalty, `adversarial` 0. The biases have no gradient: it is 0 everywhere.
    """
    op = "mlp_critic_penalty"
    autocast = check_layers(op, "x_hat", x_hat, weights, biases, slopes, dropout)
    check_penalty(op, weight, target, sided)
    job, seeds = _job(op, x_hat, weights, [None] * len(weights), slopes, dropout if training else 0.0, generator)
    job = job._replace(weight=float(weight), target=float(target), one_sided=sided == "one", sample="given")
    return _call(op, job, (None, None, x_hat, None, None, None), seeds, list(weights), list(biases), autocast)


def _job(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], slopes: Numbers, dropout: Numbers,
    generator: torch.Generator | None,
) -> tuple[Job, list[Tensor | None]]:  # fmt: skip
    hidden = len(weights) - 1
    p = _each(dropout, hidden)
    name = backend.forced()
    name = _choose(x.device.type) if name is None else backend.require(op, name, x.device.type)
    every = _traced()
    wanted = (*(w is not None and (every or w.requires_grad) for w in (*weights, *biases)), False)
    seeds = [draw_seed(x.device, generator) if q > 0.0 else None for q in p]
    return Job(_each(slopes, hidden), p, "", 1.0, 0.0, 0.0, 1.0, False, "line", wanted, name), seeds


def _choose(device: str) -> str:
    """The automatic choice: the one pass wherever the op runs, its stages in kernels or, "torch", in plain PyTorch calls.

    Eager PyTorch's time / its time in C++, one CPU thread, a WGAN-GP critic step with all gradients, by sizes and batch:
    784-1024-512-256-1 16 2.3, 64 2.0, 256 1.5; 784-256-1 4 2.7, 512 1.5; 64-64-1 4 2.3, 512 1.6; 2-8-1 4 2.1, 512 1.9. At batch 256
    the products are 95 % of it. The generator's side of the first, against a frozen critic: 16 1.17, 64 1.08, 256 1.07. On CUDA
    not yet measured.
    """
    return next((name for name in ("compiled", "triton") if not backend.problem(name, device)), "torch")


def _each(value: Numbers, count: int) -> tuple[float, ...]:
    return (float(value),) * count if isinstance(value, (int, float)) else tuple(float(v) for v in value)


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _traced() -> bool:
    """Whether what requires a gradient does not show on the tensor."""
    return not torch.compiler.is_compiling() and _transforming()


def _call(
    op: str, job: Job, inputs: tuple[Tensor | None, ...], seeds: list[Tensor | None], weights: list[Tensor],
    biases: list[Tensor | None], autocast: torch.dtype | None,
) -> MLPCriticLoss:  # fmt: skip
    generates = job.side == "generator"
    for argument, value in zip(("real", "fake", "x_hat", "eps", "real_label", "fake_label"), inputs, strict=True):
        if value is not None and value.requires_grad and torch.is_grad_enabled() and not (generates and argument == "fake"):
            which = "the fake samples get" if generates else "the parameters get"
            checks.fail(ValueError, op, argument, f"not require a gradient: only {which} one", "a tensor that does")
    receivers: tuple[Tensor | None, ...] = inputs[1:2] if generates else (*weights, *biases)
    wanted = job.wanted[-1:] if generates else job.wanted[:-1]
    if torch.compiler.is_compiling() or _transforming():
        code = None if autocast is None else str(autocast).removeprefix("torch.")
        parameters = [*weights, *biases]
        if generates and torch.compiler.is_compiling():
            parameters = [t if t is None else t.detach() for t in parameters]
        return MLPCriticLoss(_Critic.apply(job, code, *inputs, *seeds, *parameters), receivers, wanted, False)
    enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad(), at a fifth of its 3 us
    try:
        outputs = _compute(job, autocast, inputs, seeds, weights, biases)
    finally:
        torch._C._set_grad_enabled(enabled)
    return MLPCriticLoss(outputs, receivers, wanted, enabled and any(wanted))


# --- the pass --------------------------------------------------------------------------------------------------------------------


def _compute(
    job: Job, autocast: torch.dtype | None, inputs: Sequence[Tensor | None], seeds: Sequence[Tensor | None], weights: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss, adversarial, penalty, norms, stats, then the gradients that are wanted."""
    *samples, eps, real_labels, fake_labels = inputs
    real, fake, x_hat = (t if t is None or t.dim() == 2 else t.flatten(1) for t in samples)
    rows = rows_of(job, real, fake, x_hat)
    labels: tuple[Label, Label] = (
        job.real_label if real_labels is None else real_labels,
        job.fake_label if fake_labels is None else fake_labels,
    )
    if job.name == "compiled":
        loss: tuple[Any, ...] = _NO_LOSS
        if fake is not None:
            logits = fake.new_empty(rows.judged)
            spec, targets = settle(logits, None, rows.real, (True, True), job.objective, job.side, *labels)
            loss = (*spec.arguments(*targets)[:-1], spec.relative)
        outputs = torch.ops.gankern.mlp_critic_pass(
            real, fake, x_hat, eps, seeds, weights, biases, job.slopes, job.p, *loss, job.penalises, rows.first,
            rows.penalised, job.weight, job.target, job.one_sided, job.wanted, autocast,
        )  # fmt: skip
        return _shaped(job, tuple(outputs), samples[1])
    x = batch(real, fake, x_hat, eps)
    dtypes = [None if t is None else t.dtype for t in (*weights, *biases, fake)]
    if autocast is not None:
        x, weights = x.to(autocast), [w.to(autocast) for w in weights]
        biases = [None if b is None else b.to(autocast) for b in biases]
    run = _by_autograd if job.name == "reference" else one_pass
    with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
        adversarial, penalty, norms, stats, grads = run(job, rows, x, seeds, weights, biases, labels)
    found = [g if g.dtype == d else g.to(d) for g, d, w in zip(grads, dtypes, job.wanted, strict=True) if w]
    return _shaped(job, (adversarial + penalty, adversarial, penalty, norms, stats, *found), samples[1])


def _shaped(job: Job, outputs: tuple[Tensor, ...], fake: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs, with the gradient of the fake samples in their shape."""
    if fake is None or fake.dim() == 2 or not job.wanted[-1]:
        return outputs
    return (*outputs[:-1], outputs[-1].view(fake.shape))


# --- the definition --------------------------------------------------------------------------------------------------------------


def _by_autograd(
    job: Job, rows: Rows, x: Tensor, seeds: Sequence[Tensor | None], weights: list[Tensor], biases: list[Tensor | None],
    labels: tuple[Label, Label],
) -> Results:  # fmt: skip
    """The definition: PyTorch's autograd of the second order, on one pass of all rows."""
    with torch.enable_grad():
        weights = [w.detach().requires_grad_() for w in weights]
        biases = [None if b is None else b.detach().requires_grad_() for b in biases]
        h = x.detach().requires_grad_()
        leaf = h
        for i, seed in enumerate(seeds):
            h = layer.reference(h, weights[i], biases[i], job.slopes[i], job.p[i], seed)
        logits = F.linear(h, weights[-1], biases[-1]).squeeze(1)
        loss, stats = nothing(x)
        penalty, norms = loss.new_zeros(()), loss.new_zeros(0)
        if job.objective:
            out = gan_loss(
                logits[: rows.judged], None, job.objective, job.side, n_real=rows.real, real_label=labels[0], fake_label=labels[1]
            )  # fmt: skip
            loss, stats = out.loss, out.stats
        if job.penalises:
            penalised = slice(rows.first, rows.first + rows.penalised)
            (g,) = torch.autograd.grad(logits[penalised].sum(), leaf, create_graph=True)
            norms = torch.linalg.vector_norm(g[penalised].to(loss.dtype), dim=1)
            gap = (norms - job.target).clamp_min(0.0) if job.one_sided else norms - job.target
            penalty = job.weight * gap.square().mean()
        receivers = [t for t, w in zip((*weights, *biases, leaf), job.wanted, strict=True) if w and t is not None]
        found: Any = ()
        if receivers:
            found = torch.autograd.grad(loss + penalty, receivers, allow_unused=True, materialize_grads=True)
    given = iter(found)
    grads: list[Any] = [next(given) if w else None for w in job.wanted]
    if job.wanted[-1]:
        grads[-1] = grads[-1][rows.real : rows.judged]
    return loss.detach(), penalty.detach(), norms.detach(), stats, grads


# --- autograd --------------------------------------------------------------------------------------------------------------------


def _split(job: Job, tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """(real, fake, x_hat, eps, real_labels, fake_labels), seeds, weights, biases."""
    hidden = job.layers - 1
    return tensors[:6], tensors[6 : 6 + hidden], tensors[6 + hidden : 7 + 2 * hidden], tensors[7 + 2 * hidden :]


class _Critic(Function):
    """The pass as one node: loss, adversarial, penalty, norms, stats, and the gradients that its backward hands out."""

    @staticmethod
    def forward(job: Job, autocast: str | None, *tensors: Any) -> Any:
        inputs, seeds, weights, biases = _split(job, tensors)
        if torch.compiler.is_compiling():
            return tuple(torch.ops.gankern.mlp_critic_step(*inputs, list(seeds), list(weights), list(biases), *job, autocast))
        dtype = None if autocast is None else getattr(torch, autocast)
        return _compute(job, dtype, inputs, seeds, list(weights), list(biases))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.job, _, *tensors = inputs
        (_, fake, *_), _, weights, biases = _split(ctx.job, tensors)
        receivers = [t for t, w in zip((*weights, *biases, fake), ctx.job.wanted, strict=True) if w]
        ctx.inputs = len(tensors) - len(weights) - len(biases)
        ctx.save_for_backward(*output[5:], *receivers)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        generates, needs = ctx.job.side == "generator", ctx.needs_input_grad[2:]
        if generates and (needs[0] or any(needs[2:])):
            raise RuntimeError(
                f"{OP}: the critic must not require a gradient: only the fake samples get one, got a tensor that does"
            )
        if not generates and any(needs[: ctx.inputs]):
            raise RuntimeError(f"{OP}: the inputs must not require a gradient: only the parameters get one, got a tensor that does")
        saved, count = ctx.saved_tensors, sum(ctx.job.wanted)
        scaled = Scaled.forward if torch.compiler.is_compiling() else Scaled.apply  # what is compiled has no second order anyway
        given = iter(() if g is None else scaled(g, count, *saved))
        *found, fake = [next(given, None) if w else None for w in ctx.job.wanted]
        return (None, None, None, fake, *(None,) * (ctx.inputs - 2), *found)

    @staticmethod
    def vmap(info: Any, in_dims: Any, job: Job, autocast: str | None, *tensors: Any) -> Any:
        calls = [
            _Critic.apply(
                job,
                autocast,
                *(t if d is None or t is None else t.select(d, i) for t, d in zip(tensors, in_dims[2:], strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


# --- the pass as an operator, for torch.compile ----------------------------------------------------------------------------------

_library = torch.library.Library("gankern", "FRAGMENT")
_library.define(
    "mlp_critic_step(Tensor? real, Tensor? fake, Tensor? x_hat, Tensor? eps, Tensor? real_labels, Tensor? fake_labels, "
    "Tensor?[] seeds, Tensor[] weights, Tensor?[] biases, float[] slopes, float[] p, str objective, float real_label, "
    "float fake_label, float weight, float target, bool one_sided, str sample, bool[] wanted, str name, str side, str? autocast) "
    "-> Tensor[]"
)


def _step(
    real: Tensor | None, fake: Tensor | None, x_hat: Tensor | None, eps: Tensor | None, real_labels: Tensor | None,
    fake_labels: Tensor | None, seeds: list[Tensor | None], weights: list[Tensor], biases: list[Tensor | None], *settings: Any,
) -> list[Tensor]:  # fmt: skip
    *fields, autocast = settings
    job = Job._make(tuple(f) if isinstance(f, list) else f for f in fields)
    dtype = None if autocast is None else getattr(torch, autocast)
    # An operator runs below autograd, but gan_loss and the definition differentiate in the pass.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with guard, torch.no_grad():
        return list(_compute(job, dtype, (real, fake, x_hat, eps, real_labels, fake_labels), seeds, weights, biases))


def _step_fake(
    real: Tensor | None, fake: Tensor | None, x_hat: Tensor | None, eps: Tensor | None, real_labels: Tensor | None,
    fake_labels: Tensor | None, seeds: list[Tensor | None], weights: list[Tensor], biases: list[Tensor | None], *settings: Any,
) -> list[Tensor]:  # fmt: skip
    *fields, autocast = settings
    job = Job._make(fields)
    dtype = None if autocast is None else getattr(torch, autocast)
    return _fake_outputs(rows_of(job, real, fake, x_hat).penalised, fake, weights, biases, job.wanted, dtype)


def _fake_outputs(
    penalised: int, fake: Tensor | None, weights: list[Tensor], biases: list[Tensor | None], wanted: Sequence[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    like, dtype = weights[0], accumulate(autocast or weights[0].dtype)
    outputs = [like.new_empty(size, dtype=dtype) for size in ((), (), (), (penalised,), (3,))]
    receivers = (*weights, *biases, None if fake is None else fake.new_empty(fake.shape))
    return outputs + [torch.empty_like(t) for t, w in zip(receivers, wanted, strict=True) if w and t is not None]


_library.impl("mlp_critic_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("gankern::mlp_critic_step", _step_fake)


# --- fake kernels ---------------------------------------------------------------------------------------------------------------


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::mlp_critic_adjoint")
    def _(d: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, bias_rows: int, factor: Tensor | None) -> Tensor:
        return d.new_empty(d.shape[1])

    @torch.library.register_fake("gankern::mlp_critic_tangent")
    def _(t: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, first: int, factor: Tensor | None) -> None:
        return None

    @torch.library.register_fake("gankern::mlp_critic_seed")
    def _(
        g: Tensor, x: Tensor, first: int, factor: Tensor | None, weight: float, target: float, one_sided: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulate(g.dtype)
        return g.new_empty((), dtype=dtype), g.new_empty(len(g), dtype=dtype)

    @torch.library.register_fake("gankern::mlp_critic_pass")
    def _(
        real: Tensor | None, fake: Tensor | None, x_hat: Tensor | None, eps: Tensor | None, seeds: list[Tensor | None],
        weights: list[Tensor], biases: list[Tensor | None], *settings: Any,
    ) -> list[Tensor]:  # fmt: skip
        *_, penalised, _, _, _, wanted, autocast = settings
        return _fake_outputs(penalised, fake, weights, biases, wanted, autocast)
