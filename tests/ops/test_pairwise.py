"""pairwise on every backend: minibatch features, distances, MMD and pulling-away term, against what a user of PyTorch writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern import losses
from gankern.ops import pairwise as op
from tests.support import DEVICE, TOLERANCE, assert_accurate, assert_equal_derivatives, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = DEVICE == "cpu"
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)
FEATURES = [(4, 3, 5), (1, 1, 1), (2, 1, 3), (13, 2, 17), (37, 2, 3), (0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 2, 3)]  # [N, B, C]
SAMPLES = [((5,), (5,)), ((4, 3), (6, 3)), ((1, 1), (1, 1)), ((13, 7), (2, 7)), ((3, 2, 2, 3), (5, 2, 2, 3)), ((37, 5), (41, 5))]


# --- the oracles ----------------------------------------------------------------------------------------------------------------


def eager_features(m: Tensor) -> Tensor:
    e = torch.exp(-(m[:, None] - m[None]).abs().sum(-1))
    return torch.where(torch.eye(len(m), dtype=torch.bool, device=m.device)[:, :, None], 0.0, e).sum(1)


def eager_distance(x: Tensor) -> Tensor:
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    return (rows[:, None] - rows[None]).square().sum(-1).sum(1, keepdim=True) / max(len(x) - 1, 1)


def eager_mmd2(real: Tensor, fake: Tensor, sigmas: tuple[float, ...] = op.SIGMAS, unbiased: bool = False) -> Tensor:
    def k(a: Tensor, b: Tensor) -> Tensor:
        d = (a.reshape(len(a), 1, -1) - b.reshape(1, len(b), -1)).square().sum(-1)
        terms = [torch.exp(-d / (2 * s * s)) for s in sigmas]
        return torch.stack(terms).sum(0)

    n, m = len(real), len(fake)
    within, between = (k(real, real), k(fake, fake)), k(real, fake).mean()
    if unbiased:
        return sum((w.sum() - w.trace()) / (len(w) * (len(w) - 1)) for w in within) - 2 * between  # type: ignore[return-value]
    return within[0].sum() / n**2 + within[1].sum() / m**2 - 2 * between


def eager_pulling_away(features: Tensor) -> Tensor:
    rows = features.reshape(len(features), -1)
    cosines = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    return (cosines.square().sum() - cosines.square().diagonal().sum()) / (len(rows) * (len(rows) - 1))


def samples(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    real, fake = (randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
    return real, fake + 0.5


def small_m(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype, scale=1 / max(shape[-1], 1))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram blocks of a few rows, so that small shapes have several."""
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", {"cpu": 512, "cuda": 512})


# --- values and derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_features_match_eager_to_second_order(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(gankern.minibatch_features, eager_features, [small_m(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (0, 3), (7,), (5, 2, 3, 2), (67, 11), (3, 0)], ids=str)
def test_distance_matches_eager_to_third_order(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(gankern.minibatch_distance, eager_distance, [randn(*shape, seed=0, dtype=dtype)], order=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shapes", SAMPLES, ids=str)
def test_mmd2_matches_eager(backend: str, shapes: tuple, unbiased: bool, dtype: torch.dtype) -> None:
    if unbiased and 1 in (shapes[0][0], shapes[1][0]):
        pytest.skip("one sample has no unbiased estimate")
    inputs = samples(shapes, dtype)
    for order in (1, 2):
        got, want = (derivatives(partial(fn, unbiased=unbiased), inputs, order) for fn in (gankern.mmd2, eager_mmd2))
        assert got["y"].dtype == dtype
        torch.testing.assert_close(
            got.pop("y"), want.pop("y"), rtol=0, atol=10 * TOLERANCE[dtype]
        )  # a difference of numbers near 5
        assert_equal_derivatives(got, want)


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 3), (1.0, 2.0, 4.0, 8.0, 16.0), tuple(range(1, 17))], ids=str)
def test_mmd2_sigmas(backend: str, sigmas: tuple[float, ...]) -> None:
    assert_matches(lambda x, y: gankern.mmd2(x, y, sigmas), lambda x, y: eager_mmd2(x, y, sigmas), samples(((9, 4), (7, 4))))


