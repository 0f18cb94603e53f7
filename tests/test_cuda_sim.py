"""The CUDA C++ kernels' own source, run on the CPU by tests/cuda_sim with AddressSanitizer and UBSan, against the reference.

And the simulator itself: what it must catch is planted in tests/cuda_sim/planted.cpp.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops import gan_loss, linear_lrelu
from gankern.ops._activation import leaky_relu
from gankern.ops._philox import dropout_keep

ROOT = Path(__file__).parent.parent
SIM = ROOT / "tests" / "cuda_sim"
CXX = shutil.which("g++")
FLAGS = [
    *(
        "-std=c++17",
        "-Og",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fno-strict-aliasing",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ),
    *(
        "-DGK_SIM",
        "-DGK_MAX_BLOCKS=5",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-Wno-sign-conversion",
        "-Wno-float-conversion",
        "-Werror",
        f"-I{SIM}",
    ),  # 5 blocks: grid-stride loops go round at test sizes
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC_DEF

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")


# --- build and run ---------------------------------------------------------------------------------------------------------


@functools.cache
def program(name: str) -> Path:
    """tests/cuda_sim/<name>.cpp, compiled; kept in build/cuda_sim under the hash of the sources and flags."""
    assert CXX is not None
    sources = sorted([*SIM.glob("*.[ch]*"), *(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.h")])
    version = subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([version, *map(str.encode, FLAGS), *(s.read_bytes() for s in sources)])).hexdigest()[:16]
    path = ROOT / "build" / "cuda_sim" / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{name}.{os.getpid()}")
        result = subprocess.run(
            [CXX, *FLAGS, str(SIM / f"{name}.cpp"), "-o", str(temporary)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        temporary.replace(path)
    return path


def start(name: str, *words: object, inputs: tuple[Tensor | None, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    texts = [word.hex() if isinstance(word, float) else str(word).removeprefix("torch.") for word in words]
    raw = b"".join(t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in inputs if t is not None and t.numel() > 0)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [str(program(name))], input=" ".join(texts).encode() + b"\n" + raw, capture_output=True, env=environment, check=False
    )


def run(
    name: str, *words: object, inputs: tuple[Tensor | None, ...], outputs: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> tuple[list[Tensor], int]:
    """The outputs, and how many kernels were launched for them."""
    result = start(name, *words, inputs=inputs)
    assert result.returncode == 0, result.stderr.decode()
    launches = re.search(r"^launches (\d+)$", result.stderr.decode(), re.M)
    assert launches is not None
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in outputs]
    raw, tensors = torch.frombuffer(bytearray(result.stdout + b"\0"), dtype=torch.uint8)[:-1], []
    assert len(raw) >= sum(sizes)
    for (shape, dtype), size in zip(outputs, sizes, strict=True):
        tensors.append(raw[:size].clone().view(dtype).reshape(shape))
        raw = raw[size:]
    return tensors, int(launches[1])


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def close(got: Tensor, want: Tensor, terms: int = 1) -> None:
    """Within rounding of the float64 `want`: half a last place of got's dtype, and 4 eps of the accumulation dtype.

    For a sum, these are multiplied by the root of the number of its terms.
    """
    accumulated = torch.finfo(accumulate(got.dtype)).eps
    rtol = 4 * accumulated + (torch.finfo(got.dtype).eps / 2 if got.dtype.itemsize == 2 else 0.0)
    finite = want[want.isfinite()].abs()
    atol = 4 * accumulated * math.sqrt(terms) * (1.0 + (finite.max().item() if len(finite) else 0.0))
    overflowed = want.to(got.dtype).isinf()
    want = torch.where(overflowed, want.to(got.dtype).double(), want)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, equal_nan=True)


# --- the simulator ---------------------------------------------------------------------------------------------------------


def test_simulator_runs_blocks_with_shared_memory_and_shuffles() -> None:
    x = torch.randint(-50, 50, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    (got,), launches = run("planted", "sum", 64, inputs=(x,), outputs=[((64,), torch.float32)])
    assert torch.equal(got, x.sum(1))
    assert launches == 1


def test_simulator_shuffles_bring_the_right_lane() -> None:
    (got,), _ = run("planted", "shuffle", inputs=(), outputs=[((4, 64), torch.int32)])
    t = torch.arange(64)
    lane = t % 32
    assert got[0].tolist() == (t // 8 * 8 + 5).tolist()
    assert got[1].tolist() == torch.where(lane >= 3, t - 3, t).tolist()
    assert got[2].tolist() == torch.where(t % 16 + 3 < 16, t + 3, t).tolist()
    assert got[3].tolist() == (t ^ 9).tolist()


def test_simulator_atomics() -> None:
    (got,), launches = run("planted", "atomic", inputs=(), outputs=[((4,), torch.int32)])
    assert got.tolist() == [192, 307, 1, 192]
    assert launches == 2


def test_simulator_shared_memory_starts_as_nan_in_each_block() -> None:
    (got,), _ = run("planted", "unwritten", inputs=(), outputs=[((2, 2, 32), torch.float32)])
    assert got.isnan().tolist() == [[[False] * 32, [False] * 32], [[False] * 32, [True] * 32]]


def test_simulator_16_bit_numbers_are_those_of_torch() -> None:
    patterns = torch.arange(65536).to(torch.int32)
    (half, bfloat), _ = run("planted", "from16", inputs=(), outputs=[((65536,), torch.float32)] * 2)
    torch.testing.assert_close(half, patterns.to(torch.int16).view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, patterns.to(torch.int16).view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    middle = half[half.isfinite()]  # each half, the midpoints between neighbours, and their neighbours among the floats
    ordered = middle.sort().values
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    x = torch.cat(
        [middle, midpoints, *(torch.nextafter(midpoints, torch.full_like(midpoints, end)) for end in (-math.inf, math.inf))]
    )
    x = torch.cat(
        [
            x,
            torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(1))
            .to(torch.int32)
            .view(torch.float32),
        ]
    )
    x = torch.cat([x, torch.tensor([65504.0, 65519.9, 65520.0, -65520.0, 1e30, math.inf, -math.inf, math.nan])])
    (to_half, to_bfloat), _ = run(
        "planted", "to16", len(x), inputs=(x,), outputs=[((len(x),), torch.float16), ((len(x),), torch.bfloat16)]
    )
    torch.testing.assert_close(to_half, x.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(to_bfloat, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(to_half[to_half == 0].signbit(), x[to_half == 0].signbit())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_barrier", r"race: output 0 depends on the order"),
        ("missing_second_barrier", r"race: output 0 depends on the order"),
        ("global_race", r"race: output 0 depends on the order"),
        ("divergent_barrier", r"divergence: thread 0 waits at __syncthreads \S+planted.cpp:\d+, but thread 16 has returned"),
        ("two_barriers", r"divergence: thread 0 waits at __syncthreads \S+:\d+, but thread 1 waits at __syncthreads \S+:\d+"),
        ("uneven_loop", r"divergence: thread 0 has returned, but thread 32 waits at __syncthreads"),
        ("divergent_shuffle", r"divergence: thread 0 waits at a warp operation \S+:\d+, but thread 1 has returned"),
        ("outside_mask", r"takes the value of lane 16, which is not in the mask"),
        ("partial_warp", r"with lane 16 in its mask, which does not exist"),
        ("global_store", r"AddressSanitizer: heap-buffer-overflow"),
        ("shared_store", r"AddressSanitizer: heap-buffer-overflow"),
        ("shared_row", r"runtime error: index 64 out of bounds for type"),
        ("stack_store", r"AddressSanitizer: stack-buffer-overflow"),
        ("misaligned", r"runtime error: store to misaligned address"),
        ("large_block", r"a block must have 1 to 1024 threads, got \(1025, 1, 1\)"),
        ("empty_grid", r"a grid must have blocks within the limits, got \(0, 1, 1\)"),
    ],
)
def test_simulator_catches(name: str, message: str) -> None:
    result = start("planted", name)
    assert result.returncode != 0
    assert re.search(message, result.stderr.decode()), result.stderr.decode()


# --- linear_lrelu ----------------------------------------------------------------------------------------------------------


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(1000 * rows + columns + seed), dtype=torch.float64
    ).to(dtype)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """uint8 [rows, ceil(columns / 8)] to bool [rows, columns]."""
    return ((bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(len(bits), bits.shape[1] * 8)[:, :columns]


def pack(keep: Tensor) -> Tensor:
    rows, columns = keep.shape
    groups = F.pad(keep, (0, -columns % 8)).reshape(rows, (columns + 7) // 8, 8)
    return (groups << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def act(z: Tensor, bias: Tensor | None, slope: float, p: float, shift: int = 0) -> tuple[Tensor, Tensor | None, int]:
    rows, columns = z.shape
    outputs = [((rows, columns), z.dtype)] + ([((rows, (columns + 7) // 8), torch.uint8)] if p > 0 else [])
    seed = torch.tensor([SEED]) if p > 0 else None
    words = ("act", z.dtype, rows, columns, slope, p, shift, int(bias is not None))
    (y, *bits), launches = run("linear_lrelu", *words, inputs=(z, bias, seed), outputs=outputs)
    return y, bits[0] if bits else None, launches


def act_grad(
    dy: Tensor, y: Tensor, bits: Tensor | None, slope: float, p: float, with_bias: bool, shift: int = 0
) -> tuple[Tensor, Tensor | None, int]:
    rows, columns = dy.shape
    outputs = [((rows, columns), dy.dtype)] + ([((columns,), dy.dtype)] if with_bias else [])
    words = ("act_grad", dy.dtype, rows, columns, slope, p, shift, int(with_bias))
    (dz, *dbias), launches = run("linear_lrelu", *words, inputs=(dy, y, bits), outputs=outputs)
    return dz, dbias[0] if dbias else None, launches


class Shape(NamedTuple):
    rows: int
    columns: int
    slope: float
    p: float
    shift: int = 0  # elements that the matrices are off a 16-byte boundary


SHAPES = [
    Shape(1, 1, 0.2, 0.5),
    Shape(3, 7, 0.2, 0.0),
    Shape(5, 8, 0.0, 0.5),
    Shape(4, 9, 1.0, 0.5),
    Shape(2, 127, 0.2, 0.75),
    Shape(130, 40, 0.2, 0.5),
    Shape(17, 64, 0.2, 0.5, shift=1),
    Shape(9, 72, 0.01, 1.0),
    Shape(33, 392, 0.2, 0.0),  # 5 blocks of 128 threads go round more than once
    Shape(600, 12, 0.2, 0.5),  # rows split over blocks, two launches
    Shape(700, 48, 0.2, 0.0),
]


def reference(z: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """The op's definition in float64; the product is by the identity."""
    seed = torch.tensor([SEED])
    b = None if bias is None else bias.double()
    return linear_lrelu.reference(z.double(), torch.eye(z.shape[1], dtype=torch.float64), b, shape.slope, shape.p, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_lrelu(shape: Shape, dtype: torch.dtype) -> None:
    rows, columns, slope, p, shift = shape
    z, dy = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    keep = dropout_keep(torch.tensor([SEED]), rows, columns, p)
    bias = matrix(1, columns, dtype, 2)[0] if rows % 2 else None
    y, bits, launches = act(z, bias, slope, p, shift)
    close(y, reference(z, bias, shape))
    assert launches == 1
    if p > 0:
        assert bits is not None
        assert torch.equal(unpack(bits, columns), keep)

    # the gradient at this y, by autograd through the definition at points of the same signs
    at = torch.where(y > 0, 1.0, -1.0).double().requires_grad_()
    (want,) = torch.autograd.grad(reference(at, None, shape), at, dy.double())
    want = torch.where(keep & (y <= 0), want, torch.where(keep, want, 0.0))
    packed = pack(keep) if p > 0 else None
    dz, dbias, launches = act_grad(dy, y, packed, slope, p, True, shift)
    close(dz, want)
    assert dbias is not None
    close(dbias, want.sum(0), terms=rows)
    assert launches == (2 if rows > 512 else 1)
    alone, _, launches = act_grad(dy, y, packed, slope, p, False, shift)
    assert torch.equal(alone, dz)
    assert launches == 1


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.3, 0.9])
def test_linear_lrelu_dropout_mask_and_scale(p: float) -> None:
    z = matrix(37, 51, torch.float32)
    y, bits, _ = act(z, None, 0.2, p)
    keep = dropout_keep(torch.tensor([SEED]), 37, 51, p)
    if bits is not None:
        assert torch.equal(unpack(bits, 51), keep)
    close(y, F.leaky_relu(z.double(), 0.2) * keep / (1 - p))


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (0, 5), (4, 0), (0, 0)])
def test_linear_lrelu_empty(rows: int, columns: int) -> None:
    z = torch.zeros(rows, columns)
    assert act(z, torch.zeros(columns), 0.2, 0.0)[2] == 0
    assert act(z, None, 0.2, 0.5)[2] == 0
    _, dbias, _ = act_grad(z, z, None, 0.2, 0.0, True)
    assert dbias is not None
    assert torch.equal(dbias, torch.zeros(columns))
    assert act_grad(z, z, None, 0.2, 0.0, False)[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [8, 7])
