"""ConvLeakyReLU and ConvTransposeLeakyReLU: drop-in for the library's convolution and nn.LeakyReLU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.nn import conv
from tests.support import DEVICE, CountProducts, assert_accurate, assert_matches, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

# class, sides of the input, arguments
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "1d": ("Conv{}1d", (9,), {}),
    "2d": ("Conv{}2d", (6, 5), {"stride": 2, "padding": 1}),
    "3d": ("Conv{}3d", (4, 3, 4), {"padding": 1}),
    "no bias": ("Conv{}2d", (5, 5), {"bias": False}),
    "groups": ("Conv{}2d", (5, 5), {"groups": 2, "dilation": 2, "padding": 2}),
    "same": ("Conv{}2d", (5, 4), {"padding": "same"}),
    "reflect": ("Conv{}2d", (5, 5), {"padding": 1, "padding_mode": "reflect"}),
    "circular": ("Conv{}1d", (7,), {"padding": 2, "padding_mode": "circular"}),
    "transposed 1d": ("ConvTranspose{}1d", (5,), {"stride": 2}),
    "transposed 2d": ("ConvTranspose{}2d", (4, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed 3d": ("ConvTranspose{}3d", (2, 3, 2), {}),
    "transposed without bias": ("ConvTranspose{}2d", (3, 3), {"bias": False, "groups": 2}),
}


def make(case: str, slope: float = 0.2, dtype: torch.dtype = torch.float64) -> tuple[Any, nn.Module, Tensor]:
    """Our layer, the library's with the same parameters, an input."""
    name, sides, options = CASES[case]
    torch.manual_seed(0)
    ours = getattr(gankern.nn, name.format("LeakyReLU"))(4, 6, 3, **options, negative_slope=slope, device=DEVICE, dtype=dtype)
    torch.manual_seed(0)
    theirs = getattr(nn, name.format(""))(4, 6, 3, **options, device=DEVICE, dtype=dtype)
    return ours, theirs, randn(3, 4, *sides, seed=5, dtype=dtype)


def order(case: str) -> int:
    """PyTorch itself has no third derivative of a transposed convolution with output_padding."""
    return 2 if "output_padding" in CASES[case][2] else 3