@pytest.mark.parametrize("wanted", [0, 1])
def test_mmd2_where_one_half_wants_a_gradient(backend: str, wanted: int) -> None:
    both = samples(((9, 4), (7, 4)))

    def call(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda t: fn(t, both[1]) if wanted == 0 else fn(both[0], t)

    assert_matches(call(gankern.mmd2), call(eager_mmd2), [both[wanted]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (5, 4), (4, 2, 3), (41, 7), (2,), (3, 1)], ids=str)
def test_pulling_away_matches_eager(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    order = 2 if len(shape) > 1 and shape[1:] != (1,) else 1  # of one dimension the cosine is 1 and its derivatives are rounding
    x = randn(*shape, seed=3, dtype=dtype)
    if order == 1:
        torch.testing.assert_close(gankern.pulling_away(x), eager_pulling_away(x))
    else:
        assert_matches(gankern.pulling_away, eager_pulling_away, [x])


def test_the_pulling_away_term_leaves_out_the_diagonal(backend: str) -> None:
    """A fault found in well-known EBGAN code: the diagonal, N cosines that are 1, was kept."""
    assert gankern.pulling_away(torch.eye(4, device=DEVICE)).item() == 0.0
    torch.testing.assert_close(gankern.pulling_away(torch.ones(3, 5, device=DEVICE)).item(), 1.0)
    parallel = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]], device=DEVICE)  # one pair of three
    torch.testing.assert_close(gankern.pulling_away(parallel).item(), 1 / 3)


def test_pulling_away_of_a_zero_vector(backend: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], device=DEVICE, requires_grad=True)
    value = gankern.pulling_away(x)
    torch.testing.assert_close(value.item(), 1 / 3)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_known_values(backend: str) -> None:
    m = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[0.0, 3.0]]], device=DEVICE)
    e = [math.exp(-2), math.exp(-3), math.exp(-3)]
    torch.testing.assert_close(
        gankern.minibatch_features(m).flatten(), torch.tensor([e[0] + e[1], e[0] + e[2], e[1] + e[2]], device=DEVICE)
    )
    x = torch.tensor([[0.0], [1.0]], device=DEVICE)
    torch.testing.assert_close(gankern.minibatch_distance(x), torch.ones(2, 1, device=DEVICE))
    k = math.exp(-1 / 8)
    torch.testing.assert_close(gankern.mmd2(x, x + 1, [2.0], unbiased=True).item(), 2 * k - (k + 1 + math.exp(-4 / 8) + k) / 2)
    torch.testing.assert_close(gankern.mmd2(x, x, [2.0]).item(), 0.0)


def test_equal_samples(backend: str) -> None:
    """Where two samples agree, |.| has slope 0, as PyTorch's has; distances that round below 0 count as 0."""
    m = small_m(5, 2, 3)
    m[2] = m[0]
    m[4, :, 1] = m[1, :, 1]
    assert_matches(gankern.minibatch_features, eager_features, [m])
    x = randn(6, 50, seed=1, dtype=torch.float32) + 1000
    x[3] = x[1]
    value = gankern.mmd2(x, x.clone(), [0.1])
    assert 0 <= value.item() + 1e-6 < 1e-3


