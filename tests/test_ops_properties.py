"""Random calls of every op, good and bad: what the definition gives, or a refusal in one sentence; no input is ever changed.

In `make test` 50 calls of each op and property, always the same ones; in `make test-long` 2 000, others in each run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gankern
from gankern import backend
from gankern.ops import bias_lrelu, bn_lrelu, mlp_critic, pairwise, spectral_norm
from gankern.ops._objectives import OBJECTIVES, REDUCTIONS, SIDES
from tests.support import DEVICE, need

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.skipif(DEVICE != "cpu", reason="calls with CPU tensors")]

FEW = 50
COUNTS = pytest.mark.parametrize("count", [FEW, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(6000)])])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 17])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
Draw = Callable[[st.SearchStrategy[Any]], Any]
Arguments = dict[str, Any]


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= FEW,
        phases=[Phase.generate],  # a failing call prints its arguments; to shrink it takes minutes
        suppress_health_check=list(HealthCheck),
    )


# --- what a tensor may be -------------------------------------------------------------------------------------------------------

SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str = "grid") -> Tensor:
    """Multiples of 1/8 up to 2, whose sums are exact in every dtype and whose signs are so the same in each; or as `kind` says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-16, 17, shape, generator=generator).double() / 8
    limits = torch.finfo(dtype)
    if kind == "subnormal":
        x *= limits.smallest_normal / 8
    elif kind == "huge":
        x *= limits.max / 64
    elif kind in ("special", "extreme"):
        values = SPECIAL + [limits.max, limits.min, limits.smallest_normal / 4] * (kind == "extreme")
        chosen = torch.randint(0, 12 * len(values), shape, generator=generator)
        for i, value in enumerate(values):
            x[chosen == i] = value
    return x.to(dtype)


LAYOUTS = ["contiguous", "transposed", "sliced", "shifted", "expanded", "channels_last", "negated", "permuted"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers (expanded: those of the first index of dimension 0) at other places in memory."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "permuted":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "sliced" and x.dim() > 0:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "shifted":
        return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)
    if layout == "expanded" and x.dim() > 0 and len(x) > 0:
        return x[:1].expand(x.shape)
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "negated" and x.dtype in (torch.float32, torch.float64):
        return torch.complex(x, -x).conj().imag  # a view that says "minus what lies here"
    return x


def twin(x: Tensor) -> Tensor:
    """A copy with the same strides, offset and storage size; an alias within it stays one."""
    if x.is_neg() or x.device.type != "cpu" or x.layout != torch.strided:
        return x.detach().clone()
    copy = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())
    return copy.requires_grad_(x.requires_grad)


