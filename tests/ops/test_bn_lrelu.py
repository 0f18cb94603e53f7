"""bn_lrelu on every backend: values, derivatives to third order, running averages, layouts, torch.func, compile, bad input."""

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
from gankern.ops import bn_lrelu as op
from tests.support import DEVICE, TOLERANCE, assert_accurate, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)
# without space, in one, two and three dimensions; size 1, prime, many channels, nothing
SHAPES = [
    (5, 3),
    (13, 1),
    (7, 131),
    (4, 3, 5),
    (5, 2, 1),
    (3, 2, 5, 7),
    (45, 3, 2),
    (1, 3, 4, 4),
    (9, 5, 1, 1),
    (2, 3, 2, 3, 2),
    (0, 3),
    (2, 3, 0),
]
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
Fn = Callable[..., Tensor]


def eager(x: Tensor, *args: Any, slope: float = 0.2, **kwargs: Any) -> Tensor:
    """The oracle: what a user of plain PyTorch writes."""
    return F.leaky_relu(F.batch_norm(x, *args, **kwargs), slope)


def definition(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    slope: float = 0.2,
) -> Tensor:
    """The oracle of the third order, at which PyTorch's own batch_norm is wrong in training mode."""
    dims, shape = [d for d in range(x.dim()) if d != 1], (1, -1, *(1,) * (x.dim() - 2))
    mean, var = running_mean.view(shape), running_var.view(shape)
    if training and x.numel():
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    z = (x - mean) / (var + 1e-5).sqrt()
    z = z if weight is None else z * weight.view(shape)
    return F.leaky_relu(z if bias is None else z + bias.view(shape), slope)


def make(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    return (
        randn(*shape, seed=seed, dtype=dtype),
        randn(shape[1], seed=seed + 1, dtype=dtype),
        randn(shape[1], seed=seed + 2, dtype=dtype),
    )


def averages(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(channels, seed=50, dtype=dtype), randn(channels, seed=51, dtype=torch.float64).square().to(dtype) + 0.5


def call(fn: Fn, training: bool, **kwargs: Any) -> Fn:
    """fn as a function of x, weight and bias alone, with fresh running averages each time."""

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype
        kept = dtype if weight is None or x.dtype.itemsize > 2 else weight.dtype
        return fn(x, *averages(x.shape[1], kept), weight, bias, training, **kwargs)

    return run


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# --- values and derivatives ---------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_eager_to_second_order(backend: str, shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    assert_matches(call(gankern.bn_lrelu, training), call(eager, training), make(shape, dtype=dtype))


@MODES
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 5)], ids=str)
def test_third_order(backend: str, shape: tuple[int, ...], training: bool) -> None:
    assert_matches(call(gankern.bn_lrelu, training), call(definition, training), make(shape), order=3)


def test_third_order_of_eager_is_wrong_in_training() -> None:
    """Why the oracle of the third order is another. When this fails, PyTorch has been mended."""
    got, want = (derivatives(call(fn, True), make((5, 3)), order=3) for fn in (eager, definition))
    assert all(torch.allclose(got[name], want[name]) for name in want if not name.startswith("ddd"))
    assert not torch.allclose(got["ddd[0]"], want["ddd[0]"], rtol=0.01)


@MODES
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 5)], ids=str)
def test_the_automatic_choice_to_third_order(shape: tuple[int, ...], training: bool) -> None:
    """Also where it is PyTorch's own calls; and with some inputs that want no gradient."""
    x, w, b = make(shape)
    ours, want = call(gankern.bn_lrelu, training), call(definition, training)
    assert_matches(ours, want, (x, w, b), order=3)
    assert_matches(lambda x: ours(x), lambda x: want(x), (x,), order=3)
    assert_matches(lambda w, b: ours(x, w, b), lambda w, b: want(x, w, b), (w, b), order=3)
    assert_matches(lambda x, b: ours(x, None, b), lambda x, b: want(x, None, b), (x, b), order=3)


