"""linear_lrelu on every backend: values, derivatives up to the third order, dropout, torch.func, torch.compile, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.ops import linear_lrelu as op
from gankern.ops._philox import draw_seed, dropout_keep, philox
from tests.support import DEVICE, TOLERANCE, assert_accurate, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

# (shape of x, out_features): empty, size 1, prime, one and four dimensions, no features at all
SHAPES = [
    ((5, 7), 3),
    ((1, 1), 1),
    ((4,), 6),
    ((13, 31), 17),
    ((2, 3, 1, 5), 4),
    ((67, 3), 130),
    ((0, 4), 3),
    ((3, 0, 4), 2),
    ((3, 0), 4),
    ((3, 4), 0),
]
INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """The oracle: what a user of plain PyTorch writes."""
    z = F.linear(x, weight, bias)
    return F.leaky_relu(z, slope) if slope else F.relu(z)


def make(x_shape: tuple[int, ...], out: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    fan_in = x_shape[-1]
    return (
        randn(*x_shape, seed=seed, dtype=dtype),
        randn(out, fan_in, seed=seed + 1, dtype=dtype, scale=1 / math.sqrt(max(fan_in, 1))),
        randn(out, seed=seed + 2, dtype=dtype),
    )


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def rng_state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


def keep_mask(shape: tuple[int, ...], p: float, seed: int = 5) -> Tensor:
    """What dropout keeps when the caller's generator was seeded with `seed`."""
    drawn = draw_seed(torch.device(DEVICE), generator(seed))
    return dropout_keep(drawn, math.prod(shape[:-1]), shape[-1], p).reshape(shape)


# --- values and derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_matches_eager_to_third_order(backend: str, shape: tuple[int, ...], out: int, dtype: torch.dtype) -> None:
    assert_matches(gankern.linear_lrelu, eager, make(shape, out, dtype=dtype), order=3)


@pytest.mark.parametrize("slope", [0, 0.01, 0.2, 1, 3])
def test_slopes(backend: str, slope: float) -> None:
    inputs = make((11, 9), 10)
    assert_matches(lambda x, w, b: gankern.linear_lrelu(x, w, b, slope), lambda x, w, b: eager(x, w, b, slope), inputs, order=3)


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb"])
def test_only_some_inputs_want_a_gradient(backend: str, wanted: str) -> None:
    tensors = dict(zip("xwb", make((6, 5), 9), strict=True))

    def call(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: fn(*(tensors | dict(zip(wanted, given, strict=True))).values())

    assert_matches(call(gankern.linear_lrelu), call(eager), [tensors[k] for k in wanted], order=3)


def test_without_bias(backend: str) -> None:
    assert_matches(gankern.linear_lrelu, eager, make((6, 5), 9)[:2], order=3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)], ids=str)
def test_any_strides(backend: str, shape: tuple[int, ...], layout: str) -> None:
    inputs = [LAYOUTS[layout](t) for t in make(shape, 7)]
    assert_matches(gankern.linear_lrelu, eager, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_of_any_strides(backend: str, layout: str) -> None:
    inputs = [t.requires_grad_() for t in make((2, 6, 5), 7)]
    c = LAYOUTS[layout](randn(2, 6, 7, seed=9))
    got, want = (torch.autograd.grad(fn(*inputs), inputs, c) for fn in (gankern.linear_lrelu, eager))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, bias: bool) -> None:
    cases = [
        make(shape, out, seed=10 * i, dtype=dtype)[: 2 + bias]
        for i, (shape, out) in enumerate([((64, 48), 96), ((33, 130), 65), ((128, 17), 40)])
    ]
    assert_accurate(gankern.linear_lrelu, eager, cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_dropout_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype) -> None:
    cases = [make((64, 48), 96, seed=10 * i, dtype=dtype) for i in range(3)]

    def masked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = eager(x, w, b)
        return y * (keep_mask(tuple(y.shape), 0.3) / (1 - 0.3)).to(y.dtype)

    assert_accurate(lambda x, w, b: gankern.linear_lrelu(x, w, b, 0.2, 0.3, generator=generator()), masked, cases)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dtype_of_value_and_gradients(backend: str, dtype: torch.dtype, p: float) -> None:
    inputs = [t.requires_grad_() for t in make((3, 4), 5, dtype=dtype)]
    y = gankern.linear_lrelu(*inputs, dropout=p)
    assert y.dtype == dtype
    assert y.shape == (3, 5)
    assert all(g.dtype == dtype for g in torch.autograd.grad(y.sum(), inputs))


