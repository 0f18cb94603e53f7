"""mlp_critic's CUDA C++ kernels in the block simulator, against the stages in plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gankern.ops import _one_pass as op
from gankern.ops._philox import dropout_keep
from tests.test_cuda_sim import CXX, DTYPES, SEED, accumulate, close, matrix, pack, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")

# rows, columns, slope, p, misalignment, a factor for each row
CASES = [
    (1, 1, 0.2, 0.0, 0, True),
    (5, 7, 0.2, 0.3, 0, False),
    (16, 64, 0.0, 0.0, 0, True),
    (13, 40, 0.2, 0.3, 1, True),
    (67, 33, 1.0, 0.5, 0, True),
    (700, 24, 0.2, 0.3, 0, True),  # two shares of the rows, two launches
]


def factors(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(accumulate(dtype))


def kept(rows: int, columns: int, p: float) -> tuple[Tensor, Tensor | None]:
    keep = dropout_keep(torch.tensor([SEED]), rows, columns, p)
    return keep, pack(keep) if p > 0.0 else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case: tuple, dtype: torch.dtype) -> None:
    rows, columns, slope, p, shift, has_factor = case
    d, y = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    keep, bits = kept(rows, columns, p)
    for bias_rows in {0, 2 * rows // 3, rows}:
        factor = factors(bias_rows, dtype) if has_factor else None
        shares = 1 if rows <= 512 else math.ceil(rows / 256)
        partials = [((shares, columns), accumulate(dtype))] if shares > 1 else []
        (got, dbias, *_), launches = run(
            "mlp_critic", "adjoint", dtype, rows, columns, slope, p, shift, int(has_factor), bias_rows,
            inputs=(d, y, bits, factor), outputs=[((rows, columns), dtype), ((columns,), dtype), *partials],
        )  # fmt: skip
        want = d.double()
        sums = op._plain_adjoint(want, y.double(), keep, slope, p, bias_rows, None if factor is None else factor.double())
        close(got, want)
        close(dbias, sums, terms=16 * rows)
        assert launches == (2 if shares > 1 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangent(case: tuple, dtype: torch.dtype) -> None:
    rows, columns, slope, p, shift, has_factor = case
    t, y = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    keep, bits = kept(rows, columns, p)
    factor = factors(rows, dtype) if has_factor else None
    (got_t, got_y), launches = run(
        "mlp_critic", "tangent", dtype, rows, columns, slope, p, shift, int(has_factor),
        inputs=(t, y, bits, factor), outputs=[((rows, columns), dtype)] * 2,
    )  # fmt: skip
    want_t, want_y = t.double(), y.double()
    op._plain_tangent(want_t, want_y, keep, slope, p, 0, None if factor is None else factor.double())
    close(got_t, want_t)
    close(got_y, want_y)
    assert launches == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("case", [*CASES, (4, 2000, 0.2, 0.0, 0, True)], ids=str)
def test_seed(case: tuple, one_sided: bool, dtype: torch.dtype) -> None:
    rows, columns, slope, p, shift, has_factor = case
    g, x = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    g[0] = 0.0  # the norm's derivative is 0 there
    factor = factors(rows, dtype) if has_factor else None
    acc, target = accumulate(dtype), math.sqrt(columns)
    (got_g, got_x, penalty, norms), launches = run(
        "mlp_critic", "seed", dtype, rows, columns, slope, p, shift, int(has_factor), 10.0, target, int(one_sided),
        inputs=(g, x, factor), outputs=[((rows, columns), dtype)] * 2 + [((), acc), ((rows,), acc)],
    )  # fmt: skip
    want_g, want_x = g.double(), x.double()
    weights = None if factor is None else factor.double()
    want, want_norms = op._plain_seed(want_g, want_x, 0, weights, 10.0, target, one_sided)
    close(norms, want_norms, terms=columns)
    close(penalty, want, terms=rows * columns)
    close(got_g, want_g, terms=columns)
    close(got_x, want_x, terms=columns)
    assert launches == 2


def test_no_rows() -> None:
    outputs = [((0, 8), torch.float32)] * 2
    (_, _, penalty, _), launches = run(
        "mlp_critic", "seed", torch.float32, 0, 8, 0.2, 0.0, 0, 0, 10.0, 1.0, 0,
        inputs=(), outputs=[*outputs, ((), torch.float32), ((0,), torch.float32)],
    )  # fmt: skip
    assert penalty.isnan()
    assert launches == 1
    (_, dbias), _ = run(
        "mlp_critic", "adjoint", torch.float32, 0, 8, 0.2, 0.0, 0, 0, 0, inputs=(), outputs=[outputs[0], ((8,), torch.float32)]
    )
    assert torch.equal(dbias, torch.zeros(8))
    assert run("mlp_critic", "tangent", torch.float32, 0, 8, 0.2, 0.0, 0, 0, inputs=(), outputs=outputs)[1] == 0


def test_nan_and_infinity() -> None:
    special = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3e38]])
    y = special.flip(1).contiguous()
    (got_t, got_y), _ = run(
        "mlp_critic",
        "tangent",
        torch.float32,
        1,
        8,
        0.0,
        0.0,
        0,
        1,
        inputs=(special, y, torch.ones(1)),
        outputs=[((1, 8), torch.float32)] * 2,
    )
    want_t, want_y = special.double(), y.double()
    op._plain_tangent(want_t, want_y, torch.zeros(0), 0.0, 0.0, 0, torch.ones(1, dtype=torch.float64))
    assert torch.equal(got_t.isnan(), want_t.isnan())
    assert torch.equal(got_y.isnan(), want_y.isnan())
    (_, got_x, penalty, norms), _ = run(
        "mlp_critic", "seed", torch.float32, 1, 8, 0.2, 0.0, 0, 0, 1.0, 1.0, 1,
        inputs=(special, y), outputs=[((1, 8), torch.float32)] * 2 + [((), torch.float32), ((1,), torch.float32)],
    )  # fmt: skip
    assert got_x[0, 0].isnan()
    assert penalty.isnan()
    assert norms.isnan().all()