@MODES
@pytest.mark.parametrize("slope", [0, 0.01, 1, 3])
def test_slopes(backend: str, slope: float, training: bool) -> None:
    ours, want = call(gankern.bn_lrelu, training, negative_slope=slope), call(definition, training, slope=float(slope))
    assert_matches(ours, want, make((6, 3, 4)), order=3)


@MODES
@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb"])
def test_only_some_inputs_want_a_gradient(backend: str, wanted: str, training: bool) -> None:
    tensors = dict(zip("xwb", make((6, 3, 2)), strict=True))

    def some(fn: Fn) -> Fn:
        return lambda *given: call(fn, training)(*(tensors | dict(zip(wanted, given, strict=True))).values())

    assert_matches(some(gankern.bn_lrelu), some(eager), [tensors[k] for k in wanted])


@MODES
@pytest.mark.parametrize("affine", ["weight", "bias", "neither"])
def test_without_parameters(backend: str, affine: str, training: bool) -> None:
    x, w, b = make((6, 3, 2))
    given = {"weight": (x, w, None), "bias": (x, None, b), "neither": (x, None, None)}[affine]
    names = [t for t in given if t is not None]

    def fill(fn: Fn) -> Fn:
        def run(*tensors: Tensor) -> Tensor:
            it = iter(tensors)
            return call(fn, training)(*(None if t is None else next(it) for t in given))

        return run

    assert_matches(fill(gankern.bn_lrelu), fill(definition), names, order=3)


