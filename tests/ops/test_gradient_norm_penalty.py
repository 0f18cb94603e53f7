"""gradient_norm_penalty on every backend: values, derivatives to the third order, zeros, layouts, torch.func, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import gankern
from gankern.ops import gradient_norm_penalty as op
from tests.support import DEVICE, assert_accurate, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(5, 7), (1, 1), (4,), (13, 31), (2, 3, 4, 5), (67, 3), (3, 1, 2, 2, 2), (0, 4), (3, 0)]
INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [(1.0, "two", 1.0), (1.0, "one", 10.0), (0.0, "two", 5.0), (0.0, "one", 1.0), (2.5, "two", 0.0), (0.3, "one", 0.5)]


def eager(grad: Tensor, target: float = 1.0, sided: str = "two", weight: float = 1.0) -> Tensor:
    """The oracle: what a user of plain PyTorch writes, in the dtype of the gradient."""
    g = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
    if target == 0.0:
        return weight * g.square().sum(1).mean()
    excess = g.norm(2, dim=1) - target
    return weight * (excess.clamp_min(0) if sided == "one" else excess).square().mean()


def ours(*settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda g: gankern.gradient_norm_penalty(g, *settings).value


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Norms on both sides of 1."""
    scales = torch.linspace(0.3, 2, shape[0], dtype=torch.float64, device=DEVICE).reshape(-1, *[1] * (len(shape) - 1))
    g = randn(*shape, seed=seed) * scales / max(math.prod(shape[1:]), 1) ** 0.5
    return g.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_eager(backend: str, shape: tuple[int, ...], settings: tuple[float, str, float], dtype: torch.dtype) -> None:
    """First derivatives by the kernel; and, where a graph is wanted, to the third order."""
    g = gradients(shape, dtype)
    for order in (1, 3) if dtype == torch.float64 else (1,):
        assert_matches(ours(*settings), lambda g: eager(g, *settings), [g], order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(backend: str, dtype: torch.dtype) -> None:
    g = gradients((7, 3, 5), dtype).requires_grad_()
    result = gankern.gradient_norm_penalty(g)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    want = g.detach().double().flatten(1).norm(2, dim=1)
    tolerance = 8 * torch.finfo(accumulated).eps
    for got, expected in ((result.norms, want), (result.mean_norm, want.mean()), (result.value, (want - 1).square().mean())):
        assert got.dtype == accumulated
        torch.testing.assert_close(got.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert result.value.requires_grad
    assert not result.norms.requires_grad
    assert not result.mean_norm.requires_grad
    assert torch.autograd.grad(result.value, g)[0].dtype == dtype


def test_the_norm_is_of_each_sample_and_not_of_the_batch(backend: str) -> None:
    """A fault of well-known code: `grad.norm()` or `grad.norm(2, dim=1)` of images."""
    g = torch.zeros(4, 3, 2, 2, device=DEVICE)
    g[0, 0, 0, 0], g[1, 2, 1, 1], g[2] = 3.0, 4.0, 0.5
    result = gankern.gradient_norm_penalty(g)
    assert result.norms.tolist() == pytest.approx([3.0, 4.0, math.sqrt(3.0), 0.0])
    assert result.value.item() == pytest.approx((4 + 9 + (math.sqrt(3) - 1) ** 2 + 1) / 4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_gradient_gives_zero_and_not_nan(backend: str, dtype: torch.dtype, settings: tuple[float, str, float]) -> None:
    """A fault of well-known code: sqrt(sum of squares) has the derivative NaN at zero."""
    target, sided, weight = settings
    g = gradients((4, 6), dtype)
    g[1] = 0
    g.requires_grad_()
    value = gankern.gradient_norm_penalty(g, *settings).value
    for create_graph in (False, True):
        (d,) = torch.autograd.grad(value, g, create_graph=create_graph, retain_graph=True)
        assert d.isfinite().all()
        assert not d[1].any()
        assert d[3].any() == (weight > 0 and (sided == "two" or target < 2.0))
    if d.requires_grad:
        (dd,) = torch.autograd.grad(d.double().sum(), g)
        assert dd.isfinite().all()
        want = 2 * weight / 4 if target == 0 else 0.0  # the Hessian of the mean of squares; by convention 0 where there is none
        torch.testing.assert_close(dd[1].double(), torch.full_like(dd[1].double(), want), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, target: float) -> None:
    """The oracle works in float32 as ours does, else its value has 16 bits."""
    cases = [[gradients((33, 50), dtype, seed)] for seed in range(12)]

    def exact(g: Tensor) -> Tensor:
        return eager(g, target)

    def in_float32(g: Tensor) -> Tensor:
        return eager(g.float(), target)

    assert_accurate(ours(target), in_float32, cases, exact, order=1)
    assert_accurate(ours(target), in_float32, cases, exact, order=2)


def test_16_bit_gradients_do_not_overflow(backend: str) -> None:
    g = torch.full((2, 1000), 100.0, dtype=torch.float16, device=DEVICE)
    assert gankern.gradient_norm_penalty(g).mean_norm.item() == pytest.approx(100 * math.sqrt(1000), rel=1e-5)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_nan_and_infinity_show_as_in_eager(backend: str, settings: tuple[float, str, float], special: float) -> None:
    g = gradients((4, 6))
    g[2, 3] = special
    for order in (1, 2):
        got, want = (derivatives(fn, [g], order) for fn in (ours(*settings), lambda g: eager(g, *settings)))
        for name in ("y", "d[0]"):
            torch.testing.assert_close(got[name], want[name], equal_nan=True)
    assert not gankern.gradient_norm_penalty(g, *settings).mean_norm.isfinite()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: str, layout: str) -> None:
    for order in (1, 2):
        assert_matches(ours(), eager, [LAYOUTS[layout](gradients((4, 3, 5, 2)))], order)


@pytest.mark.parametrize("shape", [(3, 100_003), (2, 700_000), (40_000, 2), (5000, 17)], ids=str)
def test_large(backend: str, shape: tuple[int, int]) -> None:
    """More than one chunk, share or block; on any number of threads the same bits."""
    g, threads = gradients(shape, torch.float32).requires_grad_(), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            result = gankern.gradient_norm_penalty(g)
            runs.append((*result, *torch.autograd.grad(result.value, g)))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = g.detach().double().requires_grad_()
    want = eager(exact)
    torch.testing.assert_close(runs[0][0].double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(runs[0][1].double(), exact.norm(2, dim=1), rtol=1e-5, atol=0)
    (d,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(runs[0][3].double(), d, rtol=1e-4, atol=1e-5 * d.abs().max().item())


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_gradcheck(backend: str, settings: tuple[float, str, float]) -> None:
    g = gradients((4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(ours(*settings), [g])
    assert torch.autograd.gradgradcheck(ours(*settings), [g])


# --- torch.func, torch.compile, autocast, the registered ops -------------------------------------------------------------------


def test_func_grad_of_grad(backend: str) -> None:
    g, direction = gradients((4, 3)), randn(4, 3, seed=8)

    def slope(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda g: (torch.func.grad(fn)(g) * direction).sum()

    for level in (lambda fn: fn, slope, lambda fn: slope(slope(fn))):
        got, want = (torch.func.grad(level(fn))(g) for fn in (ours(), eager))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(backend: str, dim: int) -> None:
    stacked = torch.stack([gradients((4, 3)), 2 * gradients((4, 3)), gradients((4, 3), seed=1)], dim)
    single = [stacked.select(dim, i) for i in range(3)]
    got = torch.vmap(gankern.gradient_norm_penalty, dim)(stacked)
    torch.testing.assert_close(got.value, torch.stack([eager(s) for s in single]))
    torch.testing.assert_close(got.norms, torch.stack([s.norm(2, dim=1) for s in single]))
    grads = torch.vmap(torch.func.grad(ours()), dim)(stacked)
    torch.testing.assert_close(grads, torch.stack([torch.func.grad(eager)(s) for s in single]))


def test_gradient_through_vmap(backend: str) -> None:
    stacked = torch.stack([gradients((4, 3)), 2 * gradients((4, 3))])
    for order in (1, 2):
        assert_matches(lambda t: torch.vmap(ours())(t), lambda t: torch.stack([eager(s) for s in t]), [stacked], order)


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    g = gradients((4, 3))

    def call(fn: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.jvp(fn, (g,), (g,))[1]

    if backend == "reference":
        torch.testing.assert_close(call(ours()), call(eager))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            call(ours())


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None) -> None:
    need(name or "reference")
    torch.compiler.reset()
    g = gradients((6, 4), torch.float32).requires_grad_()
    fn = torch.compile(lambda g: gankern.gradient_norm_penalty(g, 1.0, "one", 10.0), fullgraph=True, backend="aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        result = fn(g)
    want = eager(g, 1.0, "one", 10.0)
    torch.testing.assert_close(result.value, want)
    torch.testing.assert_close(result.mean_norm, g.detach().norm(2, dim=1).mean())
    assert not result.mean_norm.requires_grad
    torch.testing.assert_close(torch.autograd.grad(result.value, g)[0], torch.autograd.grad(want, g)[0])


def test_autocast_leaves_it_in_float32(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        g = gradients((6, 40), dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            value = gankern.gradient_norm_penalty(g).value
        assert value.dtype == torch.float32
        assert torch.equal(value, gankern.gradient_norm_penalty(g).value)
        assert torch.autograd.grad(value, g)[0].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_sided", [True, False])
def test_opcheck(dtype: torch.dtype, one_sided: bool) -> None:
    need("compiled")
    g = gradients((3, 2, 5), dtype)
    ops = torch.ops.gankern
    value, norms, _ = ops.gradient_norm_penalty(g, 1.0, one_sided, 10.0)
    torch.library.opcheck(ops.gradient_norm_penalty.default, (g, 1.0, one_sided, 10.0))
    torch.library.opcheck(ops.gradient_norm_penalty_grad.default, (value, g, norms, 1.0, one_sided, 10.0))


# --- bad input ----------------------------------------------------------------------------------------------------------------

G = torch.zeros(2, 3)
OP = "gradient_norm_penalty"
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "grad is no tensor": ((1.0,), TypeError, f"{OP}: grad must be a torch.Tensor, got float"),
    "integers": ((G.long(),), TypeError, f"{OP}: grad must be float64, float32, bfloat16 or float16, got int64"),
    "a scalar": ((G[0, 0],), ValueError, f"{OP}: grad must have at least one dimension, got shape []"),
    "target < 0": ((G, -1.0), ValueError, f"{OP}: target must be a finite number >= 0, got -1.0"),
    "target is text": ((G, "1"), TypeError, f"{OP}: target must be a number, got str"),
    "sided": ((G, 1.0, "both"), ValueError, f"{OP}: sided must be one of two, one, got 'both'"),
    "weight is NaN": ((G, 1.0, "two", math.nan), ValueError, f"{OP}: weight must be a finite number >= 0, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(backend: str, case: str) -> None:
    arguments, kind, sentence = REFUSED[case]
    with pytest.raises(kind) as caught:
        gankern.gradient_norm_penalty(*arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    with gankern.use_backend(name), pytest.raises(RuntimeError, match=f"{OP}: backend must be able to run on meta .*{name}"):
        gankern.gradient_norm_penalty(G.to("meta"))


def test_reference_is_the_definition() -> None:
    g = gradients((5, 7))
    for target, sided, weight in SETTINGS:
        torch.testing.assert_close(op.reference(g, target, sided == "one", weight).value, eager(g, target, sided, weight))


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_third_derivative_at_a_zero_gradient_is_not_nan(backend: str, settings: tuple[float, str, float]) -> None:
    g = gradients((4, 6))
    g[1] = 0
    for name, d in derivatives(ours(*settings), [g], 3).items():
        assert d.isfinite().all(), name


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compiled_second_derivative_is_right_or_refused(name: str | None) -> None:
    """A kernel's Function would lose it without a word (torch 2.13)."""
    need(name or "reference")
    torch.compiler.reset()
    g, direction = gradients((6, 4)), randn(6, 4, seed=8)

    def slope(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda g: (torch.func.grad(fn)(g) * direction).sum())

    call = torch.compile(slope(ours()), fullgraph=True, backend="aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        if name in ("compiled", "triton"):
            with pytest.raises(Exception, match=r"backend must be chosen automatically or be 'reference' for torch\.func inside"):
                call(g)
        else:
            torch.testing.assert_close(call(g), slope(eager)(g), rtol=1e-11, atol=1e-11)
