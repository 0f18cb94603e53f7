"""bias_lrelu on every backend: values, derivatives up to the third order, memory layouts, torch.func, torch.compile, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gankern
from gankern.ops import bias_lrelu as op
from tests.support import DEVICE, TOLERANCE, assert_accurate, assert_matches, derivatives, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

# two to six dimensions, empty, size 1, prime; planes, small planes, few channels
SHAPES = [
    (5, 7),
    (1, 1),
    (67, 130),
    (3, 4, 5),
    (2, 3, 4, 4),
    (2, 3, 1, 1),
    (4, 1, 3, 5),
    (1, 2, 7, 13),
    (37, 3, 2, 2),
    (2, 3, 2, 3, 4),
    (2, 3, 2, 1, 2, 2),
    (0, 3, 4, 4),
    (3, 0, 4),
    (3, 4, 0, 2),
    (0, 5),
]
INTERPRETED = DEVICE == "cpu"  # Triton kernels run under its interpreter: slow, and nothing that dynamo can trace
COMPILABLE = ["reference", "compiled"] + ["triton"] * (not INTERPRETED)


def eager(x: Tensor, bias: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """The oracle: what a user of plain PyTorch writes."""
    z = x if bias is None else x + bias.reshape(1, -1, *[1] * (x.dim() - 2))
    return F.leaky_relu(z, slope) if slope else F.relu(z)


def make(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=seed, dtype=dtype), randn(shape[1], seed=seed + 1, dtype=dtype)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()])


# --- values and derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_eager_to_third_order(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(gankern.bias_lrelu, eager, make(shape, dtype=dtype), order=3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_automatic_choice_matches_eager(shape: tuple[int, ...]) -> None:
    assert_matches(gankern.bias_lrelu, eager, make(shape), order=3)


def test_the_automatic_choice_of_a_large_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SMALL", 8)
    inputs = make((3, 4, 5))
    assert_matches(gankern.bias_lrelu, eager, inputs, order=3)
    with torch.no_grad():
        torch.testing.assert_close(gankern.bias_lrelu(*inputs), eager(*inputs))


@pytest.mark.parametrize("slope", [0, 0.01, 0.2, 1, 3])
def test_slopes(backend: str, slope: float) -> None:
    inputs = make((3, 5, 4, 4))
    assert_matches(lambda x, b: gankern.bias_lrelu(x, b, slope), lambda x, b: eager(x, b, slope), inputs, order=3)


@pytest.mark.parametrize("wanted", ["x", "b"])
def test_only_one_input_wants_a_gradient(backend: str, wanted: str) -> None:
    tensors = dict(zip("xb", make((3, 5, 4, 4)), strict=True))

    def call(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda given: fn(*(tensors | {wanted: given}).values())

    assert_matches(call(gankern.bias_lrelu), call(eager), [tensors[wanted]], order=3)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 4)], ids=str)
def test_without_bias(backend: str, shape: tuple[int, ...]) -> None:
    assert_matches(gankern.bias_lrelu, eager, make(shape)[:1], order=3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda t: channels_last(t) if t.dim() > 3 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]] if t.dim() > 1 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (2, 3, 4)], ids=str)
def test_any_strides(backend: str, shape: tuple[int, ...], layout: str) -> None:
    assert_matches(gankern.bias_lrelu, eager, [LAYOUTS[layout](t) for t in make(shape)], order=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["contiguous", "channels-last"])
def test_cotangents_of_any_strides(backend: str, layout: str, of: str) -> None:
    x, b = make((2, 3, 4, 5))
    inputs = [t.requires_grad_() for t in (channels_last(x) if of == "channels-last" else x, b)]
    c = LAYOUTS[layout](randn(2, 3, 4, 5, seed=9))
    got, want = (torch.autograd.grad(fn(*inputs), inputs, c) for fn in (gankern.bias_lrelu, eager))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
def test_channels_last_stays(backend: str, shape: tuple[int, ...]) -> None:
    x, b = (t.requires_grad_() for t in make(shape))
    y = gankern.bias_lrelu(channels_last(x), b)
    (dx,) = torch.autograd.grad(y, x, channels_last(torch.ones_like(y)), create_graph=True)
    assert channels_last(y).data_ptr() == y.data_ptr()
    assert not y.is_contiguous()
    assert dx.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, bias: bool) -> None:
    shapes = [(16, 24, 8, 8), (33, 65), (8, 3, 31, 7), (20, 40, 2, 2)]
    cases = [make(shape, seed=10 * i, dtype=dtype)[: 1 + bias] for i, shape in enumerate(shapes)]
    assert_accurate(gankern.bias_lrelu, eager, cases)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_value_and_gradients(backend: str, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in make((3, 4, 2, 2), dtype=dtype)]
    y = gankern.bias_lrelu(*inputs)
    assert y.dtype == dtype
    assert y.shape == (3, 4, 2, 2)
    assert all(g.dtype == dtype for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 8, 8), (5, 5, 3)], ids=str)
def test_nan_and_infinity_pass_as_in_eager(backend: str, shape: tuple[int, ...]) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0], device=DEVICE)
    x = special.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    for slope in (0.0, 0.2, 1.0):
        got, want = (
            derivatives(lambda x, b, fn=fn, s=slope: fn(x, b, s), (x, special), order=1) for fn in (gankern.bias_lrelu, eager)
        )
        assert got.keys() == want.keys()
        for name in want if slope else ["y"]:  # ReLU's derivative at NaN is 0 here, 1 in PyTorch
            torch.testing.assert_close(got[name], want[name], rtol=0 if name == "y" else 1e-6, atol=0, equal_nan=True, msg=name)


def test_infinite_and_nan_cotangents_pass_as_in_eager(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 4, 3, 3), dtype=torch.float32)]
    c = torch.ones(4, 4, 3, 3, device=DEVICE)
    c[0, 0, 0, 0], c[1, 1, 1, 1], c[2, 2, 2, 2] = math.nan, math.inf, -math.inf
    for slope in (0.01, 0.2):
        got, want = (torch.autograd.grad(fn(*inputs, slope), inputs, c) for fn in (gankern.bias_lrelu, eager))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


LARGE = [(4099, 1031), (61, 131, 37, 11), (1, 3, 1031, 211), (2053, 3, 5, 1), (257, 67, 3, 3), (100003, 1)]
SLOW = [(1031, 131), (31, 13, 37, 11), (53, 3, 5, 1)]  # for Triton's interpreter


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("i", range(len(LARGE)))
def test_large_prime_shape(kernel_backend: str, i: int, last: bool) -> None:
    """The kernels themselves: sums over many elements, the same bits each run and for any number of threads."""
    shapes = SLOW if INTERPRETED and kernel_backend == "triton" else LARGE
    if i >= len(shapes) or (last and len(shapes[i]) == 2):
        pytest.skip("one layout, or too slow here")
    shape, dtype = shapes[i], torch.float32
    (x, bias), dy = make(shape, dtype=dtype), randn(*shape, seed=3, dtype=dtype)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    kernels, threads, results = op._kernels(kernel_backend), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            y = kernels.bias_lrelu(x, bias, 0.2)
            results.append((y, *kernels.bias_lrelu_grad(dy, y, 0.2, True), kernels.bias_lrelu_grad(dy, y, 0.2, False)[0]))
    finally:
        torch.set_num_threads(threads)
    y, dx, dbias, alone = results[0]
    torch.testing.assert_close(y, eager(x, bias))
    torch.testing.assert_close(dx, dy * torch.where(y > 0, 1.0, 0.2))
    want = dx.double().sum([0, *range(2, len(shape))])
    torch.testing.assert_close(dbias.double(), want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())
    assert torch.equal(alone, dx)
    assert y.stride() == x.stride()
    assert dx.stride() == dy.stride()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(backend: str) -> None:
    fast = INTERPRETED and backend == "triton"  # along random directions instead of element by element
    for shape in ((4, 3), (2, 3, 2, 2)):
        inputs = [t.requires_grad_() for t in make(shape)]
        assert torch.autograd.gradcheck(gankern.bias_lrelu, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(gankern.bias_lrelu, inputs, fast_mode=fast)


def test_second_backward_and_retained_graph(backend: str) -> None:
    """The same graph walked twice gives the same gradients, and a freed graph says so."""
    inputs = [t.requires_grad_() for t in make((4, 3, 2, 2))]
    y = gankern.bias_lrelu(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.square().sum(), inputs)


def test_without_a_graph(backend: str) -> None:
    inputs = [t.requires_grad_() for t in make((4, 3, 2, 2))]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = gankern.bias_lrelu(*inputs)
            torch.testing.assert_close(y, eager(*inputs))
        assert not y.requires_grad


def test_inputs_are_left_alone(backend: str) -> None:
    inputs = make((4, 3, 2, 2))
    copies = [t.clone() for t in inputs]
    derivatives(gankern.bias_lrelu, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_inputs_are_left_alone_by_default() -> None:
    inputs = make((4, 3, 2, 2))
    copies = [t.clone() for t in inputs]
    for bias in (inputs[1], None):
        with torch.no_grad():
            gankern.bias_lrelu(inputs[0], bias)
        derivatives(lambda x, bias=bias: gankern.bias_lrelu(x, bias), inputs[:1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


# --- torch.func ---------------------------------------------------------------------------------------------------------------


def test_func_grad_of_grad(backend: str) -> None:
    inputs, direction = make((4, 3, 2, 2)), randn(4, 3, 2, 2, seed=8)

    def penalty(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: (torch.func.grad(lambda x, b: fn(x, b).pow(3).sum())(*a) * direction).sum()

    def third(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: torch.func.grad(penalty(fn))(*a).square().sum()

    for level in (penalty, third):
        got, want = (torch.func.grad(level(fn), argnums=(0, 1))(*inputs) for fn in (gankern.bias_lrelu, eager))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (None, 1), (0, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["forced", "automatic"])
def test_vmap(
    backend: str, shape: tuple[int, ...], dims: tuple[int | None, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of inputs, ensembles of biases, values and the gradients of each sample."""
    if large:
        monkeypatch.setattr(gankern.backend, "_name", "auto")
        monkeypatch.setattr(op, "SMALL", 0 if backend == "compiled" else 2**15)
    batch, inputs = 3, make(shape)
    stacked = [
        t if d is None else torch.stack([t + randn(*t.shape, seed=20 + i) for i in range(batch)], d)
        for t, d in zip(inputs, dims, strict=True)
    ]
    single = [[t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)] for i in range(batch)]
    got = torch.vmap(gankern.bias_lrelu, dims)(*stacked)
    torch.testing.assert_close(got, torch.stack([eager(*s) for s in single]), rtol=1e-12, atol=1e-12)

    def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, b: fn(x, b).pow(2).sum()

    grads = torch.vmap(torch.func.grad(loss(gankern.bias_lrelu), argnums=(0, 1)), dims)(*stacked)
    wants = [torch.func.grad(loss(eager), argnums=(0, 1))(*s) for s in single]
    for j, g in enumerate(grads):
        torch.testing.assert_close(g, torch.stack([w[j] for w in wants]), rtol=1e-12, atol=1e-12)