LAYOUTS: dict[str, Fn] = {
    "channels last": channels_last,
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (5, 3, 4), (3, 2, 4, 5), (3, 2, 2, 2, 3)], ids=str)
def test_any_strides(backend: str, shape: tuple[int, ...], layout: str, training: bool) -> None:
    inputs = [LAYOUTS[layout](make(shape)[0]), *(torch.stack([t, t], -1)[..., 1] for t in make(shape)[1:])]
    assert_matches(call(gankern.bn_lrelu, training), call(definition, training), inputs)  # eager misreads a strided weight


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", [lambda t: t, channels_last], ids=["contiguous x", "channels-last x"])
def test_cotangents_of_any_strides(backend: str, of: Fn, layout: str, training: bool) -> None:
    x, w, b = (t.requires_grad_() for t in make((3, 2, 4, 5)))
    c, d = (LAYOUTS[layout](randn(3, 2, 4, 5, seed=9 + i)) for i in range(2))
    results = []
    for fn in (gankern.bn_lrelu, eager):
        grads = torch.autograd.grad(call(fn, training)(of(x), w, b), (x, w, b), c, create_graph=True)
        results.append([*grads, *torch.autograd.grad(grads[0], (x, w), d, allow_unused=True)])
    for got, want in zip(*results, strict=True):
        got, want = (torch.zeros(()) if t is None else t for t in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@MODES
def test_channels_last_stays_channels_last(backend: str, training: bool) -> None:
    x, w, b = make((3, 4, 2, 5), dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = call(gankern.bn_lrelu, training)(x, w, b)
    if backend != "reference":
        assert y.is_contiguous(memory_format=torch.channels_last)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.is_contiguous(memory_format=torch.channels_last)


@MODES
@pytest.mark.parametrize("parameters", ["float32", "16-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, parameters: str, training: bool) -> None:
    shapes = [(64, 9), (33, 3, 7), (16, 5, 4, 4)]
    cases = [make(shape, seed=10 * i, dtype=dtype) for i, shape in enumerate(shapes)]

    def with_parameters(fn: Fn) -> Fn:
        def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            wide = parameters == "float32" and x.dtype == dtype
            return call(fn, training)(x, w.float() if wide else w, b.float() if wide else b)

        return run

    assert_accurate(with_parameters(gankern.bn_lrelu), with_parameters(eager), cases, call(definition, training))


def test_accurate_far_from_zero(backend: str) -> None:
    """Where sum of squares minus square of the sum would have no digit left."""
    for shape in ((256, 3), (16, 3, 16)):
        x = (randn(*shape, seed=1) + 1e4).float()
        got = call(gankern.bn_lrelu, True, negative_slope=1)(x)
        want = call(definition, True, slope=1.0)(x.double())
        assert (got - want).abs().max() < 2e-3  # half a unit in the last place of x is 5e-4


@MODES
def test_nan_and_infinity_pass_as_in_eager(backend: str, training: bool) -> None:
    for shape in ((6, 4), (3, 4, 5), (3, 4, 2, 8)):
        x, w, b = make(shape, dtype=torch.float32)
        x[0, 0], x[1, 1], w[2] = math.nan, math.inf, math.nan
        inputs = [t.requires_grad_() for t in (x, w, b)]
        c = randn(*shape, seed=7, dtype=torch.float32)
        results = []
        for fn in (gankern.bn_lrelu, eager):
            y = call(fn, training)(*inputs)
            results.append([y, *torch.autograd.grad(y, inputs, c)])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got.isnan(), want.isnan())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_large_prime_shapes_on_any_number_of_threads(kernel_backend: str) -> None:
    """The kernels themselves, over many chunks and shares: right, and the same bits each run."""
    small = INTERPRETED and kernel_backend == "triton"
    shapes = [(509, 67), (7, 3, 131)] if small else [(4099, 131), (10007, 3), (67, 13, 1031), (300, 5, 7)]
    threads = torch.get_num_threads()
    for shape in shapes:
        x, w, b = make(shape, dtype=torch.float32)
        dy, ddx = (randn(*shape, seed=5 + i, dtype=torch.float32) for i in range(2))
        kernels = op._kernels(kernel_backend)

        def run(
            x: Tensor = x, w: Tensor = w, b: Tensor = b, dy: Tensor = dy, ddx: Tensor = ddx, kernels: Any = kernels
        ) -> list[Tensor]:
            y, mean, var = kernels.bn_lrelu(x, w, b, None, None, 0.1, 1e-5, 0.2)
            first = kernels.bn_lrelu_grad(dy, x, mean, var, w, b, 1e-5, 0.2, True)
            second = kernels.bn_lrelu_grad2(ddx, w, b, dy, x, mean, var, w, b, 1e-5, 0.2, True)
            return [y, *first, *second, kernels.bn_lrelu_eval(x, mean, var, w, b, 1e-5, 0.2)]

        try:
            torch.set_num_threads(3)
            results = run()
            torch.set_num_threads(1)
            again = run()
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
        leaves = [t.double().requires_grad_() for t in (x, w, b)]
        c = dy.double().requires_grad_()
        y = call(definition, True)(*leaves)
        first = torch.autograd.grad(y, leaves, c, create_graph=True)
        second = torch.autograd.grad(first, (c, leaves[0], leaves[1]), [ddx.double(), w.double(), b.double()])
        for got, want in zip(results, (y, *first, *second, y), strict=True):
            error = (got - want).abs().max().item()
            assert error <= 4 * TOLERANCE[torch.float32] * want.abs().max().item()


def test_triton_shares_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase by itself: small tiles, and the batch cut into shares."""
    need("triton")
    from gankern.triton import bn_lrelu as kernels

    for name, value in (("SHARE", 1), ("TILE", 32), ("COLUMNS", 2)):
        monkeypatch.setattr(kernels, name, value)
    for shape in ((45, 3), (7, 2, 19)):
        assert kernels.plan(torch.empty(shape)).shares > 1
        for training in (True, False):
            with gankern.use_backend("triton"):
                assert_matches(call(gankern.bn_lrelu, training), call(eager, training), make(shape))


@MODES
def test_gradcheck(backend: str, training: bool) -> None:
    inputs = [t.requires_grad_() for t in make((4, 2, 3))]
    fast = INTERPRETED and backend == "triton"  # along random directions instead of element by element
    assert torch.autograd.gradcheck(call(gankern.bn_lrelu, training), inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call(gankern.bn_lrelu, training), inputs, fast_mode=fast)


def test_second_backward_and_retained_graph(backend: str) -> None:
    """The same graph walked twice gives the same gradients, and a freed graph says so."""
    inputs = [t.requires_grad_() for t in make((4, 3))]
    y = call(gankern.bn_lrelu, True)(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), inputs)


@MODES
def test_without_a_graph(backend: str, training: bool) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3))]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = call(gankern.bn_lrelu, training)(*inputs)
            torch.testing.assert_close(y, call(eager, training)(*inputs))
        assert not y.requires_grad


# --- running averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 5), (0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_running_averages_move_as_in_eager(backend: str, dtype: torch.dtype, shape: tuple[int, ...], momentum: float) -> None:
    x = make(shape, dtype=dtype)[0]
    for kept in {dtype, torch.float32 if dtype == torch.bfloat16 else dtype}:
        got, want = averages(3, kept), averages(3, kept)
        parameters = (torch.ones(3, dtype=kept, device=DEVICE), None)
        gankern.bn_lrelu(x, *got, *parameters, True, momentum)
        eager(x, *want, *parameters, True, momentum)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0.01, "atol": 0.01} if kept == torch.bfloat16 else {}))


def test_strided_running_averages(backend: str) -> None:
    x = make((6, 3))[0]
    got, want = averages(3), averages(3)
    strided = [torch.stack([t, t], -1)[..., 1] for t in got]
    gankern.bn_lrelu(x, *strided, training=True)
    eager(x, *want, training=True)
    for a, b in zip(strided, want, strict=True):
        torch.testing.assert_close(a, b)


def spread(t: Tensor) -> Tensor:
    """The same numbers, each with a NaN after it in memory."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


@MODES
@pytest.mark.parametrize("strided", range(4), ids=["mean", "var", "weight", "bias"])
def test_strided_parameters_and_averages_of_the_automatic_choice(strided: int, training: bool) -> None:
    def gradients(fn: Fn, *tensors: Tensor) -> tuple[Tensor, ...]:
        mean, var, *leaves = (t.detach() for t in tensors)
        w, b, x = (t.requires_grad_() for t in leaves)
        first = torch.autograd.grad(fn(x, mean, var, w, b, training).square().sum(), (x, w, b), create_graph=True)
        return first + torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))

    x, w, b = make((6, 3))
    contiguous = [*averages(3), w, b, x]
    spoiled = [spread(t) if i == strided else t for i, t in enumerate(contiguous)]
    torch.testing.assert_close(gradients(gankern.bn_lrelu, *spoiled), gradients(definition, *contiguous))


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels of PyTorch")
def test_strided_weight_of_eager_is_misread() -> None:
    """Why the automatic choice does not give them to PyTorch's batch_norm. When this fails, PyTorch has been mended."""
    x, w, _ = make((6, 3))
    x.requires_grad_()
    right, wrong = (torch.autograd.grad(F.batch_norm(x, None, None, t, None, True).square().sum(), x)[0] for t in (w, spread(w)))
    assert right.isfinite().all()
    assert wrong.isnan().any()


def test_running_averages_stay_in_evaluation_and_parameters_always(backend: str) -> None:
    x, w, b = make((6, 3))
    tensors = (*averages(3), w, b, x)
    copies = [t.clone() for t in tensors]
    gankern.bn_lrelu(x, *tensors[:4], False)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    gankern.bn_lrelu(x, *tensors[:4], True)
    assert all(torch.equal(a, b) for a, b in zip(tensors[2:], copies[2:], strict=True))


def test_averages_that_move_after_evaluation_spoil_its_gradient(kernel_backend: str) -> None:
    """Evaluation keeps the running averages for its backward pass: moving them in between is an error and not a wrong gradient."""
    x, w, b = (t.requires_grad_() for t in make((6, 3)))
    running = averages(3)
    y = gankern.bn_lrelu(x, *running, w, b, False)
    gankern.bn_lrelu(x, *running, w, b, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


# --- torch.func ---------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "forced"])
def test_func_grad_of_grad(backend: str, automatic: bool, training: bool) -> None:
    inputs, direction = make((4, 3)), randn(4, 3, seed=8)

    def penalty(fn: Fn) -> Fn:
        return lambda *a: (torch.func.grad(lambda x, w, b: fn(x, w, b).pow(2).sum())(*a) * direction).sum()

    def third(fn: Fn) -> Fn:
        return lambda *a: torch.func.grad(penalty(fn))(*a).square().sum()

    for level in (penalty, third):
        with gankern.use_backend(backend) if not automatic else nullcontext():
            got = torch.func.grad(level(call(gankern.bn_lrelu, training)), argnums=(0, 1, 2))(*inputs)
        want = torch.func.grad(level(call(definition, training)), argnums=(0, 1, 2))(*inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@MODES
@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (None, 0, 0), (0, 0, None), (None, None, 0)], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4)], ids=str)
def test_vmap(backend: str, shape: tuple[int, ...], dims: tuple[int | None, ...], training: bool) -> None:
    """Batches of batches, ensembles of parameters; values and gradients. Each sample has running averages of its own."""
    batch, inputs = 3, make(shape)
    stacked = [
        t if d is None else torch.stack([t + randn(*t.shape, seed=20 + i) for i in range(batch)], d)
        for t, d in zip(inputs, dims, strict=True)
    ]
    single = [[t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)] for i in range(batch)]
    ours, want = (
        lambda x, w, b, fn=fn: fn(x, w, b)
        for fn in (call_without_averages(gankern.bn_lrelu, training), call_without_averages(eager, training))
    )
    torch.testing.assert_close(torch.vmap(ours, dims)(*stacked), torch.stack([want(*s) for s in single]), rtol=1e-11, atol=1e-11)

    def gradients(fn: Fn) -> Fn:
        return torch.func.grad(lambda x, w, b: fn(x, w, b).pow(3).sum(), argnums=(0, 1, 2))

    got, wants = torch.vmap(gradients(ours), dims)(*stacked), [gradients(want)(*s) for s in single]
    for j, g in enumerate(got):
        torch.testing.assert_close(g, torch.stack([w[j] for w in wants]), rtol=1e-10, atol=1e-10)