def on_parameters(layer: nn.Module, after: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[..., Tensor]:
    """The layer as a function of its input and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *values: after(torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)))


def leaky(slope: float = 0.2) -> Callable[[Tensor], Tensor]:
    return lambda y: F.leaky_relu(y, slope)


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(backend: str, case: str) -> None:
    ours, theirs, x = make(case)
    inputs = [x, *(p.detach() for p in theirs.parameters())]
    assert_matches(on_parameters(ours), on_parameters(theirs, leaky()), inputs, order(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("large", [False, True], ids=["native", "kernel"])
def test_the_automatic_choice(case: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        need("compiled")
        monkeypatch.setattr(conv, "_choose", lambda *_: "compiled")
    ours, theirs, x = make(case)
    inputs = [x, *(p.detach() for p in theirs.parameters())]
    assert_matches(on_parameters(ours), on_parameters(theirs, leaky()), inputs, order(case))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), 0.2))


@pytest.mark.parametrize("slope", [0, 0.01, 1, 3])
def test_slopes(backend: str, slope: float) -> None:
    ours, theirs, x = make("2d", slope)
    inputs = [x, *(p.detach() for p in theirs.parameters())]
    assert_matches(on_parameters(ours), on_parameters(theirs, leaky(slope)), inputs, order=3)


@pytest.mark.parametrize("case", ["1d", "2d", "3d", "transposed 1d", "transposed 2d", "transposed 3d"])
def test_unbatched_input(backend: str, case: str) -> None:
    ours, theirs, x = make(case)
    torch.testing.assert_close(ours(x[0]), F.leaky_relu(theirs(x[0]), 0.2), rtol=1e-12, atol=1e-12)


def test_output_size(backend: str) -> None:
    ours, theirs, x = make("transposed 2d")
    for size in ([7, 5], [8, 6]):
        torch.testing.assert_close(ours(x, output_size=size), F.leaky_relu(theirs(x, output_size=size), 0.2))
        assert ours(x, size).shape[2:] == tuple(size)
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, [99, 5])


@pytest.mark.parametrize("case", ["2d", "3d", "transposed 2d"])
def test_channels_last(backend: str, case: str) -> None:
    form = torch.channels_last if case != "3d" else torch.channels_last_3d
    ours, theirs, x = make(case, dtype=torch.float32)
    ours, theirs, x = ours.to(memory_format=form), theirs.to(memory_format=form), x.contiguous(memory_format=form)
    x.requires_grad_()
    y, want = ours(x), F.leaky_relu(theirs(x), 0.2)
    assert y.stride() == want.stride()
    torch.testing.assert_close(y, want)
    got, expected = (torch.autograd.grad(v.square().sum(), [x, *m.parameters()]) for v, m in ((y, ours), (want, theirs)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_same_parameters_and_checkpoints(case: str) -> None:
    ours, theirs, x = make(case)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert isinstance(ours, type(theirs))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1)
    ours.load_state_dict(theirs.state_dict())
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x), F.leaky_relu(theirs(x), 0.2), rtol=1e-12, atol=1e-12)


def test_an_existing_layer_changes_its_class(backend: str) -> None:
    """What gankern.fuse does: the class and one attribute, nothing else."""
    for name in ("Conv2d", "ConvTranspose2d"):
        layer = getattr(nn, name)(4, 6, 3, device=DEVICE)
        x = randn(2, 4, 5, 5, seed=1, dtype=torch.float32)
        want = F.leaky_relu(layer(x), 0.1)
        layer.__class__ = getattr(gankern.nn, name.replace("2d", "LeakyReLU2d"))
        layer.negative_slope = 0.1
        torch.testing.assert_close(layer(x), want)
    linear = nn.Linear(4, 6, device=DEVICE)
    x = randn(5, 4, seed=1, dtype=torch.float32)
    want = F.leaky_relu(linear(x), 0.1)
    linear.__class__ = gankern.nn.LinearLeakyReLU
    linear.negative_slope, linear.dropout = 0.1, 0.0
    torch.testing.assert_close(linear(x), want)
    assert "negative_slope=0.1" in repr(linear)


def test_a_parametrised_weight_is_computed_once(backend: str) -> None:
    ours, theirs, x = make("2d")
    for layer in (ours, theirs):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(layer)
    for _ in range(3):
        torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), 0.2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_as_the_convolution_does(backend: str, dtype: torch.dtype) -> None:
    ours, theirs, x = make("2d", dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, want = ours(x.to(dtype)), F.leaky_relu(theirs(x.to(dtype)), 0.2)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    got, expected = (torch.autograd.grad(v.sum(), [*m.parameters()]) for v, m in ((y, ours), (want, theirs)))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["2d", "transposed 2d"])
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype, case: str) -> None:
    name, _, options = CASES[case]
    ours = getattr(gankern.nn, name.format("LeakyReLU"))(8, 12, 3, **options, device=DEVICE, dtype=dtype)
    theirs = getattr(nn, name.format(""))(8, 12, 3, **options, device=DEVICE, dtype=dtype)
    cases = []
    for seed in (0, 10, 20):
        parameters = [randn(*p.shape, seed=seed + j, dtype=dtype, scale=0.1) for j, p in enumerate(theirs.parameters(), 1)]
        cases.append([randn(6, 8, 9, 9, seed=seed, dtype=dtype), *parameters])
    assert_accurate(on_parameters(ours), on_parameters(theirs, leaky()), cases, exact=on_parameters(theirs.double(), leaky()))


def test_no_zeros_are_convolved_in_a_gradient_penalty() -> None:
    """The penalty's backward pass of one large layer: eager convolves the zeros of LeakyReLU's second derivative as well."""
    need("compiled")

    class CountConvolutions(CountProducts):
        NAMES = frozenset({"convolution", "convolution_backward"})

    def count(layer: nn.Module) -> int:
        x = randn(64, 64, 16, 16, seed=1, dtype=torch.float32).requires_grad_()
        with CountConvolutions() as products:
            (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
            g.square().sum().backward()
        return products.count

    ours = gankern.nn.ConvLeakyReLU2d(64, 64, 4, 2, 1, device=DEVICE)
    eager = nn.Sequential(nn.Conv2d(64, 64, 4, 2, 1, device=DEVICE), nn.LeakyReLU(0.2))
    assert count(ours) < count(eager)


@pytest.mark.parametrize("name", ["reference", "compiled", None])
@pytest.mark.parametrize("case", ["2d", "transposed 2d"])
def test_compile_fullgraph(name: str | None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name or "reference")
    torch.compiler.reset()
    ours, theirs, x = make(case)
    monkeypatch.setattr(gankern.backend, "_name", name or "auto")
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    want = F.leaky_relu(theirs(x), 0.2)
    torch.testing.assert_close(y, want)
    got, expected = (torch.autograd.grad(v.sum(), [*m.parameters()]) for v, m in ((y, ours), (want, theirs)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_compile_with_inductor(last: bool) -> None:
    """Two layers through the whole of torch.compile, which chooses memory layouts itself."""
    need("compiled")
    torch.compiler.reset()
    form = torch.channels_last if last else torch.contiguous_format
    layers = nn.Sequential(gankern.nn.ConvLeakyReLU2d(4, 6, 3), gankern.nn.ConvLeakyReLU2d(6, 5, 3)).to(DEVICE, memory_format=form)
    x = randn(3, 4, 9, 9, seed=1, dtype=torch.float32).contiguous(memory_format=form).requires_grad_()
    results = []
    for name, network in (("compiled", torch.compile(layers, fullgraph=True)), ("reference", layers)):
        with gankern.use_backend(name):
            y = network(x * 1.5 + 0.3)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layers.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ensembles_by_vmap(backend: str) -> None:
    ours, theirs, x = make("2d")
    parameters = [torch.stack([p.detach(), 2 * p.detach()]) for p in theirs.parameters()]
    got = torch.vmap(on_parameters(ours), (None, 0, 0))(x, *parameters)
    want = torch.vmap(on_parameters(theirs, leaky()), (None, 0, 0))(x, *parameters)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_representation_and_refusals() -> None:
    assert repr(gankern.nn.ConvLeakyReLU2d(3, 4, 3, negative_slope=0.1)).endswith("stride=(1, 1), negative_slope=0.1)")
    with pytest.raises(ValueError) as caught:
        gankern.nn.ConvTransposeLeakyReLU1d(3, 4, 3, negative_slope=-1)
    assert str(caught.value) == "ConvTransposeLeakyReLU1d: negative_slope must be a finite number >= 0, got -1"
    why = gankern.backend.problem("triton", "meta")
    with gankern.use_backend("triton"), pytest.raises(RuntimeError) as refused:
        gankern.nn.ConvLeakyReLU2d(3, 4, 3, device="meta")(torch.zeros(1, 3, 5, 5, device="meta"))
    assert str(refused.value) == f"bias_lrelu: backend must be able to run on meta tensors, got 'triton': {why}"
