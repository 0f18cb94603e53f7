"""The CUDA C++ kernels of spectral_norm, run on the CPU by tests/cuda_sim, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops import spectral_norm as op
from tests.test_cuda_sim import CXX, DTYPES, accumulate, close, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")

# outer, rows, inner: the layouts of every `dim`, sizes 1, prime and odd ones, more than 512 rows, more than 8192 elements
GROUPS = [
    [(1, 5, 7)],
    [(1, 1, 1), (1, 1, 40), (1, 33, 1)],
    [(1, 16, 27), (3, 8, 16), (37, 5, 1), (1, 9, 920), (1, 530, 3)],
]


def draw(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    ws, us, vs = [], [], []
    for i, (outer, rows, inner) in enumerate(shapes):
        ws.append(draw(outer * rows * inner, 3 * i, dtype).reshape(outer, rows, inner))
        us.append(F.normalize(draw(rows, 3 * i + 1, torch.float64), dim=0).to(dtype))
        vs.append(F.normalize(draw(outer * inner, 3 * i + 2, torch.float64), dim=0).to(dtype))
    return ws, us, vs


def sizes(shapes: list[tuple[int, int, int]]) -> int:
    return sum(rows + outer * inner + 1 for outer, rows, inner in shapes)


def forward(
    ws: list[Tensor], us: list[Tensor], vs: list[Tensor], iterations: int, shift: int = 0
) -> tuple[list[Tensor], Tensor, int]:
    dtype, shapes = ws[0].dtype, [tuple(w.shape) for w in ws]
    words = ("forward", dtype, iterations, 1e-12, shift, len(ws), *(n for shape in shapes for n in shape))
    outputs: list[tuple[tuple[int, ...], torch.dtype]] = []
    for outer, rows, inner in shapes:
        partials = -(-rows // 512) * outer * inner if iterations else rows
        outputs += [((outer, rows, inner), dtype), ((partials,), accumulate(dtype))]
    outputs.append(((sizes(shapes),), accumulate(dtype)))  # type: ignore[arg-type]
    inputs = tuple(t for triple in zip(ws, us, vs, strict=True) for t in triple)
    (*both, state), launches = run("spectral_norm", *words, inputs=inputs, outputs=outputs)
    return both[::2], state, launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shapes", "iterations", "shift"), [(0, 1, 0), (1, 1, 1), (1, 0, 0), (2, 1, 0), (0, 2, 1)])
def test_value_and_gradient(shapes: int, iterations: int, shift: int, dtype: torch.dtype) -> None:
    ws, us, vs = make(GROUPS[shapes], dtype)
    ys, state, launches = forward(ws, us, vs, iterations, shift)
    assert launches == 3 * iterations + 1 if iterations else 3
    exact = [w.double().requires_grad_() for w in ws]
    dims = [1] * len(ws)
    wants, new_u, new_v = op.reference(exact, [u.double() for u in us], [v.double() for v in vs], dims, iterations, 1e-12)
    parts = list(op._parts(state, ws, dims))
    for y, want, (u, v), u64, v64 in zip(ys, wants, parts, new_u, new_v, strict=True):
        close(y, want.detach(), terms=y.numel())
        close(u, u64, terms=y.numel())
        close(v, v64, terms=y.numel())
    gs = [draw(w.numel(), 50 + i, dtype).reshape(w.shape) for i, w in enumerate(ws)]
    words = ("grad", dtype, 0, 1e-12, shift, len(ws), *(n for w in ws for n in w.shape))
    outputs = [o for w in ws for o in ((tuple(w.shape), dtype), ((-(-w.numel() // 8192),), accumulate(dtype)))]
    inputs = (state, *(t for pair in zip(ws, gs, strict=True) for t in pair))
    both, launches = run("spectral_norm", *words, inputs=inputs, outputs=outputs)
    assert launches == 2
    for dw, want in zip(both[::2], torch.autograd.grad(wants, exact, [g.double() for g in gs]), strict=True):
        close(dw, want, terms=dw.numel())


@pytest.mark.parametrize("iterations", [0, 1])
@pytest.mark.parametrize("shape", [(1, 0, 5), (1, 5, 0), (0, 3, 2), (1, 0, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], iterations: int) -> None:
    ws, us, vs = make([shape, (1, 4, 3)], torch.float32)
    ys, state, _ = forward(ws, us, vs, iterations)
    wants, new_u, new_v = op.reference(ws, us, vs, [1, 1], iterations, 1e-12)
    parts = list(op._parts(state, ws, [1, 1]))
    for got, want in zip((*ys, *(u for u, _ in parts), *(v for _, v in parts)), (*wants, *new_u, *new_v), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_nan_infinity_and_zero(value: float) -> None:
    ws, us, vs = make([(1, 6, 9)], torch.float32)
    if value == 0.0:
        ws[0].zero_()
    ws[0][0, 2, 3] = value
    ys, _, _ = forward(ws, us, vs, 1)
    torch.testing.assert_close(ys, op.reference(ws, us, vs, [1], 1, 1e-12)[0], equal_nan=True)