def call_without_averages(fn: Fn, training: bool) -> Fn:
    """Constants in evaluation, none in training."""
    constants = [averages(c) for c in range(4)]
    return lambda x, w, b: fn(x, *((None, None) if training else constants[x.shape[1]]), w, b, training)


def test_vmap_moves_averages_of_each_sample(backend: str) -> None:
    xs = randn(3, 5, 2, seed=1)
    means, variances = (torch.stack([t, t + 1, t * 2]) for t in averages(2))
    want = [t.clone() for t in (means, variances)]
    torch.vmap(lambda x, m, v: gankern.bn_lrelu(x, m, v, training=True))(xs, means, variances)
    for i in range(3):
        eager(xs[i], want[0][i], want[1][i], training=True)
    torch.testing.assert_close(means, want[0])
    torch.testing.assert_close(variances, want[1])
    with pytest.raises(RuntimeError):  # one pair for all: which sample should move it?
        torch.vmap(lambda x: gankern.bn_lrelu(x, means[0], variances[0], training=True))(xs)


@MODES
def test_forward_mode_is_right_or_refused(backend: str, training: bool) -> None:
    inputs = make((4, 3))
    tangents = tuple(randn(*t.shape, seed=7 + i) for i, t in enumerate(inputs))

    def push(fn: Fn) -> Tensor:
        return torch.func.jvp(call(fn, training), inputs, tangents)[1]

    if backend == "reference":
        torch.testing.assert_close(push(gankern.bn_lrelu), push(definition))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            push(gankern.bn_lrelu)