def test_nan_and_infinity_pass_as_in_eager(backend: str) -> None:
    x, w = torch.eye(6, dtype=torch.float32, device=DEVICE), torch.zeros(4, 6, device=DEVICE)
    b = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE)
    for slope in (0.0, 0.2, 1.0):
        got, want = (
            derivatives(lambda x, w, b, fn=fn, s=slope: fn(x, w, b, s), (x, w, b), order=1) for fn in (gankern.linear_lrelu, eager)
        )
        assert got.keys() == want.keys()
        for name in want if slope else ["y"]:  # ReLU's derivative at NaN is 0 here, 1 in PyTorch
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True, msg=name)
    x[0, 0] = math.nan
    w[1, 0] = math.inf
    torch.testing.assert_close(gankern.linear_lrelu(x, w, b), eager(x, w, b), rtol=0, atol=0, equal_nan=True)


def test_infinite_and_nan_cotangents_pass_as_in_eager(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3), 4, dtype=torch.float32)]
    c = torch.ones(4, 4, device=DEVICE)
    c[0, 0], c[1, 1], c[2, 2] = math.nan, math.inf, -math.inf
    for slope in (0.01, 0.2):
        got, want = (torch.autograd.grad(fn(*inputs, slope), inputs, c) for fn in (gankern.linear_lrelu, eager))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_nan_and_infinity_pass_dropout_as_in_eager(backend: str) -> None:
    """Dropout multiplies by 0: what is not finite becomes NaN, also where it is dropped, forward and backward."""
    x, w, c = torch.eye(4, device=DEVICE), torch.zeros(64, 4, device=DEVICE), torch.ones(4, 64, device=DEVICE)
    w[:, 0], w[:, 1], c[2, :], c[3, :] = math.nan, math.inf, -math.inf, math.nan
    w.requires_grad_()
    mask = keep_mask((4, 64), 0.5) * 2.0
    got, want = gankern.linear_lrelu(x, w, None, 0.2, 0.5, generator=generator()), eager(x, w) * mask
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    got, want = (torch.autograd.grad(y, w, c)[0] for y in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_large_prime_shape(kernel_backend: str, p: float) -> None:
    """The kernels themselves: sums over many rows, several threads, the same bits each run."""
    rows, columns, dtype = (1031, 131, torch.float32) if INTERPRETED and kernel_backend == "triton" else (4099, 1031, torch.float32)
    z, bias, dy = (
        randn(rows, columns, seed=1, dtype=dtype),
        randn(columns, seed=2, dtype=dtype),
        randn(rows, columns, seed=3, dtype=dtype),
    )
    seed = torch.tensor([2**62 + 12345], device=DEVICE) if p else None
    kernels, threads = op._kernels(kernel_backend), torch.get_num_threads()
    factor = torch.ones_like(z) if seed is None else dropout_keep(seed, rows, columns, p) * op.dropout_scale(p)
    try:
        torch.set_num_threads(3)
        y, bits = kernels.linear_lrelu_act(z, bias, 0.2, p, seed)
        dz, dbias = kernels.linear_lrelu_act_grad(dy, y, bits, 0.2, p, True)
        again = kernels.linear_lrelu_act_grad(dy, y, bits, 0.2, p, True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(y, F.leaky_relu(z + bias, 0.2) * factor)
    torch.testing.assert_close(dz, dy * torch.where(z + bias > 0, 1.0, 0.2) * factor)
    want = dz.double().sum(0)
    torch.testing.assert_close(dbias.double(), want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())
    assert torch.equal(again[0], dz)
    assert torch.equal(again[1], dbias)


def test_gradcheck(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3), 5)]
    fast = INTERPRETED and backend == "triton"  # along random directions instead of element by element
    assert torch.autograd.gradcheck(gankern.linear_lrelu, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(gankern.linear_lrelu, inputs, fast_mode=fast)


def test_gradcheck_with_dropout(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3), 5)]

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return gankern.linear_lrelu(x, w, b, 0.1, 0.5, generator=generator())

    fast = INTERPRETED and backend == "triton"
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=fast)


