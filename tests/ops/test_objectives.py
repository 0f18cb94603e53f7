"""Every row of OBJECTIVES on every backend, against the formulas of the papers, their optima and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gankern
from gankern import backend as backends
from gankern.ops import gan_loss as op
from gankern.ops._objectives import EXP_LIMIT, OBJECTIVES, TERMS, Objective, Part
from tests.ops.test_gan_loss import COMPILABLE, DEVICE, INTERPRETED, halves
from tests.support import assert_accurate, assert_equal_derivatives, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SIDES = ("discriminator", "generator")
RELATIVISTIC = [name for name, row in OBJECTIVES.items() if row.relative != "no"]
# One row for each kind of kernel work: a term of each shape, pairs, averages.
SOME = ["lsgan", "hinge", "fgan-hellinger", "relativistic", "relativistic-average-lsgan"]

Terms = tuple[Tensor | None, Tensor | None]  # what the real and the fake half pay, one value a logit; None: nothing
Formula = Callable[[Tensor, Tensor], Terms]


# --- the oracle: the formulas as the papers print them -------------------------------------------------------------------------


def sp(a: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(a))


relu = torch.relu


# (output activation g, conjugate f*) of f-GAN, tables 2 and 6
F_GAN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda v: v, lambda t: torch.exp(t - 1)),
    "reverse-kl": (lambda v: -torch.exp(-v), lambda t: -1 - torch.log(-t)),
    "pearson": (lambda v: v, lambda t: t**2 / 4 + t),
    "hellinger": (lambda v: 1 - torch.exp(-v), lambda t: t / (1 - t)),
    "jensen-shannon": (lambda v: math.log(2) - torch.log(1 + torch.exp(-v)), lambda t: -torch.log(2 - torch.exp(t))),
    "gan": (lambda v: -torch.log(1 + torch.exp(-v)), lambda t: -torch.log(1 - torch.exp(t))),
}
# f1, f2 of the relativistic forms: what a real and what a fake logit pays
F1_F2: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "": (lambda y: sp(-y), sp),
    "-lsgan": (lambda y: (y - 1) ** 2 / 2, lambda y: (y + 1) ** 2 / 2),
    "-hinge": (lambda y: relu(1 - y), lambda y: relu(1 + y)),
}


def f_gan(name: str, alternative: bool) -> tuple[Formula, Formula]:
    g, conjugate = F_GAN[name]
    return (
        lambda r, f: (-g(r), conjugate(g(f))),
        lambda r, f: (None, -g(f) if alternative else -conjugate(g(f))),
    )


def pairs(name: str) -> tuple[Formula, Formula]:
    f1, _ = F1_F2[name]
    return lambda r, f: (f1(r - f), None), lambda r, f: (None, f1(f - r))


def averages(name: str) -> tuple[Formula, Formula]:
    f1, f2 = F1_F2[name]
    return (
        lambda r, f: (f1(r - f.mean()), f2(f - r.mean())),
        lambda r, f: (f2(r - f.mean()), f1(f - r.mean())),
    )


FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "non-saturating": (lambda r, f: (sp(-r), sp(f)), lambda r, f: (None, sp(-f))),
    "minimax": (lambda r, f: (sp(-r), sp(f)), lambda r, f: (None, -sp(f))),
    "maximum-likelihood": (lambda r, f: (sp(-r), sp(f)), lambda r, f: (None, -torch.exp(f))),
    "lsgan": (lambda r, f: ((r - 1) ** 2 / 2, f**2 / 2), lambda r, f: (None, (f - 1) ** 2 / 2)),
    "lsgan-pearson": (lambda r, f: ((r - 1) ** 2 / 2, (f + 1) ** 2 / 2), lambda r, f: (None, f**2 / 2)),
    "hinge": (lambda r, f: (relu(1 - r), relu(1 + f)), lambda r, f: (None, -f)),
    "wgan": (lambda r, f: (-r, f), lambda r, f: (None, -f)),
    **{f"fgan-{name}": f_gan(name, False) for name in F_GAN},
    **{f"fgan-{name}-alternative": f_gan(name, True) for name in F_GAN},
    **{f"relativistic{name}": pairs(name) for name in F1_F2},
    **{f"relativistic-average{name}": averages(name) for name in F1_F2},
}


def paper(
    real: Tensor, fake: Tensor | None, objective: str, side: str = "discriminator", reduction: str = "mean", n_real: int = 0
) -> Tensor:
    if fake is None:
        real, fake = real[:n_real], real[n_real:]
    real, fake = real.flatten(), fake.flatten()
    terms = FORMULAS[objective][SIDES.index(side)](real, fake)
    if reduction == "none":
        return torch.cat([0 * a if t is None else t for t, a in zip(terms, (real, fake), strict=True)])
    given = [t for t in terms if t is not None]
    return sum((t.mean() if reduction == "mean" else t.sum() for t in given), torch.zeros((), dtype=real.dtype, device=real.device))


def ours(*args: Any, **options: Any) -> Tensor:
    return gankern.gan_loss(*args, **options).loss


def sizes_of(objective: str) -> tuple[tuple[int], tuple[int]]:
    return ((6,), (6,)) if OBJECTIVES[objective].relative == "pair" else ((5,), (9,))


def check(objective: str, side: str, reduction: str, inputs: list[Tensor], **options: Any) -> None:
    def found(fn: Callable[..., Tensor], order: int) -> dict[str, Tensor]:
        """What is only rounding counts as missing: the printed formulas leave 1e-17 where a derivative vanishes."""
        every = derivatives(
            lambda *a: fn(*a, *[None] * (2 - len(a)), objective, side, reduction=reduction, **options), inputs, order
        )
        return {name: t for name, t in every.items() if name == "y" or (t.abs() > 1e-13).any()}

    for order in (1, 2, 3):
        assert_equal_derivatives(found(ours, order), found(paper, order))


def test_every_row_has_its_formula() -> None:
    assert FORMULAS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_the_paper_to_third_order(backend: str, objective: str, side: str) -> None:
    """Value, three orders and the set of gradients, for two tensors and one vector; autograd through the printed formula."""
    real, fake = (t / 2 for t in halves(*sizes_of(objective)))
    for reduction in ("mean", "sum", "none"):
        check(objective, side, reduction, [real, fake])
        check(objective, side, reduction, [torch.cat([real, fake])], n_real=len(real))


@pytest.mark.parametrize("shapes", [((1,), (1,)), ((), ()), ((4, 1), (2, 2)), ((2, 1, 3, 5), (30,)), ((127,), (127, 1))], ids=str)
@pytest.mark.parametrize("objective", SOME)
def test_shapes(backend: str, objective: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    inputs = [(t / 2).mT.contiguous().mT if t.dim() == 2 else t / 2 for t in halves(*shapes)]
    for reduction in ("mean", "none"):
        check(objective, "discriminator", reduction, inputs)


# Every objective, but by interpreted Triton one of each kind: it is slow, and test_matches_the_paper_to_third_order has them all.
GRADCHECKED = [(b, o) for b in backends.NAMES for o in (SOME if INTERPRETED and b == "triton" else OBJECTIVES)]


@pytest.mark.parametrize(("backend", "objective"), GRADCHECKED, indirect=["backend"])
def test_gradcheck(backend: str, objective: str) -> None:
    inputs = [(t / 2).requires_grad_() for t in halves((3,), (3,))]
    for side in SIDES:

        def fn(real: Tensor, fake: Tensor, side: str = side) -> Tensor:
            return ours(real, fake, objective, side)

        fast = INTERPRETED and backend == "triton"
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_in_16_bits_at_most_twice_eager(backend: str, objective: str, dtype: torch.dtype) -> None:
    """Eager: the printed formula in 16 bits; where that is exact (a sum of logits), what rounding the gradient once costs."""
    for side in SIDES:
        cases = [[t / 2 for t in halves((64,), (64,), seed=10 * i, dtype=dtype)] for i in range(4)]
        assert_accurate(
            lambda r, f, side=side: ours(r, f, objective, side),
            lambda r, f, side=side: paper(r, f, objective, side),
            cases,
            order=1,
        )


def mixture(term: str, a: Tensor, t: float) -> Tensor:
    r, f = (TERMS[term].value(a, label) for label in (1.0, 0.0))
    return t * r + (1 - t) * f


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if n not in RELATIVISTIC])
def test_smooth_labels_mix_what_real_and_fake_logits_pay(backend: str, objective: str) -> None:
    (real, fake), row = halves((5,), (4,)), OBJECTIVES[objective]
    assert row.fake is not None
    if objective == "lsgan":  # b and a are what the logits aim at
        want = (real - 0.9).square().mean() / 2 + (fake - 0.2).square().mean() / 2
    else:
        want = mixture(row.real.term, real, 0.9).mean() + mixture(row.fake.term, fake, 0.2).mean()
    for labels in ((0.9, 0.2), (torch.full_like(real, 0.9), torch.full_like(fake, 0.2))):
        got = ours(real, fake, objective, real_label=labels[0], fake_label=labels[1])
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_labels_of_zero_and_one_by_sample_are_those_by_number(backend: str) -> None:
    real, fake = halves((5,), (4,))
    for objective in OBJECTIVES:
        if OBJECTIVES[objective].relative != "pair":
            by_sample = {"real_label": torch.ones_like(real), "fake_label": torch.zeros_like(fake)}
            torch.testing.assert_close(ours(real, fake, objective, **by_sample), ours(real, fake, objective), rtol=1e-14, atol=0)


# --- known values, optima, divergences ------------------------------------------------------------------------------------------

LOG2 = math.log(2)
# The critic's logit where it cannot tell the halves apart, and what both sides pay there.
EQUILIBRIUM: dict[str, tuple[float, float, float]] = {
    "non-saturating": (0, 2 * LOG2, LOG2),
    "minimax": (0, 2 * LOG2, -LOG2),
    "maximum-likelihood": (0, 2 * LOG2, -1),
    "lsgan": (0.5, 0.25, 0.125),
    "lsgan-pearson": (0, 1, 0),
    "hinge": (0, 2, 0),
    "wgan": (0, 0, 0),
    "fgan-kl": (1, 0, -1),
    "fgan-reverse-kl": (0, 0, 1),
    "fgan-pearson": (0, 0, 0),
    "fgan-hellinger": (0, 0, 0),
    "fgan-jensen-shannon": (0, 0, 0),
    "fgan-gan": (0, 2 * LOG2, -LOG2),
    "fgan-kl-alternative": (1, 0, -1),
    "fgan-reverse-kl-alternative": (0, 0, 1),
    "fgan-pearson-alternative": (0, 0, 0),
    "fgan-hellinger-alternative": (0, 0, 0),
    "fgan-jensen-shannon-alternative": (0, 0, 0),
    "fgan-gan-alternative": (0, 2 * LOG2, LOG2),
    "relativistic": (0, LOG2, LOG2),
    "relativistic-lsgan": (0, 0.5, 0.5),
    "relativistic-hinge": (0, 1, 1),
    "relativistic-average": (0, 2 * LOG2, 2 * LOG2),
    "relativistic-average-lsgan": (0, 1, 1),
    "relativistic-average-hinge": (0, 2, 2),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equilibrium(backend: str, objective: str) -> None:
    """For halves of one law the critic's gradient vanishes at a constant logit, and the losses there are the documented ones."""
    logit, critic, generator = EQUILIBRIUM[objective]
    w = torch.full((), float(logit), device=DEVICE, dtype=torch.float64, requires_grad=True)
    logits = w.expand(8)
    loss = ours(logits, logits, objective)
    assert loss.item() == pytest.approx(critic, abs=1e-14)
    assert ours(logits, logits, objective, "generator").item() == pytest.approx(generator, abs=1e-14)
    (grad,) = torch.autograd.grad(loss, w)
    assert grad.item() == pytest.approx(0, abs=1e-14)


