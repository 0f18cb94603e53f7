"""spectral_norm on every backend: values, derivatives, torch.func, torch.compile, bad input (modules: test_nn_spectral_norm.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.ops import spectral_norm as op
from tests.support import DEVICE, assert_accurate, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = DEVICE == "cpu"
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)

# (shape, dim) of each weight: size 1, prime, empty, every place of dim, a group of unlike ones
GROUPS = {
    "linear": [((5, 7), 0)],
    "one": [((1, 1), 0), ((1, 6), 0), ((6, 1), 0)],
    "prime": [((37, 131), 0), ((131, 3), 1)],
    "conv": [((6, 3, 3, 3), 0), ((4, 6, 4, 4), 1), ((3, 2, 5), 1), ((3, 4, 5), 2), ((2, 3, 2, 2, 2), 0)],
    "empty": [((0, 4), 0), ((4, 0), 0), ((0, 3, 2), 1), ((3, 5), 0)],
}


def eager(w: Tensor, u: Tensor, v: Tensor, dim: int, iterations: int, eps: float = 1e-12) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: what torch.nn.utils.parametrizations.spectral_norm does."""
    matrix = w.permute(dim, *(d for d in range(w.dim()) if d != dim)).flatten(1)
    with torch.no_grad():
        for _ in range(iterations):
            u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
            v = F.normalize(torch.mv(matrix.H, u), dim=0, eps=eps)
    return w / torch.vdot(u, torch.mv(matrix, v)), u, v


def make(group: Sequence[tuple[tuple[int, ...], int]], dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], ...]:
    weights, us, vs = [], [], []
    for i, (shape, dim) in enumerate(group):
        weights.append(randn(*shape, seed=seed + 3 * i, dtype=dtype))
        rows, columns = op.as_matrix(weights[-1], dim).shape
        us.append(F.normalize(randn(rows, seed=seed + 3 * i + 1), dim=0).to(dtype))
        vs.append(F.normalize(randn(columns, seed=seed + 3 * i + 2), dim=0).to(dtype))
    return weights, us, vs


def ours(us: list[Tensor], vs: list[Tensor], dims: list[int], iterations: int) -> Callable[..., Tensor]:
    """All outputs in one vector, from fresh buffers, so that it is a function of the weights alone."""

    def fn(*weights: Tensor) -> Tensor:
        u, v = ([t.to(weights[0].dtype, copy=True) for t in ts] for ts in (us, vs))
        return torch.cat([y.flatten() for y in op.spectral_norm(weights, u, v, dims, iterations)])

    return fn


def theirs(us: list[Tensor], vs: list[Tensor], dims: list[int], iterations: int) -> Callable[..., Tensor]:
    def fn(*weights: Tensor) -> Tensor:
        dtype = weights[0].dtype
        parts = zip(weights, us, vs, dims, strict=True)
        return torch.cat([eager(w, u.to(dtype), v.to(dtype), dim, iterations)[0].flatten() for w, u, v, dim in parts])

    return fn