def test_linear_lrelu_nan_and_infinity(columns: int, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max], dtype=dtype)[:columns]
    z = special.repeat(6, 1)
    for slope in (0.2, 0.0):
        y, _, _ = act(z, None, slope, 0.0)
        close(y, leaky_relu(z, slope).double())
        dropped, bits, _ = act(z, None, slope, 0.5)
        assert bits is not None
        keep = unpack(bits, columns)
        assert not keep.all()
        close(dropped, leaky_relu(z, slope).double() * keep * 2)
        dz, dbias, _ = act_grad(z, y, bits, slope, 0.5, True)
        want = z.double() * (keep * 2.0) * torch.where(y > 0, torch.tensor(1.0, dtype=torch.float64), slope)
        close(dz, want)
        assert dbias is not None
        close(dbias, want.sum(0), terms=6)


# --- gan_loss --------------------------------------------------------------------------------------------------------------

NOTHING = ("bce", 0.0, 0.0)


class Case(NamedTuple):
    """What gan_loss's kernels take; b None: one vector of logits."""

    a: Tensor
    b: Tensor | None
    n_real: int
    spec: gan_loss.Spec
    real_targets: Tensor | None = None
    fake_targets: Tensor | None = None

    @property
    def words(self) -> tuple[object, ...]:
        halves = zip((self.spec.real, self.spec.fake), (self.real_targets, self.fake_targets), strict=True)
        parts = [
            word
            for (term, weight, target), targets in halves
            for word in (gan_loss.TERMS[term].code, weight, target, int(targets is not None))
        ]
        sizes = (self.a.dtype, self.a.numel(), -1 if self.b is None else self.b.numel(), self.n_real)
        return (*sizes, *parts, self.spec.reduction, self.spec.relative)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.a, self.b, self.real_targets, self.fake_targets

    @property
    def n(self) -> int:
        return self.a.numel() + (0 if self.b is None else self.b.numel())

    def double(self) -> Case:
        tensors = [t if t is None else t.double() for t in (self.a, self.b, self.real_targets, self.fake_targets)]
        a, b, real_targets, fake_targets = tensors
        assert a is not None
        return Case(a, b, self.n_real, self.spec, real_targets, fake_targets)


