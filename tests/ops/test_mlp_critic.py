"""mlp_critic on every backend: loss, penalty and every parameter gradient against float64 autograd, products, bad input."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.ops import gan_loss
from gankern.ops import mlp_critic as op
from gankern.ops._critic_loss import MLPCriticLoss
from gankern.ops._objectives import OBJECTIVES
from gankern.ops._philox import draw_seed, dropout_keep
from tests.support import DEVICE, CountProducts, ProfileProducts, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = {1: (7, 1), 2: (9, 16, 1), 3: (7, 13, 5, 1), 4: (20, 17, 8, 3, 1), 5: (3, 11, 4, 9, 6, 1)}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "wgan-gp": {"penalty_weight": 10.0},
    "one-sided": {"penalty_weight": 3.0, "sided": "one", "target": 0.4},
    "r1": {"penalty_weight": 5.0, "target": 0.0, "sample": "real"},
    "r2": {"penalty_weight": 5.0, "target": 0.0, "sample": "fake"},
    "r1r2": {"penalty_weight": 5.0, "target": 0.0, "sample": "both"},
    "given": {"penalty_weight": 2.0, "target": 0.5, "x_hat": True},
}
COMPILABLE = ["reference", "compiled"] + ["triton"] * (DEVICE != "cpu")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def make(sizes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0, bias: bool = True) -> tuple[list[Any], list[Any]]:
    weights, biases = [], []
    for i, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        scale = 1.5 / math.sqrt(max(fan_in, 1))
        weights.append(randn(out, fan_in, seed=seed + 2 * i, dtype=dtype, scale=scale).requires_grad_())
        biases.append(randn(out, seed=seed + 2 * i + 1, dtype=dtype).requires_grad_() if bias else None)
    return weights, biases


def samples(batch: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 50) -> tuple[Tensor, Tensor]:
    return randn(batch, size, seed=seed, dtype=dtype), randn(batch, size, seed=seed + 1, dtype=dtype)


def points(real: Tensor, fake: Tensor, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The settings with x_hat or eps filled in, and the penalised points."""
    settings = dict(settings)
    if not settings.get("penalty_weight"):
        return settings, None
    if settings.get("x_hat") is not None:
        settings["x_hat"] = randn(5, real[0].numel(), seed=70, dtype=real.dtype)
        return settings, settings["x_hat"]
    if settings.get("sample", "line") != "line":
        return settings, {"real": real, "fake": fake, "both": torch.cat([real, fake])}[settings["sample"]]
    settings["eps"] = randn(len(real), 1, seed=71, dtype=real.dtype).sigmoid()
    return settings, settings["eps"] * real + (1 - settings["eps"]) * fake


