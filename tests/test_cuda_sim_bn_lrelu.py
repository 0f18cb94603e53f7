"""The CUDA kernels of bn_lrelu, run on the CPU by tests/cuda_sim, against the definition in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops.bn_lrelu import reference
from tests.test_cuda_sim import CXX, DTYPES, accumulate, close, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")

EPS, SLOPE, MOMENTUM = 1e-3, 0.2, 0.3


class Shape(NamedTuple):
    batch: int
    channels: int
    space: int
    shift: int = 0  # elements that the tensors are off a 16-byte boundary
    shares: bool = False  # the batch is cut: a launch for each phase


SHAPES = [
    Shape(5, 3, 1),
    Shape(9, 33, 1),
    Shape(40, 64, 1),
    Shape(3, 2, 7),
    Shape(4, 3, 16),
    Shape(4, 3, 16, shift=1),
    Shape(2, 1, 300),
    Shape(600, 40, 1, shares=True),
    Shape(40, 2, 441, shares=True),
    Shape(17, 1, 1000, shares=True),
]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_kernels(shape: Shape, affine: bool, dtype: torch.dtype) -> None:
    batch, channels, space, shift, cut = shape
    full, acc = (batch, channels, space), accumulate(dtype)
    x, dy, ddx = (randn(*full, dtype=dtype, seed=i) for i in range(3))
    weight, bias, ddweight, ddbias, mean = (randn(channels, dtype=acc, seed=10 + i) if affine else None for i in range(5))
    var = randn(channels, dtype=acc, seed=20).square() + 0.5 if affine else None
    exact = [None if t is None else t.double() for t in (x, weight, bias, ddweight, ddbias, mean, var)]
    x64, w64, b64, ddw64, ddb64, mean64, var64 = exact
    assert x64 is not None
    terms = 16 * batch * space

    def words(op: str, training: bool) -> tuple[object, ...]:
        return op, dtype, batch, channels, space, EPS, SLOPE, MOMENTUM, shift, int(affine), int(training)

    # forward
    running = [None if t is None else t.clone() for t in (mean64, var64)]
    want = reference(x64, *running, w64, b64, True, MOMENTUM, EPS, SLOPE)
    dims = (0, 2)
    outputs = [(full, dtype), ((channels,), acc), ((channels,), acc)] + [((channels,), acc)] * (2 * affine)
    (y, m, v, *moved), launches = run("bn_lrelu", *words("forward", True), inputs=(x, weight, bias, mean, var), outputs=outputs)
    close(y, want, terms)
    close(m, x64.mean(dims), terms)
    close(v, x64.var(dims, correction=0), terms)
    for got, expected in zip(moved, running, strict=False):
        assert expected is not None
        close(got, expected, terms)
    assert launches == (3 if cut else 1)

    # evaluation, and the backward passes of both modes
    if mean is None or var is None or mean64 is None or var64 is None:
        mean, var, mean64, var64 = m, v, m.double(), v.double()
    (y,), launches = run("bn_lrelu", *words("eval", False), inputs=(x, weight, bias, mean, var), outputs=[(full, dtype)])
    close(y, reference(x64, mean64, var64, w64, b64, False, MOMENTUM, EPS, SLOPE), terms)
    assert launches == 1
    for training in (False, True):
        statistics = (m, v) if training else (mean, var)
        leaf, cotangent = x64.clone().requires_grad_(), dy.double().requires_grad_()
        w = (torch.ones(channels, dtype=torch.float64) if w64 is None else w64).clone().requires_grad_()
        b = (torch.zeros(channels, dtype=torch.float64) if b64 is None else b64).clone().requires_grad_()
        out = reference(leaf, mean64, var64, w, b, training, 0.0, EPS, SLOPE)
        wants = torch.autograd.grad(out, (leaf, w, b), cotangent, create_graph=True)
        outputs = [(full, dtype), ((channels,), acc), ((channels,), acc)]
        gots, launches = run("bn_lrelu", *words("grad", training), inputs=(x, weight, bias, *statistics, dy), outputs=outputs)
        for got, expected in zip(gots, wants, strict=True):
            close(got, expected.detach(), terms)
        assert launches == (2 if cut else 1)
        along = [ddx.double(), torch.zeros_like(w) if ddw64 is None else ddw64, torch.zeros_like(b) if ddb64 is None else ddb64]
        seconds = torch.autograd.grad(wants, (cotangent, leaf, w), along)
        outputs = [(full, dtype), (full, dtype), ((channels,), acc)]
        inputs = (x, weight, bias, *statistics, dy, ddx, ddweight, ddbias)
        gots, launches = run("bn_lrelu", *words("grad2", training), inputs=inputs, outputs=outputs)
        for got, expected in zip(gots, seconds, strict=True):
            close(got, expected, terms)
        assert launches == (2 if cut else 1)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)], ids=str)
def test_nothing_is_launched_for_nothing(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape)
    words = (x.dtype, *shape, EPS, SLOPE, MOMENTUM, 0, 0, 1)
    c = torch.ones(shape[1])
    assert run("bn_lrelu", "forward", *words, inputs=(x,), outputs=[])[1] == 0
    assert run("bn_lrelu", "eval", *words, inputs=(x, c, c), outputs=[])[1] == 0
    assert run("bn_lrelu", "grad", *words, inputs=(x, c, c, x), outputs=[])[1] == 0
    assert run("bn_lrelu", "grad2", *words, inputs=(x, c, c, x, x), outputs=[])[1] == 0


@pytest.mark.parametrize("space", [1, 8])
def test_nan_and_infinity_stay_in_their_channel(space: int) -> None:
    x = randn(6, 3, space, dtype=torch.float32, seed=0)
    x[0, 0, 0], x[1, 1, 0] = math.nan, math.inf
    words = (x.dtype, 6, 3, space, EPS, SLOPE, MOMENTUM, 0, 0)
    outputs = [(tuple(x.shape), x.dtype), ((3,), x.dtype), ((3,), x.dtype)]
    (y, mean, var), _ = run("bn_lrelu", "forward", *words, 1, inputs=(x,), outputs=outputs)
    torch.testing.assert_close(y, F.leaky_relu(F.batch_norm(x, None, None, training=True, eps=EPS), SLOPE), equal_nan=True)
    (y,), _ = run("bn_lrelu", "eval", *words, 0, inputs=(x, torch.zeros(3), torch.ones(3)), outputs=outputs[:1])
    want = F.leaky_relu(F.batch_norm(x, torch.zeros(3), torch.ones(3), eps=EPS), SLOPE)
    torch.testing.assert_close(y, want, equal_nan=True)
    assert mean.isfinite().tolist() == var.isfinite().tolist() == [False, False, True]
