"""The CUDA kernels of pairwise, run on the CPU by tests/cuda_sim, against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gankern.ops.pairwise import reference_features
from tests.test_cuda_sim import CXX, DTYPES, close, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")

# [N, B, C]: one tile and several, of rows and of dimensions; sizes that fill a tile and that do not
SHAPES = [(1, 1, 1), (2, 3, 1), (16, 2, 16), (17, 1, 5), (19, 2, 33), (40, 3, 4)]


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_and_both_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, b, c = shape
    m, g, h = randn(*shape, dtype=dtype, seed=0, scale=1 / c), randn(n, b, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    leaf, cotangent = m.double().requires_grad_(), g.double().requires_grad_()
    want = reference_features(leaf)
    (want_dm,) = torch.autograd.grad(want, leaf, cotangent, create_graph=True)
    want_dg, want_ddm = torch.autograd.grad(want_dm, (cotangent, leaf), h.double())
    terms = n * max(c, 4)

    (o,), launches = run("pairwise", "features", dtype, *shape, inputs=(m,), outputs=[((n, b), dtype)])
    close(o, want.detach(), terms)
    assert launches == 1
    (dm,), launches = run("pairwise", "grad", dtype, *shape, inputs=(g, m), outputs=[(shape, dtype)])
    close(dm, want_dm.detach(), terms)
    assert launches == 1
    (ddm, dg), launches = run("pairwise", "grad2", dtype, *shape, inputs=(h, g, m), outputs=[(shape, dtype), ((n, b), dtype)])
    close(ddm, want_ddm, terms)
    close(dg, want_dg, terms)
    assert launches == 1


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2)], ids=str)
def test_features_of_nothing(shape: tuple[int, int, int]) -> None:
    m, g = torch.zeros(shape), torch.zeros(shape[:2])
    assert run("pairwise", "features", m.dtype, *shape, inputs=(m,), outputs=[])[1] == 0
    assert run("pairwise", "grad", m.dtype, *shape, inputs=(g, m), outputs=[])[1] == 0


def test_features_without_dimensions_count_the_others() -> None:
    m = torch.zeros(5, 2, 0)
    (o,), _ = run("pairwise", "features", m.dtype, 5, 2, 0, inputs=(m,), outputs=[((5, 2), m.dtype)])
    assert torch.equal(o, torch.full((5, 2), 4.0))


def test_features_pass_nan_and_infinity() -> None:
    m = randn(5, 3, 2, dtype=torch.float32, seed=0)
    m[0, 0, 0], m[1, 1, 1] = math.nan, math.inf
    (o,), _ = run("pairwise", "features", m.dtype, 5, 3, 2, inputs=(m,), outputs=[((5, 3), m.dtype)])
    torch.testing.assert_close(o, reference_features(m), equal_nan=True)


@pytest.mark.parametrize("gammas", [[0.5], [0.5, 0.125, 1 / 32, 1 / 128, 1 / 512], [1 / (k + 1) for k in range(16)]], ids=len)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (7, 300), (9, 9)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gram(dtype: torch.dtype, rows: int, columns: int, upper: bool, gammas: list[float]) -> None:
    gram = randn(rows, columns, dtype=dtype, seed=0)
    sq_a, sq_b = (randn(k, dtype=dtype, seed=1 + k).square() for k in (rows, columns))
    words = ("gram", dtype, rows, columns, int(upper), len(gammas), *map(float, gammas))
    outputs = [((rows, columns), dtype), ((rows,), dtype), ((rows,), dtype)]
    (w, sums, weights), launches = run("pairwise", *words, inputs=(gram, sq_a, sq_b), outputs=outputs)
    g = gram.double()
    d = (sq_a.double()[:, None] + sq_b.double() - 2 * g).clamp_min(0)
    e = [torch.exp(-gamma * d) for gamma in gammas]
    want_k = torch.stack(e).sum(0)
    want_w = torch.stack([2 * gamma * term for gamma, term in zip(gammas, e, strict=True)]).sum(0)
    if upper:
        want_k, want_w = want_k.triu(1), want_w.triu(1)
    for got, want in ((w, want_w), (sums, want_k.sum(1)), (weights, want_w.sum(1))):
        close(got, want, columns * len(gammas) * 4)
    assert launches == 1