def eager(
    real: Tensor,
    fake: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    at: Tensor | None,
    *,
    slopes: Sequence[float],
    masks: dict[str, list[Tensor]] | None = None,
    objective: str = "non-saturating",
    real_label: Any = 1.0,
    fake_label: Any = 0.0,
    penalty_weight: float = 0.0,
    target: float = 1.0,
    sided: str = "two",
    sample: str = "line",
    **_: Any,
) -> dict[str, Tensor]:
    """The oracle: three passes through the critic and PyTorch's autograd, as users of plain PyTorch write it."""

    def critic(x: Tensor, which: str) -> Tensor:
        for i, (w, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            x = F.leaky_relu(F.linear(x, w, b), slopes[i])
            x = x if masks is None else x * masks[which][i].to(x.dtype)
        return F.linear(x, weights[-1], biases[-1])

    out = gan_loss.reference(critic(real, "real"), critic(fake, "fake"), objective, real_label=real_label, fake_label=fake_label)
    penalty = torch.zeros_like(out.loss)
    if at is not None:
        x = at.detach().requires_grad_()
        (g,) = torch.autograd.grad(critic(x, "x_hat").sum(), x, create_graph=True)
        gap = g.flatten(1).to(out.loss.dtype).norm(2, dim=1) - target
        halves = gap.chunk(2 if sample == "both" else 1)
        penalty = penalty_weight * sum((h.clamp_min(0) if sided == "one" else h).square().mean() for h in halves)
    parameters = [p for p in (*weights, *biases) if p is not None]
    grads = torch.autograd.grad(out.loss + penalty, parameters, allow_unused=True, materialize_grads=True)
    found = {"loss": out.loss + penalty, "penalty": penalty, "adversarial": out.loss, "stats": out.stats}
    return {k: v.detach() for k, v in found.items()} | {f"grads[{i}]": g for i, g in enumerate(grads)}


def results(out: MLPCriticLoss) -> dict[str, Tensor]:
    found = {"loss": out.value, "penalty": out.penalty, "adversarial": out.adversarial, "stats": out.stats}
    return found | {f"grads[{i}]": g for i, g in enumerate(g for g in out.grads if g is not None)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert got.keys() == want.keys()
    scale = max(
        (w.abs().nan_to_num(0, 0, 0).max().item() for k, w in want.items() if k.startswith("grads") and w.numel()), default=0.0
    )
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        finite = expected[expected.isfinite()].abs()
        atol = max(finite.max().item() if finite.numel() else 0.0, 1e-3 * scale)
        atol *= TOLERANCE[got[name].dtype] if tolerance is None else tolerance
        torch.testing.assert_close(
            got[name].double(), expected.double(), rtol=0.0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def compare(
    layers: int, settings: dict[str, Any], dtype: torch.dtype = torch.float64, batch: int = 6, slopes: Any = 0.2, bias: bool = True
) -> MLPCriticLoss:
    weights, biases = make(SIZES[layers], dtype, bias=bias)
    real, fake = samples(batch, SIZES[layers][0], dtype)
    settings, x_hat = points(real, fake, settings)
    out = gankern.mlp_critic(real, fake, weights, biases, slopes, **settings)
    each = [slopes] * (layers - 1) if isinstance(slopes, (int, float)) else slopes
    doubles = [[None if t is None else t.detach().double().requires_grad_() for t in ts] for ts in (weights, biases)]
    exact = None if x_hat is None else x_hat.double()
    assert_same(results(out), eager(real.double(), fake.double(), *doubles, exact, slopes=each, **settings))
    return out


# --- values and gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("layers", SIZES)
def test_equals_autograd(backend: str, layers: int, penalty: str) -> None:
    compare(layers, PENALTIES[penalty])


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(backend: str, objective: str, penalty: str) -> None:
    compare(3, PENALTIES[penalty] | {"objective": objective})


@pytest.mark.parametrize("penalty", PENALTIES)
def test_float32(backend: str, penalty: str) -> None:
    compare(4, PENALTIES[penalty], torch.float32)


@pytest.mark.parametrize("slopes", [0, 0.2, 1, (0.0, 0.01, 3.0)], ids=str)
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_slopes(backend: str, penalty: str, slopes: Any) -> None:
    compare(4, PENALTIES[penalty], slopes=slopes)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_without_biases(backend: str, penalty: str) -> None:
    out = compare(3, PENALTIES[penalty], bias=False)
    assert out.grads[3:] == (None, None, None)


def test_labels(backend: str) -> None:
    compare(3, {"penalty_weight": 1.0, "real_label": 0.9, "fake_label": 0.1})
    each = randn(6, seed=3).sigmoid()
    compare(3, {"penalty_weight": 1.0, "real_label": each, "fake_label": 0.2})


@pytest.mark.parametrize("batch", [1, 2, 31])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r2"])
def test_batches(backend: str, penalty: str, batch: int) -> None:
    compare(4, PENALTIES[penalty], batch=batch)


def test_large(backend: str) -> None:
    """Enough rows and columns for several strips, runs and threads."""
    sizes = (150, 300, 70, 1)
    weights, biases = make(sizes)
    real, fake = samples(300, 150)
    for penalty in ("wgan-gp", "r1"):
        settings, x_hat = points(real, fake, PENALTIES[penalty])
        out = gankern.mlp_critic(real, fake, weights, biases, **settings)
        assert_same(results(out), eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), **settings))


def test_halves_of_different_sizes(backend: str) -> None:
    weights, biases = make(SIZES[3])
    real, fake = samples(6, 7)
    for sample, x in (("real", real), ("fake", fake[:4])):
        settings = {"penalty_weight": 2.0, "target": 0.3, "sample": sample}
        out = gankern.mlp_critic(real, fake[:4], weights, biases, **settings)
        assert_same(results(out), eager(real, fake[:4], weights, biases, x, slopes=(0.2, 0.2), **settings))


def test_any_shape_and_strides(backend: str) -> None:
    weights, biases = make((12, 8, 1))
    real, fake = randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
    settings, x_hat = points(real.flatten(1), fake.flatten(1), PENALTIES["wgan-gp"])
    want = eager(real.flatten(1), fake.flatten(1), weights, biases, x_hat, slopes=[0.2], **settings)
    strided = [w.detach().mT.contiguous().mT.requires_grad_() for w in weights]
    for layout in (torch.contiguous_format, torch.channels_last):
        given = (t.contiguous(memory_format=layout) for t in (real, fake))
        assert_same(results(gankern.mlp_critic(*given, weights, biases, **settings)), want)
    spread = (torch.stack([t, t], -1)[..., 1] for t in (real, fake))
    assert_same(results(gankern.mlp_critic(*spread, strided, biases, **settings)), want)
    gankern.mlp_critic(real, fake, strided, biases, **settings).backward()
    for w, g in zip(strided, (want["grads[0]"], want["grads[1]"]), strict=True):
        torch.testing.assert_close(w.grad, g, rtol=0, atol=1e-11 * g.abs().max().item())


def test_empty_batch(backend: str) -> None:
    weights, biases = make(SIZES[3])
    real, fake = samples(0, 7)
    for penalty in ("none", "wgan-gp", "r1"):
        out = gankern.mlp_critic(real, fake, weights, biases, **PENALTIES[penalty])
        assert out.value.isnan()  # the mean over no samples, as in eager
        assert all(g is not None and g.shape == p.shape for g, p in zip(out.grads, (*weights, *biases), strict=True))


def test_zero_gradient(backend: str) -> None:
    """The norm has no derivative at 0; like PyTorch, the penalty's is then 0 and no NaN."""
    weights, biases = make(SIZES[3])
    with torch.no_grad():
        weights[0].zero_()
    real, fake = samples(6, 7)
    settings, x_hat = points(real, fake, PENALTIES["wgan-gp"])
    out = gankern.mlp_critic(real, fake, weights, biases, **settings)
    assert_same(results(out), eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), **settings))
    assert torch.equal(out.norms, torch.zeros_like(out.norms))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("penalty", ["none", "wgan-gp", "r1"])
