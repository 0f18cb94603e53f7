"""gan_loss: logits [N], their loss, gradient [N] and three statistics; one program up to ONE_PROGRAM logits, two launches beyond
(relative to averages: PyTorch's own kernels for the means before and their share of the gradient after).

Contract in gankern/ops/gan_loss.py. Terms, weights and the reduction are compiled in; targets are run-time doubles, so that an
annealed label does not compile anew at each step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import ceil_div, on_device, power_of_two

ONE_PROGRAM = 4096  # one program takes this many logits, 8 a thread
BLOCK = 1024  # logits a program beyond that, and partial sums a step of the finishing program


@triton.jit
def _log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1 as 2 atanh(s), s = u / (2 + u) <= 1/3: full relative precision, which log(1 + u) loses."""
    s = u / (2.0 + u)
    q = s * s
    COUNT: tl.constexpr = 17 if u.dtype == tl.float64 else 8  # the first term left out is below an ulp
    p = q * 0.0
    for k in tl.static_range(COUNT):
        p = p * q + 1.0 / (2 * (COUNT - k) + 1)
    return 2.0 * (s + s * q * p)


EXP_LIMIT = tl.constexpr(30.0)


@triton.jit
def _sigmoid(a):
    e = tl.exp(-tl.abs(a))
    q = 1.0 / (1.0 + e)
    return tl.where(a >= 0, q, e * q)


@triton.jit
def _mix(t, real, fake):
    """t * real + (1 - t) * fake, where a share of 0 leaves out even what is infinite."""
    return tl.where(t != 0, t * real, 0.0) + tl.where(t != 1, (1.0 - t) * fake, 0.0)


@triton.jit
def _exp(x):
    """Value, slope and curvature of exp(x), continued beyond EXP_LIMIT by its tangent."""
    over = x > EXP_LIMIT
    e = tl.exp(tl.where(over, EXP_LIMIT, x))
    return tl.where(over, e * (1.0 + (x - EXP_LIMIT)), e), e, tl.where(over, 0.0, e)


@triton.jit
def _margin(v):
    """max(0, v) and its slope; NaN passes."""
    return tl.where(v <= 0, 0.0, v), tl.where(v <= 0, tl.zeros_like(v), tl.zeros_like(v) + 1.0)


@triton.jit
def _term(a, t, CODE: tl.constexpr):
    """Value, slope and curvature at logit a, target t; formulas and CODE as in gankern/ops/_objectives.py."""
    tl.static_assert(CODE <= 9, "unknown term")
    zero = tl.zeros_like(a)
    one = zero + 1.0
    if CODE == 0 or CODE == 9:  # cross entropy, softplus(a) - t a; Jensen-Shannon: minus log 2
        e = tl.exp(-tl.abs(a))
        q = 1.0 / (1.0 + e)
        value = tl.maximum(a, 0.0) - t * a + _log1p_unit(e)
        if CODE == 9:
            value = value - _log1p_unit(one)  # log 2; 0 at a = 0 to the bit
        slope = tl.where(a >= 0, q, e * q) - t
        curvature = e * q * q
    elif CODE == 1:  # linear
        slope = zero + (1.0 - 2.0 * t)
        value = slope * a
        curvature = zero
    elif CODE == 2:  # square
        value = 0.5 * (a - t) * (a - t)
        slope = a - t
        curvature = one
    elif CODE == 3:  # square-sides
        value = _mix(t, 0.5 * (a - 1.0) * (a - 1.0), 0.5 * (a + 1.0) * (a + 1.0))
        slope = a - (2.0 * t - 1.0)
        curvature = one
    elif CODE == 4:  # hinge
        real, real_slope = _margin(1.0 - a)
        fake, fake_slope = _margin(1.0 + a)
        value = _mix(t, real, fake)
        slope = _mix(t, -real_slope, fake_slope)
        curvature = zero
    elif CODE == 5:  # kl
        v, d, h = _exp(a - 1.0)
        value = _mix(t, -a, v)
        slope = _mix(t, -one, d)
        curvature = _mix(t, zero, h)
    elif CODE == 6:  # reverse-kl
        v, d, h = _exp(-a)
        value = _mix(t, v, a - 1.0)
        slope = _mix(t, -d, one)
        curvature = _mix(t, h, zero)
    elif CODE == 7:  # pearson
        value = _mix(t, -a, a * (0.25 * a + 1.0))
        slope = _mix(t, -one, 0.5 * a + 1.0)
        curvature = _mix(t, zero, 0.5 * one)
    else:  # 8, hellinger
        v, d, h = _exp(-a)
        w, dw, hw = _exp(a)
        value = _mix(t, v - 1.0, w - 1.0)
        slope = _mix(t, -d, dw)
        curvature = _mix(t, h, hw)
    return value, slope, curvature


