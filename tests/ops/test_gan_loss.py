"""gan_loss on every backend: values and derivatives against binary cross entropy, stability, statistics, torch.func, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.ops import gan_loss as op
from tests.support import DEVICE, assert_accurate, assert_equal_derivatives, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SIDES = [
    ("non-saturating", "discriminator"),
    ("non-saturating", "generator"),
    ("minimax", "discriminator"),
    ("minimax", "generator"),
]
INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)
Label = float | Tensor


def bce(logits: Tensor, label: Label, reduction: str, dtype: torch.dtype | None) -> Tensor:
    logits = (logits if dtype is None else logits.to(dtype)).flatten()
    target = label.to(logits.dtype).flatten() if isinstance(label, Tensor) else torch.full_like(logits, label)
    return F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)


def eager(
    real: Tensor | None,
    fake: Tensor | None,
    objective: str = "non-saturating",
    side: str = "discriminator",
    n_real: int | None = None,
    real_label: Label = 1.0,
    fake_label: Label = 0.0,
    reduction: str = "mean",
    own_dtype: bool = False,
) -> Tensor:
    """The oracle: what a user of plain PyTorch writes, each half by itself; in float32 for 16-bit logits unless `own_dtype`."""
    if n_real is not None:
        assert real is not None
        real, fake = real.flatten()[:n_real], real.flatten()[n_real:]
    given = fake if real is None else real
    dtype = None if own_dtype else torch.float64 if given.dtype == torch.float64 else torch.float32
    if side == "generator":
        fake_part = (
            bce(fake, real_label, reduction, dtype) if objective == "non-saturating" else -bce(fake, fake_label, reduction, dtype)
        )
        real_part = None if real is None else real.flatten().to(fake_part.dtype) * 0
    else:
        real_part = None if real is None else bce(real, real_label, reduction, dtype)
        fake_part = None if fake is None else bce(fake, fake_label, reduction, dtype)
    parts = [p for p in (real_part, fake_part) if p is not None]
    return torch.cat(parts) if reduction == "none" else sum(p if p.dim() == 0 else p.sum() for p in parts)


def halves(
    real_shape: tuple[int, ...], fake_shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [randn(*real_shape, seed=seed, dtype=dtype, scale=3), randn(*fake_shape, seed=seed + 1, dtype=dtype, scale=3)]


LABELS: dict[str, Callable[[int, int], dict[str, Label]]] = {
    "hard": lambda n, m: {},
    "smooth": lambda n, m: {"real_label": 0.9, "fake_label": 0.1},
    "integers": lambda n, m: {"real_label": 0, "fake_label": 1},
    "per sample": lambda n, m: {
        "real_label": 0.7 + 0.5 * randn(n, seed=8).sigmoid(),
        "fake_label": 0.3 * randn(m, seed=9).sigmoid(),
    },
}


def check(inputs: list[Tensor], call: Callable[..., Any]) -> None:
    """`call` maps (loss function, *inputs) to a loss. Each order by itself: a pass that builds no graph takes other kernels."""
    for order in (1, 2, 3):
        assert_matches(
            lambda *a: call(lambda *b, **c: gankern.gan_loss(*b, **c).loss, *a), lambda *a: call(eager, *a), inputs, order
        )


# --- values and derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("objective", "side"), SIDES)
def test_matches_cross_entropy_to_third_order(backend: str, objective: str, side: str, labels: str, reduction: str) -> None:
    """Both halves, as two tensors and as one vector."""
    n, m = 5, 9
    given = LABELS[labels](n, n if (objective, side) == ("non-saturating", "generator") else m)
    if side == "generator" and objective == "non-saturating" and labels == "per sample":
        given = {"real_label": LABELS[labels](m, m)["real_label"]}
    options = {"objective": objective, "side": side, "reduction": reduction, **given}
    real, fake = halves((n,), (m,))
    check([real, fake], lambda fn, real, fake: fn(real, fake, **options))
    check([torch.cat([real, fake])], lambda fn, both: fn(both, None, n_real=n, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shapes", [((1,), (1,)), ((), ()), ((4, 1), (4, 1)), ((2, 3), (7,)), ((2, 1, 3, 5), (1, 1, 1, 1)), ((127,), (131,))], ids=str
)
def test_shapes(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> None:
    for reduction in ("mean", "none"):
        check(halves(*shapes, dtype=dtype), lambda fn, real, fake, r=reduction: fn(real, fake, reduction=r))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_half_alone(backend: str, reduction: str) -> None:
    """A critic with BatchNorm is run on each half by itself: the two losses add up to the pair's."""
    real, fake = halves((6,), (4,))
    check([real], lambda fn, real: fn(real, None, reduction=reduction))
    check([fake], lambda fn, fake: fn(None, fake, reduction=reduction))
    for objective in ("non-saturating", "minimax"):
        check([fake], lambda fn, fake, o=objective: fn(None, fake, objective=o, side="generator", reduction=reduction))
    if reduction != "none":
        one, other = gankern.gan_loss(real, reduction=reduction), gankern.gan_loss(None, fake, reduction=reduction)
        torch.testing.assert_close(one.loss + other.loss, gankern.gan_loss(real, fake, reduction=reduction).loss)
        assert one.d_fake.isnan()
        assert other.d_real.isnan()