def make_case(
    n_real: int, n_fake: int, dtype: torch.dtype, reduction: int, *, one_vector: bool, targets: bool = False, scale: float = 3.0,
    real: tuple[str, float, float] = ("bce", 1.0, 0.9), fake: tuple[str, float, float] = ("bce", 1.0, 0.1), relative: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(n_real + 7 * n_fake)
    logits = (torch.randn(n_real + n_fake, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = torch.rand(n_real + n_fake, generator=generator, dtype=torch.float64).to(accumulate(dtype))
    a, b = (logits, None) if one_vector else (logits[:n_real], logits[n_real:])
    per_sample = (labels[:n_real], labels[n_real:]) if targets else (None, None)
    return Case(a, b, n_real, gan_loss.Spec(real, fake, reduction, relative), *per_sample)


def compare_loss(case: Case, launches: int = 1) -> None:
    acc, n = accumulate(case.a.dtype), case.n
    shape = (n,) if case.spec.reduction == 0 else ()
    (loss, stats, grad), count = run(
        "gan_loss", "loss", *case.words, inputs=case.inputs, outputs=[(shape, acc), ((3,), acc), ((n,), acc)]
    )
    assert count == launches
    exact = case.double()
    leaves = [t.requires_grad_() for t in (exact.a, exact.b) if t is not None]
    want, want_stats = gan_loss._reference(*exact[:3], exact.real_targets, exact.fake_targets, case.spec)
    close(loss, want.detach(), terms=n)
    close(stats, want_stats, terms=n)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(acc)
    c = torch.randn(n, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(case.a.dtype)
    slopes = [d + 0 * t for d, t in zip(torch.autograd.grad(want.sum(), leaves, create_graph=True), leaves, strict=True)]
    if case.spec.relative and case.spec.reduction == 0:  # the slopes in what the terms take
        grad = gan_loss._relative_adjoint(grad, case.n_real, case.spec.relative)
    close(grad, torch.cat(slopes).detach(), terms=n if case.spec.relative else 1)
    if case.spec.relative:
        return
    g_each = g.double().expand(n)
    curved = torch.autograd.grad(torch.cat(slopes), leaves, g_each * c.double()) if n else leaves
    ca, cb = (c, None) if case.b is None else c.split((case.a.numel(), case.b.numel()))
    halves = [t for t in (case.a, case.b) if t is not None]
    out, count = run(
        "gan_loss", "grad2", *case.words, inputs=(*case.inputs, g, ca, cb), outputs=[((t.numel(),), t.dtype) for t in halves]
    )
    assert count == (n > 0)
    close(torch.cat(out), torch.cat(curved).detach())


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_real", "n_fake"), [(1, 1), (7, 9), (64, 64), (127, 130)])
def test_gan_loss(n_real: int, n_fake: int, dtype: torch.dtype, reduction: int) -> None:
    compare_loss(make_case(n_real, n_fake, dtype, reduction, one_vector=n_real == 7, targets=n_real == 127))


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gan_loss_of_many_blocks(dtype: torch.dtype, reduction: int) -> None:
    compare_loss(make_case(2500, 4000, dtype, reduction, one_vector=True, targets=True), launches=2)
    compare_loss(make_case(2000, 2096, dtype, reduction, one_vector=False), launches=1)


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gan_loss_of_large_logits(dtype: torch.dtype, reduction: int) -> None:
    compare_loss(make_case(40, 40, dtype, reduction, one_vector=True, scale=1e4))


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
def test_gan_loss_of_generators(reduction: int) -> None:
    compare_loss(make_case(0, 33, torch.float32, reduction, one_vector=True, real=NOTHING, fake=("bce", 1.0, 1.0)))
    compare_loss(make_case(0, 33, torch.float32, reduction, one_vector=True, real=NOTHING, fake=("bce", -1.0, 0.0)))
    compare_loss(make_case(20, 33, torch.float32, reduction, one_vector=False, real=NOTHING, fake=("bce", -1.0, 0.0)))


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize(("n_real", "n_fake"), [(0, 0), (0, 3), (3, 0)])
def test_gan_loss_of_empty_halves(n_real: int, n_fake: int, reduction: int) -> None:
    compare_loss(make_case(n_real, n_fake, torch.float32, reduction, one_vector=False))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gan_loss_of_nan_and_infinity(dtype: torch.dtype, value: float) -> None:
    case = make_case(9, 9, dtype, 0, one_vector=True, real=("bce", 1.0, 1.0), fake=("bce", 1.0, 0.0))
    case.a[[3, 12]] = value
    outputs = [(shape, accumulate(dtype)) for shape in ((18,), (3,), (18,))]
    (loss, stats, grad), _ = run("gan_loss", "loss", *case.words, inputs=case.inputs, outputs=outputs)
    want, want_stats = gan_loss._reference(*case.double()[:3], None, None, case.spec)
    finite = want.isfinite()
    assert 16 <= finite.sum() < 18
    assert torch.equal(loss.isfinite(), finite)  # inf - inf or inf: outside the contract, but never a number
    close(loss[finite], want[finite])
    close(stats, want_stats, terms=18)
    close(grad, torch.cat([torch.sigmoid(case.a[:9].double()) - 1, torch.sigmoid(case.a[9:].double())]))


def test_gan_loss_ignores_nan_in_a_half_that_pays_nothing() -> None:
    case = make_case(9, 9, torch.float32, 1, one_vector=True, real=NOTHING)
    case.a[:9] = math.nan
    (loss, stats, grad), _ = run(
        "gan_loss",
        "loss",
        *case.words,
        inputs=case.inputs,
        outputs=[(shape, torch.float32) for shape in ((), (3,), (18,))],
    )
    assert loss.isfinite()
    assert torch.equal(grad[:9], torch.zeros(9))
    assert stats.isnan().tolist() == [True, False, False]