def both(group: str, dtype: torch.dtype, iterations: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    dims = [dim for _, dim in GROUPS[group]]
    weights, us, vs = make(GROUPS[group], dtype)
    return ours(us, vs, dims, iterations), theirs(us, vs, dims, iterations), weights


# --- values and derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group", ["linear", "prime", "conv", "empty"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_matches_eager_to_second_order(backend: str, iterations: int, group: str, dtype: torch.dtype) -> None:
    fn, oracle, weights = both(group, dtype, iterations)
    got, want = (derivatives(f, weights) for f in (fn, oracle))
    assert got.keys() == want.keys()
    for name in want:
        expected = want[name]
        # relative to the largest element; at iteration 0 u and v are random, sigma is a sum that cancels and magnifies rounding
        finite = expected[expected.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        factor = (
            {torch.float64: 1e-11, torch.float32: 3e-4}[dtype]
            if iterations == 0
            else {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
        )
        torch.testing.assert_close(
            got[name], expected, rtol=0, atol=factor * scale, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_third_order(backend: str) -> None:
    fn, oracle, weights = both("linear", torch.float64, 1)
    assert_matches(fn, oracle, weights, order=3)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_buffers_are_updated_as_by_eager(backend: str, iterations: int, group: str) -> None:
    weights, us, vs = make(GROUPS[group], torch.float64)
    u, v = [t.clone() for t in us], [t.clone() for t in vs]
    versions = [t._version for t in u + v]
    dims = [dim for _, dim in GROUPS[group]]
    op.spectral_norm(weights, u, v, dims, iterations)
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        _, want_u, want_v = eager(w, us[i], vs[i], dim, iterations)
        torch.testing.assert_close(u[i], want_u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(v[i], want_v, rtol=1e-12, atol=1e-12)
    assert all((t._version > before) == (iterations > 0) for t, before in zip(u + v, versions, strict=True))


def test_sigma_of_a_diagonal_matrix_is_its_largest_entry(backend: str) -> None:
    entries = torch.tensor([0.3, 7.0, 2.0, 5.0, 1.0], dtype=torch.float64, device=DEVICE)
    w = torch.diag(entries)
    u, v = (F.normalize(torch.ones(5, dtype=torch.float64, device=DEVICE), dim=0) for _ in range(2))
    (y,) = op.spectral_norm([w], [u], [v], [0], 60)
    torch.testing.assert_close(y, w / 7.0)
    torch.testing.assert_close(u.abs(), (entries == 7.0).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype) -> None:
    dims = [0, 1]
    _, us, vs = make([((48, 60), 0), ((16, 12, 4, 4), 1)], torch.float64)
    us, vs = [[t.to(dtype) for t in ts] for ts in (us, vs)]
    cases = [make([((48, 60), 0), ((16, 12, 4, 4), 1)], dtype, seed=30 * i)[0] for i in range(3)]
    # order 1, the order of the kernels: 16-bit sums lose every digit of eager's second derivative
    assert_accurate(ours(us, vs, dims, 1), theirs(us, vs, dims, 1), cases, order=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_shape_and_strides(backend: str, dtype: torch.dtype) -> None:
    plain = randn(6, 3, 4, 4, seed=0, dtype=dtype)
    layouts = [plain.contiguous(memory_format=torch.channels_last), plain.transpose(0, 1), torch.stack([plain, plain], -1)[..., 0]]
    for w in (plain, *layouts):
        w = w.detach().requires_grad_()
        (_,), (u,), (v,) = make([(tuple(w.shape), 0)], dtype)
        (y,) = op.spectral_norm([w], [u.clone()], [v.clone()], [0], 1)
        assert (y.dtype, y.shape, y.stride()) == (dtype, w.shape, (w / 2).stride())
        c = torch.ones_like(y).expand_as(y)
        want = eager(w, u, v, 0, 1)[0]
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(y, want, **tolerance)
        torch.testing.assert_close(torch.autograd.grad(y, w, c)[0], torch.autograd.grad(want, w, c)[0], **tolerance)


def test_only_some_outputs_and_inputs(backend: str) -> None:
    weights, us, vs = make(GROUPS["conv"], torch.float64)
    dims = [dim for _, dim in GROUPS["conv"]]
    weights[0].requires_grad_()
    weights[2].requires_grad_()
    ys = op.spectral_norm(weights, [u.clone() for u in us], [v.clone() for v in vs], dims, 1)
    loss = ys[1].sum() + ys[2].square().sum()
    got = torch.autograd.grad(loss, [weights[0], weights[2]], allow_unused=True)
    assert got[0] is None
    (want,) = torch.autograd.grad(eager(weights[2], us[2], vs[2], dims[2], 1)[0].square().sum(), weights[2])
    torch.testing.assert_close(got[1], want)


def test_two_calls_before_a_backward_pass(backend: str) -> None:
    """Each call keeps the u and v that it used, though the buffers move on."""
    (w,), (u,), (v,) = make(GROUPS["linear"], torch.float64)
    w.requires_grad_()
    first_u, first_v = u.clone(), v.clone()
    (a,) = op.spectral_norm([w], [u], [v], [0], 1)
    (b,) = op.spectral_norm([w], [u], [v], [0], 1)
    (c,) = op.spectral_norm([w], [u], [v], [0], 0)
    u.zero_()
    ea, u1, v1 = eager(w, first_u, first_v, 0, 1)
    eb, u2, v2 = eager(w, u1, v1, 0, 1)
    ec, _, _ = eager(w, u2, v2, 0, 0)
    got, want = (
        torch.autograd.grad(x.pow(3).sum() + 2 * y.exp().sum() + z.sin().sum(), w)[0] for x, y, z in ((a, b, c), (ea, eb, ec))
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e17])
@pytest.mark.parametrize("iterations", [0, 1])
def test_nan_infinity_and_extremes_as_eager(backend: str, iterations: int, value: float) -> None:
    (w,), (u,), (v,) = make([((6, 9), 0)], torch.float32)
    if value == 0.0:
        w = w * 0
    elif abs(value) < math.inf:
        w = w * value
    else:
        w[2, 3] = value
    want = eager(w, u, v, 0, iterations)[0]
    (y,) = op.spectral_norm([w], [u], [v], [0], iterations)
    torch.testing.assert_close(y, want, equal_nan=True)


@pytest.mark.parametrize(("scale", "eps"), [(1e-9, 1e-3), (1e-3, 0.5), (1.0, 0.0)])
def test_eps(backend: str, scale: float, eps: float) -> None:
    (w,), (u,), (v,) = make([((6, 9), 0)], torch.float64)
    w = (w * scale).requires_grad_()
    want = eager(w, u, v, 0, 2, eps)[0]
    (y,) = op.spectral_norm([w], [u], [v], [0], 2, eps)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w), torch.autograd.grad(want.sum(), w))


def test_large_and_independent_of_the_threads(kernel_backend: str) -> None:
    group = (
        [((67, 331), 0), ((16, 31, 3, 3), 1)]
        if INTERPRETED and kernel_backend == "triton"
        else [((1031, 1151), 0), ((128, 257, 4, 4), 1)]
    )
    dims, threads, runs = [0, 1], torch.get_num_threads(), []
    weights, us, vs = make(group, torch.float32)
    gs = [randn(*w.shape, seed=90 + i, dtype=torch.float32) for i, w in enumerate(weights)]
    offsets = [0, sum(op._lengths(weights[0], 0)) + 1]
    try:
        for n in (1, 3, 3):
            torch.set_num_threads(n)
            ys, state = op._kernels(kernel_backend).spectral_norm(weights, us, vs, dims, 2, 1e-12)
            runs.append([*ys, state, *op._kernels(kernel_backend).spectral_norm_grad(gs, weights, state, offsets, dims)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    for i, dim in enumerate(dims):
        exact = weights[i].double().requires_grad_()
        want = eager(exact, us[i].double(), vs[i].double(), dim, 2)[0]
        (grad,) = torch.autograd.grad(want, exact, gs[i].double())
        for got, expected in ((runs[0][i], want.detach()), (runs[0][3 + i], grad)):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_gradcheck(backend: str) -> None:
    """u and v are constants of the derivative and must not move with the weights: iterations 0 at the vectors of two iterations."""
    dims = [dim for _, dim in GROUPS["conv"]]
    weights, us, vs = make(GROUPS["conv"], torch.float64)
    op.spectral_norm(weights, us, vs, dims, 2)
    weights = [w.requires_grad_() for w in weights[:3]]
    fn = ours(us[:3], vs[:3], dims[:3], 0)
    assert torch.autograd.gradcheck(fn, weights, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, weights, fast_mode=True)


# --- torch.func, torch.compile, autocast, the registered ops -------------------------------------------------------------------


def test_func_grad_of_grad(backend: str) -> None:
    fn, oracle, weights = both("linear", torch.float64, 0)
    direction = randn(5, 7, seed=8)

    def second(f: Callable[..., Tensor]) -> Tensor:
        return torch.func.grad(lambda w: (torch.func.grad(lambda w: f(w).pow(3).sum())(w) * direction).sum())(*weights)

    torch.testing.assert_close(second(fn), second(oracle), rtol=1e-11, atol=1e-11)


def test_vmap(backend: str) -> None:
    """An ensemble of weights in evaluation; what iterates would have to write batched vectors into the one u and v."""
    _, (u,), (v,) = make(GROUPS["linear"], torch.float64)
    stacked = randn(3, 5, 7, seed=5)
    fn, oracle = ours([u], [v], [0], 0), theirs([u], [v], [0], 0)
    torch.testing.assert_close(torch.vmap(fn)(stacked), torch.stack([oracle(w) for w in stacked]))
    got = torch.vmap(torch.func.grad(lambda w: fn(w).pow(3).sum()))(stacked)
    want = torch.stack([torch.func.grad(lambda w: oracle(w).pow(3).sum())(w) for w in stacked])
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda w: op.spectral_norm([w], [u], [v], [0], 1)[0])(stacked)


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    """u and v are constants here too; PyTorch's own lets tangents through its no_grad."""
    (w,), (u,), (v,) = make(GROUPS["linear"], torch.float64)
    fn, tangent = ours([u], [v], [0], 1), randn(5, 7, seed=9)
    if backend == "reference":
        _, new_u, new_v = eager(w, u, v, 0, 1)
        oracle = theirs([new_u], [new_v], [0], 0)
        torch.testing.assert_close(torch.func.jvp(fn, (w,), (tangent,))[1], torch.func.jvp(oracle, (w,), (tangent,))[1])
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(fn, (w,), (tangent,))


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None) -> None:
    need(name or "reference")
    torch.compiler.reset()
    weights, us, vs = make(GROUPS["conv"][:2], torch.float64)
    weights = [w.requires_grad_() for w in weights]
    u, v = [t.clone() for t in us], [t.clone() for t in vs]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(a: Tensor, b: Tensor) -> Tensor:
        ys = op.spectral_norm([a, b], u, v, [0, 1], 1)
        return ys[0].pow(3).sum() + ys[1].pow(3).sum()

    with gankern.use_backend(name) if name else nullcontext():
        got = fn(*weights)
        grads = torch.autograd.grad(got, weights)
    parts = [eager(w, a, b, dim, 1) for w, a, b, dim in zip(weights, us, vs, [0, 1], strict=True)]
    want = parts[0][0].pow(3).sum() + parts[1][0].pow(3).sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want, weights))
    torch.testing.assert_close([*u, *v], [*(p[1] for p in parts), *(p[2] for p in parts)])


def test_autocast_computes_in_the_dtype_of_the_weights(backend: str) -> None:
    (w,), (u,), (v,) = make(GROUPS["prime"][:1], torch.float32)
    w.requires_grad_()
    want = eager(w, u, v, 0, 1)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (y,) = op.spectral_norm([w], [u], [v], [0], 1)
        got = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)[0]
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(got, torch.autograd.grad(want.pow(3).sum(), w)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("iterations", [0, 1])
def test_opcheck(iterations: int, dtype: torch.dtype) -> None:
    need("compiled")
    weights, us, vs = make(GROUPS["conv"][:2], dtype)
    ys, state = torch.ops.gankern.spectral_norm(weights, us, vs, [0, 1], iterations, 1e-12)
    torch.library.opcheck(torch.ops.gankern.spectral_norm.default, (weights, us, vs, [0, 1], iterations, 1e-12))
    torch.library.opcheck(torch.ops.gankern.spectral_norm_grad.default, (ys, weights, state, [0, 34], [0, 1]))


# --- bad input ----------------------------------------------------------------------------------------------------------------

W, U, V = torch.ones(2, 3), torch.ones(2), torch.ones(3)
REFUSED = {
    "no weights": (ValueError, ([], [], [], []), "weights must have at least one tensor, got none"),
    "lists": (ValueError, ([W], [], [V], [0]), "u must have one entry for each of 1 weights, got 0"),
    "tensor": (TypeError, ([3], [U], [V], [0]), r"weights\[0\] must be a torch.Tensor, got int"),
    "dtype": (TypeError, ([W.int()], [U], [V], [0]), r"weights\[0\] must be float64, float32, bfloat16 or float16, got int32"),
    "mixed": (TypeError, ([W, W.double()], [U, U], [V, V], [0, 0]), r"weights\[1\] must have dtype float32, got float64"),
    "vector": (ValueError, ([U], [U], [V], [0]), r"weights\[0\] must have two dimensions or more, got shape \[2\]"),
    "dim": (ValueError, ([W], [U], [V], [2]), r"dims\[0\] must be in \[0, 1\], got 2"),
    "u": (ValueError, ([W], [V], [V], [0]), r"u\[0\] must have shape \[2\], got \[3\]"),
    "v": (TypeError, ([W], [U], [V.double()], [0]), r"v\[0\] must have dtype float32, got float64"),
    "grad": (
        ValueError,
        ([W], [U.clone().requires_grad_()], [V], [0]),
        r"u\[0\] must not require a gradient, got a tensor that does",
    ),
    "iterations": (ValueError, ([W], [U], [V], [0], -1), "iterations must be a finite number >= 0, got -1"),
    "eps": (ValueError, ([W], [U], [V], [0], 1, -1.0), r"eps must be a finite number >= 0, got -1.0"),
    "eps beyond the dtype": (
        ValueError,
        ([W.half()], [U.half()], [V.half()], [0], 1, 1e38),
        r"eps must be a number that torch.float16 has, got 1e\+38",
    ),
    "device": (ValueError, ([W], [U.to("meta")], [V], [0]), r"u\[0\] must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    kind, args, message = REFUSED[case]
    with pytest.raises(kind, match=f"^spectral_norm: {message}$"):
        op.spectral_norm(*args)


def test_raw_ops_hold_their_contract() -> None:
    need("compiled")
    ones = [t.to(DEVICE) for t in (W, U, V)]
    with pytest.raises(RuntimeError, match="be contiguous"):
        torch.ops.gankern.spectral_norm([ones[0].mT], [ones[2]], [ones[1]], [0], 1, 1e-12)
    with pytest.raises(RuntimeError, match="one element a row and a column"):
        torch.ops.gankern.spectral_norm([ones[0]], [ones[2]], [ones[1]], [0], 1, 1e-12)
    with pytest.raises(RuntimeError, match="lie within state"):
        torch.ops.gankern.spectral_norm_grad([ones[0]], [ones[0]], torch.ones(6, device=DEVICE), [1], [0])