def test_gradient_through_vmap(backend: str) -> None:
    """The other way round: a backward pass, and a second one, through a vmapped call."""
    x, b = make((4, 3, 2, 2))
    bs = torch.stack([b, b + 1, -b])

    def ensemble(x: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(gankern.bias_lrelu, (None, 0))(x, b)

    def loop(x: Tensor, b: Tensor) -> Tensor:
        return torch.stack([eager(x, b[i]) for i in range(3)])

    assert_matches(ensemble, loop, (x, bs))


def test_hessian(backend: str) -> None:
    x, b = make((2, 3, 2, 2))

    def loss(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda b: fn(x, b).pow(3).sum()

    got, want = (torch.func.jacrev(torch.func.jacrev(loss(fn)))(b) for fn in (gankern.bias_lrelu, eager))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("how", ["func", "dual numbers"])
def test_forward_mode_is_right_or_refused(backend: str, argument: int, how: str) -> None:
    inputs = make((4, 3, 2, 2))
    tangents = [torch.zeros_like(t) for t in inputs]
    tangents[argument] = randn(*inputs[argument].shape, seed=7)

    def call(fn: Callable[..., Tensor]) -> Tensor:
        if how == "func":
            return torch.func.jvp(fn, inputs, tuple(tangents))[1]
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(fn(*duals)).tangent.clone()

    if backend == "reference":
        torch.testing.assert_close(call(gankern.bias_lrelu), call(eager))
    else:
        with pytest.raises(RuntimeError, match="jvp"):
            call(gankern.bias_lrelu)


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the choice is a kernel, which refuses")
def test_forward_mode_by_default() -> None:
    inputs = make((4, 3, 2, 2))
    got, want = (torch.func.jvp(fn, inputs, inputs)[1] for fn in (gankern.bias_lrelu, eager))
    torch.testing.assert_close(got, want)


# --- torch.compile, autocast, the registered ops ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMPILABLE, None])
def test_compile_fullgraph(name: str | None) -> None:
    need(name or "reference")
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in make((6, 5, 2, 2))]
    fn = torch.compile(lambda x, b: gankern.bias_lrelu(x, b, 0.2), fullgraph=True, backend="aot_eager")
    with gankern.use_backend(name) if name else nullcontext():
        y = fn(*inputs)
    want = eager(*inputs)
    torch.testing.assert_close(y, want)
    for got, expected in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_compile_notices_another_backend() -> None:
    """A compiled function follows the backend that is forced when it is called, not the one of its first call."""
    need("compiled")
    torch.compiler.reset()
    fn, inputs, seen = torch.compile(lambda x, b: gankern.bias_lrelu(x, b), fullgraph=True, backend="aot_eager"), make((6, 5)), []
    for name in ("reference", "compiled"):
        with gankern.use_backend(name), torch.profiler.profile() as profile:
            fn(*inputs)
        seen.append(any("gankern::" in event.key for event in profile.key_averages()))
    assert seen == [False, True]


def test_autocast_casts_the_bias(backend: str) -> None:
    x, b = make((6, 5, 2, 2), dtype=torch.float32)
    b.requires_grad_()
    z = x.bfloat16()  # what a convolution hands on under autocast
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gankern.bias_lrelu(z, b)
    want = eager(z.float(), b)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
    (got,), (expected,) = torch.autograd.grad(y.sum(), b), torch.autograd.grad(want.sum(), b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 11), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    need("compiled")
    x, b = make(shape, dtype=dtype)
    for z in (x, channels_last(x)) if len(shape) == 4 else (x,):
        y = torch.ops.gankern.bias_lrelu(z, b if bias else None, 0.2)
        torch.library.opcheck(torch.ops.gankern.bias_lrelu.default, (z, b if bias else None, 0.2))
        torch.library.opcheck(torch.ops.gankern.bias_lrelu_grad.default, (z, y, 0.2, bias))


def test_the_raw_ops_refuse_other_layouts() -> None:
    need("compiled")
    x = torch.zeros(2, 3, 4, 5, device=DEVICE)
    kernels = torch.ops.gankern
    for call, sentence in (
        (lambda: kernels.bias_lrelu(x.mT, None, 0.2), "bias_lrelu: the first tensor must be contiguous or channels-last"),
        (lambda: kernels.bias_lrelu(x[0, 0, 0], None, 0.2), "bias_lrelu: the first tensor must have at least two dimensions"),
        (lambda: kernels.bias_lrelu(x, x[0, :2, 0, 0], 0.2), "bias_lrelu: bias must be contiguous"),
        (lambda: kernels.bias_lrelu(x, x.new_zeros(4), 0.2), "bias_lrelu: bias must have one element for each channel of x"),
        (lambda: kernels.bias_lrelu(x, x.new_zeros(3).double(), 0.2), "bias_lrelu: bias must have the dtype of the first tensor"),
        (
            lambda: kernels.bias_lrelu_grad(x, channels_last(x), 0.2, True),
            "bias_lrelu_grad: y must have the shape and strides of the first tensor",
        ),
        (lambda: kernels.bias_lrelu_grad(x, x.half(), 0.2, True), "bias_lrelu_grad: y must have the dtype of the first tensor"),
        (lambda: kernels.bias_lrelu(x.long(), None, 0.2), "bias_lrelu: dtype must be float64, float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert sentence in str(caught.value)


# --- a penalty through a convolutional critic -----------------------------------------------------------------------------------


def test_penalty_reaches_every_weight_of_a_convolutional_critic(backend: str) -> None:
    def critic(activation: Callable[..., Tensor], parameters: list[Tensor], x: Tensor) -> Tensor:
        w1, b1, w2, b2, w3 = parameters
        h = activation(F.conv2d(x, w1, None, 2, 1), b1)
        return F.linear(activation(F.conv2d(h, w2, None, 2, 1), b2).flatten(1), w3)

    def gradients(activation: Callable[..., Tensor]) -> list[Tensor]:
        shapes = [(4, 2, 4, 4), (4,), (3, 4, 4, 4), (3,), (1, 12)]
        parameters = [randn(*s, seed=i, scale=0.3).requires_grad_() for i, s in enumerate(shapes)]
        x = randn(5, 2, 8, 8, seed=9).requires_grad_()
        score = critic(activation, parameters, x)
        (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = score.mean() + 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    for got, want in zip(gradients(gankern.bias_lrelu), gradients(eager), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


# --- bad input ----------------------------------------------------------------------------------------------------------------

X, B = torch.zeros(2, 4, 3), torch.zeros(4)
REFUSED = {
    "x is no tensor": ([[1.0]], B, 0.2, TypeError, "bias_lrelu: x must be a torch.Tensor, got list"),
    "x is integer": (X.long(), B, 0.2, TypeError, "bias_lrelu: x must be float64, float32, bfloat16 or float16, got int64"),
    "x is complex": (X.cfloat(), B, 0.2, TypeError, "bias_lrelu: x must be float64, float32, bfloat16 or float16, got complex64"),
    "x is 1-D": (B, B, 0.2, ValueError, "bias_lrelu: x must have at least 2 dimensions, got shape [4]"),
    "x is a scalar": (torch.tensor(1.0), None, 0.2, ValueError, "bias_lrelu: x must have at least 2 dimensions, got shape []"),
    "bias is no tensor": (X, 1.0, 0.2, TypeError, "bias_lrelu: bias must be a torch.Tensor, got float"),
    "bias does not fit": (X, torch.zeros(3), 0.2, ValueError, "bias_lrelu: bias must have shape [4], got [3]"),
    "bias is 2-D": (X, torch.zeros(1, 4), 0.2, ValueError, "bias_lrelu: bias must have shape [4], got [1, 4]"),
    "bias is one number": (X, torch.zeros(1), 0.2, ValueError, "bias_lrelu: bias must have shape [4], got [1]"),
    "bias has another dtype": (X, B.half(), 0.2, TypeError, "bias_lrelu: bias must have dtype float32, got float16"),
    "bias elsewhere": (X, B.to("meta"), 0.2, ValueError, "bias_lrelu: bias must be on cpu, got meta"),
    "slope < 0": (X, B, -0.1, ValueError, "bias_lrelu: negative_slope must be a finite number >= 0, got -0.1"),
    "slope is NaN": (X, B, math.nan, ValueError, "bias_lrelu: negative_slope must be a finite number >= 0, got nan"),
    "slope is infinite": (X, B, math.inf, ValueError, "bias_lrelu: negative_slope must be a finite number >= 0, got inf"),
    "slope is text": (X, B, "0.2", TypeError, "bias_lrelu: negative_slope must be a number, got str"),
    "slope is a bool": (X, B, True, TypeError, "bias_lrelu: negative_slope must be a number, got bool"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["reference", None])
def test_bad_input_is_refused_in_one_sentence(name: str | None, case: str) -> None:
    x, b, slope, kind, sentence = REFUSED[case]
    with gankern.use_backend(name) if name else nullcontext(), pytest.raises(kind) as caught:
        gankern.bias_lrelu(x, b, slope)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    why = gankern.backend.problem(name, "meta")
    assert why
    with gankern.use_backend(name), pytest.raises(RuntimeError) as caught:
        gankern.bias_lrelu(X.to("meta"), None)
    assert str(caught.value) == f"bias_lrelu: backend must be able to run on meta tensors, got {name!r}: {why}"