@pytest.mark.parametrize("n_real", [0, 1, 6, 7])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_split_of_one_vector(backend: str, n_real: int, reduction: str) -> None:
    check([randn(7, seed=3)], lambda fn, both: fn(both, None, n_real=n_real, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_empty_halves_as_in_eager(backend: str, sizes: tuple[int, int], reduction: str) -> None:
    """The mean over a half that is given and empty is NaN, as in eager; its sum is 0."""
    inputs = halves((sizes[0],), (sizes[1],))
    check(inputs, lambda fn, real, fake: fn(real, fake, reduction=reduction))
    stats = gankern.gan_loss(*inputs, reduction=reduction)
    assert [s.isnan().item() for s in stats.stats] == [sizes[0] == 0, sizes[1] == 0, sum(sizes) == 0]


def test_objective_in_closed_form(backend: str) -> None:
    """Where D cannot tell them apart (logits 0) the critic pays 2 log 2, that is minus the value function -log 4."""
    zeros = torch.zeros(8, device=DEVICE, dtype=torch.float64)
    for (objective, side), want in zip(SIDES, (2 * math.log(2), math.log(2), math.log(4), -math.log(2)), strict=True):
        loss = gankern.gan_loss(zeros, zeros, objective, side).loss.item()
        assert loss == pytest.approx(want, abs=1e-15)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides(backend: str, layout: str, reduction: str) -> None:
    inputs = [LAYOUTS[layout](t) for t in halves((4, 3), (3, 5))]
    labels = {"real_label": LAYOUTS[layout](randn(4, 3, seed=7)), "fake_label": LAYOUTS[layout](randn(3, 5, seed=8))}
    check(inputs, lambda fn, real, fake: fn(real, fake, reduction=reduction, **labels))
    leaves = [t.detach().requires_grad_() for t in inputs]
    c = torch.stack([randn(27, seed=1)] * 2, -1)[..., 0]
    got, want = (
        torch.autograd.grad(loss, leaves, c)
        for loss in (gankern.gan_loss(*leaves, reduction="none").loss, eager(*leaves, reduction="none"))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# What each half pays in closed form, as (weight w, sign s) for w softplus(s a); None: nothing.
CLOSED = {
    ("non-saturating", "discriminator"): ((1, -1), (1, 1)),
    ("non-saturating", "generator"): (None, (1, -1)),
    ("minimax", "discriminator"): ((1, -1), (1, 1)),
    ("minimax", "generator"): (None, (-1, 1)),
}


def closed_form(a: float, part: tuple[int, int] | None) -> tuple[float, float, float]:
    """Value, slope and curvature at logit a, each right to the last bits of float64 (F.binary_cross_entropy_with_logits is not)."""
    if part is None:
        return 0.0, 0.0, 0.0
    w, s = part
    e = math.exp(-abs(a))
    sigmoid = (1.0 if s * a >= 0 else e) / (1.0 + e)
    return w * (max(s * a, 0.0) + math.log1p(e)), w * s * sigmoid, w * e / (1.0 + e) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("objective", "side"), SIDES)
def test_stable_to_logits_of_ten_thousand(backend: str, objective: str, side: str, dtype: torch.dtype) -> None:
    """Value, slope and curvature of each logit, where naive formulas overflow, cancel or round to nothing."""
    sizes = [1e4, 1e3, 200, 104, 90, 88.5, 87.5, 87, 50, 30, 20, 17, 16, 10, 3, 1, 0.5, 1e-2, 1e-4, 1e-7, 0]
    logits = torch.tensor([sign * s for s in sizes for sign in (1, -1)], dtype=torch.float64).to(dtype).to(DEVICE)
    leaves = [logits.clone().requires_grad_(), logits.clone().requires_grad_()]
    loss = gankern.gan_loss(*leaves, objective, side, reduction="none").loss
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True, allow_unused=True)
    precision, rounding = torch.finfo(loss.dtype).eps, torch.finfo(dtype).eps  # of the loss; of what returns in the logits' dtype
    for half, (part, leaf, grad) in enumerate(zip(CLOSED[objective, side], leaves, grads, strict=True)):
        want = torch.tensor([closed_form(a, part) for a in logits.tolist()], dtype=torch.float64, device=DEVICE)
        value, slope, curvature = want.unbind(1)
        got = loss[half * len(logits) :][: len(logits)]
        torch.testing.assert_close(got.double(), value, rtol=16 * precision, atol=2 * torch.finfo(torch.float32).tiny)
        if part is None:
            assert grad is None or not grad.any()
            continue
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), slope, rtol=rounding + 16 * precision, atol=2 * precision)
        (second,) = torch.autograd.grad(grad.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(second.double(), curvature, rtol=rounding + 16 * precision, atol=2 * precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, reduction: str) -> None:
    cases = [halves((130,), (61,), seed=10 * i, dtype=dtype) for i in range(6)]
    assert_accurate(
        lambda real, fake: gankern.gan_loss(real, fake, reduction=reduction).loss,
        lambda real, fake: eager(real, fake, reduction=reduction, own_dtype=True),
        cases,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in halves((6,), (4,), dtype=dtype)]
    result = gankern.gan_loss(*inputs)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.loss.dtype == result.stats.dtype == accumulated
    assert all(g.dtype == dtype for g in torch.autograd.grad(result.loss, inputs))
    assert gankern.gan_loss(*inputs, reduction="none").loss.shape == (10,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_per_sample_labels_keep_their_precision_in_16_bits(backend: str, dtype: torch.dtype) -> None:
    real, fake = halves((6,), (4,), dtype=dtype)
    label = torch.full((6,), 0.901, device=DEVICE)
    got, want = gankern.gan_loss(real, fake, real_label=label).loss, gankern.gan_loss(real, fake, real_label=0.901).loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_nan_and_infinity_show_as_in_eager(backend: str) -> None:
    """The gradients of eager PyTorch, and a loss that is NaN or the limit of the formula, never another number."""
    logits = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE)
    for label in (0.0, 0.25, 1.0):
        got, want = (
            derivatives(lambda r, f, fn=fn, t=label: fn(r, f, real_label=t, fake_label=t, reduction="none"), [logits, logits], 1)
            for fn in (lambda *a, **k: gankern.gan_loss(*a, **k).loss, eager)
        )
        loss, limits = got.pop("y").tolist(), [math.nan, math.inf * (1 - label) if label < 1 else 0.0, math.inf if label else 0.0]
        assert all(math.isnan(v) or v == limit for v, limit in zip(loss[:3] + loss[4:7], limits * 2, strict=True))
        torch.testing.assert_close(torch.tensor(loss)[3::4], want.pop("y")[3::4].cpu())
        assert_equal_derivatives(got, want)
    total = gankern.gan_loss(logits, logits)
    assert not total.loss.isfinite()
    assert total.d_real.isnan()


def test_gradcheck(backend: str) -> None:
    inputs = [t.requires_grad_() for t in halves((4,), (3,))]
    for reduction in ("mean", "none"):

        def fn(real: Tensor, fake: Tensor, r: str = reduction) -> Tensor:
            return gankern.gan_loss(real, fake, real_label=0.9, reduction=r).loss

        fast = INTERPRETED and backend == "triton"  # along random directions instead of element by element
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=fast)