@triton.jit
def _loss_term(x, t, inside, WEIGHT: tl.constexpr, CODE: tl.constexpr):
    """Value and slope of a half's term, 0 outside it; one that pays nothing is left out, not multiplied by 0: it may be inf."""
    value = tl.zeros_like(x)
    slope = tl.zeros_like(x)
    if WEIGHT != 0:
        v, d, _ = _term(x, t, CODE)
        value = tl.where(inside, v, 0.0)
        slope = tl.where(inside, d, 0.0)
    return value, slope


@triton.jit
def _logits(a_ptr, b_ptr, i, inside, n_real, COMPUTE: tl.constexpr):
    """Logit i of a, or of a and b one after the other."""
    if b_ptr is None:
        a = tl.load(a_ptr + i, mask=inside, other=0.0).to(COMPUTE)
    else:
        a = tl.load(a_ptr + i, mask=inside & (i < n_real), other=0.0).to(COMPUTE)
        a += tl.load(b_ptr + i - n_real, mask=inside & (i >= n_real), other=0.0).to(COMPUTE)
    return a


@triton.jit
def _targets(t_ptr, target, i, inside, like):
    """The targets at i: a tensor's, or one number [1]; of the dtype of `like`."""
    return tl.full((1,), target, like.dtype) if t_ptr is None else tl.load(t_ptr + i, mask=inside, other=0.0).to(like.dtype)


@triton.jit
def _scale(like, count, WEIGHT: tl.constexpr, REDUCTION: tl.constexpr):
    """weight, over the half's count where the reduction is the mean; [1] of the dtype of `like`."""
    scale = tl.full((1,), WEIGHT, like.dtype)
    if REDUCTION == 1:
        scale = scale / tl.maximum(count, 1).to(like.dtype)
    return scale


@triton.jit
def _mean(total, count):
    """total / count, NaN where there is nothing."""
    return tl.where(count > 0, total / tl.maximum(count, 1).to(total.dtype), float("nan"))


@triton.jit
def _finish(
    loss_ptr, stats_ptr, v_r, v_f, s_r, s_f, right, n_real, n, W_R: tl.constexpr, W_F: tl.constexpr, REDUCTION: tl.constexpr
):
    """From the five sums (value, value, sigmoid, sigmoid, rightly called) to loss and statistics."""
    if REDUCTION != 0:
        if REDUCTION == 1:  # a half that pays nothing may be empty
            v_r = _mean(v_r, n_real) if W_R != 0 else v_r
            v_f = _mean(v_f, n - n_real) if W_F != 0 else v_f
        tl.store(loss_ptr, v_r * W_R + v_f * W_F)
    tl.store(stats_ptr, _mean(s_r, n_real))
    tl.store(stats_ptr + 1, _mean(s_f, n - n_real))
    tl.store(stats_ptr + 2, _mean(right, n))


