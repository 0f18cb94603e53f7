"""mlp_critic's elementwise stages on matrices [rows, N], in place; contract of the launchers in gankern/ops/mlp_critic.py.

m(y, bits) is dropout factor times LeakyReLU slope, as in linear_lrelu, whose activation is the forward stage.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, on_device, power_of_two, rounded
from gankern.triton.linear_lrelu import CHUNK_ROWS, STRIP_ROWS, _mask_constants, _masked, _tile, linear_lrelu_act

__all__ = ["linear_lrelu_act", "mlp_critic_adjoint", "mlp_critic_seed", "mlp_critic_tangent"]

ELEMENTS = 2048  # of a row that a program of the seed kernel takes at a time


@triton.jit(do_not_specialize=["steps", "bias_rows"])
def _adjoint_kernel(
    d_ptr,
    y_ptr,
    bits_ptr,
    factor_ptr,
    sums_ptr,
    M,
    N,
    steps,
    bias_rows,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """d = m(y, bits) * d. Program (i, j) takes steps * ROWS rows and BYTES * 8 columns.

    sums [programs(0), N] receives the column sums of factor * d over those rows of a program that are below bias_rows.
    """
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    column = tl.program_id(1) * BYTES * 8 + tl.arange(0, BYTES)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    total = tl.zeros((ROWS, BYTES, 8), COMPUTE)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None, None]
        inside = (row < M) & (column < N)
        at = row * N + column
        d = tl.load(d_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        d = _masked(d, y, bits_ptr, row, column, inside, N, SLOPE, SCALE, THRESHOLD)
        tl.store(d_ptr + at, rounded(d, d_ptr.dtype.element_ty), mask=inside)
        summed = inside & (row < bias_rows)
        if factor_ptr is not None:
            d *= tl.load(factor_ptr + row, mask=row < bias_rows, other=0.0)
        total += tl.where(summed, d, 0.0)
    sums = tl.sum(total, axis=0)[None, :, :]
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * N + column, rounded(sums, sums_ptr.dtype.element_ty), mask=column < N)


@triton.jit(do_not_specialize=["first"])
def _tangent_kernel(
    t_ptr,
    y_ptr,
    bits_ptr,
    factor_ptr,
    first,
    M,
    N,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """y[first + i] = m * t[i]; with a factor t = m * t, y = factor * y + t. Program (i, j) takes ROWS rows, BYTES * 8 columns."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = tl.program_id(1) * BYTES * 8 + tl.arange(0, BYTES)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = (row < M) & (column < N)
    at, of = row * N + column, (first + row) * N + column
    t = tl.load(t_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    y = tl.load(y_ptr + of, mask=inside, other=0.0).to(COMPUTE)
    v = _masked(t, y, bits_ptr, first + row, column, inside, N, SLOPE, SCALE, THRESHOLD)
    if factor_ptr is not None:
        tl.store(t_ptr + at, rounded(v, t_ptr.dtype.element_ty), mask=inside)
        v += tl.load(factor_ptr + row, mask=row < M, other=0.0) * y
    tl.store(y_ptr + of, rounded(v, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _seed_kernel(
    g_ptr,
    x_ptr,
    factor_ptr,
    norms_ptr,
    first,
    M,
    N,
    two_weight: tl.float64,
    target: tl.float64,
    ONE_SIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The norms of ROWS rows of g, and x[first + i] = c * g[i]; with a factor g = c * g, x = factor * x + g."""
    COMPUTE: tl.constexpr = norms_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)[None, :]
    squares = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(tl.cdiv(N, COLUMNS)):
        column = step * COLUMNS + lane
        g = tl.load(g_ptr + row[:, None] * N + column, mask=(row[:, None] < M) & (column < N), other=0.0).to(COMPUTE)
        squares += g * g
    norm = tl.sqrt_rn(tl.sum(squares, axis=1)) if tl.float32 == COMPUTE else tl.sqrt(tl.sum(squares, axis=1))
    tl.store(norms_ptr + row, norm, mask=row < M)
    gap = norm - tl.full((1,), target, COMPUTE)
    if ONE_SIDED:
        gap = tl.where(gap < 0, 0.0, gap)
    c = tl.where(norm > 0, tl.full((1,), two_weight, COMPUTE) * gap / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    for step in range(tl.cdiv(N, COLUMNS)):
        column = step * COLUMNS + lane
        inside = (row[:, None] < M) & (column < N)
        at, of = row[:, None] * N + column, (first + row[:, None]) * N + column
        v = c * tl.load(g_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        if factor_ptr is not None:
            tl.store(g_ptr + at, rounded(v, g_ptr.dtype.element_ty), mask=inside)
            x = tl.load(x_ptr + of, mask=inside, other=0.0).to(COMPUTE)
            v += tl.load(factor_ptr + row, mask=row < M, other=0.0)[:, None] * x
        tl.store(x_ptr + of, rounded(v, x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _penalty_kernel(norms_ptr, penalty_ptr, M, weight: tl.float64, target: tl.float64, ONE_SIDED: tl.constexpr, SIZE: tl.constexpr):
    """penalty = weight * mean (norm - target)², by one program; NaN over no norms."""
    COMPUTE: tl.constexpr = norms_ptr.dtype.element_ty
    total = tl.zeros((SIZE,), COMPUTE)
    for step in range(tl.cdiv(M, SIZE)):
        i = step * SIZE + tl.arange(0, SIZE)
        gap = tl.load(norms_ptr + i, mask=i < M, other=0.0) - tl.full((1,), target, COMPUTE)
        if ONE_SIDED:
            gap = tl.where(gap < 0, 0.0, gap)
        total += tl.where(i < M, gap * gap, 0.0)
    mean = tl.sum(total, axis=0) / tl.full((1,), M, COMPUTE)
    tl.store(penalty_ptr + tl.arange(0, 1), tl.full((1,), weight, COMPUTE) * mean)


def mlp_critic_adjoint(d: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, bias_rows: int, factor: Tensor | None) -> Tensor:
    """d [R, N] in place; dbias [N]."""
    rows, columns = d.shape
    if d.numel() == 0:
        return d.new_zeros(columns)
    span = rows if rows <= STRIP_ROWS else CHUNK_ROWS
    height, width = _tile(span, columns, 2048, 4)
    steps = ceil_div(span, height)
    programs = ceil_div(rows, steps * height)
    compute = torch.float64 if d.dtype == torch.float64 else torch.float32
    sums = d.new_empty(programs, columns, dtype=d.dtype if programs == 1 else compute)
    with on_device(d):
        _adjoint_kernel[(programs, ceil_div(columns, 8 * width))](
            d,
            y,
            bits,
            factor,
            sums,
            rows,
            columns,
            steps,
            bias_rows,
            **_mask_constants(slope, p),
            ROWS=height,
            BYTES=width,
            num_warps=8,
        )
    return sums[0] if programs == 1 else sums.sum(0).to(d.dtype)


def mlp_critic_tangent(t: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, first: int, factor: Tensor | None) -> None:
    """y [R, N], rows first ... first + P - 1, and with a factor t [P, N], in place."""
    rows, columns = t.shape
    if t.numel() == 0:
        return
    height, width = _tile(rows, columns, 1024, 32)
    with on_device(t):
        _tangent_kernel[(ceil_div(rows, height), ceil_div(columns, 8 * width))](
            t, y, bits, factor, first, rows, columns, **_mask_constants(slope, p), ROWS=height, BYTES=width
        )


def mlp_critic_seed(
    g: Tensor, x: Tensor, first: int, factor: Tensor | None, weight: float, target: float, one_sided: bool
) -> tuple[Tensor, Tensor]:
    """x [R, K], rows first ... first + P - 1, and with a factor g [P, K], in place; penalty [], norms [P]."""
    rows, columns = g.shape
    compute = torch.float64 if g.dtype == torch.float64 else torch.float32
    penalty, norms = g.new_empty((), dtype=compute), g.new_empty(rows, dtype=compute)
    height, width = (power_of_two(rows), power_of_two(columns)) if INTERPRETED else (1, min(power_of_two(columns), ELEMENTS))
    with on_device(g):
        if rows > 0:
            _seed_kernel[(ceil_div(rows, height),)](
                g,
                x,
                factor,
                norms,
                first,
                rows,
                columns,
                2.0 * weight / rows,
                target,
                ONE_SIDED=one_sided,
                ROWS=height,
                COLUMNS=width,
            )
        _penalty_kernel[(1,)](norms, penalty, rows, weight, target, ONE_SIDED=one_sided, SIZE=min(power_of_two(rows), 1024))
    return penalty, norms