def test_nan_and_infinity_show(backend: str, penalty: str, value: float) -> None:
    weights, biases = make(SIZES[3])
    real, fake = samples(6, 7)
    real[2, 3] = value
    settings, x_hat = points(real, fake, PENALTIES[penalty])
    got = results(gankern.mlp_critic(real, fake, weights, biases, **settings))
    want = eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), **settings)
    for name in ("loss", "adversarial", "grads[0]", "grads[1]", "grads[2]"):
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


@pytest.mark.parametrize("penalty", ["none", "wgan-gp", "r1", "given"])
@pytest.mark.parametrize("dropout", [0.3, (0.0, 0.9)], ids=str)
def test_dropout(backend: str, dropout: Any, penalty: str) -> None:
    """The masks are those that linear_lrelu draws, layer after layer, for the rows [real; fake; x̂]."""
    weights, biases = make(SIZES[3])
    real, fake = samples(8, 7)
    settings, x_hat = points(real, fake, PENALTIES[penalty])
    out = gankern.mlp_critic(
        real, fake, weights, biases, dropout=dropout, generator=torch.Generator(DEVICE).manual_seed(5), **settings
    )
    generator = torch.Generator(DEVICE).manual_seed(5)
    extra = len(x_hat) if x_hat is not None and settings.get("sample", "line") == "line" else 0
    masks: dict[str, list[Tensor]] = {"real": [], "fake": [], "x_hat": []}
    for p, w in zip((dropout,) * 2 if isinstance(dropout, float) else dropout, weights, strict=False):
        keep = torch.ones(16 + extra, len(w), device=DEVICE, dtype=torch.float64)
        if p:
            keep = dropout_keep(draw_seed(torch.device(DEVICE), generator), 16 + extra, len(w), p).double() / (1 - p)
        masks["real"].append(keep[:8])
        masks["fake"].append(keep[8:16])
        masks["x_hat"].append({"none": keep, "r1": keep[:8]}.get(penalty, keep[16:]))
    assert_same(results(out), eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), masks=masks, **settings))
    off = gankern.mlp_critic(real, fake, weights, biases, dropout=dropout, training=False, **settings)
    assert_same(results(off), eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), **settings))


def test_everything_dropped(backend: str) -> None:
    weights, biases = make(SIZES[3])
    out = gankern.mlp_critic(*samples(4, 7), weights, biases, dropout=1.0, penalty_weight=10.0)
    assert out.penalty == 10.0  # no gradient, (0 - 1)²
    assert not out.grads[0].any()


def test_eps_is_drawn_for_each_sample(backend: str) -> None:
    weights, biases = make(SIZES[2])
    real, fake = samples(6, 9)
    eps = torch.rand(6, 1, dtype=torch.float64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    drawn = gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, generator=torch.Generator(DEVICE).manual_seed(3))
    assert_same(results(drawn), results(gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps[:, 0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_error_in_16_bits_at_most_twice_eager(backend: str, penalty: str, dtype: torch.dtype) -> None:
    errors: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for seed in range(8):
        weights, biases = make((48, 64, 33, 1), dtype, seed=10 * seed)
        real, fake = samples(24, 48, dtype, seed=100 + 10 * seed)
        settings, x_hat = points(real, fake, PENALTIES[penalty])
        ours = results(gankern.mlp_critic(real, fake, weights, biases, **settings))
        theirs = eager(real, fake, weights, biases, x_hat, slopes=(0.2, 0.2), **settings)
        doubles = [[t.detach().double().requires_grad_() for t in ts] for ts in (weights, biases)]
        exact, eps = real.double(), settings.get("eps")
        at = exact if eps is None else eps.double() * exact + (1 - eps.double()) * fake.double()
        want = eager(exact, fake.double(), *doubles, at, slopes=(0.2, 0.2), **settings)
        for name in ours:
            if name != "stats":
                assert ours[name].dtype == theirs[name].dtype
                mine, other = errors.setdefault(name, ([], []))
                mine.append((ours[name].double() - want[name]).flatten())
                other.append((theirs[name].double() - want[name]).flatten())
    for name, (mine, other) in errors.items():
        a, b = torch.cat(mine).square().mean().sqrt(), torch.cat(other).square().mean().sqrt()
        assert a <= 2 * b, f"{name}: error {a.item():.3g} in {dtype}, eager PyTorch makes {b.item():.3g}"


# --- the penalty alone, products, no silent zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", SIZES)
@pytest.mark.parametrize("sided", ["one", "two"])
def test_penalty_alone(backend: str, layers: int, sided: str) -> None:
    weights, biases = make(SIZES[layers])
    x = randn(6, SIZES[layers][0], seed=5)
    out = gankern.mlp_critic_penalty(x, weights, biases, weight=3.0, target=0.4, sided=sided)
    want = eager(x, x, weights, biases, x, slopes=[0.2] * layers, penalty_weight=3.0, target=0.4, sided=sided)
    base = eager(x, x, weights, biases, None, slopes=[0.2] * layers)
    torch.testing.assert_close(out.loss, want["penalty"], rtol=1e-12, atol=0)
    for i, g in enumerate(out.grads[:layers]):
        expected = want[f"grads[{i}]"] - base[f"grads[{i}]"]
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-11 * expected.abs().max().item() + 1e-12)
    assert out.grads[layers:] == (None,) * layers
    out.loss.backward()
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, out.grads, strict=False))


