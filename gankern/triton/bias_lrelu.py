"""bias_lrelu: y = LeakyReLU(x + bias) of x [N, C, *], and its gradient with the bias sum. Contract in gankern/ops/bias_lrelu.py.

Memory is read as [outer, channels, inner]: samples, channels and pixels, or, with the channels innermost (channels-last, matrices),
pixels, channels and 1. Not yet measured on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, leaky_relu, on_device, power_of_two, rounded

# --- kernels --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _act_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    channels,
    SLOPE: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y [M, N], the channel being the column, or BY_ROW the row modulo `channels`. A program takes ROWS x COLUMNS."""
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < M) & (column < N)
    x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0).to(COMPUTE)
    if bias_ptr is not None:
        if BY_ROW:
            x += tl.load(bias_ptr + row % channels, mask=row < M, other=0.0).to(COMPUTE)
        else:
            x += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)
    y = leaky_relu(x, SLOPE)
    tl.store(y_ptr + row * N + column, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_one(dy_ptr, y_ptr, dx_ptr, at, inside, SLOPE: tl.constexpr):
    """dx = dy * slope of the activation where `inside`, stored; returned before rounding, 0 outside."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    dx = tl.where(y > 0, dy, dy * SLOPE)
    tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
    return dx


@triton.jit
def _grad_kernel(dy_ptr, y_ptr, dx_ptr, numel, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """dx, without the bias gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _grad_one(dy_ptr, y_ptr, dx_ptr, at, at < numel, SLOPE)


@triton.jit(do_not_specialize=["steps"])
def _grad_rows_kernel(dy_ptr, y_ptr, dx_ptr, sums_ptr, M, N, steps, SLOPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dx [M, N], the channel being the column. A program sums steps * ROWS rows and COLUMNS columns: sums [programs(0), N]."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        total += _grad_one(dy_ptr, y_ptr, dx_ptr, row * N + column, (row < M) & (column < N), SLOPE)
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * N + column, rounded(sums, sums_ptr.dtype.element_ty), mask=column < N)


@triton.jit(do_not_specialize=["steps"])
def _grad_planes_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    sums_ptr,
    outer,
    channels,
    inner,
    steps,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx [outer, channels, inner]. Program (c, i) sums `steps` tiles of ROWS samples x COLUMNS pixels: sums [*, channels]."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(inner, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(steps):
        tile = tl.program_id(1).to(tl.int64) * steps + step
        sample = tile // tiles * ROWS + tl.arange(0, ROWS)[:, None]
        pixel = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        at = (sample * channels + c) * inner + pixel
        total += _grad_one(dy_ptr, y_ptr, dx_ptr, at, (sample < outer) & (pixel < inner), SLOPE)
    sums = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * channels + c, rounded(sums, sums_ptr.dtype.element_ty))


# --- launchers ------------------------------------------------------------------------------------------------------------------

PROGRAMS = 264  # that fill a GPU: with fewer channels than this, the samples of a channel are shared out
STRIP_ROWS = 512  # up to so many rows one program sums a strip of columns; beyond, it takes CHUNK_ROWS, and a second launch adds up
CHUNK_ROWS = 256


def _memory(t: Tensor) -> tuple[int, int, int]:
    """(outer, channels, inner) of a tensor that is not empty."""
    channels = t.shape[1]
    inner = math.prod(t.shape[2:]) if t.is_contiguous() else 1
    return t.numel() // (channels * inner), channels, inner


def _tile(rows: int, columns: int, elements: int, width: int) -> tuple[int, int]:
    """(ROWS, COLUMNS): about so many elements, at most `width` columns."""
    if INTERPRETED:
        elements, width = 1 << 20, 1 << 20
    width = min(power_of_two(columns), width)
    return min(power_of_two(rows), max(elements // width, 1)), width


def bias_lrelu(x: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    """y = LeakyReLU(x + bias)."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    outer, channels, inner = _memory(x)
    by_row = inner > 1
    rows, columns = (outer * channels, inner) if by_row else (outer, channels)
    height, width = _tile(rows, columns, 1024, 1024)
    with on_device(x):
        _act_kernel[(ceil_div(rows, height), ceil_div(columns, width))](
            x, bias, y, rows, columns, channels, SLOPE=slope, BY_ROW=by_row, ROWS=height, COLUMNS=width
        )
    return y


def bias_lrelu_grad(dy: Tensor, y: Tensor, slope: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """dx = dy * slope of the activation, its sum over all but the channels [C] (or [0])."""
    dx = torch.empty_like(dy)
    if dx.numel() == 0:
        return dx, dy.new_zeros(dy.shape[1] if with_bias else 0)
    if not with_bias:
        block = min(power_of_two(dx.numel()), 1 << 20) if INTERPRETED else 1024
        with on_device(dy):
            _grad_kernel[(ceil_div(dx.numel(), block),)](dy, y, dx, dx.numel(), SLOPE=slope, BLOCK=block)
        return dx, dy.new_empty(0)
    outer, channels, inner = _memory(dy)
    if inner == 1:
        span = outer if outer <= STRIP_ROWS else CHUNK_ROWS
        height, width = _tile(span, channels, 2048, 32)
        steps = ceil_div(span, height)
        shares = ceil_div(outer, steps * height)
    else:
        height, width = _tile(outer, inner, 2048, 2048)
        tiles = ceil_div(outer, height) * ceil_div(inner, width)
        steps = ceil_div(tiles, min(tiles, ceil_div(PROGRAMS, channels)))
        shares = ceil_div(tiles, steps)
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    sums = dy.new_empty(shares, channels, dtype=dy.dtype if shares == 1 else compute)
    with on_device(dy):
        if inner == 1:
            _grad_rows_kernel[(shares, ceil_div(channels, width))](
                dy, y, dx, sums, outer, channels, steps, SLOPE=slope, ROWS=height, COLUMNS=width, num_warps=8
            )
        else:
            _grad_planes_kernel[(channels, shares)](
                dy, y, dx, sums, outer, channels, inner, steps, SLOPE=slope, ROWS=height, COLUMNS=width, num_warps=8
            )
    return dx, sums[0] if shares == 1 else sums.sum(0).to(dy.dtype)
