"""gan_loss: the adversarial loss of the real and the fake half, its gradient, D(x), D(G(z)) and accuracy in one pass.

An objective is a row of OBJECTIVES (`_objectives.py`): which term each half pays. A term is a functor with value, slope and
curvature in the logit a and its target t, written in TERMS (plain PyTorch), in csrc/math.h (host and device) and in Triton.
The forward kernel already computes the gradient, so the backward pass is one product. Derivatives: any order
(order 2, which unrolled GANs need, has a kernel of its own; beyond it, and for relativistic objectives, the plain formulas run).

Kernels, same names and tensors in `torch.ops.gankern` (csrc/gan_loss.*) and `gankern.triton.gan_loss`:
    gan_loss(a, b | None, n_real, term_real, weight_real, target_real, targets_real | None, term_fake, weight_fake, target_fake,
             targets_fake | None, reduction, relative) -> loss, stats [3], grad_a, grad_b
    gan_loss_grad2(a, b | None, n_real, <the same eight>, reduction, g, ca, cb | None) -> da, db
Contiguous. b None: the first n_real entries of a are the real half, the rest the fake half; else a is real and b is fake.
reduction: 0 none (loss is [N]), 1 mean of each half, then their sum, 2 sum. relative: what the terms take; 0 the logits, 1 each
logit minus its partner in the other half, of as many logits, 2 minus the mean of the other half. Everything returned is in the
accumulation dtype: float64 for float64 logits, else float32. grad is d loss / d logit, through partners and means too; only with
reduction 0 it is the slope of each loss in what its term takes. stats, of the logits themselves, are mean sigmoid(real), mean
sigmoid(fake) and the share of logits on the right side of 0, NaN where there is no logit. A half of weight 0 pays nothing. grad2
is g * c * curvature, scaled as grad, for relative 0.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import _engine_run_backward

from gankern import backend, checks
from gankern.ops._function import apply
from gankern.ops._objectives import NOTHING, OBJECTIVES, REDUCTIONS, RELATIVE, SIDES, TERMS, Label, Part, Spec
from gankern.ops._outcome import Outcome

OP = "gan_loss"


class GanLoss(Outcome):
    """What `gan_loss` returns: a loss, and detached statistics of the same pass.

    `out.loss.backward()` and `out.backward()` do the same. The second needs no graph node for the loss, because the forward pass
    has already computed the gradient: half the time of two BCEWithLogitsLoss with their backward, where the first saves little.
    """

    __slots__ = ("_pending",)

    def __init__(self, loss: Tensor, stats: Tensor, pending: _Pending | None = None) -> None:
        self._loss, self.stats, self._pending = loss, stats, pending

    @property
    def loss(self) -> Tensor:
        """The loss, attached to the graph of the logits; scalar, or [N] with reduction="none"."""
        if self._pending is not None:
            self._loss, self._pending = self._pending.attach(self._loss), None
        return self._loss

    def backward(self) -> None:
        """`loss.backward()`, straight from the gradient that the forward pass computed.

        Raises:
            RuntimeError: as torch.Tensor.backward: no logit requires a gradient, or the loss is not a scalar.
        """
        pending = self._pending
        if pending is None or pending.spec.reduction == 0:
            self.loss.backward()
            return
        pending.check_unchanged()
        if pending.done:
            raise RuntimeError(
                f"{OP}: backward must be called once (a second time: loss.backward(retain_graph=True)), got two calls"
            )
        pending.done = True
        a, b = pending.a, pending.b
        da, db = (g if g.dtype == a.dtype else g.to(a.dtype) for g in pending.grads)
        if b is None or not b.requires_grad:
            roots: Any = (a,), (da,)
        else:
            roots = ((a, b), (da, db)) if a.requires_grad else ((b,), (db,))
        _engine_run_backward(*roots, False, False, (), allow_unreachable=True, accumulate_grad=True)


class _Pending:
    """Logits whose loss, statistics and gradient are known, before the loss gets its node in the graph."""

    __slots__ = ("a", "b", "done", "grads", "n_real", "name", "spec", "targets", "versions")

    def __init__(
        self, a: Tensor, b: Tensor | None, n_real: int, targets: _Targets, spec: Spec, name: str, grads: tuple[Tensor, Tensor]
    ) -> None:
        self.a, self.b, self.n_real, self.targets, self.spec, self.name, self.grads = a, b, n_real, targets, spec, name, grads
        self.versions, self.done = self._versions(), False

    def _versions(self) -> tuple[int, int]:
        return _version(self.a), _version(self.b)

    def check_unchanged(self) -> None:
        if self._versions() != self.versions:
            raise RuntimeError(f"{OP}: the logits must not be changed in place before the backward pass, got changed logits")

    def attach(self, loss: Tensor) -> Tensor:
        self.check_unchanged()
        with torch.enable_grad():
            return apply(_Known, self.a, self.b, self.n_real, *self.targets, self.spec, self.name, (loss, *self.grads))


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def reference(
    real: Tensor | None,
    fake: Tensor | None,
    objective: str = "non-saturating",
    side: str = "discriminator",
    *,
    n_real: int | None = None,
    real_label: Label = 1.0,
    fake_label: Label = 0.0,
    reduction: str = "mean",
) -> GanLoss:
    """The definition, in plain PyTorch."""
    given = _given(real, fake, n_real)
    a, b, n_real = _halves(real, fake, n_real)
    spec, real_targets, fake_targets = _specify(a, given, objective, side, real_label, fake_label, reduction)
    return GanLoss(*_reference(a, b, n_real, real_targets, fake_targets, spec))


def _reference(
    a: Tensor, b: Tensor | None, n_real: int, real_targets: Tensor | None, fake_targets: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    logits = _one_vector(a, b).to(_accumulate(a.dtype))
    x, losses = _relative(logits, n_real, spec.relative), []
    for half, targets, (term, weight, target) in zip(
        (x[:n_real], x[n_real:]), (real_targets, fake_targets), (spec.real, spec.fake), strict=True
    ):
        value = weight * TERMS[term].value(half, target if targets is None else targets) if weight else torch.zeros_like(half)
        losses.append(value.mean() if spec.reduction == 1 and weight else value if spec.reduction == 0 else value.sum())
    with torch.no_grad():
        real, fake = logits[:n_real], logits[n_real:]
        right = torch.cat([real > 0, fake <= 0]).to(logits.dtype)
        stats = torch.stack([torch.sigmoid(real).mean(), torch.sigmoid(fake).mean(), right.mean()])
    return torch.cat(losses) if spec.reduction == 0 else losses[0] + losses[1], stats


def gan_loss(
    real: Tensor | None,
    fake: Tensor | None = None,
    objective: str = "non-saturating",
    side: str = "discriminator",
    *,
    n_real: int | None = None,
    real_label: Label = 1.0,
    fake_label: Label = 0.0,
    reduction: str = "mean",
) -> GanLoss:
    """A GAN objective over the critic's raw scores (logits) of real and fake samples.

    With a_r and a_f the logits, sp = softplus, a line the mean of a half and labels 1 and 0 (lsgan: b, a):

        objective                    critic minimises                       generator minimises      equal halves
        non-saturating               sp(-a_r) + sp(a_f)                     sp(-a_f)                 2 log 2, log 2
        minimax                      the same                               -sp(a_f)                 2 log 2, -log 2
        maximum-likelihood           the same                               -exp(a_f)                2 log 2, -1
        lsgan                        (a_r - b)^2/2 + (a_f - a)^2/2          (a_f - c)^2/2            1/4, 1/8 at a = 1/2
        lsgan-pearson                (a_r - 1)^2/2 + (a_f + 1)^2/2          a_f^2/2                  1, 0
        hinge                        max(0, 1 - a_r) + max(0, 1 + a_f)      -a_f                     2, 0
        wgan                         a_f - a_r                              -a_f                     0, any
        fgan-kl                      -a_r + exp(a_f - 1)                    -exp(a_f - 1)            0, -1 at a = 1
        fgan-reverse-kl              exp(-a_r) + a_f - 1                    1 - a_f                  0, 1
        fgan-pearson                 -a_r + a_f^2/4 + a_f                   -a_f^2/4 - a_f           0, 0
        fgan-hellinger               exp(-a_r) - 1 + exp(a_f) - 1           1 - exp(a_f)             0, 0
        fgan-jensen-shannon          sp(-a_r) + sp(a_f) - 2 log 2           log 2 - sp(a_f)          0, 0
        fgan-gan                     sp(-a_r) + sp(a_f)                     -sp(a_f)                 2 log 2, -log 2
        fgan-...-alternative         as fgan-...                            what a_r pays, at a_f    see below
        relativistic                 sp(-(a_r - a_f)), pair by pair         sp(-(a_f - a_r))         log 2, log 2
        relativistic-lsgan           (a_r - a_f - 1)^2/2                    (a_f - a_r - 1)^2/2      1/2, 1/2
        relativistic-hinge           max(0, 1 - (a_r - a_f))                max(0, 1 - (a_f - a_r))  1, 1
        relativistic-average         sp(-x_r) + sp(x_f)                     sp(x_r) + sp(-x_f)       2 log 2, 2 log 2
        relativistic-average-lsgan   (x_r - 1)^2/2 + (x_f + 1)^2/2          (x_r + 1)^2/2 + (x_f - 1)^2/2      1, 1
        relativistic-average-hinge   max(0, 1 - x_r) + max(0, 1 + x_f)      max(0, 1 + x_r) + max(0, 1 - x_f)  2, 2

    The last column is the expected equilibrium value of critic and generator: the best critic where both halves have one law, its
    logits all 0 but where the row says other. The f-GAN rows are -(g(a_r) - f*(g(a_f))), with g the output activation and f* the
    conjugate: the critic's loss is minus a lower bound of the divergence (fgan-jensen-shannon: in its sum form, twice the usual
    one). Their generators minimise -f*(g(a_f)), the "-alternative" ones -g(a_f): -1, 1, 0, 0, 0, log 2 at equilibrium. x_r = a_r
    minus the mean of a_f and x_f = a_f minus the mean of a_r; gradients pass through the means. Pairs need as many real as fake
    logits. The general relativistic f1(a_r - a_f) + f2(a_f - a_r) has f2(-y) = f1(y) for these three: one of the two is paid.
    Nothing here clips weights or penalises gradients, which wgan needs.

    Finite, with its gradient, for any logit up to 1e4 in size; computed in float32 for 16-bit logits. For that exp(x), in
    maximum-likelihood (x = a - 1), fgan-kl, fgan-reverse-kl and fgan-hellinger, is continued beyond x = 30 by its tangent
    exp(30) (1 + x - 30), of curvature 0; a gradient beyond 65504 is infinite in float16 alone. Differentiable to any order in the
    logits.

    Args:
        real: logits of real samples, any shape (each element is one logit), or None: that half then pays nothing.
        fake: logits of generated samples, any shape; same dtype and device; or None (on the discriminator's side), likewise.
        objective: a name of the table.
        side: "discriminator" or "generator"; on the generator's side the real half, if given, only enters the statistics, but
            for relativistic objectives, which need both halves on both sides.
        n_real: give it to pass both halves as ONE vector of logits, as one pass through the critic makes them:
            `gan_loss(logits, n_real=64)`; the first n_real elements are the real half.
        real_label: target of real samples (0.9: one-sided label smoothing), a number or a tensor with one value a logit. A logit
            of target t pays t times what the table says of a real one and 1 - t times what it says of a fake one; lsgan: b.
            Also the target of fake logits where the generator aims at real ones; lsgan: c, so that (a, b, c) = (-1, 1, 0) is
            `fake_label=-1` for the critic and `real_label=0` for the generator.
        fake_label: target of fake samples, likewise; lsgan: a.
        reduction: "mean" (of each half, then their sum), "sum", or "none": one loss a logit, real ones first, [N].

    Returns:
        GanLoss with `loss` (float64 for float64 logits, else float32) and detached `d_real`, `d_fake`, `accuracy`.

    Raises:
        ValueError: a shape, device, name or number that does not fit.
        TypeError: a dtype that is not supported or differs.
        RuntimeError: a backend was forced that cannot run here.

    Sources: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014, eq. 1; Salimans et al., "Improved techniques for
    training GANs", NeurIPS 2016, section 3.4 (label smoothing); Goodfellow, "NIPS 2016 tutorial", section 3.2.4 (maximum
    likelihood); Mao et al., "Least squares GANs", ICCV 2017; Lim and Ye, "Geometric GAN", 2017 (hinge); Arjovsky et al.,
    "Wasserstein GAN", ICML 2017; Nowozin et al., "f-GAN", NeurIPS 2016, table 2 and section 3.2; Jolicoeur-Martineau, "The
    relativistic discriminator", ICLR 2019.
    """
    _check_logits(real, fake, n_real)
    a, b, n = _halves(real, fake, n_real)
    spec, targets = settle(a, b, n, _given(real, fake, n_real), objective, side, real_label, fake_label, reduction)
    name = backend.forced()
    name = _choose(a) if name is None else backend.require(OP, name, a.device.type)
    if name == "reference":
        return GanLoss(*_reference(a, b, n, *targets, spec))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        loss, stats, *_ = apply(_Loss, a, b, n, *targets, spec, name)
        return GanLoss(loss, stats)
    needs_graph = torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad))
    enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad(), at a fifth of its 3 us
    try:
        loss, stats, ga, gb = _run(a, b, n, *targets, spec, name)
    finally:
        torch._C._set_grad_enabled(enabled)
    return GanLoss(loss, stats, _Pending(a, b, n, targets, spec, name, (ga, gb)) if needs_graph else None)


_Targets = tuple[Tensor | None, Tensor | None]
_specs: dict[Any, Spec] = {}  # settings that have passed the checks


def settle(
    a: Tensor, b: Tensor | None, n_real: int, given: tuple[bool, bool], objective: str, side: str = "discriminator",
    real_label: Label = 1.0, fake_label: Label = 0.0, reduction: str = "mean",
) -> tuple[Spec, _Targets]:  # fmt: skip
    """What each half of these logits pays, checked; of the logits only dtype, device and number matter."""
    try:
        key = (objective, side, real_label, fake_label, type(real_label), type(fake_label), reduction, *given)
        spec = _specs.get(key)
    except TypeError:  # something that cannot be hashed: the checks will name it
        spec = key = None
    targets: _Targets = (None, None)
    if spec is None:
        _check_settings(not given[1], objective, side, real_label, fake_label, reduction)
        spec, *found = _specify(a, given, objective, side, real_label, fake_label, reduction)
        targets = (found[0], found[1])
        if not isinstance(real_label, Tensor) and not isinstance(fake_label, Tensor):
            if len(_specs) >= 256:
                _specs.clear()
            _specs[key] = spec
        else:
            _check_targets(a, b, n_real, targets, _parts(objective, side))
    if spec.relative:
        _check_relative(a, b, n_real, spec, given)
    return spec, targets


def _run(a: Tensor, b: Tensor | None, n_real: int, rt: Tensor | None, ft: Tensor | None, spec: Spec, name: str) -> Any:
    arguments = spec.arguments(rt, ft)
    return _kernels(name).gan_loss(a.contiguous(), None if b is None else b.contiguous(), n_real, *arguments, spec.relative)


def _choose(a: Tensor) -> str:
    """The automatic choice: a kernel wherever there is one. On two cores, 64 + 64 logits with their backward: eager pair 73 us,
    `gan_loss(real, fake).backward()` 45 us, one vector 28 us; plain PyTorch with the same statistics 220 us."""
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses it
    return backend.preferred(a.device.type)


def _halves(real: Tensor | None, fake: Tensor | None, n_real: int | None) -> tuple[Tensor, Tensor | None, int]:
    """(a, b, n_real) as the kernels take them."""
    if n_real is not None:
        assert real is not None
        return real, None, n_real
    if real is None or fake is None:
        only = fake if real is None else real
        assert only is not None
        return only, None, 0 if real is None else only.numel()
    return real, fake, real.numel()


def _given(real: Tensor | None, fake: Tensor | None, n_real: int | None) -> tuple[bool, bool]:
    """Which halves the caller gave; one that is not given pays nothing (one that is given and empty has the mean NaN)."""
    return real is not None, fake is not None or n_real is not None


def _specify(
    a: Tensor, given: tuple[bool, bool], objective: str, side: str, real_label: Label, fake_label: Label, reduction: str
) -> tuple[Spec, Tensor | None, Tensor | None]:
    specs: list[tuple[str, float, float]] = []
    targets: list[Tensor | None] = []
    for part in (part if there else None for part, there in zip(_parts(objective, side), given, strict=True)):
        label = 0.0 if part is None else {"real": real_label, "fake": fake_label}.get(str(part.label), part.label)
        is_tensor = isinstance(label, Tensor)
        targets.append(label.to(_accumulate(a.dtype)).flatten().contiguous() if isinstance(label, Tensor) else None)
        specs.append(NOTHING if part is None else (part.term, part.weight, 0.0 if is_tensor else float(label)))
    relative = RELATIVE.index(OBJECTIVES[objective].relative)
    return Spec(specs[0], specs[1], REDUCTIONS.index(reduction), relative), targets[0], targets[1]


def _parts(objective: str, side: str) -> tuple[Part | None, Part | None]:
    """What the real and the fake half pay."""
    row = OBJECTIVES[objective]
    return (row.real, row.fake) if side == "discriminator" else (row.generator_real, row.generator)


def _count(a: Tensor, b: Tensor | None) -> int:
    return a.numel() + (0 if b is None else b.numel())


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_logits(real: Any, fake: Any, n_real: Any) -> None:
    if real is None and fake is None:
        checks.fail(ValueError, OP, "real or fake", "be given", "None for both")
    for argument, value in (("real", real), ("fake", fake)):
        if value is not None:
            checks.tensor(OP, argument, value)
            checks.floating(OP, argument, value)
    if real is not None and fake is not None:
        checks.same_dtype(OP, "fake", fake, real.dtype)
        checks.same_device(OP, "fake", fake, real.device)
    if n_real is not None:
        if isinstance(n_real, bool) or not isinstance(n_real, int):
            checks.fail(TypeError, OP, "n_real", "be an int", type(n_real).__name__)
        if real is None or fake is not None:
            checks.fail(ValueError, OP, "n_real", "come with one vector of logits in `real` and no `fake`", n_real)
        if not 0 <= n_real <= real.numel():
            checks.fail(ValueError, OP, "n_real", f"be in [0, {real.numel()}], the number of logits", n_real)


def _check_settings(no_fake: bool, objective: str, side: str, real_label: Any, fake_label: Any, reduction: str) -> None:
    checks.one_of(OP, "objective", objective, OBJECTIVES)
    checks.one_of(OP, "side", side, SIDES)
    checks.one_of(OP, "reduction", reduction, REDUCTIONS)
    for argument, value in (("real_label", real_label), ("fake_label", fake_label)):
        if not isinstance(value, Tensor):
            checks.number(OP, argument, value, -math.inf)
    if side == "generator" and no_fake:
        checks.fail(ValueError, OP, "fake", "be given on the generator's side", None)


def _check_relative(a: Tensor, b: Tensor | None, n_real: int, spec: Spec, given: tuple[bool, bool]) -> None:
    for argument, there in zip(("real", "fake"), given, strict=True):
        if not there:
            checks.fail(ValueError, OP, argument, "be given for a relativistic objective", None)
    n_fake = _count(a, b) - n_real
    if RELATIVE[spec.relative] == "pair" and n_fake != n_real:
        checks.fail(ValueError, OP, "fake", f"have as many logits as real, {n_real}, to pair with", n_fake)


def _check_targets(a: Tensor, b: Tensor | None, n_real: int, targets: _Targets, parts: tuple[Part | None, Part | None]) -> None:
    for part, value, count in zip(parts, targets, (n_real, _count(a, b) - n_real), strict=True):
        if value is not None:
            assert part is not None
            argument = f"{part.label}_label"
            if value.numel() != count:
                checks.fail(ValueError, OP, argument, f"have one value for each of {count} logits", value.numel())
            checks.same_device(OP, argument, value, a.device)
            if value.requires_grad:
                checks.fail(ValueError, OP, argument, "not require a gradient", "a tensor that does")


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.gan_loss")


class _Loss(Function):
    """loss, stats and the gradients that the backward pass will hand out."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, n_real: int, rt: Tensor | None, ft: Tensor | None, spec: Spec, name: str) -> Any:
        return _run(a, b, n_real, rt, ft, spec, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, b, ctx.n_real, rt, ft, ctx.spec, ctx.name = inputs
        _, stats, ga, gb = output
        ctx.save_for_backward(a, b, rt, ft, ga, gb)
        ctx.mark_non_differentiable(stats, ga, gb)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        a, b, rt, ft, ga, gb = ctx.saved_tensors
        if g is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            da, db = apply(_LossGrad, g, a, b, ga, gb, rt, ft, ctx.n_real, ctx.spec, ctx.name)
        else:
            da, db = _times(g, ga, gb, a, b, ctx.n_real, ctx.spec)
        return da, db, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(_Loss, info, in_dims, args), (0, 0, 0, 0)


class _Known(Function):
    """The same node for a loss whose kernel has run already: `known` is (loss, grad of a, grad of b)."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor | None, n_real: int, rt: Tensor | None, ft: Tensor | None, spec: Spec, name: str, known: Any
    ) -> Tensor:
        return known[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, b, ctx.n_real, rt, ft, ctx.spec, ctx.name, (_, ga, gb) = inputs
        ctx.save_for_backward(a, b, rt, ft, ga, gb)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_Loss.backward(ctx, g), None


class _LossGrad(Function):
    """(g * gradient) handed to each logit; differentiable in g and in the logits."""

    @staticmethod
    def forward(
        g: Tensor,
        a: Tensor,
        b: Tensor | None,
        ga: Tensor,
        gb: Tensor,
        rt: Tensor | None,
        ft: Tensor | None,
        n_real: int,
        spec: Spec,
        name: str,
    ) -> Any:
        return _times(g, ga, gb, a, b, n_real, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, a, b, ga, gb, rt, ft, ctx.n_real, ctx.spec, ctx.name = inputs
        ctx.save_for_backward(g, a, b, ga, gb, rt, ft)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        da, db = _one_by_one(_LossGrad, info, in_dims, args)
        return (da, db), (0, None if db is None else 0)

    @staticmethod
    def backward(ctx: Any, ca: Tensor, cb: Tensor | None) -> Any:
        g, a, b, ga, gb, rt, ft = ctx.saved_tensors
        spec, n_real = ctx.spec, ctx.n_real
        wants_dg = ctx.needs_input_grad[0]  # g is often the root's plain 1
        dg = None
        if torch.is_grad_enabled() or spec.relative:
            slope, curvature = _slope_and_curvature(a, b, n_real, rt, ft, spec)
            c = _relative(_one_vector(ca, cb).to(ga.dtype), n_real, spec.relative)
            da, db = _scatter(_relative_adjoint(g * c * curvature, n_real, spec.relative), a, b)
            if wants_dg:
                dg = c * slope
        else:
            halves = a.contiguous(), None if b is None else b.contiguous()
            cotangents = ca.contiguous(), None if cb is None else cb.contiguous()
            da, db = _kernels(ctx.name).gan_loss_grad2(*halves, n_real, *spec.arguments(rt, ft), g.contiguous(), *cotangents)
            db = None if b is None else db
            if wants_dg:
                dg = _one_vector(ca, cb) * _one_vector(ga, None if b is None else gb)
        return dg.sum() if dg is not None and spec.reduction != 0 else dg, da, db, *(None,) * 7


def _one_by_one(function: type[Function], info: Any, in_dims: Any, args: Any) -> tuple[Any, ...]:
    """vmap of a function whose halves are reduced as wholes: a call for each sample, the outputs stacked."""
    calls = [
        apply(
            function,
            *(arg.select(d, i) if isinstance(arg, Tensor) and d is not None else arg for arg, d in zip(args, in_dims, strict=True)),
        )
        for i in range(info.batch_size)
    ]
    return tuple(None if outputs[0] is None else torch.stack(outputs) for outputs in zip(*calls, strict=True))


def _one_vector(a: Tensor, b: Tensor | None) -> Tensor:
    """All logits, or what there is one of for each: [N]."""
    return a.flatten() if b is None else torch.cat([a.flatten(), b.flatten()])


def _scatter(d: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One value a logit, back to the shapes and dtype of the logits."""
    d = d.to(a.dtype)
    if b is None:
        return d.reshape(a.shape), None
    real, fake = d.split((a.numel(), b.numel()))
    return real.reshape(a.shape), fake.reshape(b.shape)


def _relative(v: Tensor, n_real: int, relative: int) -> Tensor:
    """What the terms take, [N], from one value a logit, [N]."""
    real, fake = v[:n_real], v[n_real:]
    if relative == 1:
        return torch.cat([real - fake, fake - real])
    return torch.cat([real - fake.mean(), fake - real.mean()]) if relative else v


def _relative_adjoint(v: Tensor, n_real: int, relative: int) -> Tensor:
    """The transpose of `_relative`: from gradients in what the terms take to gradients in the logits."""
    if relative == 2:
        real, fake = v[:n_real], v[n_real:]
        return torch.cat([real - fake.sum() / max(real.numel(), 1), fake - real.sum() / max(fake.numel(), 1)])
    return _relative(v, n_real, relative)


def _times(g: Tensor, ga: Tensor, gb: Tensor, a: Tensor, b: Tensor | None, n_real: int, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """g, a number or one a logit, times the gradient of each half, in the dtype of the logits."""
    if g.dim() > 0:
        slopes = g * _one_vector(ga, None if b is None else gb)
        return _scatter(_relative_adjoint(slopes, n_real, spec.relative), a, b)
    return (g * ga).to(a.dtype), None if b is None else (g * gb).to(a.dtype)


def _slope_and_curvature(
    a: Tensor, b: Tensor | None, n_real: int, rt: Tensor | None, ft: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Of each term in what it takes, scaled by weight and reduction, as differentiable formulas."""
    logits = _relative(_one_vector(a, b).to(_accumulate(a.dtype)), n_real, spec.relative)
    slopes, curvatures = [], []
    for half, targets, (term, weight, target) in zip(
        (logits[:n_real], logits[n_real:]), (rt, ft), (spec.real, spec.fake), strict=True
    ):
        t = target if targets is None else targets
        scale = weight / max(half.numel(), 1) if spec.reduction == 1 else weight
        slopes.append(scale * TERMS[term].slope(half, t) if weight else torch.zeros_like(half))
        curvatures.append(scale * TERMS[term].curvature(half, t) if weight else torch.zeros_like(half))
    return torch.cat(slopes), torch.cat(curvatures)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::gan_loss")
    def _(a: Tensor, b: Tensor | None, n_real: int, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *_, reduction, _relative = settings
        n, acc = a.numel() + (0 if b is None else b.numel()), _accumulate(a.dtype)
        ga, gb = a.new_empty(a.shape, dtype=acc), a.new_empty(0 if b is None else b.shape, dtype=acc)
        return a.new_empty(n if reduction == 0 else (), dtype=acc), a.new_empty(3, dtype=acc), ga, gb

    @torch.library.register_fake("gankern::gan_loss_grad2")
    def _(a: Tensor, b: Tensor | None, n_real: int, *settings: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(a), a.new_empty(0) if b is None else torch.empty_like(b)