def test_penalty_of_a_linear_critic_is_known(backend: str) -> None:
    w = randn(1, 7, seed=0).requires_grad_()
    out = gankern.mlp_critic_penalty(randn(5, 7, seed=1), [w], [None], weight=1.0)
    torch.testing.assert_close(out.value, (w.detach().norm() - 1) ** 2, rtol=1e-12, atol=0)


def count(call: Any) -> int:
    """By the profiler, which sees the products inside `mlp_critic_pass` too."""
    with ProfileProducts() as products:
        call()
    return products.count


@pytest.mark.parametrize("layers", SIZES)
def test_products(kernel_backend: str, layers: int) -> None:
    weights, biases = make(SIZES[layers])
    real, fake = samples(6, SIZES[layers][0])
    for penalty in ("wgan-gp", "r1"):
        got = count(lambda p=penalty: gankern.mlp_critic(real, fake, weights, biases, **PENALTIES[p]).backward())
        assert got == (4 * layers - 1 if layers > 1 else 3)
    assert count(lambda: gankern.mlp_critic_penalty(real, weights, biases).backward()) == 4 * (layers - 1)


def test_products_of_the_paper_critic() -> None:
    need("compiled")
    weights, biases = make((784, 1024, 512, 256, 1), torch.float32)
    real, fake = samples(2, 784, torch.float32)
    assert count(lambda: gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0).backward()) == 15
    assert count(lambda: gankern.mlp_critic_penalty(real, weights, biases).backward()) == 12
    settings, x_hat = points(real, fake, PENALTIES["wgan-gp"])
    for counter in (ProfileProducts(), CountProducts()):  # both count alike where nothing is inside an operator
        with counter:
            eager(real, fake, weights, biases, x_hat, slopes=[0.2] * 3, **settings)
        assert counter.count == 42  # and one for x̂ in backward()


def test_no_silent_zero(backend: str) -> None:
    """The penalty reaches every weight and no bias, with its full size."""
    weights, biases = make(SIZES[3])
    real, fake = samples(16, 7)
    eps = randn(16, 1, seed=3).sigmoid()
    grads = [gankern.mlp_critic(real, fake, weights, biases, penalty_weight=w, eps=eps).grads for w in (0.0, 10.0)]
    for i in range(6):
        moved = (grads[1][i] - grads[0][i]).abs().max()
        assert moved > 0.1 * grads[0][i].abs().max() if i < 3 else moved <= 1e-12


# --- handing the gradients over --------------------------------------------------------------------------------------------------


def critic() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (*samples(6, 7), *make(SIZES[3]))


def test_backward_adds_to_grad_as_loss_backward_does(backend: str) -> None:
    real, fake, weights, biases = critic()
    eps = randn(6, 1, seed=3).sigmoid()
    parameters = [*weights, *biases]

    def call() -> MLPCriticLoss:
        return gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps)

    want = call().grads
    for run, times in ((lambda o: o.backward(), 1), (lambda o: o.loss.backward(), 1), (lambda o: (3 * o.loss).backward(), 3)):
        for p in parameters:
            p.grad = None
        run(call())
        run(call())
        for p, g in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, 2 * times * g, rtol=1e-12, atol=0)
    out = call()
    out.loss.backward(retain_graph=True)
    out.backward()


def test_hooks_run_and_values_of_layers_get_their_gradients(backend: str) -> None:
    real, fake, weights, biases = critic()
    seen: list[str] = []
    weights[0].register_hook(lambda g: seen.append("hook") or 2 * g)
    biases[1].register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    leaf = weights[1].detach().clone().requires_grad_()
    scaled = [weights[0], 2 * leaf, weights[2]]  # as a parametrisation makes it
    out = gankern.mlp_critic(real, fake, scaled, biases)
    out.backward()
    assert sorted(seen) == ["hook", "post"]
    torch.testing.assert_close(weights[0].grad, 2 * out.grads[0])
    torch.testing.assert_close(leaf.grad, 2 * out.grads[1])
    torch.testing.assert_close(biases[1].grad, out.grads[4])