def test_second_backward_and_retained_graph(backend: str) -> None:
    """The same graph walked twice gives the same gradients, and a freed graph says so."""
    inputs = [t.requires_grad_() for t in make((4, 3), 5)]
    y = gankern.linear_lrelu(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), inputs)


def test_without_a_graph(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3), 5)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = gankern.linear_lrelu(*inputs)
            torch.testing.assert_close(y, eager(*inputs))
        assert not y.requires_grad


def test_inputs_are_left_alone(backend: str) -> None:
    inputs = make((4, 3), 5)
    copies = [t.clone() for t in inputs]
    derivatives(lambda x, w, b: gankern.linear_lrelu(x, w, b, 0.2, 0.5), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


# --- dropout ------------------------------------------------------------------------------------------------------------------


def philox_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 on Python integers, with all four counter words."""
    (c0, c1, c2, c3), (k0, k1), m = counter, key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & m, (p0 >> 32) ^ c3 ^ k1, p0 & m
        k0, k1 = (k0 + 0x9E3779B9) & m, (k1 + 0xBB67AE85) & m
    return [c0, c1, c2, c3]


def test_philox_is_the_published_generator() -> None:
    """Three known answers of the authors' Random123 library, and then `philox` against that on 64-bit counters and keys."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_in_python((0,) * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_in_python((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_in_python(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed in (0, 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF):
        counters = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62])
        got = philox(torch.tensor([seed]), counters).tolist()
        assert got == [philox_in_python((c & ones, c >> 32, 0, 0), (seed & ones, seed >> 32)) for c in counters.tolist()]