# --- torch.compile, autocast, the registered ops ------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None, shape: tuple[int, ...], training: bool) -> None:
    need(name or "reference")
    torch.compiler.reset()
    got, want = averages(3), averages(3)
    inputs = [t.requires_grad_() for t in make(shape)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return gankern.bn_lrelu(x, mean, var, w, b, training)

    with gankern.use_backend(name) if name else nullcontext():
        y = fn(*inputs, *got)
    expected = eager(inputs[0], *want, *inputs[1:], training)
    torch.testing.assert_close(y, expected)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_as_batch_norm_does(backend: str, dtype: torch.dtype, training: bool) -> None:
    x, w, b = make((6, 3, 4), dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x.to(dtype), w, b)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, want = (fn(inputs[0], *averages(3, torch.float32), *inputs[1:], training) for fn in (gankern.bn_lrelu, eager))
    assert y.dtype == want.dtype == dtype
    torch.testing.assert_close(y, want)
    for got, expected in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_opcheck(dtype: torch.dtype, affine: bool) -> None:
    need("compiled")
    x, dy = randn(4, 3, 5, seed=0, dtype=dtype), randn(4, 3, 5, seed=1, dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    w, b, m, v = (randn(3, seed=2 + i, dtype=kept).abs() if affine else None for i in range(4))
    ops = torch.ops.gankern
    _, mean, var = ops.bn_lrelu(x, w, b, None, None, 0.1, 1e-5, 0.2)
    torch.library.opcheck(ops.bn_lrelu.default, (x, w, b, m, v, 0.1, 1e-5, 0.2))
    torch.library.opcheck(ops.bn_lrelu_eval.default, (x, mean, var, w, b, 1e-5, 0.2))
    torch.library.opcheck(ops.bn_lrelu_grad.default, (dy, x, mean, var, w, b, 1e-5, 0.2, True))
    torch.library.opcheck(ops.bn_lrelu_grad2.default, (x, w, b, dy, x, mean, var, w, b, 1e-5, 0.2, True))


@pytest.mark.gpu
def test_a_cuda_graph_moves_the_averages(kernel_backend: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("runs with GANKERN_TEST_DEVICE=cuda")
    x, w, b = make((16, 5, 4, 4), dtype=torch.float32)
    running, want = averages(5, torch.float32), averages(5, torch.float32)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # kernels are compiled before the capture
        gankern.bn_lrelu(x, *averages(5, torch.float32), w, b, True)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = gankern.bn_lrelu(x, *running, w, b, True)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(y, eager(x, *want, w, b, True))
        for got, expected in zip(running, want, strict=True):
            torch.testing.assert_close(got, expected)


# --- bad input ----------------------------------------------------------------------------------------------------------------

X, C = torch.zeros(2, 3), torch.ones(3)
REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "x is no tensor": ([[1.0]], {}, TypeError, "x must be a torch.Tensor, got list"),
    "x is integer": (X.long(), {}, TypeError, "x must be float64, float32, bfloat16 or float16, got int64"),
    "x has one dimension": (C, {}, ValueError, "x must have at least 2 dimensions, got shape [3]"),
    "one value a channel": (X[:1], {}, ValueError, "x must have more than 1 value per channel when training, got shape [1, 3]"),
    "weight is no tensor": (X, {"weight": 1.0}, TypeError, "weight must be a torch.Tensor, got float"),
    "weight does not fit": (X, {"weight": torch.ones(4)}, ValueError, "weight must have shape [3], got [4]"),
    "weight has another dtype": (X, {"weight": C.double()}, TypeError, "weight must have dtype float32, got float64"),
    "weight of 16-bit x": (
        X.bfloat16(),
        {"weight": C.half()},
        TypeError,
        "weight must have dtype bfloat16 or float32, got float16",
    ),
    "weight elsewhere": (X, {"weight": C.to("meta")}, ValueError, "weight must be on cpu, got meta"),
    "bias is integer, x with gaps": (
        torch.zeros(2, 6)[:, ::2],
        {"bias": C.long()},
        TypeError,
        "bias must have dtype float32, got int64",
    ),
    "bias alone does not fit": (X, {"bias": C[:1]}, ValueError, "bias must have shape [3], got [1]"),
    "bias does not fit": (X, {"bias": torch.ones(1, 3)}, ValueError, "bias must have shape [3], got [1, 3]"),
    "running_mean does not fit": (
        X,
        {"running_mean": torch.ones(2), "running_var": C},
        ValueError,
        "running_mean must have shape [3], got [2]",
    ),
    "one average": (
        X,
        {"running_mean": C},
        ValueError,
        "running_mean and running_var must both be given or both be None, got one of them",
    ),
    "average that wants a gradient": (
        X,
        {"running_mean": C, "running_var": torch.ones(3, requires_grad=True)},
        ValueError,
        "running_var must not require a gradient, got a tensor that does",
    ),
    "average of one channel does not fit": (
        X[:, :1],
        {"running_mean": C[:1], "running_var": C[:0]},
        ValueError,
        "running_var must have shape [1], got [0]",
    ),
    "average elsewhere": (X, {"running_mean": C.to("meta"), "running_var": C}, ValueError, "running_mean must be on cpu, got meta"),
    "average has another dtype": (
        X.double(),
        {"running_mean": C, "running_var": C.double()},
        TypeError,
        "running_mean must have dtype float64, got float32",
    ),
    "averages have another dtype": (
        X.double(),
        {"running_mean": C, "running_var": C},
        TypeError,
        "running_mean must have dtype float64, got float32",
    ),
    "momentum is infinite": (X, {"momentum": math.inf}, ValueError, "momentum must be a finite number, got inf"),
    "momentum beyond any float": (X, {"momentum": 10**400}, ValueError, f"momentum must be a finite number, got {10**400}"),
    "no averages": (X, {"training": False}, ValueError, "running_mean must be given when training is False, got None"),
    "momentum is None": (X, {"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
    "eps < 0": (X, {"eps": -1.0}, ValueError, "eps must be a finite number >= 0, got -1.0"),
    "slope < 0": (X, {"negative_slope": -0.1}, ValueError, "negative_slope must be a finite number >= 0, got -0.1"),
    "slope is NaN": (X, {"negative_slope": math.nan}, ValueError, "negative_slope must be a finite number >= 0, got nan"),
}


@pytest.mark.parametrize("name", [None, *COMPILABLE])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(case: str, name: str | None) -> None:
    need(name or "reference")
    x, options, kind, sentence = REFUSED[case]
    with gankern.use_backend(name) if name else nullcontext(), pytest.raises(kind) as caught:
        gankern.bn_lrelu(x, **{"training": True, **options})
    assert str(caught.value) == f"bn_lrelu: {sentence}"


@MODES
def test_averages_and_parameters_of_different_16_bit_kinds(training: bool) -> None:
    x, w, b = make((6, 3), dtype=torch.float32)
    mean, var = averages(3, torch.float32)
    mixed = (mean.clone(), var.half(), w.half(), b)
    got = gankern.bn_lrelu(x.half(), *mixed, training)
    want = definition(x.half().float(), mean, var.half().float(), w.half().float(), b, training)
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    why = gankern.backend.problem(name, "meta")
    assert why
    with gankern.use_backend(name), pytest.raises(RuntimeError) as caught:
        gankern.bn_lrelu(X.to("meta"), training=True)
    assert str(caught.value) == f"bn_lrelu: backend must be able to run on meta tensors, got {name!r}: {why}"