def test_one_weight_in_two_layers(backend: str) -> None:
    real, fake = samples(5, 8)
    (w, last), (b, c) = make((8, 8, 1))
    settings, x_hat = points(real, fake, PENALTIES["wgan-gp"])
    gankern.mlp_critic(real, fake, [w, w, last], [b, b, c], **settings).backward()
    want = eager(real, fake, [w, w, last], [b, b, c], x_hat, slopes=(0.2, 0.2), **settings)
    torch.testing.assert_close(w.grad, want["grads[0]"], rtol=1e-10, atol=1e-12)


def test_frozen_parameters_cost_nothing_and_get_nothing(backend: str) -> None:
    real, fake, weights, biases = critic()
    weights[1].requires_grad_(False)
    biases[2].requires_grad_(False)
    out = gankern.mlp_critic(real, fake, weights, biases, penalty_weight=1.0)
    out.backward()
    assert [g is None for g in out.grads] == [False, True, False, False, False, True]
    assert weights[1].grad is None
    assert weights[0].grad is not None
    with torch.no_grad():
        assert not gankern.mlp_critic(real, fake, weights, biases).loss.requires_grad


def test_a_parameter_changed_before_backward_is_noticed(backend: str) -> None:
    real, fake, weights, biases = critic()
    for use in (lambda o: o.backward(), lambda o: o.loss):
        out = gankern.mlp_critic(real, fake, weights, biases)
        with torch.no_grad():
            weights[0].add_(1)
        with pytest.raises(RuntimeError, match="mlp_critic: what gets a gradient must not be changed in place before the backward"):
            use(out)


# --- what is not a parameter gradient raises -------------------------------------------------------------------------------------


def test_second_order_raises(backend: str) -> None:
    real, fake, weights, biases = critic()
    for call in (
        lambda: gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0),
        lambda: gankern.mlp_critic_penalty(real, weights, biases),
    ):
        grads = torch.autograd.grad(call().loss, weights, create_graph=True)
        message = "mlp_critic: a derivative must be the gradient of a parameter, got one of second order"
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(grads[0].sum(), weights, allow_unused=True)
        with pytest.raises(RuntimeError, match=message):
            sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("which", ["real", "fake", "x_hat", "eps"])
def test_inputs_that_want_a_gradient_are_refused(backend: str, which: str) -> None:
    real, fake, weights, biases = critic()
    given = {"real": real, "fake": fake, "x_hat": None, "eps": randn(6, 1, seed=3).sigmoid()}
    given[which] = (real.clone() if given[which] is None else given[which]).requires_grad_()
    message = f"mlp_critic: {which} must not require a gradient: only the parameters get one, got a tensor that does"
    with pytest.raises(ValueError, match=message):
        gankern.mlp_critic(**given, weights=weights, biases=biases, penalty_weight=1.0)
    with pytest.raises(ValueError, match="real must not require a gradient"):
        torch.func.grad(lambda x: gankern.mlp_critic(x, fake, weights, biases).loss)(real)


def test_forward_mode_raises(backend: str) -> None:
    real, fake, weights, biases = critic()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda w: gankern.mlp_critic(real, fake, [w, *weights[1:]], biases).loss, (weights[0],), (weights[0],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weights[0].detach(), torch.ones_like(weights[0]))
        with pytest.raises(RuntimeError, match="jvp"):
            gankern.mlp_critic(real, fake, [dual, *weights[1:]], biases)


# --- torch.func, torch.compile, autocast, operators ------------------------------------------------------------------------------


def test_func_grad(backend: str) -> None:
    real, fake, weights, biases = critic()
    eps = randn(6, 1, seed=3).sigmoid()

    def loss(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps).loss

    out = gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps)
    (dw, db), value = torch.func.grad_and_value(loss, argnums=(0, 1))(weights, biases)
    torch.testing.assert_close(value, out.value)
    for got, want in zip((*dw, *db), out.grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="one of second order"):
        torch.func.grad(lambda w: torch.func.grad(loss)(w, biases)[0].sum())(weights)


def test_vmap_over_an_ensemble_of_critics(backend: str) -> None:
    real, fake = samples(5, 7)
    critics = [make((7, 6, 1), seed=10 * i) for i in range(3)]
    eps = randn(5, 1, seed=3).sigmoid()
    weights = [torch.stack([c[0][i].detach() for c in critics]) for i in range(2)]
    biases = [torch.stack([c[1][i].detach() for c in critics]) for i in range(2)]

    def loss(w: list[Tensor], b: list[Tensor]) -> Tensor:
        return gankern.mlp_critic(real, fake, w, b, penalty_weight=10.0, eps=eps).loss

    values = torch.func.vmap(loss)(weights, biases)
    grads = torch.func.vmap(torch.func.grad(loss))(weights, biases)
    for i, c in enumerate(critics):
        out = gankern.mlp_critic(real, fake, *c, penalty_weight=10.0, eps=eps)
        torch.testing.assert_close(values[i], out.value)
        for got, want in zip(grads, out.grads, strict=False):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", COMPILABLE)