@pytest.mark.parametrize("p", [0.0001, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 8), (2, 9), (37, 131)])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_mask_bits_are_those_of_the_definition(kernel_backend: str, seed: int, rows: int, columns: int, p: float) -> None:
    z = randn(rows, columns, seed=1, dtype=torch.float32) + 10
    drawn = torch.tensor([seed], device=DEVICE)
    y, bits = op._kernels(kernel_backend).linear_lrelu_act(z, None, 0.2, p, drawn)
    assert bits.dtype == torch.uint8
    assert bits.shape == (rows, (columns + 7) // 8)
    kept = (bits[..., None] >> torch.arange(8, device=DEVICE, dtype=torch.uint8) & 1).flatten(1)[:, :columns].bool()
    assert torch.equal(kept, dropout_keep(drawn, rows, columns, p))
    torch.testing.assert_close(y, z * kept * op.dropout_scale(p))


@pytest.mark.parametrize(
    ("shape", "out"), [((5, 7), 3), ((4,), 6), ((13, 31), 17), ((2, 3, 1, 5), 4), ((0, 4), 3), ((3, 4), 0), ((3, 0), 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dropout_matches_eager_times_mask_to_third_order(
    backend: str, shape: tuple[int, ...], out: int, dtype: torch.dtype
) -> None:
    p = 0.4
    mask = keep_mask((*shape[:-1], out), p).to(dtype) / (1 - p)
    assert_matches(
        lambda x, w, b: gankern.linear_lrelu(x, w, b, 0.1, p, generator=generator()),
        lambda x, w, b: eager(x, w, b, 0.1) * mask,
        make(shape, out, dtype=dtype),
        order=3,
    )


def test_dropout_of_everything(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((6, 5), 9)]
    y = gankern.linear_lrelu(*inputs, dropout=1.0)
    assert torch.equal(y, torch.zeros_like(y))
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))


def test_dropout_does_nothing_in_evaluation_or_at_zero(backend: str) -> None:
    inputs = make((6, 5), 9)
    state = rng_state()
    plain = gankern.linear_lrelu(*inputs)
    assert torch.equal(gankern.linear_lrelu(*inputs, dropout=0.5, training=False), plain)
    assert torch.equal(gankern.linear_lrelu(*inputs, dropout=0.0), plain)
    assert torch.equal(rng_state(), state), "random numbers were drawn without need"


def test_dropout_keeps_the_right_share_independently(backend: str) -> None:
    """Kept shares over all, over each column and of neighbouring pairs, within 5 standard deviations of p."""
    p, rows, columns = 0.3, 1024, 250
    x, w = torch.ones(rows, 1, device=DEVICE), torch.ones(columns, 1, device=DEVICE)
    y = gankern.linear_lrelu(x, w, dropout=p, generator=generator())
    kept = y != 0
    torch.testing.assert_close(y, kept / (1 - p))
    q = 1 - p
    for what, share, expected, n in (
        ("all", kept.double().mean(), q, rows * columns),
        ("column", kept.double().mean(0), q, rows),
        ("row", kept.double().mean(1), q, columns),
        ("neighbours in a row", (kept[:, 1:] & kept[:, :-1]).double().mean(), q * q, rows * columns / 4),
        ("neighbours in a column", (kept[1:] & kept[:-1]).double().mean(), q * q, rows * columns / 4),
    ):
        assert ((share - expected).abs() <= 5 * math.sqrt(expected * (1 - expected) / n)).all(), what


def test_dropout_follows_the_seed(backend: str) -> None:
    inputs = make((16, 5), 20)

    def draw(g: torch.Generator | None = None) -> Tensor:
        return gankern.linear_lrelu(*inputs, dropout=0.5, generator=g)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    g = generator(3)
    state = rng_state()
    own = draw(g), draw(g)
    assert not torch.equal(*own)
    assert torch.equal(draw(generator(3)), own[0])
    assert torch.equal(rng_state(), state), "a given generator leaves the default one alone"


@pytest.mark.gpu
def test_each_replay_of_a_cuda_graph_draws_anew(kernel_backend: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("runs with GANKERN_TEST_DEVICE=cuda")
    inputs = make((16, 5), 20, dtype=torch.float32)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # kernels are compiled and handles created before the capture
        gankern.linear_lrelu(*inputs, dropout=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = gankern.linear_lrelu(*inputs, dropout=0.5)
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append(y.clone())
        torch.testing.assert_close(y, eager(*inputs) * (y != 0) * 2)
    assert not torch.equal(runs[0] != 0, runs[1] != 0)


def test_all_backends_draw_the_same_mask() -> None:
    inputs, zeros = make((16, 5), 20, dtype=torch.float32), []
    for name in gankern.backend.NAMES:
        if not gankern.backend.problem(name, DEVICE):
            with gankern.use_backend(name):
                zeros.append(gankern.linear_lrelu(*inputs, dropout=0.5, generator=generator()) == 0)
    assert all(torch.equal(z, zeros[0]) for z in zeros)
    assert torch.equal(zeros[0], ~keep_mask((16, 20), 0.5))


# --- torch.func ---------------------------------------------------------------------------------------------------------------


def test_func_grad_of_grad(backend: str) -> None:
    inputs, direction = make((4, 3), 5), randn(4, 3, seed=8)

    def penalty(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: (torch.func.grad(lambda x, w, b: fn(x, w, b).pow(2).sum())(*a) * direction).sum()

    def third(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.func.grad(penalty(fn))(*a).square().sum()

    for level in (penalty, third):
        got, want = (torch.func.grad(level(fn), argnums=(0, 1, 2))(*inputs) for fn in (gankern.linear_lrelu, eager))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "dims", [(0, None, None), (1, None, None), (None, 0, 0), (None, 1, None), (0, 0, 0), (0, None, 1), (None, None, 0)], ids=str
)
@pytest.mark.parametrize("shape", [(4, 3), (3,)], ids=str)
def test_vmap(backend: str, shape: tuple[int, ...], dims: tuple[int | None, ...]) -> None:
    """Batches of inputs, ensembles of weights and biases, values and the gradients of each sample."""
    batch, inputs = 3, make(shape, 5)
    stacked = [
        t if d is None else torch.stack([t + randn(*t.shape, seed=20 + i) for i in range(batch)], min(d, t.dim()))
        for t, d in zip(inputs, dims, strict=True)
    ]
    dims = tuple(d if d is None else min(d, t.dim()) for t, d in zip(inputs, dims, strict=True))
    single = [[t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)] for i in range(batch)]
    got = torch.vmap(gankern.linear_lrelu, dims)(*stacked)
    torch.testing.assert_close(got, torch.stack([eager(*s) for s in single]), rtol=1e-12, atol=1e-12)

    def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: fn(x, w, b).pow(2).sum()

    grads = torch.vmap(torch.func.grad(loss(gankern.linear_lrelu), argnums=(0, 1, 2)), dims)(*stacked)
    wants = [torch.func.grad(loss(eager), argnums=(0, 1, 2))(*s) for s in single]
    for j, g in enumerate(grads):
        torch.testing.assert_close(g, torch.stack([w[j] for w in wants]), rtol=1e-12, atol=1e-12)


def test_gradient_through_vmap(backend: str) -> None:
    """The other way round: a backward pass, and a second one, through a vmapped call."""
    x, w, b = make((4, 3), 5)
    ws, bs = torch.stack([w, w - 1, 2 * w]), torch.stack([b, b + 1, -b])

    def ensemble(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: torch.vmap(fn, (None, 0, 0))(x, w, b)

    def loop(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.stack([eager(x, w[i], b[i]) for i in range(3)])

    assert_matches(ensemble(gankern.linear_lrelu), loop, (x, ws, bs))


def test_hessian(backend: str) -> None:
    x, w, b = make((2, 3), 4)

    def loss(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: fn(x, w, b).pow(2).sum()

    got, want = (torch.func.jacrev(torch.func.jacrev(loss(fn)))(w) for fn in (gankern.linear_lrelu, eager))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(backend: str, randomness: str) -> None:
    p, batch = 0.5, 4
    x, w, b = make((8, 3), 16)
    xs = torch.stack([x, x, x + 1, x - 1])

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = torch.func.vjp(lambda x: gankern.linear_lrelu(x, w, b, 0.2, p), x)
        return y, pull(torch.ones_like(y))[0]

    torch.manual_seed(11)
    ys, dxs = torch.vmap(both, randomness=randomness)(xs)
    kept = ys != 0
    if randomness == "same":
        torch.manual_seed(11)
        seed = draw_seed(torch.device(DEVICE), None)
        assert torch.equal(kept, dropout_keep(seed, 8, 16, p).expand(batch, 8, 16))
    else:
        assert all(not torch.equal(kept[i], kept[j]) for i in range(batch) for j in range(i))
        assert abs(kept.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(kept.numel())
    for i in range(batch):
        leaf = xs[i].clone().requires_grad_()
        want = eager(leaf, w, b) * kept[i] / (1 - p)
        torch.testing.assert_close(ys[i], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dxs[i], torch.autograd.grad(want.sum(), leaf)[0], rtol=1e-12, atol=1e-12)


def test_vmap_with_dropout_must_be_told_about_randomness(backend: str) -> None:
    x, w, b = make((8, 3), 16)
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(lambda x: gankern.linear_lrelu(x, w, b, dropout=0.5))(x)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_mode_is_right_or_refused(backend: str, argument: int) -> None:
    inputs = make((4, 3), 5)
    tangents = [torch.zeros_like(t) for t in inputs]
    tangents[argument] = randn(*inputs[argument].shape, seed=7)

    def call(fn: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(fn, inputs, tuple(tangents))[1]

    if backend == "reference":
        torch.testing.assert_close(call(gankern.linear_lrelu), call(eager))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            call(gankern.linear_lrelu)


# --- torch.compile, autocast, the registered ops ------------------------------------------------------------------------------


def compiled_call(p: float, how: str) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(lambda x, w, b: gankern.linear_lrelu(x, w, b, 0.2, p), fullgraph=True, backend=how)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None, p: float) -> None:
    need(name or "reference")
    inputs = [t.requires_grad_() for t in make((6, 5), 9)]
    fn = compiled_call(p, "aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        y = fn(*inputs)
    kept = y != 0
    assert kept.all() if p == 0 else 0 < kept.sum() < kept.numel()
    want = eager(*inputs) * kept / (1 - p)
    torch.testing.assert_close(y, want)
    for got, expected in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", COMPILABLE[-1:])
def test_compile_with_inductor(name: str) -> None:
    """A critic's loss of both ops, through the whole of torch.compile."""
    need(name)
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in make((6, 5), 9, dtype=torch.float32)]

    @torch.compile(fullgraph=True)
    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return gankern.gan_loss(gankern.linear_lrelu(x, w, b).sum(1), n_real=4).loss

    with gankern.use_backend(name):
        got = loss(*inputs)
    logits = eager(*inputs).sum(1)
    want = F.softplus(-logits[:4]).mean() + F.softplus(logits[4:]).mean()
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_notices_another_backend() -> None:
    """A compiled function follows the backend that is forced when it is called, not the one of its first call."""
    need("compiled")
    fn, inputs, seen = compiled_call(0.0, "aot_eager"), make((6, 5), 9), []
    for name in ("reference", "compiled"):
        with gankern.use_backend(name), torch.profiler.profile() as profile:
            fn(*inputs)
        seen.append(any("gankern::" in event.key for event in profile.key_averages()))
    assert seen == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_does_as_linear_does(backend: str, dtype: torch.dtype, p: float) -> None:
    inputs = [t.requires_grad_() for t in make((6, 5), 9, dtype=torch.float32)]
    x = inputs[0].to(dtype)  # what an earlier layer hands on
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gankern.linear_lrelu(x, *inputs[1:], dropout=p, generator=generator())
        want = F.leaky_relu(F.linear(x, *inputs[1:]), 0.2) * (keep_mask((6, 9), p) / (1 - p)).bfloat16()
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    for got, expected in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(dtype: torch.dtype, p: float, bias: bool) -> None:
    need("compiled")
    z, b = randn(2, 3, 11, seed=0, dtype=dtype), randn(11, seed=1, dtype=dtype) if bias else None
    seed = torch.tensor([77], device=DEVICE) if p else None
    y, bits = torch.ops.gankern.linear_lrelu_act(z, b, 0.2, p, seed)
    torch.library.opcheck(torch.ops.gankern.linear_lrelu_act.default, (z, b, 0.2, p, seed))
    torch.library.opcheck(torch.ops.gankern.linear_lrelu_act_grad.default, (z, y, bits, 0.2, p, bias))


# --- the module ---------------------------------------------------------------------------------------------------------------


def test_module_is_linear_leaky_relu_dropout(backend: str) -> None:
    torch.manual_seed(0)
    module = gankern.nn.LinearLeakyReLU(5, 9, negative_slope=0.1, dropout=0.5, device=DEVICE, dtype=torch.float64)
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 9, device=DEVICE, dtype=torch.float64)
    assert [*module.state_dict()] == [*linear.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), linear.parameters(), strict=True))
    x = make((6, 5), 9)[0]
    torch.testing.assert_close(module.eval()(x), F.leaky_relu(linear(x), 0.1))
    y = module.train()(x)
    torch.testing.assert_close(y, F.leaky_relu(linear(x), 0.1) * (y != 0) * 2)
    assert 0 < (y != 0).sum() < y.numel()
    assert "negative_slope=0.1, dropout=0.5" in repr(module)
    assert gankern.nn.LinearLeakyReLU(5, 9, bias=False).bias is None


# --- bad input ----------------------------------------------------------------------------------------------------------------

X, W, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
REFUSED = {
    "x is no tensor": ([[1.0]], W, B, {}, TypeError, "linear_lrelu: x must be a torch.Tensor, got list"),
    "x is integer": (X.long(), W, B, {}, TypeError, "linear_lrelu: x must be float64, float32, bfloat16 or float16, got int64"),
    "x is complex": (
        X.cfloat(),
        W,
        B,
        {},
        TypeError,
        "linear_lrelu: x must be float64, float32, bfloat16 or float16, got complex64",
    ),
    "x does not fit": (
        torch.zeros(2, 5),
        W,
        B,
        {},
        ValueError,
        "linear_lrelu: x must have 3 as its last dimension, got shape [2, 5]",
    ),
    "x is a scalar": (torch.tensor(1.0), W, B, {}, ValueError, "linear_lrelu: x must have 3 as its last dimension, got shape []"),
    "weight is no tensor": (X, 3, B, {}, TypeError, "linear_lrelu: weight must be a torch.Tensor, got int"),
    "weight is 1-D": (X, B, B, {}, ValueError, "linear_lrelu: weight must have 2 dimensions, got shape [4]"),
    "weight has another dtype": (X, W.double(), B, {}, TypeError, "linear_lrelu: weight must have dtype float32, got float64"),
    "weight elsewhere": (X, W.to("meta"), B, {}, ValueError, "linear_lrelu: weight must be on cpu, got meta"),
    "bias is no tensor": (X, W, 1.0, {}, TypeError, "linear_lrelu: bias must be a torch.Tensor, got float"),
    "bias does not fit": (X, W, torch.zeros(5), {}, ValueError, "linear_lrelu: bias must have shape [4], got [5]"),
    "bias is 2-D": (X, W, torch.zeros(1, 4), {}, ValueError, "linear_lrelu: bias must have shape [4], got [1, 4]"),
    "bias has another dtype": (X, W, B.half(), {}, TypeError, "linear_lrelu: bias must have dtype float32, got float16"),
    "bias is integer, x with gaps": (
        torch.zeros(3, 2, 3).transpose(0, 2),
        torch.zeros(4, 3),
        torch.zeros(4, dtype=torch.int64),
        {},
        TypeError,
        "linear_lrelu: bias must have dtype float32, got int64",
    ),
    "weight elsewhere, one input": (
        torch.zeros(2, 4, 1),
        torch.zeros(3, 1, device="meta"),
        None,
        {},
        ValueError,
        "linear_lrelu: weight must be on cpu, got meta",
    ),
    "bias elsewhere": (X, W, B.to("meta"), {}, ValueError, "linear_lrelu: bias must be on cpu, got meta"),
    "slope < 0": (
        X,
        W,
        B,
        {"negative_slope": -0.1},
        ValueError,
        "linear_lrelu: negative_slope must be a finite number >= 0, got -0.1",
    ),
    "slope is NaN": (
        X,
        W,
        B,
        {"negative_slope": math.nan},
        ValueError,
        "linear_lrelu: negative_slope must be a finite number >= 0, got nan",
    ),
    "slope is infinite": (
        X,
        W,
        B,
        {"negative_slope": math.inf},
        ValueError,
        "linear_lrelu: negative_slope must be a finite number >= 0, got inf",
    ),
    "slope is text": (X, W, B, {"negative_slope": "0.2"}, TypeError, "linear_lrelu: negative_slope must be a number, got str"),
    "dropout > 1": (X, W, B, {"dropout": 1.5}, ValueError, "linear_lrelu: dropout must be in [0, 1], got 1.5"),
    "dropout < 0": (X, W, B, {"dropout": -0.5}, ValueError, "linear_lrelu: dropout must be in [0, 1], got -0.5"),
    "dropout is a bool": (X, W, B, {"dropout": True}, TypeError, "linear_lrelu: dropout must be a number, got bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(backend: str, case: str) -> None:
    x, w, b, options, kind, sentence = REFUSED[case]
    with pytest.raises(kind) as caught:
        gankern.linear_lrelu(x, w, b, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    why = gankern.backend.problem(name, "meta")
    assert why
    with gankern.use_backend(name), pytest.raises(RuntimeError) as caught:
        gankern.linear_lrelu(X.to("meta"), W.to("meta"))
    assert str(caught.value) == f"linear_lrelu: backend must be able to run on meta tensors, got {name!r}: {why}"


def test_module_refuses_bad_settings() -> None:
    for options, sentence in (
        ({"negative_slope": -1}, "LinearLeakyReLU: negative_slope must be a finite number >= 0, got -1"),
        ({"dropout": 2}, "LinearLeakyReLU: dropout must be in [0, 1], got 2"),
    ):
        with pytest.raises(ValueError) as caught:
            gankern.nn.LinearLeakyReLU(3, 4, **options)
        assert str(caught.value) == sentence
