"""gradient_norm_penalty: gradients [B, D], norms [B], penalty; two launches forward, one backward.

Contract in gankern/ops/gradient_norm_penalty.py. A sample is cut into at most MAX_SHARES shares, whose sums of squares the second
launch, of one program, adds in a fixed order. Target and weight are run-time doubles: an annealed one does not compile anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, on_device, power_of_two, rounded

MAX_SHARES = 64
SHARE = 4096  # elements of a sample that one program sums, unless there are more than MAX_SHARES of them


@triton.jit
def _excess(norm, target, ONE_SIDED: tl.constexpr):
    """How far the norm is from the target; NaN stays NaN."""
    return tl.where(norm <= target, 0.0, norm - target) if ONE_SIDED else norm - target


@triton.jit(do_not_specialize=["B", "shares", "steps"])
def _squares_kernel(grad_ptr, sums_ptr, B, D, shares, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums [B, shares]: program (i, j) adds the squares of steps * COLUMNS elements of ROWS samples."""
    COMPUTE: tl.constexpr = sums_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(steps):
        column = (tl.program_id(1).to(tl.int64) * steps + step) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        g = tl.load(grad_ptr + row * D + column, mask=(row < B) & (column < D), other=0.0).to(COMPUTE)
        total += g * g
    tl.store(sums_ptr + row * shares + tl.program_id(1), tl.sum(total, axis=1)[:, None], mask=row < B)


@triton.jit(do_not_specialize=["B", "shares"])
def _finish_kernel(
    sums_ptr,
    norms_ptr,
    value_ptr,
    mean_ptr,
    B,
    shares,
    target: tl.float64,
    weight: tl.float64,
    ONE_SIDED: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One program: from sums [B, shares] to norms [B], value and mean norm."""
    COMPUTE: tl.constexpr = sums_ptr.dtype.element_ty
    share = tl.arange(0, SHARES)[None, :]
    t = tl.full((ROWS,), target, COMPUTE)
    paid = tl.zeros((ROWS,), COMPUTE)
    total = tl.zeros((ROWS,), COMPUTE)
    for step in range(tl.cdiv(B, ROWS)):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < B
        sums = tl.load(sums_ptr + row[:, None] * shares + share, mask=inside[:, None] & (share < shares), other=0.0)
        norm = tl.sqrt(tl.sum(sums, axis=1))
        tl.store(norms_ptr + row, norm, mask=inside)
        excess = tl.where(inside, _excess(norm, t, ONE_SIDED), 0.0)
        paid += excess * excess
        total += norm
    count = tl.maximum(B, 1).to(COMPUTE)
    nan = tl.where(B > 0, 0.0, float("nan")).to(COMPUTE)  # the mean of nothing
    tl.store(value_ptr + tl.arange(0, 1), tl.sum(paid, axis=0) / count * tl.full((1,), weight, COMPUTE) + nan)
    tl.store(mean_ptr, tl.sum(total, axis=0) / count + nan)


@triton.jit(do_not_specialize=["B"])
def _grad_kernel(
    c_ptr,
    grad_ptr,
    norms_ptr,
    out_ptr,
    B,
    D,
    target: tl.float64,
    scale: tl.float64,
    SMOOTH: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = c * scale * (excess / norm) * grad; SMOOTH: the target is 0, and that fraction 1."""
    COMPUTE: tl.constexpr = norms_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    factor = tl.load(c_ptr) * tl.full((ROWS,), scale, COMPUTE)
    if not SMOOTH:
        norm = tl.load(norms_ptr + row, mask=row < B, other=0.0)
        excess = _excess(norm, tl.full((ROWS,), target, COMPUTE), ONE_SIDED)
        factor *= tl.where(norm == 0.0, 0.0, excess / tl.where(norm == 0.0, 1.0, norm))
    at = row[:, None] * D + column
    inside = (row[:, None] < B) & (column < D)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    tl.store(out_ptr + at, rounded(factor[:, None] * g, out_ptr.dtype.element_ty), mask=inside)


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Samples and elements of each that a program takes at a time."""
    limit = 1 << 16 if INTERPRETED else 2048
    width = min(power_of_two(columns), limit)
    return min(power_of_two(rows), max(limit // width, 1)), width


def gradient_norm_penalty(grad: Tensor, target: float, one_sided: bool, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """value [], norms [B], mean norm []."""
    b = grad.shape[0]
    d, dtype = grad.numel() // max(b, 1), torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows, columns = _tile(b, d)
    steps = max(ceil_div(SHARE, columns), ceil_div(d, columns * MAX_SHARES))
    shares = max(ceil_div(d, columns * steps), 1)
    steps = min(steps, ceil_div(d, columns))
    value, norms, mean = (grad.new_empty(shape, dtype=dtype) for shape in ((), (b,), ()))
    sums = grad.new_empty(b, shares, dtype=dtype)
    with on_device(grad):
        if b > 0:
            _squares_kernel[(ceil_div(b, rows), shares)](grad, sums, b, d, shares, steps, ROWS=rows, COLUMNS=columns)
        wide = power_of_two(shares)
        _finish_kernel[(1,)](
            sums,
            norms,
            value,
            mean,
            b,
            shares,
            target,
            weight,
            ONE_SIDED=one_sided,
            ROWS=min(power_of_two(b), (1 << 16 if INTERPRETED else 1024) // wide),
            SHARES=wide,
        )
    return value, norms, mean


def gradient_norm_penalty_grad(c: Tensor, grad: Tensor, norms: Tensor, target: float, one_sided: bool, weight: float) -> Tensor:
    """d<c, value>/dgrad, like grad."""
    out = torch.empty_like(grad)
    if out.numel() == 0:
        return out
    b = grad.shape[0]
    d = grad.numel() // b
    rows, columns = _tile(b, d)
    with on_device(grad):
        _grad_kernel[(ceil_div(b, rows), ceil_div(d, columns))](
            c,
            grad,
            norms,
            out,
            b,
            d,
            target,
            2.0 * weight / b,
            SMOOTH=target == 0.0,
            ONE_SIDED=one_sided,
            ROWS=rows,
            COLUMNS=columns,
        )
    return out
