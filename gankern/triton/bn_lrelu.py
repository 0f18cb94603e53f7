"""bn_lrelu: x, y, dy, dx ... [B, C, S], statistics and parameters [C]; each pass one launch, or two (three) where channels are cut.

Contract in gankern/ops/bn_lrelu.py, formulas and their names in csrc/bn_lrelu.h. Program (i, j) takes channel i, or, where S is 1
(MATRIX), WIDTH channels, and the j-th share of the batch; a tile is [ROWS samples, WIDTH places or channels]. With one share a
program does everything (PHASE 0). With several each phase ends with sums in partials [sums, shares, C], which the next one adds in
a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, leaky_relu, on_device, power_of_two, rounded

PROGRAMS = 264  # a channel's batch is cut into shares until there are so many programs,
SHARE = 8192  # as long as each has so many elements,
MAX_SHARES = 64
TILE = 1 << 16 if INTERPRETED else 1024  # elements a program works on at a time
COLUMNS = 1024 if INTERPRETED else 32  # channels a program takes where S is 1


# --- parts ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(step, part, B, C, S, steps, MATRIX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile lies, and which of it exists."""
    row = (tl.program_id(1).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    if MATRIX:
        lane += tl.program_id(0) * WIDTH
        at = row * C + lane
        inside = (row < B) & (lane < C)
    else:
        lane += part * WIDTH
        at = (row * C + tl.program_id(0)) * S + lane
        inside = (row < B) & (lane < S)
    return at, inside


@triton.jit
def _parts(S, MATRIX: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles in a run of S."""
    return 1 if MATRIX else tl.cdiv(S, WIDTH)


@triton.jit
def _channel(C, MATRIX: tl.constexpr, WIDTH: tl.constexpr):
    """The program's channels [1, WIDTH or 1], and which of them exist."""
    WIDE: tl.constexpr = WIDTH if MATRIX else 1
    channel = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)[None, :]
    return channel, channel < C


@triton.jit
def _folded(total, MATRIX: tl.constexpr):
    """[ROWS, WIDTH] of sums to one a channel."""
    sums = tl.sum(total, axis=0)[None, :]
    return sums if MATRIX else tl.sum(sums, axis=1)[:, None]


@triton.jit
def _put(partials_ptr, k: tl.constexpr, value, channel, exists, C, shares):
    tl.store(partials_ptr + (k * shares + tl.program_id(1)).to(tl.int64) * C + channel, value, mask=exists)


@triton.jit
def _gathered(partials_ptr, k: tl.constexpr, channel, exists, C, shares, SHARES: tl.constexpr):
    share = tl.arange(0, SHARES)[:, None]
    each = tl.load(partials_ptr + (k * shares + share).to(tl.int64) * C + channel, mask=exists & (share < shares), other=0.0)
    return tl.sum(each, axis=0)[None, :]


@triton.jit
def _value(ptr, channel, exists, like, otherwise: tl.constexpr):
    """A number a channel; `otherwise` where there is no tensor."""
    return tl.full(channel.shape, otherwise, like.dtype) if ptr is None else tl.load(ptr + channel, mask=exists, other=0.0)


@triton.jit
def _times(value, coefficient):
    """value * coefficient; where that is 0 the value does not count, and may be NaN."""
    return tl.where(coefficient == 0, 0.0, value * coefficient)


@triton.jit
def _rstd(var, eps):
    return 1.0 / tl.sqrt(var + tl.full((1, 1), eps, var.dtype))


# --- forward --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _summed(x_ptr, centre, B, C, S, steps, SQUARES: tl.constexpr, MATRIX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over a share of x - centre, or of its squares."""
    total = tl.zeros((ROWS, WIDTH), centre.dtype)
    for step in range(steps):
        for part in range(_parts(S, MATRIX, WIDTH)):
            at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
            d = tl.where(inside, tl.load(x_ptr + at, mask=inside, other=0.0).to(centre.dtype) - centre, 0.0)
            total += d * d if SQUARES else d
    return _folded(total, MATRIX)


@triton.jit
def _normalised(
    x_ptr,
    y_ptr,
    mean,
    scale,
    bias,
    B,
    C,
    S,
    steps,
    SLOPE: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    for step in range(steps):
        for part in range(_parts(S, MATRIX, WIDTH)):
            at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(mean.dtype)
            z = (x - mean) * scale + bias
            tl.store(y_ptr + at, rounded(leaky_relu(z, SLOPE), y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "shares", "steps"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    partials_ptr,
    B,
    C,
    S,
    shares,
    steps,
    per_value: tl.float64,
    unbiased: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    SLOPE: tl.constexpr,
    PHASE: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Phases: 1 sums, 2 sums of squares about the mean, 3 the rest."""
    COMPUTE: tl.constexpr = mean_ptr.dtype.element_ty
    channel, exists = _channel(C, MATRIX, WIDTH)
    nth = tl.full((1, 1), per_value, COMPUTE)
    first = tl.load(x_ptr + channel * S, mask=exists, other=0.0).to(COMPUTE)  # sums of differences keep their digits
    if PHASE < 2:
        total = _summed(x_ptr, first, B, C, S, steps, False, MATRIX, ROWS, WIDTH)
    else:
        total = _gathered(partials_ptr, 0, channel, exists, C, shares, SHARES)
    if PHASE == 1:
        _put(partials_ptr, 0, total, channel, exists, C, shares)
    else:
        mean = first + total * nth
        if PHASE == 3:
            squares = _gathered(partials_ptr, 1, channel, exists, C, shares, SHARES)
        else:
            squares = _summed(x_ptr, mean, B, C, S, steps, True, MATRIX, ROWS, WIDTH)
        if PHASE == 2:
            _put(partials_ptr, 1, squares, channel, exists, C, shares)
        else:
            var = squares * nth
            if tl.program_id(1) == 0:
                tl.store(mean_ptr + channel, mean, mask=exists)
                tl.store(var_ptr + channel, var, mask=exists)
                if running_mean_ptr is not None:
                    m = tl.full((1, 1), momentum, COMPUTE)
                    u = tl.full((1, 1), unbiased, COMPUTE)
                    before = tl.load(running_mean_ptr + channel, mask=exists, other=0.0)
                    tl.store(running_mean_ptr + channel, m * mean + (1.0 - m) * before, mask=exists)
                    before = tl.load(running_var_ptr + channel, mask=exists, other=0.0)
                    tl.store(
                        running_var_ptr + channel,
                        m * (var * u) + (1.0 - m) * before,
                        mask=exists,
                    )
            scale = _value(weight_ptr, channel, exists, mean, 1.0) * _rstd(var, eps)
            bias = _value(bias_ptr, channel, exists, mean, 0.0)
            _normalised(x_ptr, y_ptr, mean, scale, bias, B, C, S, steps, SLOPE, MATRIX, ROWS, WIDTH)


@triton.jit(do_not_specialize=["B", "steps"])
def _eval_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    B,
    C,
    S,
    steps,
    eps: tl.float64,
    SLOPE: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, exists = _channel(C, MATRIX, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    scale = _value(weight_ptr, channel, exists, mean, 1.0) * _rstd(tl.load(var_ptr + channel, mask=exists, other=1.0), eps)
    bias = _value(bias_ptr, channel, exists, mean, 0.0)
    _normalised(x_ptr, y_ptr, mean, scale, bias, B, C, S, steps, SLOPE, MATRIX, ROWS, WIDTH)


# --- backward -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _loaded(dy_ptr, x_ptr, at, inside, mean, scale, bias, SLOPE: tl.constexpr):
    """c, the slope of the activation, and g; 0 outside."""
    c = tl.where(inside, tl.load(x_ptr + at, mask=inside, other=0.0).to(mean.dtype) - mean, 0.0)
    slope = tl.where(c * scale + bias > 0, tl.full((1, 1), 1.0, mean.dtype), tl.full((1, 1), SLOPE, mean.dtype))
    return c, slope, tl.load(dy_ptr + at, mask=inside, other=0.0).to(mean.dtype) * slope


@triton.jit(do_not_specialize=["B", "shares", "steps"])
def _grad_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    partials_ptr,
    B,
    C,
    S,
    shares,
    steps,
    per_value: tl.float64,
    eps: tl.float64,
    SLOPE: tl.constexpr,
    TRAINING: tl.constexpr,
    PHASE: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Phases: 1 the sums of g and g c, 2 the rest."""
    COMPUTE: tl.constexpr = mean_ptr.dtype.element_ty
    channel, exists = _channel(C, MATRIX, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    r = _rstd(tl.load(var_ptr + channel, mask=exists, other=1.0), eps)
    scale = _value(weight_ptr, channel, exists, mean, 1.0) * r
    bias = _value(bias_ptr, channel, exists, mean, 0.0)
    if PHASE < 2:
        total_g = tl.zeros((ROWS, WIDTH), COMPUTE)
        total_gc = tl.zeros((ROWS, WIDTH), COMPUTE)
        for step in range(steps):
            for part in range(_parts(S, MATRIX, WIDTH)):
                at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
                c, _, g = _loaded(dy_ptr, x_ptr, at, inside, mean, scale, bias, SLOPE)
                total_g += g
                total_gc += g * c
        sum_g = _folded(total_g, MATRIX)
        sum_gc = _folded(total_gc, MATRIX)
    else:
        sum_g = _gathered(partials_ptr, 0, channel, exists, C, shares, SHARES)
        sum_gc = _gathered(partials_ptr, 1, channel, exists, C, shares, SHARES)
    if PHASE == 1:
        _put(partials_ptr, 0, sum_g, channel, exists, C, shares)
        _put(partials_ptr, 1, sum_gc, channel, exists, C, shares)
    else:
        if tl.program_id(1) == 0:
            tl.store(dweight_ptr + channel, r * sum_gc, mask=exists)
            tl.store(dbias_ptr + channel, sum_g, mask=exists)
        nth = tl.full((1, 1), per_value, COMPUTE)
        along = -scale * r * r * (sum_gc * nth) if TRAINING else tl.zeros_like(mean)
        one = -scale * (sum_g * nth) if TRAINING else tl.zeros_like(mean)
        for step in range(steps):
            for part in range(_parts(S, MATRIX, WIDTH)):
                at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
                c, _, g = _loaded(dy_ptr, x_ptr, at, inside, mean, scale, bias, SLOPE)
                tl.store(dx_ptr + at, rounded(g * scale + _times(c, along) + one, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "shares", "steps"])
def _grad2_kernel(
    ddx_ptr,
    ddweight_ptr,
    ddbias_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    ddy_ptr,
    dx_ptr,
    dweight_ptr,
    partials_ptr,
    B,
    C,
    S,
    shares,
    steps,
    per_value: tl.float64,
    count: tl.float64,
    eps: tl.float64,
    SLOPE: tl.constexpr,
    TRAINING: tl.constexpr,
    PHASE: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Phases: 1 the sums of p, p c, g, g c and p g, 2 the rest."""
    COMPUTE: tl.constexpr = mean_ptr.dtype.element_ty
    channel, exists = _channel(C, MATRIX, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    r = _rstd(tl.load(var_ptr + channel, mask=exists, other=1.0), eps)
    scale = _value(weight_ptr, channel, exists, mean, 1.0) * r
    bias = _value(bias_ptr, channel, exists, mean, 0.0)
    if PHASE < 2:
        total_p = tl.zeros((ROWS, WIDTH), COMPUTE)
        total_pc = tl.zeros((ROWS, WIDTH), COMPUTE)
        total_g = tl.zeros((ROWS, WIDTH), COMPUTE)
        total_gc = tl.zeros((ROWS, WIDTH), COMPUTE)
        total_pg = tl.zeros((ROWS, WIDTH), COMPUTE)
        for step in range(steps):
            for part in range(_parts(S, MATRIX, WIDTH)):
                at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
                c, _, g = _loaded(dy_ptr, x_ptr, at, inside, mean, scale, bias, SLOPE)
                p = tl.load(ddx_ptr + at, mask=inside, other=0.0).to(COMPUTE)
                total_p += p
                total_pc += p * c
                total_g += g
                total_gc += g * c
                total_pg += p * g
        sum_p = _folded(total_p, MATRIX)
        sum_pc = _folded(total_pc, MATRIX)
        sum_g = _folded(total_g, MATRIX)
        sum_gc = _folded(total_gc, MATRIX)
        sum_pg = _folded(total_pg, MATRIX)
    else:
        sum_p = _gathered(partials_ptr, 0, channel, exists, C, shares, SHARES)
        sum_pc = _gathered(partials_ptr, 1, channel, exists, C, shares, SHARES)
        sum_g = _gathered(partials_ptr, 2, channel, exists, C, shares, SHARES)
        sum_gc = _gathered(partials_ptr, 3, channel, exists, C, shares, SHARES)
        sum_pg = _gathered(partials_ptr, 4, channel, exists, C, shares, SHARES)
    if PHASE == 1:
        _put(partials_ptr, 0, sum_p, channel, exists, C, shares)
        _put(partials_ptr, 1, sum_pc, channel, exists, C, shares)
        _put(partials_ptr, 2, sum_g, channel, exists, C, shares)
        _put(partials_ptr, 3, sum_gc, channel, exists, C, shares)
        _put(partials_ptr, 4, sum_pg, channel, exists, C, shares)
    else:
        q = _value(ddweight_ptr, channel, exists, mean, 0.0)
        s = _value(ddbias_ptr, channel, exists, mean, 0.0)
        if TRAINING:
            n = tl.full((1, 1), count, COMPUTE)
            nth = tl.full((1, 1), per_value, COMPUTE)
            mean_p = sum_p * nth
            a = r * (sum_pc * nth)
            mean_g = sum_g * nth
            b = r * (sum_gc * nth)
            moment = sum_pg * nth - mean_p * mean_g
            along = r * (q - scale * a)
            dy_one = s - scale * mean_p
            x_p = -scale * r * b
            x_c = -r * r * (scale * (moment - 3.0 * a * b) + q * b)
            x_one = r * (scale * (mean_p * b + mean_g * a) - q * mean_g)
            dweight = r * n * (moment - a * b)
        else:
            along = q * r
            dy_one = s
            x_p = tl.zeros_like(mean)
            x_c = tl.zeros_like(mean)
            x_one = tl.zeros_like(mean)
            dweight = r * sum_pg
        if tl.program_id(1) == 0:
            tl.store(dweight_ptr + channel, dweight, mask=exists)
        for step in range(steps):
            for part in range(_parts(S, MATRIX, WIDTH)):
                at, inside = _place(step, part, B, C, S, steps, MATRIX, ROWS, WIDTH)
                c, slope, g = _loaded(dy_ptr, x_ptr, at, inside, mean, scale, bias, SLOPE)
                p = tl.load(ddx_ptr + at, mask=inside, other=0.0).to(COMPUTE)
                ddy = slope * (p * scale + _times(c, along) + dy_one)
                tl.store(ddy_ptr + at, rounded(ddy, ddy_ptr.dtype.element_ty), mask=inside)
                dx = _times(p, x_p) + _times(g, along) + _times(c, x_c) + x_one
                tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How x is cut: channel blocks, shares of the batch, and the settings of a launch."""

    blocks: int
    shares: int
    sizes: dict[str, Any]

    @property
    def values(self) -> float:
        """Values a channel."""
        return float(self.sizes["B"] * self.sizes["S"])

    @property
    def cut(self) -> dict[str, Any]:
        """What a kernel with phases takes besides."""
        return {"shares": self.shares, "SHARES": power_of_two(self.shares), "per_value": 1.0 / self.values}

    def launch(self, kernel: Any, *args: Any, phases: int, warps: int, **settings: Any) -> None:
        """One launch of phase 0, or one of each."""
        grid = (self.blocks, self.shares)
        with on_device(args[0]):
            for phase in range(1, phases + 1) if self.shares > 1 else (0,):
                kernel[grid](*args, **self.sizes, **self.cut, **settings, PHASE=phase, num_warps=warps)


def plan(x: Tensor) -> Plan:
    b, c = x.shape[:2]
    s = x.numel() // (b * c)
    matrix = s == 1
    width = min(power_of_two(c), COLUMNS) if matrix else min(power_of_two(s), TILE)
    rows = min(power_of_two(b), max(TILE // width, 1))
    blocks = ceil_div(c, width) if matrix else c
    elements = b * s * (width if matrix else 1)
    tiles = ceil_div(b, rows)
    shares = max(1, min(ceil_div(PROGRAMS, blocks), elements // SHARE, tiles, MAX_SHARES))
    steps = ceil_div(tiles, shares)
    sizes = {"B": b, "C": c, "S": s, "steps": steps, "MATRIX": matrix, "ROWS": rows, "WIDTH": width}
    return Plan(blocks, ceil_div(tiles, steps), sizes)


def _channels(x: Tensor, fill: float | None = None) -> Tensor:
    t = x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return t if fill is None else t.fill_(fill)


def _partials(like: Tensor, p: Plan, sums: int) -> Tensor | None:
    return like.new_empty(sums, p.shares, like.shape[0]) if p.shares > 1 else None


def bn_lrelu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean [C], biased variance [C]; moves the running averages."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, _channels(x, 0.0), _channels(x, 1.0)
    mean, var, p = _channels(x), _channels(x), plan(x)
    tensors = (x, weight, bias, running_mean, running_var, y, mean, var, _partials(mean, p, 2))
    p.launch(
        _forward_kernel,
        *tensors,
        phases=3,
        warps=8 if p.shares == 1 else 4,
        unbiased=p.values / max(p.values - 1.0, 1.0),
        momentum=momentum,
        eps=eps,
        SLOPE=slope,
    )
    return y, mean, var


def bn_lrelu_eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """y."""
    y = torch.empty_like(x)
    if x.numel():
        p = plan(x)
        steps = 1 if not INTERPRETED else p.sizes["steps"]  # nothing is summed: a program for each tile
        grid = (p.blocks, ceil_div(ceil_div(x.shape[0], p.sizes["ROWS"]), steps))
        with on_device(x):
            _eval_kernel[grid](x, mean, var, weight, bias, y, **p.sizes | {"steps": steps}, eps=eps, SLOPE=slope)
    return y


def bn_lrelu_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight [C], dbias [C]."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(mean), torch.zeros_like(mean)
    dweight, dbias, p = torch.empty_like(mean), torch.empty_like(mean), plan(x)
    tensors = (dy, x, mean, var, weight, bias, dx, dweight, dbias, _partials(mean, p, 2))
    p.launch(_grad_kernel, *tensors, phases=2, warps=8, eps=eps, SLOPE=slope, TRAINING=training)
    return dx, dweight, dbias


def bn_lrelu_grad2(
    ddx: Tensor,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ddy, dx, dweight [C]."""
    ddy, dx = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return ddy, dx, torch.zeros_like(mean)
    dweight, p = torch.empty_like(mean), plan(x)
    tensors = (ddx, ddweight, ddbias, dy, x, mean, var, weight, bias, ddy, dx, dweight, _partials(mean, p, 5))
    p.launch(_grad2_kernel, *tensors, phases=2, warps=8, count=p.values, eps=eps, SLOPE=slope, TRAINING=training)
    return ddy, dx, dweight
