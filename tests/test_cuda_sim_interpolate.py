"""interpolate's CUDA kernel, its very source run on the CPU by the block simulator (see test_cuda_sim.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gankern.ops import interpolate as op
from tests.test_cuda_sim import CXX, DTYPES, SEED, accumulate, close, matrix, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")


def interpolate(real: Tensor, fake: Tensor, eps: Tensor | None, shift: int = 0) -> tuple[Tensor, Tensor, int]:
    rows, columns = real.shape
    inputs = (real, fake, torch.tensor([SEED]) if eps is None else eps)
    outputs = [((rows, columns), real.dtype), ((rows,), accumulate(real.dtype))]
    words = (real.dtype, rows, columns, shift, int(eps is not None))
    (x_hat, used), launches = run("interpolate", *words, inputs=inputs, outputs=outputs)
    return x_hat, used, launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "shift"), [(1, 1, 0), (3, 7, 0), (5, 8, 0), (4, 9, 0), (17, 64, 1), (33, 392, 0), (2, 2051, 0)]
)
def test_interpolate(rows: int, columns: int, shift: int, dtype: torch.dtype) -> None:
    real, fake = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    drawn = op.draw_eps(torch.tensor([SEED]), rows, accumulate(dtype))
    x_hat, used, launches = interpolate(real, fake, None, shift)
    assert launches == 1
    assert torch.equal(used, drawn)
    close(x_hat, op.reference(real.double(), fake.double(), drawn.double()))
    eps = matrix(1, rows, torch.float64).sigmoid()[0].to(accumulate(dtype))
    x_hat, used, _ = interpolate(real, fake, eps, shift)
    assert torch.equal(used, eps)
    close(x_hat, op.reference(real.double(), fake.double(), eps.double()))


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (4, 0)])
def test_interpolate_empty(rows: int, columns: int) -> None:
    x = torch.zeros(rows, columns)
    assert interpolate(x, x, None)[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolate_nan_and_infinity(dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype)
    real, fake, eps = special[:, None].expand(4, 4), special.expand(4, 4), torch.tensor([0.5] * 4, dtype=accumulate(dtype))
    close(interpolate(real, fake, eps)[0], op.reference(real.double(), fake.double(), eps.double()))