@triton.jit(do_not_specialize=["n_real", "n"])
def _loss_kernel(
    a_ptr,
    b_ptr,
    tr_ptr,
    tf_ptr,
    loss_ptr,
    stats_ptr,
    grad_real_ptr,
    grad_fake_ptr,
    partial_ptr,
    mean_real_ptr,
    mean_fake_ptr,
    n_real,
    n,
    target_real: tl.float64,
    target_fake: tl.float64,
    TERM_R: tl.constexpr,
    W_R: tl.constexpr,
    TERM_F: tl.constexpr,
    W_F: tl.constexpr,
    REDUCTION: tl.constexpr,
    RELATIVE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Program p takes the logits from p * SIZE on; partial [programs, 8] receives its seven sums, or is None: one program is all.

    mean_*_ptr: the means of the halves, when there are several programs and RELATIVE is 2.
    """
    COMPUTE: tl.constexpr = grad_real_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < n
    real = inside & (i < n_real)
    fake = inside & (i >= n_real)
    a = _logits(a_ptr, b_ptr, i, inside, n_real, COMPUTE)
    sigmoid = _sigmoid(a)
    t_r = _targets(tr_ptr, target_real, i, real, a)
    t_f = _targets(tf_ptr, target_fake, i - n_real, fake, a)
    scale_r = _scale(a, n_real, W_R, REDUCTION)
    scale_f = _scale(a, n - n_real, W_F, REDUCTION)
    x = a
    if RELATIVE == 1:
        x = a - _logits(a_ptr, b_ptr, tl.where(i < n_real, i + n_real, i - n_real), inside, n_real, COMPUTE)
    if RELATIVE == 2:
        if mean_real_ptr is None:
            mean_r = _mean(tl.sum(tl.where(real, a, 0.0), axis=0), n_real)
            mean_f = _mean(tl.sum(tl.where(fake, a, 0.0), axis=0), n - n_real)
        else:
            mean_r = tl.load(mean_real_ptr)
            mean_f = tl.load(mean_fake_ptr)
        x = a - tl.where(i < n_real, mean_f, mean_r)
    value_r, slope_r = _loss_term(x, t_r, real, W_R, TERM_R)
    value_f, slope_f = _loss_term(x, t_f, fake, W_F, TERM_F)
    slope_r = slope_r * scale_r
    slope_f = slope_f * scale_f
    d_r = tl.sum(slope_r, axis=0)
    d_f = tl.sum(slope_f, axis=0)
    if RELATIVE == 1 and REDUCTION != 0:  # minus what the partner pays, whose x is -x
        _, partner_f = _loss_term(-x, _targets(tf_ptr, target_fake, i, real, a), real, W_F, TERM_F)
        _, partner_r = _loss_term(-x, _targets(tr_ptr, target_real, i - n_real, fake, a), fake, W_R, TERM_R)
        slope_r -= partner_f * scale_f
        slope_f -= partner_r * scale_r
    if RELATIVE == 2 and REDUCTION != 0 and partial_ptr is None:
        slope_r -= _mean(d_f, n_real)
        slope_f -= _mean(d_r, n - n_real)
    tl.store(grad_real_ptr + i, slope_r, mask=real)
    tl.store(grad_fake_ptr + i - n_real, slope_f, mask=fake)
    if REDUCTION == 0:
        tl.store(loss_ptr + i, value_r * W_R + value_f * W_F, mask=inside)
    v_r = tl.sum(value_r, axis=0)
    v_f = tl.sum(value_f, axis=0)
    s_r = tl.sum(tl.where(real, sigmoid, 0.0), axis=0)
    s_f = tl.sum(tl.where(fake, sigmoid, 0.0), axis=0)
    right = tl.sum(((real & (a > 0)) | (fake & (a <= 0))).to(COMPUTE), axis=0)
    if partial_ptr is None:
        _finish(loss_ptr, stats_ptr, v_r, v_f, s_r, s_f, right, n_real, n, W_R, W_F, REDUCTION)
    else:
        row = partial_ptr + tl.program_id(0).to(tl.int64) * 8
        tl.store(row, v_r)
        tl.store(row + 1, v_f)
        tl.store(row + 2, s_r)
        tl.store(row + 3, s_f)
        tl.store(row + 4, right)
        tl.store(row + 5, d_r)
        tl.store(row + 6, d_f)


@triton.jit(do_not_specialize=["n_real", "n", "rows"])
def _finish_kernel(
    partial_ptr,
    loss_ptr,
    stats_ptr,
    n_real,
    n,
    rows,
    W_R: tl.constexpr,
    W_F: tl.constexpr,
    REDUCTION: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The rows of partial [rows, 8], summed in a fixed order by one program; the slopes' sums return in row 0."""
    lane = tl.arange(0, 8)
    total = tl.zeros((SIZE, 8), partial_ptr.dtype.element_ty)
    for step in range(tl.cdiv(rows, SIZE)):
        row = step * SIZE + tl.arange(0, SIZE).to(tl.int64)
        total += tl.load(
            partial_ptr + row[:, None] * 8 + lane[None, :], mask=(row[:, None] < rows) & (lane[None, :] < 7), other=0.0
        )
    sums = tl.sum(total, axis=0)
    v_r = tl.sum(tl.where(lane == 0, sums, 0.0), axis=0)
    v_f = tl.sum(tl.where(lane == 1, sums, 0.0), axis=0)
    s_r = tl.sum(tl.where(lane == 2, sums, 0.0), axis=0)
    s_f = tl.sum(tl.where(lane == 3, sums, 0.0), axis=0)
    right = tl.sum(tl.where(lane == 4, sums, 0.0), axis=0)
    tl.debug_barrier()  # every row has been read
    tl.store(partial_ptr + lane, sums, mask=(lane == 5) | (lane == 6))
    _finish(loss_ptr, stats_ptr, v_r, v_f, s_r, s_f, right, n_real, n, W_R, W_F, REDUCTION)


@triton.jit(do_not_specialize=["n_real", "n"])
def _grad2_kernel(
    a_ptr,
    b_ptr,
    tr_ptr,
    tf_ptr,
    g_ptr,
    ca_ptr,
    cb_ptr,
    da_ptr,
    db_ptr,
    n_real,
    n,
    target_real: tl.float64,
    target_fake: tl.float64,
    TERM_R: tl.constexpr,
    W_R: tl.constexpr,
    TERM_F: tl.constexpr,
    W_F: tl.constexpr,
    REDUCTION: tl.constexpr,
    SIZE: tl.constexpr,
):
    """d = g * c * curvature, scaled as the gradient is, c and d halved as the logits are; g is one number unless REDUCTION is 0."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < n
    real = inside & (i < n_real)
    a = _logits(a_ptr, b_ptr, i, inside, n_real, g_ptr.dtype.element_ty)
    _, _, curvature_r = _term(a, _targets(tr_ptr, target_real, i, real, a), TERM_R)
    _, _, curvature_f = _term(a, _targets(tf_ptr, target_fake, i - n_real, inside & (i >= n_real), a), TERM_F)
    curvature_r = curvature_r * _scale(a, n_real, W_R, REDUCTION) if W_R != 0 else tl.zeros_like(a)
    curvature_f = curvature_f * _scale(a, n - n_real, W_F, REDUCTION) if W_F != 0 else tl.zeros_like(a)
    g = tl.load(g_ptr + i, mask=inside, other=0.0) if REDUCTION == 0 else tl.load(g_ptr)
    d = g * _logits(ca_ptr, cb_ptr, i, inside, n_real, g_ptr.dtype.element_ty) * tl.where(real, curvature_r, curvature_f)
    if db_ptr is None:
        tl.store(da_ptr + i, d, mask=inside)
    else:
        tl.store(da_ptr + i, d, mask=real)
        tl.store(db_ptr + (i - n_real), d, mask=inside & (i >= n_real))


def gan_loss(
    a: Tensor,
    b: Tensor | None,
    n_real: int,
    term_real: int,
    weight_real: float,
    target_real: float,
    targets_real: Tensor | None,
    term_fake: int,
    weight_fake: float,
    target_fake: float,
    targets_fake: Tensor | None,
    reduction: int,
    relative: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, stats [3], grad of a, grad of b ([0] without b)."""
    n = a.numel() + (0 if b is None else b.numel())
    compute = torch.float64 if a.dtype == torch.float64 else torch.float32
    loss = a.new_empty(n if reduction == 0 else (), dtype=compute)
    stats, grad_a = a.new_empty(3, dtype=compute), a.new_empty(a.shape, dtype=compute)
    grad_b = a.new_empty(0 if b is None else b.shape, dtype=compute)
    size = power_of_two(n) if n <= ONE_PROGRAM else BLOCK
    programs = max(ceil_div(n, size), 1)
    partial = a.new_empty(programs, 8, dtype=compute) if programs > 1 else None
    flat = grad_a.view(-1)
    grad_real, grad_fake = (flat[:n_real], flat[n_real:]) if b is None else (flat, grad_b.view(-1))
    means: list[Tensor | None] = [None, None]
    if relative == 2 and partial is not None:
        halves = (a.view(-1)[:n_real], a.view(-1)[n_real:]) if b is None else (a, b)
        means = [half.mean(dtype=compute) for half in halves]
    with on_device(a):
        _loss_kernel[(programs,)](
            a,
            b,
            targets_real,
            targets_fake,
            loss,
            stats,
            grad_real,
            grad_fake,
            partial,
            *means,
            n_real,
            n,
            target_real,
            target_fake,
            TERM_R=term_real,
            W_R=weight_real,
            TERM_F=term_fake,
            W_F=weight_fake,
            REDUCTION=reduction,
            RELATIVE=relative,
            SIZE=size,
            num_warps=max(size // 256, 4),
        )
        if partial is not None:
            _finish_kernel[(1,)](
                partial,
                loss,
                stats,
                n_real,
                n,
                programs,
                W_R=weight_real,
                W_F=weight_fake,
                REDUCTION=reduction,
                SIZE=BLOCK,
                num_warps=8,
            )
    if relative == 2 and reduction != 0 and partial is not None:
        grad_real -= partial[0, 6] / n_real
        grad_fake -= partial[0, 5] / (n - n_real)
    return loss, stats, grad_a, grad_b


def gan_loss_grad2(
    a: Tensor,
    b: Tensor | None,
    n_real: int,
    term_real: int,
    weight_real: float,
    target_real: float,
    targets_real: Tensor | None,
    term_fake: int,
    weight_fake: float,
    target_fake: float,
    targets_fake: Tensor | None,
    reduction: int,
    g: Tensor,
    ca: Tensor,
    cb: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """g * c * curvature for a and for b ([0] without b), in their dtype."""
    da = torch.empty_like(a)
    db = None if b is None else torch.empty_like(b)
    n = a.numel() + (0 if b is None else b.numel())
    if n == 0:
        return da, a.new_empty(0) if db is None else db
    size = min(power_of_two(n), BLOCK)
    with on_device(a):
        _grad2_kernel[(ceil_div(n, size),)](
            a,
            b,
            targets_real,
            targets_fake,
            g,
            ca,
            cb,
            da,
            db,
            n_real,
            n,
            target_real,
            target_fake,
            TERM_R=term_real,
            W_R=weight_real,
            TERM_F=term_fake,
            W_F=weight_fake,
            REDUCTION=reduction,
            SIZE=size,
        )
    return da, a.new_empty(0) if db is None else db
