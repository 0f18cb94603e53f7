"""The CUDA kernels of bias_lrelu, run on the CPU by tests/cuda_sim, against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops._activation import leaky_relu
from tests.test_cuda_sim import CXX, DTYPES, close, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")

Shape = tuple[int, int, int]
# outer, channels, inner; elements off a 16-byte boundary; launches of the gradient with its bias sum
CASES = [
    ((1, 1, 1), 0, 1),
    ((3, 5, 1), 0, 1),
    ((130, 40, 1), 0, 1),
    ((17, 64, 1), 1, 1),
    ((700, 48, 1), 0, 2),  # rows split over blocks
    ((600, 12, 1), 0, 2),
    ((3, 5, 2), 0, 1),
    ((2, 7, 9), 0, 1),
    ((4, 3, 16), 0, 1),
    ((4, 3, 16), 3, 1),
    ((2, 2, 127), 0, 1),
    ((5, 3, 1024), 0, 2),  # planes split over blocks
    ((600, 2, 4), 0, 2),
    ((9, 40, 25), 0, 1),  # 5 blocks of 128 threads go round more than once
]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def act(x: Tensor, bias: Tensor | None, slope: float, shift: int = 0) -> tuple[Tensor, int]:
    words = ("act", x.dtype, *x.shape, slope, shift, int(bias is not None))
    (y,), launches = run("bias_lrelu", *words, inputs=(x, bias), outputs=[(tuple(x.shape), x.dtype)])
    return y, launches


def grad(dy: Tensor, y: Tensor, slope: float, with_bias: bool, shift: int = 0) -> tuple[Tensor, Tensor, int]:
    outputs = [(tuple(dy.shape), dy.dtype)] + ([((dy.shape[1],), dy.dtype)] if with_bias else [])
    words = ("grad", dy.dtype, *dy.shape, slope, shift, int(with_bias))
    (dx, *dbias), launches = run("bias_lrelu", *words, inputs=(dy, y), outputs=outputs)
    return dx, dbias[0] if dbias else torch.empty(0), launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "shift", "launches"), CASES, ids=str)
def test_values_and_gradients(shape: Shape, shift: int, launches: int, dtype: torch.dtype) -> None:
    slope = 0.2 if shape[0] % 2 else 0.0
    x, dy = randn(*shape, dtype=dtype, seed=0), randn(*shape, dtype=dtype, seed=1)
    bias = randn(shape[1], dtype=dtype, seed=2)
    y, count = act(x, bias, slope, shift)
    close(y, F.leaky_relu(x.double() + bias.double()[:, None], slope))
    assert count == 1
    alone, count = act(x, None, slope, shift)
    close(alone, F.leaky_relu(x.double(), slope))
    assert count == 1

    want = dy.double() * torch.where(y > 0, 1.0, slope * torch.ones_like(y.double()))
    dx, dbias, count = grad(dy, y, slope, True, shift)
    close(dx, want)
    close(dbias, want.sum((0, 2)), terms=shape[0] * shape[2])
    assert count == launches
    alone, _, count = grad(dy, y, slope, False, shift)
    assert torch.equal(alone, dx)
    assert count == 1


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 8, 1)], ids=str)
def test_empty(shape: Shape) -> None:
    x, bias = torch.zeros(shape), torch.zeros(shape[1])
    assert act(x, bias, 0.2)[1] == 0
    _, dbias, _ = grad(x, x, 0.2, True)
    assert torch.equal(dbias, bias)
    assert grad(x, x, 0.2, False)[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 1), (2, 7, 1), (2, 1, 8), (2, 1, 7)], ids=str)
def test_nan_and_infinity(shape: Shape, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max], dtype=dtype)
    x = special[: max(shape)].expand(2, -1).reshape(shape).contiguous()
    for slope in (0.2, 0.0):
        y, _ = act(x, None, slope)
        close(y, leaky_relu(x.double(), slope))
        y, _ = act(torch.zeros_like(x[:, :, :1]), x[0, :, 0].clone(memory_format=torch.contiguous_format), slope)
        close(y, leaky_relu(x[:1, :, :1].expand_as(y), slope).double())
        dx, _, _ = grad(x, torch.full_like(x, -1.0), slope, False)
        close(dx, x.double() * slope)
        dx, _, _ = grad(torch.ones_like(x), x, slope, False)
        close(dx, torch.where(x > 0, 1.0, slope * torch.ones_like(x.double())))