@pytest.mark.parametrize("sizes", [(40_009, 20_011), (65_536, 8_192)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_logits(backend: str, sizes: tuple[int, int], reduction: str) -> None:
    """More logits than one block or chunk holds, on several threads; the same bits each run."""
    inputs, threads = [t.requires_grad_() for t in halves((sizes[0],), (sizes[1],), dtype=torch.float32)], torch.get_num_threads()
    label = randn(sizes[0], seed=4).sigmoid()
    try:
        torch.set_num_threads(3)
        runs = []
        for _ in range(2):
            result = gankern.gan_loss(*inputs, real_label=label, reduction=reduction)
            runs.append((result.loss, result.stats, *torch.autograd.grad(result.loss.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = eager(*exact, real_label=label, reduction=reduction)
    torch.testing.assert_close(runs[0][0].double(), want, rtol=2e-6, atol=1e-6)
    for got, expected in zip(runs[0][2:], torch.autograd.grad(want.sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-7 * expected.abs().max().item())
    real, fake = (t.detach().double() for t in inputs)
    stats = torch.stack([real.sigmoid().mean(), fake.sigmoid().mean(), torch.cat([real > 0, fake <= 0]).double().mean()])
    torch.testing.assert_close(runs[0][1].double(), stats, rtol=2e-6, atol=0)


# --- statistics ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("objective", "side"), SIDES)
def test_statistics(backend: str, objective: str, side: str, dtype: torch.dtype) -> None:
    real = torch.tensor([[3.0, -1.0], [0.0, 0.5]], dtype=dtype, device=DEVICE).requires_grad_()
    fake = torch.tensor([-2.0, 0.0, 4.0, -0.25, 1.0], dtype=dtype, device=DEVICE).requires_grad_()
    for result in (
        gankern.gan_loss(real, fake, objective, side),
        gankern.gan_loss(torch.cat([real.flatten(), fake]), None, objective, side, n_real=4),
    ):
        torch.testing.assert_close(result.d_real.double(), real.detach().double().sigmoid().mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(result.d_fake.double(), fake.detach().double().sigmoid().mean(), rtol=1e-6, atol=0)
        assert result.accuracy.item() == pytest.approx(5 / 9)  # 3 and 0.5 of the real ones; -2, 0 and -0.25 of the fake ones
        assert result.loss.requires_grad
        for statistic in (result.stats, result.d_real, result.d_fake, result.accuracy):
            assert not statistic.requires_grad
            assert statistic.dtype == result.loss.dtype


def test_real_half_only_enters_the_statistics_on_the_generators_side(backend: str) -> None:
    real, fake = (t.requires_grad_() for t in halves((6,), (4,)))
    with_real, without = gankern.gan_loss(real, fake, side="generator"), gankern.gan_loss(None, fake, side="generator")
    torch.testing.assert_close(with_real.loss, without.loss, rtol=0, atol=0)
    assert not with_real.d_real.isnan()
    (grad,) = torch.autograd.grad(with_real.loss, real, allow_unused=True)
    assert grad is None or not grad.any()


# --- what GAN training does with it -------------------------------------------------------------------------------------------


def unrolled_gradient(loss_fn: Callable[..., Tensor], dtype: torch.dtype, steps: int = 2) -> list[Tensor]:
    """d(generator loss after `steps` differentiable critic updates) / d(generator parameters), by Metz et al. 2017."""
    x, z = randn(8, 2, seed=1, dtype=dtype), randn(8, 3, seed=2, dtype=dtype)
    generator = [randn(3, 2, seed=3, dtype=dtype).requires_grad_(), randn(2, seed=4, dtype=dtype).requires_grad_()]
    critic = [randn(2, 6, seed=5, dtype=dtype).requires_grad_(), randn(6, 1, seed=6, dtype=dtype).requires_grad_()]

    def score(points: Tensor) -> Tensor:
        return torch.tanh(points @ critic[0]) @ critic[1]

    fake = torch.tanh(z @ generator[0] + generator[1])
    for _ in range(steps):
        loss = loss_fn(score(x), score(fake))
        critic = [w - 0.5 * g for w, g in zip(critic, torch.autograd.grad(loss, critic, create_graph=True), strict=True)]
    return list(torch.autograd.grad(loss_fn(None, score(fake), side="generator"), generator))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_unrolled_critic_steps(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    got = unrolled_gradient(lambda *a, **k: gankern.gan_loss(*a, **k).loss, dtype)
    want, blind = unrolled_gradient(eager, torch.float64), unrolled_gradient(eager, torch.float64, steps=0)
    for g, w, b in zip(got, want, blind, strict=True):
        assert (w - b).abs().max() > 100 * tolerance, "the unrolled steps change nothing: this test would see no cut graph"
        torch.testing.assert_close(g.double(), w, rtol=0, atol=tolerance * w.abs().max().item())


def test_backward_twice(backend: str) -> None:
    inputs = [t.requires_grad_() for t in halves((4,), (3,))]
    loss = gankern.gan_loss(*inputs).loss
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_of_the_result_is_backward_of_its_loss(backend: str, reduction: str, dtype: torch.dtype) -> None:
    """Through a critic, for two tensors, one vector, one half alone and one half that wants no gradient; .grad accumulates."""
    x, w = randn(9, 3, seed=1, dtype=dtype), randn(3, seed=2, dtype=dtype)
    calls: list[Callable[[Tensor], gankern.GanLoss]] = [
        lambda w: gankern.gan_loss(x[:5] @ w, x[5:] @ w, reduction=reduction),
        lambda w: gankern.gan_loss(x @ w, n_real=5, reduction=reduction),
        lambda w: gankern.gan_loss(x[:5] @ w, reduction=reduction),
        lambda w: gankern.gan_loss((x[:5] @ w).detach(), x[5:] @ w, reduction=reduction),
        lambda w: gankern.gan_loss(x[:5] @ w, (x[5:] @ w).detach(), reduction=reduction),
        lambda w: gankern.gan_loss(x[:5] @ w.detach(), x[5:] @ w, "minimax", "generator", reduction=reduction),
    ]
    for call in calls:
        one, other = w.clone().requires_grad_(), w.clone().requires_grad_()
        for _ in range(2):
            call(one).backward()
            out = call(other)
            out.loss.backward()
            assert not out.value.requires_grad
            assert torch.equal(out.value, out.loss)
        assert one.grad is not None
        assert one.grad.any()
        assert torch.equal(one.grad, other.grad)


def test_backward_of_the_result_refuses_what_backward_of_the_loss_refuses(backend: str) -> None:
    real, fake = halves((4,), (3,))
    with pytest.raises(RuntimeError, match="does not require grad"):
        gankern.gan_loss(real, fake).backward()
    with pytest.raises(RuntimeError, match="scalar"):
        gankern.gan_loss(real.requires_grad_(), fake, reduction="none").backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        gankern.gan_loss(real, fake).backward()


@pytest.mark.parametrize("which", [0, 1])
def test_logits_changed_in_place_are_not_differentiated_in_silence(kernel_backend: str, which: int) -> None:
    """They are other tensors by then, and the gradient known from the forward pass is not theirs."""
    for backward in (lambda out: out.loss.backward(), lambda out: out.backward()):
        leaf = randn(4, seed=1).requires_grad_()
        logits = [leaf * 1.0, leaf * 2.0]
        out = gankern.gan_loss(*logits)
        logits[which].mul_(3.0)
        with pytest.raises(RuntimeError, match="in place"):
            backward(out)


def test_a_half_that_wants_no_gradient(backend: str) -> None:
    for i in (0, 1):
        inputs = halves((4,), (3,))
        inputs[i].requires_grad_()
        check([inputs[i].detach()], lambda fn, t, i=i, inputs=inputs: fn(*(t if j == i else inputs[j].detach() for j in (0, 1))))


# --- torch.func, torch.compile, autocast, the registered ops ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad_of_grad(backend: str, reduction: str) -> None:
    inputs = halves((4,), (3,))

    def second(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.func.grad(lambda r, f: fn(r, f, reduction=reduction).square().sum())(*a).square().sum()

    def third(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.func.grad(second(fn))(*a).square().sum()

    for level in (second, third):
        got, want = (
            torch.func.grad(level(fn), argnums=(0, 1))(*inputs) for fn in (lambda *a, **k: gankern.gan_loss(*a, **k).loss, eager)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 0)], ids=str)
def test_vmap(backend: str, dims: tuple[int | None, int | None], reduction: str) -> None:
    """Each sample its own pair of halves: losses, statistics and gradients."""
    batch = 3
    inputs = [
        t if d is None else torch.stack([t + i for i in range(batch)], d) for t, d in zip(halves((4,), (3,)), dims, strict=True)
    ]
    single = [[t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)] for i in range(batch)]

    def call(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        out = gankern.gan_loss(real, fake, reduction=reduction)
        return out.loss, out.d_real

    losses, d_real = torch.vmap(call, dims)(*inputs)
    torch.testing.assert_close(losses, torch.stack([eager(*s, reduction=reduction) for s in single]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_real, torch.stack([s[0].sigmoid().mean() for s in single]), rtol=1e-12, atol=1e-12)

    def gradients(fn: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda r, f: fn(r, f, reduction=reduction).square().sum(), argnums=(0, 1))

    grads = torch.vmap(gradients(lambda *a, **k: gankern.gan_loss(*a, **k).loss), dims)(*inputs)
    wants = [gradients(eager)(*s) for s in single]
    for j, g in enumerate(grads):
        torch.testing.assert_close(g, torch.stack([w[j] for w in wants]), rtol=1e-12, atol=1e-12)


def test_vmap_over_labels_and_one_vector(backend: str) -> None:
    both, labels = torch.cat(halves((4,), (3,))), randn(3, 4, seed=6).sigmoid()
    got = torch.vmap(lambda t: gankern.gan_loss(both, n_real=4, real_label=t).loss)(labels)
    torch.testing.assert_close(
        got, torch.stack([eager(both, None, n_real=4, real_label=t) for t in labels]), rtol=1e-12, atol=1e-12
    )


def test_gradient_through_vmap(backend: str) -> None:
    inputs = [torch.stack([t, t - 1]) for t in halves((4,), (3,))]
    assert_matches(
        lambda r, f: torch.vmap(lambda r, f: gankern.gan_loss(r, f).loss)(r, f),
        lambda r, f: torch.stack([eager(r[i], f[i]) for i in range(2)]),
        inputs,
    )


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    inputs, tangents = halves((4,), (3,)), halves((4,), (3,), seed=5)

    def call(fn: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(fn, tuple(inputs), tuple(tangents))[1]

    def ours(real: Tensor, fake: Tensor) -> Tensor:
        return gankern.gan_loss(real, fake).loss

    if backend == "reference":
        torch.testing.assert_close(call(ours), call(eager))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            call(ours)


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None) -> None:
    need(name or "reference")
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in halves((6,), (4,), dtype=torch.float32)]
    fn = torch.compile(lambda r, f: gankern.gan_loss(r, f, real_label=0.9), fullgraph=True, backend="aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        result = fn(*inputs)
    want = eager(*inputs, real_label=0.9)
    torch.testing.assert_close(result.loss, want)
    torch.testing.assert_close(result.d_real, inputs[0].detach().sigmoid().mean())
    assert not result.d_real.requires_grad
    for got, expected in zip(torch.autograd.grad(result.loss, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_leaves_it_in_float32(backend: str) -> None:
    inputs = [t.requires_grad_() for t in halves((6,), (4,), dtype=torch.float32)]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = gankern.gan_loss(*inputs).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, gankern.gan_loss(*inputs).loss)
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]  # what a critic hands on under autocast
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = gankern.gan_loss(*half).loss
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, half))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("pair", [True, False], ids=["two tensors", "one vector"])
def test_opcheck(dtype: torch.dtype, reduction: int, pair: bool) -> None:
    need("compiled")
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = halves((2, 3), (4,), dtype=dtype)
    if not pair:
        a, b = torch.cat([a.flatten(), b]), None
    targets = randn(6, seed=2, dtype=accumulated)
    common = (a, b, 6, 0, 1.0, 0.0, targets, 0, 1.0, 0.1, None, reduction)
    g = randn(*((10,) if reduction == 0 else ()), seed=3, dtype=accumulated)
    torch.library.opcheck(torch.ops.gankern.gan_loss.default, (*common, 0))
    torch.library.opcheck(torch.ops.gankern.gan_loss_grad2.default, (*common, g, a, b))


# --- bad input ----------------------------------------------------------------------------------------------------------------

R, G = torch.zeros(4), torch.zeros(3)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "nothing": ((None, None), {}, ValueError, "gan_loss: real or fake must be given, got None for both"),
    "real is no tensor": ((1.0, G), {}, TypeError, "gan_loss: real must be a torch.Tensor, got float"),
    "fake is no tensor": ((R, [0.0]), {}, TypeError, "gan_loss: fake must be a torch.Tensor, got list"),
    "integer logits": ((R.long(), G), {}, TypeError, "gan_loss: real must be float64, float32, bfloat16 or float16, got int64"),
    "boolean logits": ((None, G > 0), {}, TypeError, "gan_loss: fake must be float64, float32, bfloat16 or float16, got bool"),
    "dtypes differ": ((R, G.double()), {}, TypeError, "gan_loss: fake must have dtype float32, got float64"),
    "devices differ": ((R, G.to("meta")), {}, ValueError, "gan_loss: fake must be on cpu, got meta"),
    "objective": ((R, G, "gan"), {}, ValueError, f"gan_loss: objective must be one of {', '.join(op.OBJECTIVES)}, got 'gan'"),
    "side": ((R, G, "minimax", "critic"), {}, ValueError, "gan_loss: side must be one of discriminator, generator, got 'critic'"),
    "reduction": ((R, G), {"reduction": "max"}, ValueError, "gan_loss: reduction must be one of none, mean, sum, got 'max'"),
    "n_real and fake": (
        (R, G),
        {"n_real": 2},
        ValueError,
        "gan_loss: n_real must come with one vector of logits in `real` and no `fake`, got 2",
    ),
    "n_real too large": ((R,), {"n_real": 5}, ValueError, "gan_loss: n_real must be in [0, 4], the number of logits, got 5"),
    "n_real negative": ((R,), {"n_real": -1}, ValueError, "gan_loss: n_real must be in [0, 4], the number of logits, got -1"),
    "n_real is a float": ((R,), {"n_real": 2.0}, TypeError, "gan_loss: n_real must be an int, got float"),
    "generator without fake": (
        (R,),
        {"side": "generator"},
        ValueError,
        "gan_loss: fake must be given on the generator's side, got None",
    ),
    "label is text": ((R, G), {"real_label": "1"}, TypeError, "gan_loss: real_label must be a number, got str"),
    "label is NaN": ((R, G), {"fake_label": math.nan}, ValueError, "gan_loss: fake_label must be a finite number, got nan"),
    "real labels": (
        (R, G),
        {"real_label": torch.ones(3)},
        ValueError,
        "gan_loss: real_label must have one value for each of 4 logits, got 3",
    ),
    "fake labels": (
        (R, G),
        {"fake_label": torch.ones(4)},
        ValueError,
        "gan_loss: fake_label must have one value for each of 3 logits, got 4",
    ),
    "generator's labels": (
        (R, G),
        {"side": "generator", "real_label": torch.ones(4)},
        ValueError,
        "gan_loss: real_label must have one value for each of 3 logits, got 4",
    ),
    "labels elsewhere": ((R, G), {"real_label": R.to("meta")}, ValueError, "gan_loss: real_label must be on cpu, got meta"),
    "labels want gradients": (
        (R, G),
        {"fake_label": torch.ones(3, requires_grad=True)},
        ValueError,
        "gan_loss: fake_label must not require a gradient, got a tensor that does",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(backend: str, case: str) -> None:
    args, options, kind, sentence = REFUSED[case]
    with pytest.raises(kind) as caught:
        gankern.gan_loss(*args, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    why = gankern.backend.problem(name, "meta")
    assert why
    with gankern.use_backend(name), pytest.raises(RuntimeError) as caught:
        gankern.gan_loss(R.to("meta"), G.to("meta"))
    assert str(caught.value) == f"gan_loss: backend must be able to run on meta tensors, got {name!r}: {why}"


def test_terms_are_each_others_derivatives() -> None:
    """Every functor of TERMS: slope and curvature are the derivatives of value, and the kernels' codes are distinct."""
    a, t = randn(50, seed=1, scale=4).requires_grad_(), randn(50, seed=2).sigmoid()
    for term in op.TERMS.values():
        (slope,) = torch.autograd.grad(term.value(a, t).sum(), a, create_graph=True)
        slope = slope + 0 * a  # where it is a constant, its derivative is 0
        torch.testing.assert_close(term.slope(a, t), slope, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(term.curvature(a, t), torch.autograd.grad(slope.sum(), a)[0], rtol=1e-11, atol=1e-14)
    assert len({term.code for term in op.TERMS.values()}) == len(op.TERMS)


def test_backward_runs_once(kernel_backend: str) -> None:
    logits = torch.zeros(4, device=DEVICE, requires_grad=True)
    out = gankern.gan_loss(logits, n_real=2)
    out.backward()
    with pytest.raises(RuntimeError, match="gan_loss: backward must be called once"):
        out.backward()


def test_samples_of_inference_mode_and_labels_leave_nothing_behind(kernel_backend: str) -> None:
    with torch.inference_mode():
        fake = torch.zeros(4, device=DEVICE)
    real = torch.zeros(4, device=DEVICE, requires_grad=True)
    gankern.gan_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, torch.full((4,), -0.125, device=DEVICE))
    before = len(op._specs)
    gankern.gan_loss(None, real, side="generator", fake_label=torch.zeros(4, device=DEVICE))
    assert len(op._specs) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_jensen_shannon_of_undecided_logits_is_zero(backend: str, dtype: torch.dtype) -> None:
    """log 2 - log 2 in each term: a last bit too much in each would be 2e-5 of a sum of this length."""
    zeros = torch.zeros(3000, dtype=dtype, device=DEVICE)
    assert gankern.gan_loss(zeros, zeros, objective="fgan-jensen-shannon", reduction="sum").loss.item() == 0.0