def test_distance_far_from_the_origin() -> None:
    """Centred, it keeps its digits where ||x||² - 2 xy + ||y||² loses them all."""
    x = randn(20, 3, seed=0, dtype=torch.float32) + 1e4
    torch.testing.assert_close(gankern.minibatch_distance(x).double(), eager_distance(x.double()), rtol=1e-3, atol=0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: str, layout: str) -> None:
    change = LAYOUTS[layout]
    m = change(small_m(6, 3, 4))
    assert_matches(gankern.minibatch_features, eager_features, [m])
    leaf, c = m.detach().requires_grad_(), change(randn(6, 3, 1, seed=4).expand(6, 3, 2))[..., 0]
    for a, b in zip(*(torch.autograd.grad(fn(leaf), leaf, c) for fn in (gankern.minibatch_features, eager_features)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert_matches(gankern.mmd2, eager_mmd2, [change(t) for t in samples(((6, 4), (5, 4)))])
    x = change(randn(6, 4, seed=1))
    if layout != "expanded":
        assert_matches(gankern.pulling_away, eager_pulling_away, [x])


def test_channels_last(backend: str) -> None:
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in samples(((4, 3, 2, 2), (5, 3, 2, 2)))]
    assert_matches(gankern.mmd2, eager_mmd2, inputs)
    assert_matches(gankern.pulling_away, eager_pulling_away, inputs[:1])
    assert_matches(gankern.minibatch_distance, eager_distance, inputs[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype) -> None:
    cases = [[small_m(*shape, seed=10 * i, dtype=dtype)] for i, shape in enumerate([(16, 3, 5), (33, 2, 8), (20, 4, 3)])]
    assert_accurate(gankern.minibatch_features, eager_features, cases)
    rows = [[randn(*shape, seed=10 * i, dtype=dtype)] for i, shape in enumerate([(16, 5), (33, 8), (20, 3)])]
    assert_accurate(gankern.minibatch_distance, eager_distance, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_losses_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    real, fake = (t.requires_grad_() for t in samples(((16, 5), (12, 5)), dtype))
    for fn, inputs in ((gankern.mmd2, (real, fake)), (gankern.pulling_away, (real,))):
        value = fn(*inputs)
        assert value.dtype == torch.float32
        exact = fn(*(t.detach().double() for t in inputs))
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        assert all(g.dtype == dtype for g in torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_features(backend: str, dtype: torch.dtype) -> None:
    m = small_m(4, 3, 2, dtype=dtype).requires_grad_()
    o = gankern.minibatch_features(m)
    assert (o.dtype, o.shape) == (dtype, (4, 3))
    assert torch.autograd.grad(o.sum(), m)[0].dtype == dtype
    assert gankern.minibatch_distance(m).dtype == dtype


def test_nan_and_infinity_pass_as_in_eager(backend: str) -> None:
    m = small_m(6, 3, 2, dtype=torch.float32)
    m[0, 0, 0], m[1, 1, 1], m[2, 2, 0] = math.nan, math.inf, -math.inf
    got, want = (derivatives(fn, [m]) for fn in (gankern.minibatch_features, eager_features))
    assert got.keys() == want.keys()
    for d in (got["d[0]"], want["d[0]"]):  # eager's NaN here is inf - inf of a sample and itself, which the kernels do not visit
        d[1, 1] = d[2, 2] = 0.0
    for name in ("y", "d[0]"):
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name)
    for value in (math.nan, math.inf):
        x, y = samples(((5, 3), (4, 3)), torch.float32)
        x[1, 2] = value
        assert gankern.mmd2(x, y).isnan()
        assert gankern.pulling_away(x).isnan()
        assert gankern.minibatch_distance(x).isnan().all()


def test_gradcheck(backend: str) -> None:
    fast = INTERPRETED and backend == "triton"
    m, x, y = small_m(4, 2, 3).requires_grad_(), *(t.requires_grad_() for t in samples(((4, 3), (3, 3))))
    for fn, inputs in (
        (gankern.minibatch_features, (m,)),
        (gankern.minibatch_distance, (x,)),
        (gankern.mmd2, (x, y)),
        (partial(gankern.mmd2, unbiased=True), (x, y)),
        (gankern.pulling_away, (x,)),
    ):
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=fast)


def test_a_third_derivative_of_the_features_raises(kernel_backend: str) -> None:
    m = small_m(4, 2, 3).requires_grad_()
    (d,) = torch.autograd.grad(gankern.minibatch_features(m).sum(), m, create_graph=True)
    (dd,) = torch.autograd.grad(d.square().sum(), m, create_graph=True)
    for allow_unused in (False, True):
        with pytest.raises(
            RuntimeError, match=r"minibatch_features: derivatives must be of order 1 or 2 on the backend .*, got order 3"
        ):
            torch.autograd.grad(dd.sum(), m, allow_unused=allow_unused, retain_graph=True)


def test_large_prime_shape(kernel_backend: str) -> None:
    """The kernels themselves: several threads, the same bits each run and for each number of threads."""
    kernels, threads = op._kernels(kernel_backend), torch.get_num_threads()
    n, b, c = (131, 3, 5) if INTERPRETED and kernel_backend == "triton" else (521, 13, 7)
    m, g, h = (randn(*shape, seed=i, dtype=torch.float32) / c for i, shape in enumerate([(n, b, c), (n, b), (n, b, c)]))
    gram, sq = randn(n, 1031, seed=4, dtype=torch.float32), [randn(k, seed=5, dtype=torch.float32).square() + 2 for k in (n, 1031)]

    def all_of_them() -> list[Tensor]:
        block = gram.clone()
        rows = kernels.pairwise_gram_(block, *sq, [0.5, 0.01], True)
        return [
            kernels.pairwise_features(m),
            kernels.pairwise_features_grad(g, m),
            *kernels.pairwise_features_grad2(h, g, m),
            block,
            *rows,
        ]

    try:
        runs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(all_of_them())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    leaf, cotangent = m.double().requires_grad_(), g.double().requires_grad_()
    o = eager_features(leaf)
    (dm,) = torch.autograd.grad(o, leaf, cotangent, create_graph=True)
    dg, ddm = torch.autograd.grad(dm, (cotangent, leaf), h.double())
    d = (sq[0].double()[:, None] + sq[1].double() - 2 * gram.double()).clamp_min(0)
    mask = torch.ones_like(d).triu(1)
    k = mask * (torch.exp(-0.5 * d) + torch.exp(-0.01 * d))
    w = mask * (torch.exp(-0.5 * d) + 0.02 * torch.exp(-0.01 * d))
    for got, want in zip(runs[0], (o, dm, dg, ddm, w, k.sum(1), w.sum(1)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[torch.float32] * want.abs().max().item())


def test_retained_graph_and_untouched_inputs(backend: str) -> None:
    m, (x, y) = small_m(4, 2, 3), samples(((5, 3), (4, 3)))
    copies = [t.clone() for t in (m, x, y)]
    leaves = [t.requires_grad_() for t in (m, x, y)]
    for fn, inputs in ((gankern.minibatch_features, leaves[:1]), (gankern.mmd2, leaves[1:]), (gankern.pulling_away, leaves[1:2])):
        value = fn(*inputs).sum()
        first, second = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            assert torch.equal(fn(*inputs).sum(), value)
            assert not fn(*inputs).requires_grad
    assert all(torch.equal(a, b) for a, b in zip((m, x, y), copies, strict=True))


def test_the_penalty_of_a_critic_with_minibatch_features_reaches_every_weight(backend: str) -> None:
    """A gradient penalty through MinibatchDiscrimination and MinibatchDistance, against plain PyTorch."""
    weights = [randn(7, 5, seed=1), randn(5, 3, 2, seed=2), randn(9, 1, seed=3)]

    def penalty(features: Callable[[Tensor], Tensor], distance: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def fn(x: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            hidden = F.leaky_relu(x @ w, 0.2)
            o = features((hidden @ t.flatten(1) / 5).unflatten(1, (3, 2)))
            score = torch.cat([hidden, o, distance(hidden)], 1) @ v
            (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            return (grad.norm(dim=1) - 1).square().mean()

        return fn

    inputs = [randn(6, 7, seed=0), *weights]
    assert_matches(
        penalty(gankern.minibatch_features, gankern.minibatch_distance), penalty(eager_features, eager_distance), inputs, order=1
    )


# --- torch.func, torch.compile, autocast, the registered ops --------------------------------------------------------------------


def test_func_grad_of_grad(backend: str) -> None:
    m, (x, y) = small_m(4, 2, 3), samples(((4, 3), (5, 3)))
    for fn, want, inputs in (
        (gankern.minibatch_features, eager_features, (m,)),
        (gankern.mmd2, eager_mmd2, (x, y)),
        (gankern.pulling_away, eager_pulling_away, (x,)),
    ):

        def outer(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *a: torch.func.grad(lambda *b: f(*b).pow(2).sum())(*a).pow(2).sum()

        got, expected = (torch.func.grad(outer(f))(*inputs) for f in (fn, want))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_vmap_of_features(backend: str, dim: int) -> None:
    m = torch.stack([small_m(4, 2, 3, seed=i) for i in range(3)], dim)
    got = torch.vmap(gankern.minibatch_features, dim)(m)
    torch.testing.assert_close(got, torch.stack([eager_features(t) for t in m.unbind(dim)]), rtol=1e-12, atol=1e-12)

    def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda m: torch.func.grad(lambda a: fn(a).pow(2).sum())(m).pow(2).sum()

    got, want = (torch.vmap(torch.func.grad(loss(fn)), dim)(m) for fn in (gankern.minibatch_features, eager_features))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dims", [(0, None), (None, 1), (0, 0)], ids=str)
def test_vmap_of_mmd2(backend: str, dims: tuple[int | None, int | None]) -> None:
    inputs = [t if d is None else torch.stack([t, t + 1, 2 * t], d) for t, d in zip(samples(((4, 3), (5, 3))), dims, strict=True)]
    for fn, want in (
        (gankern.mmd2, eager_mmd2),
        (torch.func.grad(gankern.mmd2, argnums=(0, 1)), torch.func.grad(eager_mmd2, argnums=(0, 1))),
    ):
        torch.testing.assert_close(torch.vmap(fn, dims)(*inputs), torch.vmap(want, dims)(*inputs), rtol=1e-11, atol=1e-12)


def test_hessian(backend: str) -> None:
    m = small_m(3, 1 if INTERPRETED and backend == "triton" else 2, 2)  # a launch for each pair of elements
    got, want = (torch.func.jacrev(torch.func.jacrev(fn))(m) for fn in (gankern.minibatch_features, eager_features))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    m, (x, y) = small_m(4, 2, 3), samples(((4, 3), (5, 3)))
    for fn, want, inputs in (
        (gankern.minibatch_features, eager_features, (m,)),
        (gankern.mmd2, eager_mmd2, (x, y)),
    ):
        tangents = tuple(randn(*t.shape, seed=7) for t in inputs)
        if backend == "reference":
            torch.testing.assert_close(torch.func.jvp(fn, inputs, tangents)[1], torch.func.jvp(want, inputs, tangents)[1])
        else:
            with pytest.raises(RuntimeError, match="jvp"):
                torch.func.jvp(fn, inputs, tangents)


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None) -> None:
    need(name or "reference")
    m, (x, y) = small_m(4, 2, 3), samples(((7, 3), (5, 3)))
    for fn, want, inputs in (
        (gankern.minibatch_features, eager_features, (m,)),
        (gankern.minibatch_distance, eager_distance, (x,)),
        (gankern.mmd2, eager_mmd2, (x, y)),
        (gankern.pulling_away, eager_pulling_away, (x,)),
    ):
        torch.compiler.reset()
        leaves = [t.requires_grad_() for t in inputs]
        with gankern.use_backend(name) if name else nullcontext():
            got = torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
        expected = want(*leaves)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(backend: str) -> None:
    """Products inside stay in float32; 16-bit projections become float32, as torch.exp makes them."""
    m, (x, y) = small_m(4, 2, 3, dtype=torch.float32), samples(((7, 3), (5, 3)), torch.float32)
    leaves = [t.requires_grad_() for t in (m, x, y)]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = [gankern.minibatch_features(m), gankern.mmd2(x, y), gankern.pulling_away(x), gankern.minibatch_distance(x)]
        half = gankern.minibatch_features(m.bfloat16())
    want = [eager_features(m), eager_mmd2(x, y), eager_pulling_away(x), eager_distance(x)]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, got[0], rtol=0.02, atol=0.02)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        grads = (torch.autograd.grad(v.sum(), leaves, allow_unused=True, retain_graph=True) for v in (a, b))
        for c, d in zip(*grads, strict=True):
            torch.testing.assert_close(c, d, rtol=1e-4, atol=1e-5)
    if backend == "reference":  # the engine's own products follow autocast there, as everywhere in PyTorch
        return
    with torch.autocast(DEVICE, torch.bfloat16):
        (d,) = torch.autograd.grad(gankern.mmd2(x, y), x, create_graph=True)
    torch.testing.assert_close(d, torch.autograd.grad(eager_mmd2(x, y), x)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    need("compiled")
    ops = torch.ops.gankern
    m, h, g = small_m(5, 2, 3, dtype=dtype), small_m(5, 2, 3, seed=1, dtype=dtype), randn(5, 2, seed=2, dtype=dtype)
    torch.library.opcheck(ops.pairwise_features.default, (m,))
    torch.library.opcheck(ops.pairwise_features_grad.default, (g, m))
    torch.library.opcheck(ops.pairwise_features_grad2.default, (h, g, m))
    if dtype.itemsize > 2:
        gram, a, b = randn(4, 6, seed=3, dtype=dtype), randn(4, seed=4, dtype=dtype), randn(6, seed=5, dtype=dtype)
        for gammas, upper in (([0.5, 0.1], True), ([2.0], False)):
            torch.library.opcheck(ops.pairwise_gram_.default, (gram, a, b, gammas, upper))


def test_raw_ops_refuse() -> None:
    need("compiled")
    ops, m, gram = torch.ops.gankern, torch.zeros(3, 2, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    for call, message in (
        (lambda: ops.pairwise_features(m[0]), "pairwise_features: m must have 3 dimensions"),
        (lambda: ops.pairwise_features(m.mT), "pairwise_features: m must be contiguous"),
        (lambda: ops.pairwise_features_grad(gram, m), "pairwise_features_grad: g must have the first two dimensions of m"),
        (
            lambda: ops.pairwise_features_grad2(gram, m[..., 0].contiguous(), m),
            "pairwise_features_grad2: h must have the shape of m",
        ),
        (
            lambda: ops.pairwise_gram_(gram, gram[0], gram[0], [1.0], False),
            "sq_a and sq_b must have one element for each row and column",
        ),
        (
            lambda: ops.pairwise_gram_(gram.half(), gram[:, 0].half(), gram[0].half(), [1.0], False),
            "gram must be float64 or float32",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.gpu
def test_capture_in_a_cuda_graph(kernel_backend: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("runs with GANKERN_TEST_DEVICE=cuda")
    m, (x, y) = small_m(16, 4, 5, dtype=torch.float32), samples(((40, 3), (30, 3)), torch.float32)

    def work() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (m, x, y)]
        value = gankern.minibatch_features(leaves[0]).sum() + gankern.mmd2(*leaves[1:]) + gankern.pulling_away(leaves[1])
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    for a, b in zip(captured, work(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- the modules ----------------------------------------------------------------------------------------------------------------


def test_modules(backend: str) -> None:
    torch.manual_seed(0)
    module = gankern.nn.MinibatchDiscrimination(400, 30, 5, device=DEVICE)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {"T": (400, 30, 5)}
    assert abs(module.T.std().item() * 20 - 1) < 0.02
    assert "in_features=400, out_features=30, kernel_dim=5" in repr(module)
    x = randn(8, 400, seed=1, dtype=torch.float32)
    y = module(x)
    assert torch.equal(y[:, :400], x)
    torch.testing.assert_close(y[:, 400:], eager_features((x @ module.T.flatten(1)).view(8, 30, 5)))
    assert (y[:, 400:] > 0).all()
    assert torch.equal(gankern.nn.MinibatchDistance()(x), torch.cat([x, gankern.minibatch_distance(x)], 1))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert module(x).shape == (8, 430)
    assert losses.mmd2 is gankern.mmd2
    assert losses.pulling_away is gankern.pulling_away


# --- bad input ------------------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "m is no tensor": (
        lambda: gankern.minibatch_features([1.0]),
        TypeError,
        "minibatch_features: m must be a torch.Tensor, got list",
    ),
    "m is integer": (
        lambda: gankern.minibatch_features(X.long()[None]),
        TypeError,
        "minibatch_features: m must be float64, float32, bfloat16 or float16, got int64",
    ),
    "m is 2-D": (
        lambda: gankern.minibatch_features(X),
        ValueError,
        "minibatch_features: m must have 3 dimensions, got shape [3, 4]",
    ),
    "x is a scalar": (
        lambda: gankern.minibatch_distance(torch.tensor(1.0)),
        ValueError,
        "minibatch_distance: x must have samples as its first dimension, got shape []",
    ),
    "no real sample": (lambda: gankern.mmd2(X[:0], X), ValueError, "mmd2: real must have at least 1 sample, got shape [0, 4]"),
    "one fake sample": (
        lambda: gankern.mmd2(X, X[:1], unbiased=True),
        ValueError,
        "mmd2: fake must have at least 2 samples, got shape [1, 4]",
    ),
    "sizes differ": (lambda: gankern.mmd2(X, X[:, :2]), ValueError, "mmd2: fake must have 4 numbers a sample, got shape [3, 2]"),
    "dtypes differ": (lambda: gankern.mmd2(X, X.double()), TypeError, "mmd2: fake must have dtype float32, got float64"),
    "devices differ": (lambda: gankern.mmd2(X, X.to("meta")), ValueError, "mmd2: fake must be on cpu, got meta"),
    "no sigma": (lambda: gankern.mmd2(X, X, []), ValueError, "mmd2: sigmas must be 1 to 16 numbers, got 0"),
    "zero sigma": (lambda: gankern.mmd2(X, X, [1.0, 0.0]), ValueError, "mmd2: sigmas must be in [1e-18, 1e+18], got 0.0"),
    "sigma is a word": (lambda: gankern.mmd2(X, X, ["a"]), TypeError, "mmd2: sigmas must be a number, got str"),
    "one feature": (
        lambda: gankern.pulling_away(X[:1]),
        ValueError,
        "pulling_away: features must have at least 2 samples, got shape [1, 4]",
    ),
    "layer of nothing": (
        lambda: gankern.nn.MinibatchDiscrimination(0, 3),
        ValueError,
        "MinibatchDiscrimination: in_features must be a finite number >= 1, got 0",
    ),
    "layer's x does not fit": (
        lambda: gankern.nn.MinibatchDiscrimination(5, 3)(X),
        ValueError,
        "MinibatchDiscrimination: x must have 5 as its last dimension, got shape [3, 4]",
    ),
    "layer's x is 1-D": (
        lambda: gankern.nn.MinibatchDistance()(X[0]),
        ValueError,
        "MinibatchDistance: x must have 2 dimensions, got shape [4]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_a_forced_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.backend, "problem", lambda name, device: "there is none")
    for name, call in (
        ("minibatch_features", lambda: gankern.minibatch_features(X[None])),
        ("mmd2", lambda: gankern.mmd2(X, X)),
    ):
        with (
            gankern.use_backend("compiled"),
            pytest.raises(RuntimeError, match=f"^{name}: backend must be able to run on cpu tensors"),
        ):
            call()
