"""linear_lrelu: bias, LeakyReLU, dropout alone [M, N], and inside the products of x [M, K], weight [N, K], y and c [M, N].

Contract of the first two launchers in gankern/ops/linear_lrelu.py, of the other four in gankern/ops/_fused_linear.py.
Dropout bits: byte g of row m is one Philox call with counter m * ceil(N / 8) + g, as gankern/ops/_philox.py defines it.
m(y, bits) below is dropout factor times LeakyReLU slope: what the layer's backward pass multiplies by.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, leaky_relu, on_device, power_of_two, rounded

# --- parts ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _two(word, THRESHOLD: tl.constexpr):
    """Bit 0: the low half of a 32-bit word reaches the threshold; bit 1: the high half does."""
    return ((word & 0xFFFF) >= THRESHOLD).to(tl.int32) | (((word >> 16) >= THRESHOLD).to(tl.int32) << 1)


@triton.jit
def _keep_byte(seed_ptr, counter, THRESHOLD: tl.constexpr):
    """int32 of the counter's shape (int64): bit k says that element k of the byte is kept."""
    low = counter.to(tl.uint32)
    zero = low * 0
    # The seed is loaded once an element: a scalar would let the compiler draw anew in every layout that uses the bits, where it now
    # moves the bits (forward kernel, 128x128 tile on sm_90: 255 registers and 400 bytes spilled, now 179 and none).
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + zero), low, (counter >> 32).to(tl.uint32), zero, zero)
    return _two(w0, THRESHOLD) | (_two(w1, THRESHOLD) << 2) | (_two(w2, THRESHOLD) << 4) | (_two(w3, THRESHOLD) << 6)


@triton.jit
def _masked(value, y, bits_ptr, row, column, inside, N, SLOPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr):
    """m(y, bits) * value; a THRESHOLD below 0 is no dropout. Dropped elements are multiplied by 0: NaN and infinity show."""
    value = tl.where(y > 0, value, value * SLOPE)
    if THRESHOLD >= 0:
        byte = tl.load(bits_ptr + row * tl.cdiv(N, 8) + (column >> 3), mask=inside, other=0).to(tl.int32)
        value *= ((byte >> (column & 7).to(tl.int32)) & 1).to(value.dtype) * SCALE
    return value


# --- bias, LeakyReLU and dropout alone ------------------------------------------------------------------------------------------