P, Q = [1, 2, 5], [4, 3, 1]  # of 8 samples, how many lie in each of three states
# For a density ratio u = p/q the best critic's logit, and the f whose divergence, sum q f(u), its loss is minus.
OPTIMA: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "non-saturating": (math.log, lambda u: u * math.log(u) - (1 + u) * math.log(1 + u)),
    "lsgan": (lambda u: u / (1 + u), lambda u: -u / (1 + u) / 2),
    "lsgan-pearson": (lambda u: (u - 1) / (u + 1), lambda u: -2 * u / (1 + u)),
    "fgan-kl": (lambda u: 1 + math.log(u), lambda u: u * math.log(u)),
    "fgan-reverse-kl": (math.log, lambda u: -math.log(u)),
    "fgan-pearson": (lambda u: 2 * (u - 1), lambda u: (u - 1) ** 2),
    "fgan-hellinger": (lambda u: math.log(u) / 2, lambda u: (math.sqrt(u) - 1) ** 2),
    "fgan-jensen-shannon": (math.log, lambda u: u * math.log(2 * u / (1 + u)) + math.log(2 / (1 + u))),
    "fgan-gan": (math.log, lambda u: u * math.log(u) - (1 + u) * math.log(1 + u)),
}


@pytest.mark.parametrize("objective", OPTIMA)
def test_the_best_critic_attains_the_divergence(backend: str, objective: str) -> None:
    """Its loss is minus the divergence (f-GAN, eq. 4 with equality); its gradient vanishes, and moving any logit costs."""
    logit, f = OPTIMA[objective]
    best = torch.tensor([logit(p / q) for p, q in zip(P, Q, strict=True)], dtype=torch.float64, device=DEVICE, requires_grad=True)
    of_real, of_fake = (torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).to(DEVICE) for counts in (P, Q))
    loss = ours(best[of_real], best[of_fake], objective)
    divergence = sum(q / 8 * f(p / q) for p, q in zip(P, Q, strict=True))
    assert loss.item() == pytest.approx(-divergence, rel=1e-13)
    (grad,) = torch.autograd.grad(loss, best)
    assert grad.abs().max() < 1e-14
    for step in (-0.1, 0.1):
        for k in range(3):
            moved = best.detach().clone()
            moved[k] += step
            assert ours(moved[of_real], moved[of_fake], objective) > loss