def test_compile(name: str) -> None:
    need(name)
    real, fake, weights, biases = critic()
    eps = randn(6, 1, seed=3).sigmoid()

    def loss(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        out = gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps)
        penalty = gankern.mlp_critic_penalty(real, weights, biases)
        return out.loss + penalty.loss, out.penalty

    with gankern.use_backend(name):
        torch._dynamo.reset()
        value, penalty = torch.compile(loss, backend="aot_eager", fullgraph=True)(real, fake)
        want, want_penalty = loss(real, fake)
        torch.testing.assert_close((value, penalty), (want, want_penalty))
        got = torch.autograd.grad(value, [*weights, *biases])
        for a, b in zip(got, torch.autograd.grad(want, [*weights, *biases]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    real, fake = samples(6, 7, torch.float32)
    weights, biases = make(SIZES[3], torch.float32)
    eps = randn(6, 1, seed=3, dtype=torch.float32).sigmoid()
    with torch.autocast(DEVICE, dtype):
        out = gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps)
    assert out.value.dtype == out.penalty.dtype == torch.float32
    assert all(g is not None and g.dtype == torch.float32 for g in out.grads)
    exact = eager(real, fake, weights, biases, eps * real + (1 - eps) * fake, slopes=(0.2, 0.2), penalty_weight=10.0)
    for name, value in results(out).items():
        assert (value - exact[name]).norm() <= 0.05 * exact[name].norm(), name
    assert (results(out)["grads[0]"] - exact["grads[0]"]).abs().max() > 0  # it did run in 16 bits


def test_operators_pass_opcheck() -> None:
    need("compiled")
    for p in (0.0, 0.3):
        y, d = randn(6, 10, seed=0), randn(6, 10, seed=1)
        bits = (
            torch.randint(256, (6, 2), dtype=torch.uint8, device=DEVICE) if p else torch.zeros(0, dtype=torch.uint8, device=DEVICE)
        )
        t, factor = randn(2, 10, seed=2), randn(2, seed=3)
        ops = torch.ops.gankern
        for f in (factor, None):
            torch.library.opcheck(ops.mlp_critic_adjoint, (d, y, bits, 0.2, p, 2, f))
            torch.library.opcheck(ops.mlp_critic_tangent, (t, y, bits, 0.2, p, 3, f))
            torch.library.opcheck(ops.mlp_critic_seed, (t, y, 3, f, 10.0, 1.0, True))
    real, fake, weights, biases = critic()
    weights, biases = ([t.detach() for t in ts] for ts in (weights, biases))
    settings = (
        [0.2] * 2,
        [0.0] * 2,
        "non-saturating",
        1.0,
        0.0,
        10.0,
        1.0,
        False,
        "line",
        [True] * 6 + [False],
        "compiled",
        "discriminator",
        None,
    )
    eps = randn(6, 1, seed=3)
    torch.library.opcheck(ops.mlp_critic_step, (real, fake, None, eps, None, None, [None] * 2, weights, biases, *settings))


def pass_arguments(**changes: Any) -> list[Any]:
    """Of `mlp_critic_pass`: WGAN-GP of a critic of three layers, 6 + 6 samples and their eps."""
    real, fake, weights, biases = critic()
    linear, label = 1, None
    given = {
        "real": real, "fake": fake, "x_hat": None, "eps": randn(6, seed=3).sigmoid(), "seeds": [None] * 2, "weights": weights,
        "biases": biases, "slopes": [0.2] * 2, "p": [0.0] * 2, "term_real": linear, "weight_real": 1.0, "target_real": 1.0,
        "targets_real": label, "term_fake": linear, "weight_fake": 1.0, "target_fake": 0.0, "targets_fake": label, "relative": 0,
        "penalise": True, "first": 12, "count": 6, "weight": 10.0, "target": 1.0, "one_sided": False,
        "wanted": [True] * 6 + [False], "autocast": None,
    }  # fmt: skip
    return list((given | changes).values())


def test_the_whole_pass_is_an_operator() -> None:
    """It runs below autograd, whatever its tensors require."""
    need("compiled")
    real, fake, weights, biases = critic()
    eps = randn(6, seed=3).sigmoid()
    out = torch.ops.gankern.mlp_critic_pass(*pass_arguments())
    want = gankern.mlp_critic(real, fake, weights, biases, objective="wgan", penalty_weight=10.0, eps=eps)
    assert torch.is_grad_enabled()
    for got, expected in zip(out[5:], want.grads, strict=True):
        torch.testing.assert_close(got.detach(), expected, rtol=1e-11, atol=1e-13)
    plain = [t.detach() for t in weights], [t.detach() for t in biases]
    seeds = [draw_seed(torch.device(DEVICE), None) for _ in range(2)]
    for changes in (
        {},
        {"penalise": False, "eps": None, "count": 0},
        {"eps": None, "first": 6, "wanted": [False, True] * 3 + [False]},
        {"penalise": False, "eps": None, "count": 0, "wanted": [False] * 6 + [True]},
        {"wanted": [True] * 7},
        {"seeds": seeds, "p": [0.3, 0.5]},
    ):
        torch.library.opcheck(torch.ops.gankern.mlp_critic_pass, pass_arguments(weights=plain[0], biases=plain[1], **changes))
    alone = {"real": None, "fake": None, "x_hat": real, "eps": None, "first": 0, "wanted": [True] * 3 + [False] * 4}
    arguments = pass_arguments(weights=plain[0], biases=plain[1], **alone)
    some = ("test_schema", "test_faketensor")  # the others compare numbers, and its statistics are NaN
    torch.library.opcheck(torch.ops.gankern.mlp_critic_pass, arguments, test_utils=some)


BAD_PASS: list[tuple[str, dict[str, Any]]] = [
    ("weights must hold at least one matrix", {"weights": []}),
    ("biases must be as many as weights", {"biases": [None]}),
    ("seeds, slopes and p must be as many as hidden layers", {"p": [0.0]}),
    ("wanted must be one more than twice as many as weights", {"wanted": [True] * 6}),
    (
        "wanted must want neither bias nor samples of a penalty alone",
        {"real": None, "fake": None, "x_hat": randn(6, 7, seed=0), "eps": None},
    ),
    ("the samples must be fake, real and fake, x_hat, or all three", {"fake": None, "wanted": [True] * 3 + [False] * 4}),
    ("eps must have one value for each pair of samples, without x_hat", {"eps": randn(5, seed=0)}),
    ("the samples must be matrices of as many columns as weights[0]", {"real": randn(6, 8, seed=0)}),
    (
        "weights must be matrices that follow each other",
        {"weights": [*make((7, 13, 1))[0], *make((7, 1))[0]], "biases": [None] * 3},
    ),
    ("weights must end with one row", {"weights": make((7, 13, 5, 2))[0], "biases": [None] * 3}),
    ("biases must have one element for each row of their weights", {"biases": make((7, 13, 6, 1))[1]}),
    ("first and count must be rows of the batch", {"first": 13}),
    ("first and count must be the rows of x_hat or eps", {"first": 6}),
    ("first and count must be the rows of x_hat or eps", {"penalise": False}),
]


@pytest.mark.parametrize(("sentence", "changes"), BAD_PASS, ids=range(len(BAD_PASS)))
def test_the_pass_refuses_what_does_not_fit(sentence: str, changes: dict[str, Any]) -> None:
    need("compiled")
    with pytest.raises(RuntimeError, match=re.escape(f"mlp_critic_pass: {sentence}")):
        torch.ops.gankern.mlp_critic_pass(*pass_arguments(**changes))


def test_labels_and_halves_are_checked(backend: str) -> None:
    real, fake, weights, biases = critic()
    with pytest.raises(ValueError, match=r"^mlp_critic: fake must have 6 samples, as real, to pair with, got 5$"):
        gankern.mlp_critic(real, fake[:5], weights, biases, objective="relativistic")
    with pytest.raises(ValueError, match=r"^gan_loss: real_label must have one value for each of 6 logits, got 4$"):
        gankern.mlp_critic(real, fake, weights, biases, real_label=torch.ones(4, device=DEVICE))


def test_kernels_do_not_depend_on_the_number_of_threads() -> None:
    need("compiled")
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            d, y, g = (randn(999, 257, seed=i, dtype=torch.float32) for i in range(3))
            bits = torch.zeros(0, dtype=torch.uint8, device=DEVICE)
            dbias = torch.ops.gankern.mlp_critic_adjoint(d, y, bits, 0.2, 0.0, 700, None)
            penalty, norms = torch.ops.gankern.mlp_critic_seed(g, y, 0, None, 10.0, 1.0, False)
            found.append((d, dbias, y, penalty, norms))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is built the one pass runs in plain PyTorch calls."""
    monkeypatch.setattr(op, "_choose", lambda device: "torch")
    for penalty in PENALTIES.values():
        compare(3, penalty)
        weights, biases = make(SIZES[3])
        real, fake = samples(4, 7)
        settings, _ = points(real, fake, penalty)
        calls = []
        for name in ("torch", "reference"):
            monkeypatch.setattr(op, "_choose", lambda device, name=name: name)
            generator = torch.Generator(DEVICE).manual_seed(1)
            calls.append(results(gankern.mlp_critic(real, fake, weights, biases, dropout=0.4, generator=generator, **settings)))
        assert_same(*calls)


def test_automatic_choice_takes_the_kernels() -> None:
    need("compiled")
    assert op._choose(DEVICE) == "compiled"
    assert op._choose("meta") == "torch"


@pytest.mark.gpu
def test_graph_capture() -> None:
    real, fake, weights, biases = (
        t.cuda() if isinstance(t, Tensor) else [u.detach().cuda().requires_grad_() for u in t] for t in critic()
    )
    eps = randn(6, 1, seed=3).sigmoid().cuda()

    def step() -> MLPCriticLoss:
        return gankern.mlp_critic(real, fake, weights, biases, penalty_weight=10.0, eps=eps)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert_same(results(out), results(step()))


# --- bad input -------------------------------------------------------------------------------------------------------------------


def bad(**changes: Any) -> dict[str, Any]:
    real, fake, weights, biases = critic()
    return {"real": real, "fake": fake, "weights": weights, "biases": biases} | changes


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "real must be a torch.Tensor, got int", {"real": 3}),
    (TypeError, "real must be float64, float32, bfloat16 or float16, got int64", {"real": torch.zeros(6, 7, dtype=torch.int64)}),
    (ValueError, r"real must have shape \[B, \*\], got shape \[7\]", {"real": torch.zeros(7)}),
    (ValueError, "fake must have 6 samples, as real, to penalise both, got 5", {
        "fake": randn(5, 7, seed=0), "penalty_weight": 1.0, "sample": "both"}),
    (TypeError, "fake must have dtype float64, got float32", {"fake": torch.zeros(6, 7, device=DEVICE)}),
    (ValueError, r"fake must have 7 elements a sample, as real, got shape \[6, 8\]", {"fake": randn(6, 8, seed=0)}),
    (ValueError, "fake must have 6 samples, as real, for the line between them, got 5", {
        "fake": randn(5, 7, seed=0), "penalty_weight": 1.0}),
    (TypeError, "weights must be a list or tuple, got Tensor", {"weights": torch.zeros(2)}),
    (ValueError, "weights must hold at least one matrix, got none", {"weights": [], "biases": []}),
    (ValueError, "biases must hold 3 vectors or None, as many as weights, got 0", {"biases": []}),
    (ValueError, r"weights\[0\] must have 7 columns, got shape \[13, 6\]", {"weights": make((6, 13, 5, 1))[0]}),
    (ValueError, r"weights\[2\] must have one row: the critic's score, got shape \[2, 5\]", {
        "weights": make((7, 13, 5, 2))[0], "biases": [None] * 3}),
    (ValueError, r"biases\[1\] must have shape \[5\], got \[6\]", {"biases": make((7, 13, 6, 1))[1]}),
    (TypeError, r"weights\[0\] must have dtype float64, got float32", {"weights": make(SIZES[3], torch.float32)[0]}),
    (ValueError, "slopes must hold 2 numbers, one for each hidden layer, got 3", {"slopes": [0.2] * 3}),
    (ValueError, "slopes must be a finite number >= 0, got -0.1", {"slopes": -0.1}),
    (TypeError, "slopes must be a number, or one for each hidden layer, got str", {"slopes": "a"}),
    (ValueError, r"dropout must be in \[0, 1\], got 1.5", {"dropout": (0.1, 1.5)}),
    (ValueError, "penalty_weight must be a finite number >= 0, got -1", {"penalty_weight": -1}),
    (ValueError, "target must be a finite number >= 0, got nan", {"target": math.nan}),
    (ValueError, "sided must be one of one, two, got 'three'", {"sided": "three"}),
    (ValueError, "sample must be one of line, real, fake, both, got 'x'", {"sample": "x"}),
    (ValueError, "objective must be one of .*, got 'x'", {"objective": "x"}),
    (ValueError, "fake must have 6 samples, as real, to pair with, got 5", {
        "fake": randn(5, 7, seed=0), "objective": "relativistic"}),
    (TypeError, r"weights\[0\] must be a dense tensor, got torch.sparse_coo", {
        "weights": [w.to_sparse() for w in make(SIZES[3])[0]]}),
    (ValueError, "eps must have one value for each of 6 samples, got 5", {"eps": torch.zeros(5), "penalty_weight": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sentence", "changes"), BAD, ids=[b[1][:40] for b in BAD])
def test_bad_input(kind: type[Exception], sentence: str, changes: dict[str, Any]) -> None:
    with pytest.raises(kind, match=f"^mlp_critic: {sentence}$"):
        gankern.mlp_critic(**bad(**changes))


def test_bad_input_of_the_penalty() -> None:
    _, _, weights, biases = critic()
    with pytest.raises(ValueError, match=r"^mlp_critic_penalty: weight must be a finite number >= 0, got -1$"):
        gankern.mlp_critic_penalty(randn(2, 7, seed=0), weights, biases, weight=-1)
    with pytest.raises(ValueError, match=r"^mlp_critic_penalty: weights\[0\] must have 8 columns, got shape \[13, 7\]$"):
        gankern.mlp_critic_penalty(randn(2, 8, seed=0), weights, biases)