def each_tensor(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        for i, t in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(t, Tensor):
                yield f"{name}[{i}]", t


def mapped(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(one(v) for v in value)
        return function(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


# --- the ops --------------------------------------------------------------------------------------------------------------------


class Source:
    """Draws tensors of one call: one dtype, one kind of numbers for those that may be wild, each with a layout of its own."""

    def __init__(self, draw: Draw, kinds: tuple[str, ...] = ("extreme", "special", "subnormal", "huge")) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from(DTYPES))
        self.kind = draw(st.sampled_from(("grid", *kinds)))
        self.seed = draw(st.integers(0, 2**20))

    def tensor(self, *shape: int, wild: bool = False, layout: bool = True, shift: float = 0.0) -> Tensor:
        self.seed += 1
        x = numbers(shape, self.dtype, self.seed, self.kind if wild else "grid") + shift
        return laid_out(x, self.draw(st.sampled_from(LAYOUTS))) if layout else x

    def size(self, least: int = 0) -> int:
        return max(least, self.draw(SIZES))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def slope(self) -> float:
        """Where signs depend on rounding, LeakyReLU has no kink in 16 bits."""
        return 1.0 if self.dtype.itemsize == 2 else self.one_of(0.0, 0.2, 1.0)

    def shape(self, least: int, most: int, least_size: int = 0) -> list[int]:
        """Of so many dimensions. One in eight is larger than a grain of work of one thread, or than a block."""
        sizes = [self.size(least_size) for _ in range(self.draw(st.integers(least, most)))]
        if self.draw(st.integers(0, 7)) == 0:
            i = self.draw(st.integers(0, len(sizes) - 1))
            sizes[i] *= 2**16 // max(1, math.prod(sizes))
        elif math.prod(sizes) > 2**13:
            sizes = [min(n, 5) for n in sizes]
        return sizes


def draw_bias_lrelu(draw: Draw) -> Arguments:
    s = Source(draw)
    shape = s.shape(2, 5)
    return {
        "x": s.tensor(*shape, wild=True),
        "bias": s.tensor(shape[1]) if draw(st.booleans()) else None,
        "negative_slope": s.one_of(0.0, 0.01, 0.2, 1.0, 1.5, 0),
    }


def draw_linear_lrelu(draw: Draw) -> Arguments:
    s = Source(draw, ("special", "subnormal"))
    inputs, outputs, rows = s.size(), s.size(), s.size() * s.one_of(1, 1, 1, 61)
    leading = s.one_of((rows,), (), (2, rows), (rows, 1, 3))
    dropout = s.one_of(0.0, 0.0, 0.5, 1.0)
    return {
        "x": s.tensor(*leading, inputs, wild=True),
        "weight": s.tensor(outputs, inputs),
        "bias": s.tensor(outputs) if draw(st.booleans()) else None,
        "negative_slope": s.one_of(0.0, 0.2, 1.0, 2),
        "dropout": dropout,
        "training": draw(st.booleans()) if dropout == 1.0 or not dropout else False,
    }


def draw_bn_lrelu(draw: Draw) -> Arguments:
    s = Source(draw, ("special",))
    shape, training = s.shape(2, 4), draw(st.booleans())
    running = not training or draw(st.booleans())
    if training and shape[1] and math.prod(shape) == shape[1]:
        shape[0] += 1
    channels = shape[1]
    return {
        "x": s.tensor(*shape, wild=True),
        "running_mean": laid_out(s.tensor(channels, layout=False, shift=1 / 17), s.one_of("contiguous", "sliced"))
        if running
        else None,
        "running_var": s.tensor(channels, layout=False).abs() + 0.5 if running else None,
        "weight": s.tensor(channels) if draw(st.booleans()) else None,
        "bias": s.tensor(channels, shift=1 / 19)
        if training or draw(st.booleans())
        else None,  # not at the kink, where x is its mean
        "training": training,
        "momentum": s.one_of(0.0, 0.1, 1.0),
        "eps": s.one_of(1e-5, 1e-3),
        "negative_slope": s.slope(),
    }


def draw_gan_loss(draw: Draw) -> Arguments:
    s = Source(draw, ("special", "subnormal"))
    objective, side = draw(st.sampled_from(list(OBJECTIVES))), draw(st.sampled_from(SIDES))
    n = s.size() * s.one_of(1, 1, 1, 997)
    m = n if OBJECTIVES[objective].relative == "pair" else s.size()
    arguments: Arguments = {"objective": objective, "side": side, "reduction": draw(st.sampled_from(list(REDUCTIONS)))}
    for label in ("real_label", "fake_label"):
        arguments[label] = s.one_of(0.0, 1.0, 0.9, 1)
    if draw(st.booleans()):
        return {**arguments, "real": s.tensor(n + m, wild=True), "n_real": n}
    return {**arguments, "real": s.tensor(n, *s.one_of((), (1,)), wild=True), "fake": s.tensor(m, wild=True)}


def draw_penalty(draw: Draw) -> Arguments:
    s = Source(draw)
    return {
        "grad": s.tensor(*s.shape(1, 5), wild=True),
        "target": s.one_of(0.0, 1.0, 1.03),
        "sided": s.one_of("one", "two"),
        "weight": s.one_of(0.0, 1.0, 10),
    }


def draw_interpolate(draw: Draw) -> Arguments:
    s = Source(draw)
    shape = s.shape(1, 5)
    return {"real": s.tensor(*shape, wild=True), "fake": s.tensor(*shape, wild=True), "eps": s.tensor(shape[0]).abs() / 2}


def draw_mlp_critic(draw: Draw) -> Arguments:
    s = Source(draw, ("special",))
    sizes = [s.size(1) for _ in range(draw(st.integers(1, 3)))]
    b = s.size(1)
    sample = s.one_of(*mlp_critic.SAMPLES)
    objective = draw(st.sampled_from(list(OBJECTIVES)))
    equal = sample in ("line", "both") or OBJECTIVES[objective].relative == "pair"
    slope = s.slope()
    wild = slope > 0  # ReLU's derivative at NaN is 0 in the kernels and 1 in PyTorch, and so are the norms of such samples
    return {
        "real": s.tensor(b, sizes[0], wild=wild, shift=1 / 32),
        "fake": s.tensor(b if equal else s.size(1), sizes[0], wild=wild),
        "weights": [s.tensor(n, k) for k, n in zip(sizes, [*sizes[1:], 1], strict=True)],
        "biases": [s.tensor(n, shift=1 / 32) if draw(st.booleans()) else None for n in [*sizes[1:], 1]],
        "slopes": slope,
        "objective": objective,
        "penalty_weight": s.one_of(0.0, 10.0),
        "target": s.one_of(0.0, 1.03),
        "sided": s.one_of("one", "two"),
        "sample": sample,
        "eps": s.tensor(b).abs() / 2 if sample == "line" else None,
    }


def draw_features(draw: Draw) -> Arguments:
    s = Source(draw)
    return {"m": s.tensor(s.size() * s.one_of(1, 1, 1, 5), s.size(), s.size(), wild=True)}


def draw_mmd2(draw: Draw) -> Arguments:
    s = Source(draw, ("special",))
    d, rest = s.size(), s.one_of((), (2,))
    return {
        "real": s.tensor(s.size(2) * s.one_of(1, 1, 1, 9), d, *rest, wild=True),
        "fake": s.tensor(s.size(2), d, *rest, wild=True),
        "sigmas": s.one_of((1.0,), (1.0, 4), [0.5, 2.0, 8.0], tuple(range(1, 17))),
        "unbiased": draw(st.booleans()),
    }


def draw_spectral_norm(draw: Draw) -> Arguments:
    s = Source(draw, ("special",))
    weights: list[Tensor] = []
    us: list[Tensor] = []
    vs: list[Tensor] = []
    dims: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        shape = s.shape(2, 3, 1)
        dim = draw(st.integers(0, len(shape) - 1))
        weights.append(
            s.tensor(*shape, wild=True, layout=False) + torch.eye(*shape[:2])[(..., *(None,) * (len(shape) - 2))].to(s.dtype)
        )
        weights[-1] = laid_out(weights[-1], s.one_of("contiguous", "transposed", "sliced", "shifted", "negated"))
        rows, columns = shape[dim], math.prod(shape) // shape[dim]
        for vectors, n in ((us, rows), (vs, columns)):
            vectors.append(
                laid_out((torch.ones(n, dtype=torch.float64) / n**0.5).to(s.dtype), s.one_of("contiguous", "sliced", "shifted"))
            )
        dims.append(dim)
    iterations = s.one_of(0, 1, 2)
    for w, dim in zip(weights, dims, strict=True):
        start = w.double().movedim(dim, 0).flatten(1).sum(1)  # W v but for a factor
        assume(not start.norm() < 0.1)  # of what cancels no direction is left
        assume(iterations or not start.sum().abs() < 0.1)
    return {"weights": weights, "u": us, "v": vs, "dims": dims, "iterations": iterations, "eps": 1e-12}


class Op(NamedTuple):
    function: Callable[..., Any]
    draw: Callable[[Draw], Arguments]
    differentiable: tuple[str, ...]
    results: Callable[[Any], dict[str, Tensor]] = lambda y: {"y": y}
    updated: tuple[str, ...] = ()  # what a call may change, and is compared

    @property
    def name(self) -> str:
        return self.function.__name__


OPS = {
    op.name: op
    for op in (
        Op(gankern.bias_lrelu, draw_bias_lrelu, ("x", "bias")),
        Op(gankern.linear_lrelu, draw_linear_lrelu, ("x", "weight", "bias")),
        Op(gankern.bn_lrelu, draw_bn_lrelu, ("x", "weight", "bias"), updated=("running_mean", "running_var")),
        Op(gankern.gan_loss, draw_gan_loss, ("real", "fake"), lambda out: {"loss": out.loss, "stats": out.stats}),
        Op(gankern.gradient_norm_penalty, draw_penalty, ("grad",), lambda out: out._asdict()),
        Op(gankern.interpolate, draw_interpolate, ("real", "fake")),
        Op(
            gankern.mlp_critic,
            draw_mlp_critic,
            ("weights", "biases"),
            lambda out: {"loss": out.loss, "penalty": out.penalty, "norms": out.norms, "stats": out.stats},
        ),
        Op(pairwise.minibatch_features, draw_features, ("m",)),
        Op(gankern.mmd2, draw_mmd2, ("real", "fake")),
        Op(
            spectral_norm.spectral_norm,
            draw_spectral_norm,
            ("weights",),
            lambda ys: {f"y[{i}]": y for i, y in enumerate(ys)},
            ("u", "v"),
        ),
    )
}
WAYS = ["compiled", "automatic", "automatic, any size"]


@contextmanager
def way(name: str) -> Iterator[None]:
    """Force a backend, or take the automatic choice; of any size: as if all tensors were large enough for a kernel."""
    if not name.startswith("automatic"):
        with backend.use_backend(name):
            yield
        return
    before = bias_lrelu.SMALL, bn_lrelu.SMALL, pairwise.SMALL_MMD
    if name != "automatic":
        bias_lrelu.SMALL = bn_lrelu.SMALL = pairwise.SMALL_MMD = 0
    try:
        yield
    finally:
        bias_lrelu.SMALL, bn_lrelu.SMALL, pairwise.SMALL_MMD = before


def evaluate(op: Op, arguments: Arguments, name: str) -> dict[str, Tensor]:
    """What the call gives on a backend, the gradients of the floating results, and what it has updated. Everything else must stay
    as it was, to the bit."""
    arguments = mapped(arguments, twin)
    leaves = []
    for argument in op.differentiable:
        for key, t in each_tensor({argument: arguments.get(argument)}):
            if t.is_floating_point():
                leaves.append((key, t.requires_grad_()))
    before = mapped({k: v for k, v in arguments.items() if k not in op.updated}, lambda t: t.detach().clone())
    with way(name):
        found = op.results(op.function(**arguments))
        outputs = [y for y in found.values() if y.requires_grad]
        relu = arguments.get("negative_slope") == 0  # at NaN its derivative is 0 in the kernels, 1 in PyTorch
        if outputs and not (relu and not outputs[0].is_meta and found["y"].isnan().any()):
            cotangents = [numbers(tuple(y.shape), y.dtype, i).to(y.device) for i, y in enumerate(outputs)]
            gradients = torch.autograd.grad(outputs, [t for _, t in leaves], cotangents, allow_unused=True)
            found |= {f"d {key}": g for (key, _), g in zip(leaves, gradients, strict=True) if g is not None}
    for (key, now), (_, then) in zip(each_tensor({k: arguments[k] for k in before}), each_tensor(before), strict=True):
        if now.device.type == "cpu" and now.layout == torch.strided:
            assert torch.equal(bits(now), bits(then)), f"{key} was changed"
    found |= {key: t for name in op.updated for key, t in each_tensor({name: arguments.get(name)})}
    return {key: t.detach() for key, t in found.items()}


def bits(t: Tensor) -> Tensor:
    return torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().flatten()).view(torch.uint8)


def agree(got: dict[str, Tensor], want: dict[str, Tensor], exact: dict[str, Tensor], terms: tuple[float, float]) -> None:
    """Every number is, to rounding, what the definition gives in this dtype or in float64; where it gives none, there is none.
    terms: the size of what is added up to results and to gradients, where it may cancel."""
    nothing = {k for k in got.keys() ^ want.keys() if bool(((got | want)[k] != 0).any())}
    assert not nothing, f"gradients differ in {sorted(nothing)}"
    undefined = any(y.dim() == 0 and not y.isfinite() for key, y in want.items() if not key.startswith("d "))
    for key in got.keys() & want.keys():
        if undefined and key.startswith("d "):
            continue  # of a loss that is no number
        g, w, e = got[key], want[key], exact[key]
        assert (g.shape, g.dtype) == (w.shape, w.dtype), f"{key}: {g.shape}, {g.dtype} instead of {w.shape}, {w.dtype}"
        e = e.to(g.dtype)
        ok = torch.zeros_like(g, dtype=torch.bool)
        for other, of in ((w, want), (e, exact)):
            largest = max(map(size, (v for k, v in of.items() if k.startswith("d ")))) if key.startswith("d ") else size(other)
            limit = TOLERANCE[lowest(want)] * largest + 8 * torch.finfo(g.dtype).tiny * torch.finfo(g.dtype).eps
            limit += torch.finfo(torch.float64 if g.dtype == torch.float64 else torch.float32).eps * terms[key.startswith("d ")]
            ok |= (g.double() - other.double()).abs() <= limit
            ok |= ~g.isfinite() & ~other.isfinite()
        assert ok.all(), f"{key}: {g[~ok][:4].tolist()} instead of {w[~ok][:4].tolist()} or {e[~ok][:4].tolist()}"


def size(t: Tensor) -> float:
    """The largest finite number."""
    finite = t[t.isfinite()].abs().double()
    return finite.max().item() if finite.numel() else 0.0


def lowest(tensors: dict[str, Tensor]) -> torch.dtype:
    return max((t.dtype for t in tensors.values()), key=lambda d: torch.finfo(d).eps)


@COUNTS
@pytest.mark.parametrize("name", OPS)
def test_is_what_the_definition_gives(name: str, count: int) -> None:
    need("compiled")
    op = OPS[name]

    @examples(count)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        compare(op, op.draw(data.draw), WAYS)

    check()


def compare(op: Op, arguments: Arguments, ways: list[str]) -> None:
    exact = evaluate(op, mapped(arguments, lambda t: t.double() if t.is_floating_point() else t), "reference")
    want = evaluate(op, arguments, "reference")
    for name in ways:
        try:
            agree(evaluate(op, arguments, name), want, exact, cancelling(op, arguments))
        except AssertionError as error:
            raise AssertionError(f"{op.name} ({name}): {error}; {described(arguments)}") from None


def cancelling(op: Op, arguments: Arguments) -> tuple[float, float]:
    """The size of what is added up to results and to gradients, and may cancel."""
    objective, reduction, real = str(arguments.get("objective")), arguments.get("reduction"), arguments.get("real")
    # Jensen-Shannon's value is less log 2, Hellinger's less 1; Wasserstein's is a sum of logits
    result = float("jensen" in objective or "hellinger" in objective)
    if op.name == "gan_loss" and isinstance(real, Tensor) and reduction != "none":
        result = max(result, size(real)) * (real.numel() if reduction == "sum" else 1)
    # Of samples that are all alike: means of thousands of slopes, distances from a Gram matrix, layers of numbers up to 2
    return result, 64.0 * (op.name in ("gan_loss", "mmd2", "mlp_critic", "spectral_norm"))


def described(arguments: Arguments) -> str:
    def one(v: Any) -> str:
        if isinstance(v, (list, tuple)):
            return f"[{', '.join(map(one, v))}]"
        return f"{str(v.dtype)[6:]}{list(v.shape)}/{v.stride()}" if isinstance(v, Tensor) and v.layout == torch.strided else repr(v)

    return ", ".join(f"{k}={one(v)}" for k, v in arguments.items())


@pytest.mark.parametrize("name", OPS)
def test_is_what_the_definition_gives_in_triton(name: str) -> None:
    need("triton")
    op = OPS[name]

    @examples(FEW // 10)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arguments = op.draw(data.draw)
        assume(sum(t.numel() for _, t in each_tensor(arguments)) < 2**13)
        short = [t for _, t in each_tensor(arguments) if t.dtype.itemsize == 2]  # whose subnormals the interpreter spoils
        assume(not any(((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).any() for t in short))
        compare(op, arguments, ["triton"])

    check()


# --- wrong calls ----------------------------------------------------------------------------------------------------------------

WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "int64": lambda t: torch.ones(t.shape, dtype=torch.int64),
    "bool": lambda t: torch.ones(t.shape, dtype=torch.bool),
    "complex": lambda t: torch.ones(t.shape, dtype=torch.complex64),
    "float8": lambda t: torch.ones(t.shape).to(torch.float8_e4m3fn),
    "other float": lambda t: t.detach().to(torch.float32 if t.dtype != torch.float32 else torch.float16),
    "meta": lambda t: t.detach().to("meta"),
    "none": lambda t: None,
    "list": lambda t: t.detach().tolist(),
    "array": lambda t: t.detach().float().resolve_neg().numpy(),
    "text": lambda t: "x",
    "number": lambda t: 0.5,
    "in a list": lambda t: [t],
    "one dimension more": lambda t: t.detach().unsqueeze(0),
    "one dimension more at the end": lambda t: t.detach().unsqueeze(-1),
    "flat": lambda t: t.detach().flatten(),
    "scalar": lambda t: torch.ones((), dtype=t.dtype),
    "one more": lambda t: torch.cat([t.detach(), t.detach()[:1]]) if t.dim() and len(t) else t,
    "one less": lambda t: t.detach()[1:] if t.dim() else t,
    "one less at the end": lambda t: t.detach()[..., 1:] if t.dim() else t,
    "none at all": lambda t: t.detach()[:0] if t.dim() else t,
    "sparse": lambda t: t.detach().to_sparse(),
    "with a gradient": lambda t: t.detach().clone().requires_grad_(),
}
WRONG_OTHERS = {
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "1e38": 1e38,
    "-1e38": -1e38,
    "1e-38": 1e-38,
    "10^400": 10**400,
    "2^63": 2**63,
    "none": None,
    "true": True,
    "text": "x",
    "bytes": b"x",
    "complex": 1j,
    "tensor": torch.ones(2),
    "scalar tensor": torch.tensor(0.5),
    "array": np.ones(2),
    "numpy scalar": np.float32(0.25),
    "empty": [],
    "list": [0.5, "x"],
    "dictionary": {},
    "object": object(),
}


@COUNTS
@pytest.mark.parametrize("name", OPS)
def test_a_wrong_call_is_refused_in_one_sentence(name: str, count: int) -> None:
    need("compiled")
    op = OPS[name]

    @examples(count)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arguments = op.draw(data.draw)
        wrong = spoiled(arguments, data.draw)
        random = "eps" in wrong and wrong["eps"] is None and arguments["eps"] is not None
        used = {k: v for k, v in wrong.items() if k != "eps" or arguments.get("penalty_weight") != 0}
        outcomes = {name: outcome(op, wrong, name) for name in ("reference", *WAYS)}
        for name, got in outcomes.items():
            text = f"{op.name} ({name}): {described(wrong)}"
            if isinstance(got, Exception):
                assert isinstance(got, (TypeError, ValueError, RuntimeError)), f"{text}: {got!r}"
                assert re.fullmatch(rf"{op.name}: .+ must [^\n]+, got [^\n]+", str(got)), f"{text}: {got!r}"
            elif any(t.device.type == "meta" for _, t in each_tensor(used)):
                assert all(t.device.type == "meta" for t in got.values()), text
            elif all(t.layout == torch.strided for _, t in each_tensor(used)):  # PyTorch's own calls may take sparse tensors
                want = outcomes["reference"]
                assert not isinstance(want, Exception), f"{text} gave a result, the definition refuses: {want!r}"
                if random or any(isinstance(v, (int, float)) and abs(v) > 1e15 for v in wrong.values()):
                    continue  # where the definition overflows or cancels depends on its order
                exact = outcome(op, mapped(wrong, lambda t: t.double() if t.is_floating_point() else t), "reference")
                try:
                    agree(got, want, want if isinstance(exact, Exception) else exact, cancelling(op, wrong))
                except AssertionError as error:
                    raise AssertionError(f"{text}: {error}") from None

    check()


def spoiled(arguments: Arguments, draw: Draw) -> Arguments:
    """The arguments with one of them wrong in some way, or one of a list of tensors."""
    name = draw(st.sampled_from([k for k, v in arguments.items() if not isinstance(v, bool)]))  # anything has a truth value
    value = arguments[name]
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return {**arguments, name: [*value[:i], spoiled({"": value[i]}, draw)[""], *value[i + 1 :]]}
    if isinstance(value, Tensor):
        return {**arguments, name: WRONG_TENSORS[draw(st.sampled_from(list(WRONG_TENSORS)))](value)}
    endless = ("2^63", "10^400") if name == "iterations" else ()  # they would be made
    return {**arguments, name: WRONG_OTHERS[draw(st.sampled_from([w for w in WRONG_OTHERS if w not in endless]))]}


def outcome(op: Op, arguments: Arguments, name: str) -> dict[str, Tensor] | Exception:
    try:
        return evaluate(op, arguments, name)
    except AssertionError:
        raise
    except Exception as error:
        return error


# --- the operators themselves, below the checks of the public functions ---------------------------------------------------------

RAW = torch.ops.gankern
M, SQUARE, ROW, LAST = torch.ones(4, 3), torch.ones(3, 3), torch.ones(3), 2**63 - 1
NO_BITS = torch.zeros(0, dtype=torch.uint8)
REFUSED: dict[str, Callable[[], Any]] = {
    "probability of NaN": lambda: RAW.linear_lrelu_act(M, None, 0.2, math.nan, torch.zeros(1, dtype=torch.int64)),
    "no seed": lambda: RAW.linear_lrelu_act(M, None, 0.2, 0.5, None),
    "short bits": lambda: RAW.linear_lrelu_act_grad(M, M, torch.zeros(3, dtype=torch.uint8), 0.2, 0.5, True),
    "short bias": lambda: RAW.bias_lrelu(M, torch.ones(2), 0.2),
    "empty integers": lambda: RAW.bias_lrelu(torch.zeros(0, 3, dtype=torch.int64), None, 0.2),
    "other strides": lambda: RAW.bias_lrelu_grad(SQUARE, SQUARE.t().expand(3, 3)[:, :1].expand(3, 3), 0.2, True),
    "a negative number of iterations": lambda: RAW.spectral_norm([M], [torch.ones(4)], [ROW], [0], -1, 1e-12),
    "a dimension too many": lambda: RAW.spectral_norm([M], [torch.ones(4)], [ROW], [2], 1, 1e-12),
    "an offset that overflows": lambda: RAW.spectral_norm_grad([M], [M], torch.ones(8), [LAST], [0]),
    "an offset at the end": lambda: RAW.spectral_norm_grad([M], [M], torch.ones(8), [1], [0]),
    "a first row that overflows": lambda: RAW.mlp_critic_tangent(M.clone(), M.clone(), NO_BITS, 0.2, 0.0, LAST, None),
    "a row too many": lambda: RAW.mlp_critic_seed(M.clone(), M.clone(), 1, None, 1.0, 1.0, False),
    "more bias rows than rows": lambda: RAW.mlp_critic_adjoint(M.clone(), M, NO_BITS, 0.2, 0.0, 5, None),
    "more real logits than logits": lambda: RAW.gan_loss(ROW, None, 4, 0, 1.0, 1.0, None, 0, 1.0, 0.0, None, 1, 0),
    "an unknown term": lambda: RAW.gan_loss(ROW, None, 1, 99, 1.0, 1.0, None, 0, 1.0, 0.0, None, 1, 0),
    "short targets": lambda: RAW.gan_loss(ROW, None, 2, 0, 1.0, 1.0, torch.ones(1), 0, 1.0, 0.0, None, 1, 0),
    "short eps": lambda: RAW.interpolate(M, M, ROW, None),
    "short norms": lambda: RAW.gradient_norm_penalty_grad(torch.ones(()), M, ROW, 1.0, False, 1.0),
    "a matrix of features": lambda: RAW.pairwise_features(M),
    "short squares": lambda: RAW.pairwise_gram_(M.clone(), ROW, ROW, [1.0], False),
    "short statistics": lambda: RAW.bn_lrelu_eval(M, torch.ones(2), ROW, None, None, 1e-5, 0.2),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_an_operator_refuses_what_would_leave_its_tensors(call: Callable[[], Any]) -> None:
    need("compiled")
    with pytest.raises(RuntimeError, match=r"^\w+: .+ must "):
        call()