@pytest.mark.parametrize("name", F_GAN)
def test_conjugates(name: str) -> None:
    """f*(t) = sup u t - f(u): no u does better than f* at the activation's output, and the best one reaches it."""
    g, conjugate = F_GAN[name]
    t = g(torch.linspace(-2, 2, 9, dtype=torch.float64))
    u = torch.logspace(-4, 4, 4001, dtype=torch.float64)
    f = torch.tensor([OPTIMA[f"fgan-{name}"][1](v) for v in u.tolist()], dtype=torch.float64)
    best = (u * t[:, None] - f).amax(1)
    assert (best <= conjugate(t) + 1e-12).all()
    torch.testing.assert_close(best, conjugate(t), rtol=1e-4, atol=1e-4)


# --- faults of well-known code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", RELATIVISTIC)
def test_relativistic_compares_real_with_fake_not_with_real(backend: str, objective: str) -> None:
    """The fault: C(x) - mean C(x) in the real branch. Then the fake logits would not matter to it."""
    (real, fake), both = halves((6,), (6,)), {}
    for side in SIDES:
        loss = ours(real, fake, objective, side)
        torch.testing.assert_close(ours(real + 3, fake + 3, objective, side), loss, rtol=1e-12, atol=0)
        assert (ours(real, fake + 3, objective, side) - loss).abs() > 0.1
        both[side] = loss
        leaves = [t.clone().requires_grad_() for t in (real, fake)]
        grads = torch.autograd.grad(ours(*leaves, objective, side), leaves)
        assert all(g.abs().sum() > 0.1 for g in grads)
        torch.testing.assert_close(grads[0].sum(), -grads[1].sum(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours(fake, real, objective), both["generator"], rtol=1e-12, atol=0)  # swapped


@pytest.mark.parametrize("objective", RELATIVISTIC)
def test_relativistic_losses_stay_apart_where_only_the_fake_half_changes(backend: str, objective: str) -> None:
    """Each loss of the real half alone, with reduction "none", moves when the fake half does."""
    real, fake = halves((6,), (6,))
    fake = fake - 20
    near, far = (ours(real, f, objective, reduction="none")[:6] for f in (fake, real.flip(0)))
    assert not torch.equal(near, far)


@pytest.mark.parametrize(("objective", "domain"), [("fgan-reverse-kl", 0.0), ("fgan-hellinger", 1.0)])
def test_reverse_kl_and_hellinger_apply_their_output_activation(backend: str, objective: str, domain: float) -> None:
    """The fault: f* applied to the logit itself, NaN or senseless for logits outside f*'s domain (t < 0, t < 1)."""
    a = torch.tensor([-3.0, -0.5, 0.5, 1.5, 3.0], dtype=torch.float64, device=DEVICE)
    g, conjugate = F_GAN[objective.removeprefix("fgan-")]
    assert (g(a) < domain).all()
    assert not (a < domain).all()
    assert ours(a, a, objective, reduction="none").isfinite().all()
    got = ours(a, a, objective, reduction="none")
    torch.testing.assert_close(got, torch.cat([-g(a), conjugate(g(a))]), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(got[:5], -a)


def test_cross_entropy_is_of_the_logit_and_not_of_a_sigmoid(backend: str) -> None:
    """The fault: a sigmoid at the critic's end and again in the loss, which then cannot fall below 2 log(1 + exp(-1))."""
    logits = torch.full((4,), 40.0, dtype=torch.float64, device=DEVICE)
    for objective in ("non-saturating", "minimax", "fgan-gan", "relativistic", "relativistic-average"):
        assert ours(logits, -logits, objective).item() < 1e-15
        assert ours(logits.sigmoid(), (-logits).sigmoid(), objective).item() > 0.3


# --- limits ---------------------------------------------------------------------------------------------------------------------


def guarded(term: str, a: float, t: float) -> tuple[float, float, float]:
    """Value, slope and curvature in closed form, with Python's floats; t is 0 or 1."""

    def exp(x: float) -> tuple[float, float, float]:
        top = math.exp(min(x, EXP_LIMIT))
        return (top * (1 + x - EXP_LIMIT), top, 0.0) if x > EXP_LIMIT else (top, top, top)

    def decay(shift: float) -> tuple[float, float, float]:
        v, d, h = exp(-a)
        return v - shift, -d, h

    e = math.exp(-abs(a))
    sign = -1 if t else 1
    cross = max(sign * a, 0.0) + math.log1p(e), sign * (1.0 if sign * a >= 0 else e) / (1 + e), e / (1 + e) ** 2
    margin = max(0.0, 1 + sign * a)
    grow = exp(a)
    kl = exp(a - 1)
    rows = {
        "bce": (cross, cross),
        "jensen-shannon": ((cross[0] - LOG2, *cross[1:]),) * 2,
        "linear": ((-a, -1.0, 0.0), (a, 1.0, 0.0)),
        "square": ((0.5 * (a - t) ** 2, a - t, 1.0),) * 2,
        "square-sides": ((0.5 * (a + sign) ** 2, a + sign, 1.0),) * 2,
        "hinge": ((margin, sign * float(margin > 0), 0.0),) * 2,
        "kl": ((-a, -1.0, 0.0), kl),
        "reverse-kl": (decay(0.0), (a - 1, 1.0, 0.0)),
        "pearson": ((-a, -1.0, 0.0), (a * a / 4 + a, a / 2 + 1, 0.5)),
        "hellinger": (decay(1.0), (grow[0] - 1, *grow[1:])),
    }
    return rows[term][0 if t else 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_stable_to_logits_of_ten_thousand(backend: str, term: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite value, slope and curvature of each logit, exp continued by its tangent; a float16 gradient overflows."""
    monkeypatch.setattr(op, "_specs", {})
    monkeypatch.setitem(OBJECTIVES, "row", Objective(Part(term, 1.0, 1.0), Part(term, 1.0, 0.0), Part(term, 1.0, 0.0)))
    sizes = [1e4, 1e3, 200, 90, 50, 31, 30.5, 30, 29, 20, 11, 10, 3, 1, 0.5, 1e-2, 1e-4, 0]
    logits = torch.tensor([sign * s for s in sizes for sign in (1, -1)], dtype=torch.float64).to(dtype).to(DEVICE)
    leaves = [logits.clone().requires_grad_(), logits.clone().requires_grad_()]
    loss = ours(*leaves, "row", reduction="none")
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert loss.isfinite().all()
    precision, rounding = torch.finfo(loss.dtype).eps, torch.finfo(dtype).eps
    for half, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        want = torch.tensor([guarded(term, a, 1.0 - half) for a in logits.tolist()], dtype=torch.float64, device=DEVICE)
        value, slope, curvature = want.unbind(1)
        relative = (32 + EXP_LIMIT) * precision  # exp(x) multiplies the rounding of x, here of a - 1, by x
        torch.testing.assert_close(loss[half * len(logits) :][: len(logits)].double(), value, rtol=relative, atol=4 * precision)
        assert dtype == torch.float16 or grad.isfinite().all()
        torch.testing.assert_close(grad.double(), slope.to(dtype).double(), rtol=2 * rounding + relative, atol=2 * precision)
        (second,) = torch.autograd.grad((grad + 0 * leaf).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(second.double(), curvature.to(dtype).double(), rtol=2 * rounding + relative, atol=2 * precision)
    total = ours(logits.float(), logits.float(), "row")
    assert total.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_row_is_finite_for_large_logits(backend: str, objective: str, dtype: torch.dtype) -> None:
    values = torch.tensor([1e4, -1e4, 1e4, -1e4, 3.0, 100.0], dtype=dtype, device=DEVICE)
    for side in SIDES:
        leaves = [values.clone().requires_grad_(), values.flip(0).clone().requires_grad_()]
        loss = ours(*leaves, objective, side)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert loss.isfinite()
        assert dtype == torch.float16 or all(g is None or g.isfinite().all() for g in grads)
        assert not any(g is not None and g.isnan().any() for g in grads)


def test_hinge_has_the_slope_of_relu_at_its_corner(backend: str) -> None:
    a = torch.tensor([1.0, -1.0, 1 + 1e-15, -1 - 1e-15], dtype=torch.float64, device=DEVICE)
    assert_matches(
        lambda r, f: ours(r, f, "hinge", reduction="none"), lambda r, f: torch.cat([torch.relu(1 - r), torch.relu(1 + f)]), [a, a]
    )


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if OBJECTIVES[n].real.term not in ("bce", "jensen-shannon")])
def test_nan_and_infinity_show(kernel_backend: str, objective: str) -> None:
    """As in the plain formulas under autograd; a NaN logit leaves NaN in its loss."""
    logits = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE)
    for side in SIDES:
        got, want = (
            derivatives(lambda r, f, fn=fn, side=side: fn(r, f, objective, side, reduction="none").loss, [logits, logits], 1)
            for fn in (gankern.gan_loss, op.reference)
        )
        assert_equal_derivatives(got, want)
        assert got["y"][0 if side == "discriminator" else 4].isnan()
        assert ours(logits, logits, objective, side).isnan()


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_empty_halves_of_averages_as_in_eager(backend: str, sizes: tuple[int, int]) -> None:
    inputs = halves((sizes[0],), (sizes[1],))
    for objective in RELATIVISTIC[3:]:
        for reduction in ("mean", "none"):
            assert_matches(
                lambda r, f, o=objective, k=reduction: ours(r, f, o, reduction=k),
                lambda r, f, o=objective, k=reduction: paper(r, f, o, reduction=k),
                inputs,
                1,
            )
    assert ours(*(t[:0] for t in inputs), "relativistic").isnan()


@pytest.mark.parametrize("objective", ["fgan-kl", "hinge", "relativistic-lsgan", "relativistic-average"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_logits_are_the_same_bits_on_any_number_of_threads(backend: str, objective: str, reduction: str) -> None:
    inputs = [(t / 3).requires_grad_() for t in halves((20_011,), (20_011,), dtype=torch.float32)]
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = gankern.gan_loss(*inputs, objective, reduction=reduction)
            runs.append((out.loss, out.stats, *torch.autograd.grad(out.loss.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    assert backend == "reference" or all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = paper(*exact, objective, reduction=reduction)
    torch.testing.assert_close(runs[0][0].double(), want, rtol=4e-6, atol=4e-6)
    for got, expected in zip(runs[0][2:], torch.autograd.grad(want.sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=4e-6, atol=4e-6 * expected.abs().max().item())


# --- relativistic in general, unrolling, torch.func, torch.compile, the registered op -------------------------------------------


@pytest.mark.parametrize("relative", ["pair", "average"])
def test_a_general_relativistic_row(backend: str, relative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """f1(a_r - ...) + f2(a_f - ...) with an f1 and an f2 that have nothing to do with each other, and other weights."""
    row = Objective(Part("kl", 0.5, 0.0), Part("pearson", 2.0, 0.25), Part("kl", 1.0, "real"), relative=relative)
    monkeypatch.setattr(op, "_specs", {})
    monkeypatch.setitem(OBJECTIVES, "general", row)

    def general(r: Tensor, f: Tensor, reduction: str) -> Tensor:
        x, y = (r - f, f - r) if relative == "pair" else (r - f.mean(), f - r.mean())
        f1, f2 = 0.5 * torch.exp(x - 1), 2 * (0.75 * (y**2 / 4 + y) - 0.25 * y)
        return torch.cat([f1, f2]) if reduction == "none" else sum(getattr(v, reduction)() for v in (f1, f2))

    for reduction in ("mean", "sum", "none"):
        for order in (1, 2, 3):
            assert_matches(
                lambda r, f, k=reduction: ours(r, f, "general", reduction=k),
                lambda r, f, k=reduction: general(r, f, k),
                [t / 3 for t in halves((6,), (6,))],
                order,
            )


def unrolled(loss: Callable[..., Tensor], objective: str, steps: int = 2) -> list[Tensor]:
    """d(generator loss after `steps` differentiable critic updates) / d(generator parameters), by Metz et al. 2017."""
    x, z = randn(8, 2, seed=1), randn(8, 3, seed=2)
    generator = [randn(3, 2, seed=3).requires_grad_(), randn(2, seed=4).requires_grad_()]
    critic = [randn(2, 6, seed=5).requires_grad_(), randn(6, seed=6).requires_grad_()]

    def scores() -> tuple[Tensor, Tensor]:
        return torch.tanh(x @ critic[0]) @ critic[1] / 2, torch.tanh(fake @ critic[0]) @ critic[1] / 2

    fake = torch.tanh(z @ generator[0] + generator[1])
    for _ in range(steps):
        value = loss(*scores(), objective)
        critic = [w - 0.3 * g for w, g in zip(critic, torch.autograd.grad(value, critic, create_graph=True), strict=True)]
    return list(torch.autograd.grad(loss(*scores(), objective, "generator"), generator))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unrolled_critic_steps(backend: str, objective: str) -> None:
    got, want, blind = (unrolled(ours, objective), unrolled(paper, objective), unrolled(paper, objective, steps=0))
    for g, w, b in zip(got, want, blind, strict=True):
        assert (w - b).abs().max() > 1e-6
        torch.testing.assert_close(g, w, rtol=0, atol=1e-11 * max(w.abs().max().item(), 1e-3))


@pytest.mark.parametrize("objective", SOME)
def test_backward_of_the_result_is_backward_of_its_loss(backend: str, objective: str) -> None:
    for side in SIDES:
        pairs_of = [[t.clone().requires_grad_() for t in halves((6,), (6,))] for _ in range(2)]
        gankern.gan_loss(*pairs_of[0], objective, side).backward()
        ours(*pairs_of[1], objective, side).backward()
        for a, b in zip(*pairs_of, strict=True):
            assert (a.grad is None or not a.grad.any()) if b.grad is None else torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", SOME)
def test_func_grad_of_grad_and_vmap(backend: str, objective: str, reduction: str) -> None:
    inputs = [t / 2 for t in halves((4,), (4,))]

    def second(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.func.grad(lambda r, f: fn(r, f, objective, reduction=reduction).square().sum())(*a).square().sum()

    got, want = (torch.func.grad(second(fn), argnums=(0, 1))(*inputs) for fn in (ours, paper))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    batch = [torch.stack([t, t + 1, 2 * t]) for t in inputs]
    for call in (lambda fn: lambda r, f: fn(r, f, objective, reduction=reduction), lambda fn: torch.func.grad(second(fn))):
        got = torch.vmap(call(ours))(*batch)
        torch.testing.assert_close(
            got, torch.stack([call(paper)(*(t[i] for t in batch)) for i in range(3)]), rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("name", [*COMPILABLE, None])
@pytest.mark.parametrize("objective", SOME)
def test_compile_fullgraph(name: str | None, objective: str) -> None:
    need(name or "reference")
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in halves((6,), (6,), dtype=torch.float32)]
    fn = torch.compile(lambda r, f: gankern.gan_loss(r, f, objective), fullgraph=True, backend="aot_eager")
    if name is None:
        loss = fn(*inputs).loss
    else:
        with gankern.use_backend(name):
            loss = fn(*inputs).loss
    want = paper(*inputs, objective)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("objective", SOME)
def test_forward_mode_is_refused(kernel_backend: str, objective: str) -> None:
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda r, f: ours(r, f, objective), tuple(halves((4,), (4,))), tuple(halves((4,), (4,), seed=5)))


@pytest.mark.parametrize("objective", SOME)
def test_autocast_leaves_it_in_float32(backend: str, objective: str) -> None:
    inputs = halves((6,), (6,), dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = ours(*inputs, objective)
        of_half = ours(*(t.bfloat16() for t in inputs), objective)
    assert torch.equal(loss, ours(*inputs, objective))
    assert of_half.dtype == torch.float32


@pytest.mark.parametrize(("term", "relative"), [(term, k % 3) for k, term in enumerate(TERMS)])
def test_opcheck(term: str, relative: int) -> None:
    """Schema, fake tensors and aliasing depend on neither: each term once, each pairing with some."""
    need("compiled")
    code, (a, b) = TERMS[term].code, halves((6,), (6,), dtype=torch.float32)
    for reduction in (0, 1):
        common = (a, b, 6, code, 1.0, 1.0, None, code, 1.0, 0.0, None, reduction)
        torch.library.opcheck(torch.ops.gankern.gan_loss.default, (*common, relative))
    torch.library.opcheck(torch.ops.gankern.gan_loss_grad2.default, (*common, randn(seed=3, dtype=torch.float32), a, b))


def test_the_raw_op_refuses_what_it_does_not_know() -> None:
    need("compiled")
    a = torch.zeros(5)
    for changes, sentence in (
        ({3: 10}, "gan_loss: term must be a known code"),
        ({12: 3}, "gan_loss: relative must be 0, 1 or 2"),
        ({12: 1}, "gan_loss: n_real must be half the number of logits when they pair"),
    ):
        arguments = [a, None, 2, 0, 1.0, 1.0, None, 0, 1.0, 0.0, None, 1, 0]
        for index, value in changes.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=sentence):
            torch.ops.gankern.gan_loss(*arguments)


R, G = torch.zeros(4), torch.zeros(3)


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        ((R, G, "relativistic"), {}, "gan_loss: fake must have as many logits as real, 4, to pair with, got 3"),
        (
            (torch.zeros(7), None, "relativistic-hinge"),
            {"n_real": 3},
            "gan_loss: fake must have as many logits as real, 3, to pair with, got 4",
        ),
        ((R, None, "relativistic"), {}, "gan_loss: fake must be given for a relativistic objective, got None"),
        (
            (None, G, "relativistic-average"),
            {"side": "generator"},
            "gan_loss: real must be given for a relativistic objective, got None",
        ),
        (
            (R, R, "relativistic-average"),
            {"side": "generator", "fake_label": torch.ones(3)},
            "gan_loss: fake_label must have one value for each of 4 logits, got 3",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(backend: str, args: Any, options: dict[str, Any], sentence: str) -> None:
    for _ in range(2):  # settings that have passed are kept: the second call takes the short way
        with pytest.raises(ValueError) as caught:
            gankern.gan_loss(*args, **options)
        assert str(caught.value) == sentence
