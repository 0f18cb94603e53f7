"""interpolate on every backend: values, derivatives, eps and its source, layouts, torch.func, torch.compile, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import gankern
from gankern.ops import interpolate as op
from gankern.ops._philox import draw_seed
from tests.support import DEVICE, assert_accurate, assert_matches, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(5, 7), (1, 1), (4,), (13, 31), (2, 3, 4, 5), (67, 3), (3, 1, 2, 2, 2), (0, 4), (3, 0)]
INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def eager(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """The oracle: what a user of plain PyTorch writes."""
    e = eps.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
    return e * real + (1 - e) * fake


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)]


def epsilons(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(count, seed=3).sigmoid().to(dtype)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_eager_to_third_order(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    eps = epsilons(shape[0], dtype)
    assert_matches(lambda r, f: gankern.interpolate(r, f, eps), lambda r, f: eager(r, f, eps), pair(shape, dtype), order=3)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_input_wants_a_gradient(backend: str, wanted: int) -> None:
    real, fake = pair((5, 4))
    eps = epsilons(5)

    def call(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: fn(*((t, fake) if wanted == 0 else (real, t)), eps)

    assert_matches(call(gankern.interpolate), call(eager), [(real, fake)[wanted]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype) -> None:
    eps = epsilons(33, torch.float32)

    def exact(real: Tensor, fake: Tensor) -> Tensor:
        return eager(real, fake, eps.double())

    cases = [[randn(33, 50, seed=10 * i + j, dtype=dtype) for j in (0, 1)] for i in range(3)]
    assert_accurate(lambda r, f: gankern.interpolate(r, f, eps), lambda r, f: eager(r, f, eps), cases, exact)


# --- eps ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_is_the_philox_draw_of_the_seed(backend: str, dtype: torch.dtype) -> None:
    """real = 1, fake = 0: the output is eps, the same bits on every backend and in every dtype that holds 24 bits."""
    x = torch.ones(300, 3, dtype=dtype, device=DEVICE)
    got = gankern.interpolate(x, torch.zeros_like(x), generator=generator())
    want = op.draw_eps(draw_seed(torch.device(DEVICE), generator()), 300, torch.float64)
    assert torch.equal(got, want.to(torch.float32 if dtype != torch.float64 else dtype)[:, None].expand(300, 3).to(dtype))


def test_one_eps_for_each_sample_and_not_one_for_the_batch(backend: str) -> None:
    """A fault of well-known code: `eps = torch.rand(1)`. And it is one for all elements of a sample, not one each."""
    x = torch.ones(64, 3, 2, 2, device=DEVICE)
    eps = gankern.interpolate(x, torch.zeros_like(x), generator=generator())
    assert torch.equal(eps, eps[:, :1, :1, :1].expand_as(eps))
    assert len(eps[:, 0, 0, 0].unique()) > 60


@pytest.mark.parametrize("name", ["automatic", "compiled", "triton"])
def test_eps_is_uniform_and_drawn_anew(name: str) -> None:
    if name != "automatic":
        need(name)
    n = 20_000
    with gankern.use_backend(name) if name != "automatic" else nullcontext():
        x = torch.ones(n, device=DEVICE)
        a, b = (gankern.interpolate(x, torch.zeros_like(x)).double() for _ in range(2))
    for eps in (a, b):
        assert 0 <= eps.min() < 1e-3
        assert 1 - 1e-3 < eps.max() < 1
        assert abs(eps.mean() - 0.5) < 5 / math.sqrt(12 * n)
        assert abs(eps.var() - 1 / 12) < 5 / math.sqrt(180 * n)
    correlation = ((a - 0.5) * (b - 0.5)).mean() * 12
    assert abs(correlation) < 5 / math.sqrt(n)
    assert not torch.equal(a, b)


def test_ends_of_the_line_are_exact(backend: str) -> None:
    real, fake = pair((4, 9), torch.float32)
    assert torch.equal(gankern.interpolate(real, fake, torch.ones(4, device=DEVICE)), real)
    assert torch.equal(gankern.interpolate(real, fake, torch.zeros(4, device=DEVICE)), fake)


def test_nan_and_infinity_show_as_in_eager(backend: str) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE)
    real, fake = special[:, None].expand(4, 4), special.expand(4, 4)
    for value in (0.0, 0.5, 1.0):
        eps = torch.full((4,), value, device=DEVICE)
        torch.testing.assert_close(gankern.interpolate(real, fake, eps), eager(real, fake, eps), equal_nan=True)


# --- layouts and dtypes -------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("second", [None, "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: str, layout: str, second: str | None) -> None:
    real, fake = pair((4, 3, 5, 2))
    eps = torch.stack([epsilons(4)] * 2, -1)[:, 0]
    inputs = [LAYOUTS[layout](real), fake if second else LAYOUTS[layout](fake)]
    for given in (inputs, inputs[::-1]):
        assert_matches(lambda r, f: gankern.interpolate(r, f, eps), lambda r, f: eager(r, f, eps), given)


@pytest.mark.parametrize(("shape", "layout"), [((4, 3, 5, 2), torch.channels_last), ((2, 3, 4, 2, 2), torch.channels_last_3d)])
def test_channels_last_stays_channels_last(backend: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    real, fake = (t.contiguous(memory_format=layout) for t in pair(shape))
    assert gankern.interpolate(real, fake).is_contiguous(memory_format=layout)


def test_large(backend: str) -> None:
    real, fake = pair((3, 100_003), torch.float32)
    eps = epsilons(3, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(gankern.interpolate(real, fake, eps), eager(real, fake, eps))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fake_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("real_dtype", DTYPES, ids=str)
def test_different_dtypes_are_promoted_as_in_eager(backend: str, real_dtype: torch.dtype, fake_dtype: torch.dtype) -> None:
    """A generator under autocast gives 16-bit samples, the data are float32."""
    real, fake = randn(4, 3, seed=1, dtype=real_dtype), randn(4, 3, seed=2, dtype=fake_dtype)
    got = gankern.interpolate(real, fake)
    assert got.dtype == (real + fake).dtype


def test_autocast_changes_nothing(backend: str) -> None:
    real, fake = pair((4, 3), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = gankern.interpolate(real, fake, generator=generator())
    assert torch.equal(got, gankern.interpolate(real, fake, generator=generator()))


# --- torch.func, torch.compile, the registered op ------------------------------------------------------------------------------


def test_gradcheck(backend: str) -> None:
    inputs = [t.requires_grad_() for t in pair((3, 2))]
    eps = epsilons(3)
    assert torch.autograd.gradcheck(lambda r, f: gankern.interpolate(r, f, eps), inputs)
    assert torch.autograd.gradgradcheck(lambda r, f: gankern.interpolate(r, f, eps), inputs)


def test_func_grad(backend: str) -> None:
    real, fake = pair((4, 3))
    eps = epsilons(4)
    got, want = (
        torch.func.grad(lambda r, f, fn=fn: fn(r, f, eps).pow(3).sum(), argnums=(0, 1))(real, fake)
        for fn in (gankern.interpolate, eager)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 1, None), (None, None, 0)], ids=str)
def test_vmap(backend: str, dims: tuple[int | None, ...]) -> None:
    inputs = [*pair((4, 3)), epsilons(4)]
    stacked = [t if d is None else torch.stack([t, 2 * t, t - 1], d) for t, d in zip(inputs, dims, strict=True)]
    single = [[t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)] for i in range(3)]
    got = torch.vmap(gankern.interpolate, dims)(*stacked)
    torch.testing.assert_close(got, torch.stack([eager(*s) for s in single]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws(backend: str, randomness: str) -> None:
    ones = torch.ones(3, 8, 2, device=DEVICE)
    eps = torch.vmap(lambda x: gankern.interpolate(x, torch.zeros_like(x)), randomness=randomness)(ones)
    assert torch.equal(eps[0], eps[1]) == (randomness == "same")
    assert torch.equal(eps[..., 0], eps[..., 1])


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    inputs, eps = pair((4, 3)), epsilons(4)

    def call(fn: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda r, f: fn(r, f, eps), tuple(inputs), tuple(inputs[::-1]))[1]

    if backend == "reference":
        torch.testing.assert_close(call(gankern.interpolate), call(eager))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            call(gankern.interpolate)


@pytest.mark.parametrize("given", [True, False], ids=["eps", "drawn"])
@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None, given: bool) -> None:
    need(name or "reference")
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in pair((6, 4), torch.float32)]
    eps = epsilons(6, torch.float32) if given else None
    fn = torch.compile(lambda r, f: gankern.interpolate(r, f, eps), fullgraph=True, backend="aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        got = fn(*inputs)
    real, fake = (t.detach() for t in inputs)
    used = ((got - fake) / (real - fake)).mean(1).detach() if eps is None else eps
    want = eager(*inputs, used)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["eps", "drawn"])
def test_opcheck(dtype: torch.dtype, given: bool) -> None:
    need("compiled")
    real, fake = pair((3, 2, 5), dtype)
    eps = epsilons(3, torch.float64 if dtype == torch.float64 else torch.float32) if given else None
    torch.library.opcheck(
        torch.ops.gankern.interpolate.default, (real, fake, eps, None if given else torch.tensor([7], device=DEVICE))
    )


# --- bad input ----------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "real is no tensor": ((1.0, X), TypeError, "interpolate: real must be a torch.Tensor, got float"),
    "fake is no tensor": ((X, None), TypeError, "interpolate: fake must be a torch.Tensor, got NoneType"),
    "integers": ((X.long(), X), TypeError, "interpolate: real must be float64, float32, bfloat16 or float16, got int64"),
    "scalars": ((X[0, 0], X[0, 0]), ValueError, "interpolate: real must have at least one dimension, got shape []"),
    "shapes differ": ((X, X[:1]), ValueError, "interpolate: fake must have shape [2, 3], got [1, 3]"),
    "devices differ": ((X, X.to("meta")), ValueError, "interpolate: fake must be on cpu, got meta"),
    "eps is a number": ((X, X, 0.5), TypeError, "interpolate: eps must be a torch.Tensor, got float"),
    "eps is one for all": ((X, X, torch.zeros(1)), ValueError, "interpolate: eps must have shape [2], got [1]"),
    "eps is integer": (
        (X, X, torch.zeros(2).int()),
        TypeError,
        "interpolate: eps must be float64, float32, bfloat16 or float16, got int32",
    ),
    "eps wants a gradient": (
        (X, X, torch.zeros(2, requires_grad=True)),
        ValueError,
        "interpolate: eps must not require a gradient, got a tensor that does",
    ),
    "eps elsewhere": ((X, X, torch.zeros(2, device="meta")), ValueError, "interpolate: eps must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(backend: str, case: str) -> None:
    arguments, kind, sentence = REFUSED[case]
    with pytest.raises(kind) as caught:
        gankern.interpolate(*arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    with gankern.use_backend(name), pytest.raises(RuntimeError, match=f"interpolate: backend must be able to run on meta .*{name}"):
        gankern.interpolate(X.to("meta"), X.to("meta"))