@triton.jit
def _act_kernel(
    z_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    bits_ptr,
    M,
    N,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Program (i, j) takes ROWS rows and BYTES times 8 columns."""
    COMPUTE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    groups = tl.cdiv(N, 8)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    group = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    column = group * 8 + lane
    inside = (row < M) & (column < N)
    z = tl.load(z_ptr + row * N + column, mask=inside, other=0.0).to(COMPUTE)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)
    y = leaky_relu(z, SLOPE)
    if THRESHOLD >= 0:
        byte = _keep_byte(seed_ptr, row * groups + group, THRESHOLD)
        y *= ((byte >> lane) & 1).to(COMPUTE) * SCALE
        tl.store(bits_ptr + row * groups + group, byte.to(tl.uint8), mask=(row < M) & (group < groups))
    tl.store(y_ptr + row * N + column, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _act_grad_kernel(
    dy_ptr,
    y_ptr,
    bits_ptr,
    dz_ptr,
    sums_ptr,
    M,
    N,
    steps,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """dz = m(y, bits) * dy. Program (i, j) takes steps * ROWS rows and BYTES * 8 columns.

    sums [programs(0), N] receives the column sums of each program's rows, or is None.
    """
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    column = tl.program_id(1) * BYTES * 8 + tl.arange(0, BYTES)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    total = tl.zeros((ROWS, BYTES, 8), COMPUTE)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None, None]
        inside = (row < M) & (column < N)
        at = row * N + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        dz = _masked(dy, y, bits_ptr, row, column, inside, N, SLOPE, SCALE, THRESHOLD)
        tl.store(dz_ptr + at, rounded(dz, dz_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            total += dz
    if sums_ptr is not None:
        sums = tl.sum(total, axis=0)[None, :, :]
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * N + column, rounded(sums, sums_ptr.dtype.element_ty), mask=column < N)


# --- the products ---------------------------------------------------------------------------------------------------------------
# Each loops over its inner dimension in steps of DEPTH. OPERAND is what the multiplication takes: the inputs' own dtype, but
# float32 for 16-bit inputs under the interpreter, which cannot multiply them.


@triton.jit
def _forward_kernel(
    a_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    bits_ptr,
    u_ptr,
    M,
    N,
    K,
    a_m,
    a_k,
    weight_n,
    weight_k,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z = a Wᵀ + b; u None: writes y = dropout(LeakyReLU(z)) and its bits; else reads them and writes u = m(y, bits) * z."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    z = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(tl.cdiv(K, DEPTH)):
        k = step * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
        a = tl.load(a_ptr + row * a_m + k[None, :] * a_k, mask=(row < M) & (k[None, :] < K), other=0.0)
        w = tl.load(weight_ptr + k[:, None] * weight_k + column * weight_n, mask=(k[:, None] < K) & (column < N), other=0.0)
        z = tl.dot(a.to(OPERAND), w.to(OPERAND), z, input_precision=PRECISION, out_dtype=COMPUTE)
    inside = (row < M) & (column < N)
    at = row * N + column
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)
    if u_ptr is not None:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        u = _masked(z, y, bits_ptr, row, column, inside, N, SLOPE, SCALE, THRESHOLD)
        tl.store(u_ptr + at, rounded(u, u_ptr.dtype.element_ty), mask=inside)
    else:
        y = leaky_relu(z, SLOPE)
        if THRESHOLD >= 0:
            groups = tl.cdiv(N, 8)
            group = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
            byte = _keep_byte(seed_ptr, row * groups + group, THRESHOLD)
            tl.store(bits_ptr + row * groups + group, byte.to(tl.uint8), mask=(row < M) & (group < groups))
            keep = ((byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1).to(tl.int1)
            y *= tl.reshape(keep, (ROWS, COLUMNS)).to(COMPUTE) * SCALE
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _data_grad_kernel(
    c_ptr,
    weight_ptr,
    y_ptr,
    bits_ptr,
    dx_ptr,
    M,
    N,
    K,
    c_m,
    c_n,
    weight_n,
    weight_k,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dx [M, K] = (m(y, bits) * c) W, the inner dimension being N."""
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dx = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(tl.cdiv(N, DEPTH)):
        n = step * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
        inside = (row < M) & (n[None, :] < N)
        c = tl.load(c_ptr + row * c_m + n[None, :] * c_n, mask=inside, other=0.0).to(COMPUTE)
        y = tl.load(y_ptr + row * N + n[None, :], mask=inside, other=0.0).to(COMPUTE)
        dz = _masked(c, y, bits_ptr, row, n[None, :], inside, N, SLOPE, SCALE, THRESHOLD)
        w = tl.load(weight_ptr + n[:, None] * weight_n + column * weight_k, mask=(n[:, None] < N) & (column < K), other=0.0)
        dx = tl.dot(
            rounded(dz, y_ptr.dtype.element_ty).to(OPERAND), w.to(OPERAND), dx, input_precision=PRECISION, out_dtype=COMPUTE
        )
    tl.store(dx_ptr + row * K + column, rounded(dx, dx_ptr.dtype.element_ty), mask=(row < M) & (column < K))


@triton.jit
def _weight_grad_kernel(
    c_ptr,
    x_ptr,
    y_ptr,
    bits_ptr,
    dw_ptr,
    sums_ptr,
    M,
    N,
    K,
    c_m,
    c_n,
    x_m,
    x_k,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dW [N, K] = (m(y, bits) * c)ᵀ x, the inner dimension being M.

    Programs (i, ceil(K / COLUMNS)), launched if wanted, write the sums [N] over M of m * c instead.
    """
    COMPUTE: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if tl.program_id(1) == tl.cdiv(K, COLUMNS):
        total = tl.zeros((ROWS, DEPTH), COMPUTE)
        for step in range(tl.cdiv(M, DEPTH)):
            m = step * DEPTH + tl.arange(0, DEPTH).to(tl.int64)[None, :]
            inside = (m < M) & (n < N)
            c = tl.load(c_ptr + m * c_m + n * c_n, mask=inside, other=0.0).to(COMPUTE)
            y = tl.load(y_ptr + m * N + n, mask=inside, other=0.0).to(COMPUTE)
            total += _masked(c, y, bits_ptr, m, n, inside, N, SLOPE, SCALE, THRESHOLD)
        sums = tl.sum(total, axis=1)[:, None]
        tl.store(sums_ptr + n, rounded(sums, sums_ptr.dtype.element_ty), mask=n < N)
    else:
        column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        dw = tl.zeros((ROWS, COLUMNS), COMPUTE)
        for step in range(tl.cdiv(M, DEPTH)):
            m = step * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
            inside = (m[None, :] < M) & (n < N)
            c = tl.load(c_ptr + m[None, :] * c_m + n * c_n, mask=inside, other=0.0).to(COMPUTE)
            y = tl.load(y_ptr + m[None, :] * N + n, mask=inside, other=0.0).to(COMPUTE)
            dz = _masked(c, y, bits_ptr, m[None, :], n, inside, N, SLOPE, SCALE, THRESHOLD)
            x = tl.load(x_ptr + m[:, None] * x_m + column * x_k, mask=(m[:, None] < M) & (column < K), other=0.0)
            dw = tl.dot(
                rounded(dz, y_ptr.dtype.element_ty).to(OPERAND), x.to(OPERAND), dw, input_precision=PRECISION, out_dtype=COMPUTE
            )
        tl.store(dw_ptr + n * K + column, rounded(dw, dw_ptr.dtype.element_ty), mask=(n < N) & (column < K))


# --- block sizes ----------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Tile [rows, columns] of the result, step along the inner dimension, and how many warps and pipeline stages work on it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Largest tile first. The first row that makes at least PROGRAMS programs is taken, else the last: GAN layers are small, and a tile
# that is reused less beats a multiprocessor that idles. The key is how a product is computed. For tuning on a GPU: one table.
PROGRAMS = 96
BLOCKS = {
    "16-bit": (Blocks(128, 128, 64, 8, 3), Blocks(64, 64, 64, 4, 4), Blocks(32, 64, 64, 4, 4), Blocks(32, 32, 64, 4, 4)),
    "tf32": (Blocks(128, 128, 32, 8, 3), Blocks(64, 64, 32, 4, 4), Blocks(32, 64, 32, 4, 4), Blocks(32, 32, 32, 4, 4)),
    "ieee": (Blocks(64, 64, 32, 8, 2), Blocks(32, 64, 32, 4, 2), Blocks(32, 32, 32, 4, 2)),
}


def blocks(rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str) -> Blocks:
    """The tile for a [rows, columns] result with this inner dimension."""

    def fit(size: int, limit: int) -> int:
        return min(max(power_of_two(size), 16), limit)  # tl.dot takes nothing below 16

    if INTERPRETED:
        return Blocks(fit(rows, 1024), fit(columns, 1024), fit(depth, 1024), 4, 1)
    for b in BLOCKS[precision if dtype == torch.float32 else "16-bit"]:
        if ceil_div(rows, b.rows) * ceil_div(columns, b.columns) >= PROGRAMS:
            break
    return b._replace(rows=fit(rows, b.rows), columns=fit(columns, b.columns), depth=fit(depth, b.depth))


STRIP_ROWS = 512  # up to so many rows one program sums a strip of columns; beyond, it takes CHUNK_ROWS, and a second launch adds up
CHUNK_ROWS = 256


def _tile(rows: int, columns: int, elements: int, width: int) -> tuple[int, int]:
    """(ROWS, BYTES) of an elementwise kernel's program: so many elements, at most `width` bytes wide."""
    if INTERPRETED:
        elements, width = 1 << 20, 1 << 17
    width = min(power_of_two(ceil_div(columns, 8)), width)
    return min(power_of_two(rows), max(elements // (8 * width), 1)), width


# --- launchers ------------------------------------------------------------------------------------------------------------------


def _mask_constants(slope: float, p: float) -> dict[str, Any]:
    """SLOPE, SCALE and THRESHOLD, as gankern/ops/_philox.py and `dropout_scale` define them."""
    return {"SLOPE": slope, "SCALE": 1.0 / (1.0 - p) if p < 1.0 else 0.0, "THRESHOLD": round(p * 65536) if p > 0.0 else -1}


def _new_bits(like: Tensor, rows: int, columns: int, p: float) -> Tensor:
    return like.new_empty((rows, ceil_div(columns, 8)) if p > 0.0 else (0,), dtype=torch.uint8)


def linear_lrelu_act(z: Tensor, bias: Tensor | None, slope: float, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y = dropout(LeakyReLU(z + bias)) [..., N], bits."""
    columns = z.shape[-1]
    rows = z.numel() // max(columns, 1)
    y, bits = torch.empty_like(z), _new_bits(z, math.prod(z.shape[:-1]), columns, p)
    if y.numel() == 0:
        return y, bits
    height, width = _tile(rows, columns, 1024, 32)
    with on_device(z):
        _act_kernel[(ceil_div(rows, height), ceil_div(columns, 8 * width))](
            z, bias, seed, y, bits, rows, columns, **_mask_constants(slope, p), ROWS=height, BYTES=width
        )
    return y, bits


def linear_lrelu_act_grad(dy: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """dz = m(y, bits) * dy [..., N], its sum over the rows [N] (or [0])."""
    columns = dy.shape[-1]
    dz = torch.empty_like(dy)
    if dz.numel() == 0:
        return dz, dy.new_zeros(columns if with_bias else 0)
    rows = dy.numel() // columns
    span = rows if not with_bias or rows <= STRIP_ROWS else CHUNK_ROWS
    height, width = _tile(span, columns, 2048, 4) if with_bias else _tile(rows, columns, 1024, 32)
    steps = ceil_div(span, height) if with_bias else 1
    programs = ceil_div(rows, steps * height)
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    sums = dy.new_empty(programs, columns, dtype=dy.dtype if programs == 1 else compute) if with_bias else None
    with on_device(dy):
        _act_grad_kernel[(programs, ceil_div(columns, 8 * width))](
            dy,
            y,
            bits,
            dz,
            sums,
            rows,
            columns,
            steps,
            **_mask_constants(slope, p),
            ROWS=height,
            BYTES=width,
            num_warps=8 if with_bias else 4,
        )
    if sums is None:
        return dz, dy.new_empty(0)
    return dz, sums[0] if programs == 1 else sums.sum(0).to(dy.dtype)


def _product_constants(t: Tensor, precision: str, b: Blocks) -> dict[str, Any]:
    operand = tl.float32 if INTERPRETED and t.dtype.itemsize == 2 else _TL[t.dtype]
    return {
        "PRECISION": precision,
        "OPERAND": operand,
        "ROWS": b.rows,
        "COLUMNS": b.columns,
        "DEPTH": b.depth,
        "num_warps": b.warps,
        "num_stages": b.stages,
    }


_TL = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, y: Tensor, bits: Tensor, u: Tensor | None, **constants: Any
) -> None:
    (m, k), n = a.shape, weight.shape[0]
    if m == 0 or n == 0:
        return
    precision = constants.pop("precision")
    b = blocks(m, n, k, a.dtype, precision)
    with on_device(a):
        _forward_kernel[(ceil_div(m, b.rows), ceil_div(n, b.columns))](
            a,
            weight,
            bias,
            seed,
            y,
            bits,
            u,
            m,
            n,
            k,
            *a.stride(),
            *weight.stride(),
            **constants,
            **_product_constants(a, precision, b),
        )


def linear_lrelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, p: float, seed: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """y = dropout(LeakyReLU(x Wᵀ + b)) [M, N], bits. x and weight may have any strides; precision is "ieee" or "tf32" (float32)."""
    y, bits = x.new_empty(x.shape[0], weight.shape[0]), _new_bits(x, x.shape[0], weight.shape[0], p)
    _forward(x, weight, bias, seed, y, bits, None, precision=precision, **_mask_constants(slope, p))
    return y, bits


def linear_lrelu_masked(
    a: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, bits: Tensor, slope: float, p: float, precision: str
) -> Tensor:
    """u = m(y, bits) * (a Wᵀ + b) [M, N]. a and weight may have any strides."""
    u = torch.empty_like(y)
    _forward(a, weight, bias, None, y, bits, u, precision=precision, **_mask_constants(slope, p))
    return u


def linear_lrelu_data_grad(c: Tensor, weight: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, precision: str) -> Tensor:
    """(m(y, bits) * c) W [M, K]. c and weight may have any strides."""
    (m, n), k = y.shape, weight.shape[1]
    dx = y.new_empty(m, k)
    if dx.numel() == 0:
        return dx
    b = blocks(m, k, n, c.dtype, precision)
    with on_device(c):
        _data_grad_kernel[(ceil_div(m, b.rows), ceil_div(k, b.columns))](
            c,
            weight,
            y,
            bits,
            dx,
            m,
            n,
            k,
            *c.stride(),
            *weight.stride(),
            **_mask_constants(slope, p),
            **_product_constants(c, precision, b),
        )
    return dx


def linear_lrelu_weight_grad(
    c: Tensor, x: Tensor, y: Tensor, bits: Tensor, slope: float, p: float, with_bias: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """(m(y, bits) * c)ᵀ x [N, K], the column sums of m(y, bits) * c [N] (or [0]). c and x may have any strides."""
    (m, n), k = y.shape, x.shape[1]
    dw, sums = y.new_empty(n, k), y.new_empty(n if with_bias else 0)
    b = blocks(n, k, m, c.dtype, precision)
    grid = (ceil_div(n, b.rows), ceil_div(k, b.columns) + with_bias)
    if 0 in grid:
        return dw, sums
    with on_device(c):
        _weight_grad_kernel[grid](
            c,
            x,
            y,
            bits,
            dw,
            sums,
            m,
            n,
            k,
            *c.stride(),
            *x.stride(),
            **_mask_constants(slope, p),
            **_product_constants(c, precision, b),
        )
    return dw, sums
