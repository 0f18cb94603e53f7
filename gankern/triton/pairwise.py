"""pairwise: m [N, B, C] to features [N, B] with their gradients, and Gram blocks [R, M] to similarities.

Contract in gankern/ops/pairwise.py. A program of the features takes a tile of rows i of one space b and walks over the tiles of j.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, on_device, power_of_two, rounded

GRAM_COLUMNS = 1024  # columns of a Gram row that are worked on at a time


@triton.jit
def _sign(a):
    """1, 0 or -1; 0 for NaN."""
    return (a > 0).to(a.dtype) - (a < 0).to(a.dtype)


@triton.jit
def _tile(x_ptr, row, b, c, N, B, C, COMPUTE: tl.constexpr):
    """x[row, b, c], 0 outside."""
    return tl.load(x_ptr + (row * B + b) * C + c, mask=(row < N) & (c < C), other=0.0).to(COMPUTE)


@triton.jit
def _distances(m_ptr, h_ptr, i, j, b, N, B, C, COMPUTE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """[ROWS, ROWS] of ||m_i - m_j||_1, and, where h is given, of the sum over c of (h_i - h_j) sign(m_i - m_j)."""
    d = tl.zeros((ROWS, ROWS), COMPUTE)
    q = tl.zeros((ROWS, ROWS), COMPUTE)
    for step in range(tl.cdiv(C, DEPTH)):
        c = step * DEPTH + tl.arange(0, DEPTH)[None, None, :]
        difference = _tile(m_ptr, i[:, None, None], b, c, N, B, C, COMPUTE) - _tile(m_ptr, j[None, :, None], b, c, N, B, C, COMPUTE)
        d += tl.sum(tl.abs(difference), axis=2)
        if h_ptr is not None:
            along = _tile(h_ptr, i[:, None, None], b, c, N, B, C, COMPUTE) - _tile(h_ptr, j[None, :, None], b, c, N, B, C, COMPUTE)
            q += tl.sum(along * _sign(difference), axis=2)
    return d, q


@triton.jit
def _features_kernel(m_ptr, o_ptr, N, B, C, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """o_ib = sum over j != i of exp(-||m_ib - m_jb||_1)."""
    COMPUTE: tl.constexpr = tl.float64 if m_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(N, ROWS)
    i = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    total = tl.zeros((ROWS, ROWS), COMPUTE)
    for step in range(tiles):
        j = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        d, _ = _distances(m_ptr, None, i, j, b, N, B, C, COMPUTE, ROWS, DEPTH)
        pair = (j[None, :] < N) & (i[:, None] != j[None, :])
        total += tl.where(pair, tl.exp(-d), 0.0)
    tl.store(o_ptr + i * B + b, rounded(tl.sum(total, axis=1), o_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def _features_grad_kernel(h_ptr, g_ptr, m_ptr, dg_ptr, dm_ptr, N, B, C, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """dm = -sum over j of w sign(m_i - m_j), w = (g_i + g_j) e_ij; with h: w times -q_ij, and dg = -sum over j of e q.

    Program axis 1 is the DEPTH dimensions that are written; e is found anew for each.
    """
    COMPUTE: tl.constexpr = tl.float64 if m_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(N, ROWS)
    i = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    g_i = tl.load(g_ptr + i * B + b, mask=i < N, other=0.0).to(COMPUTE)
    mine = _tile(m_ptr, i[:, None, None], b, c, N, B, C, COMPUTE)
    total = tl.zeros((ROWS, DEPTH), COMPUTE)
    total_g = tl.zeros((ROWS, ROWS), COMPUTE)
    for step in range(tiles):
        j = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        d, q = _distances(m_ptr, h_ptr, i, j, b, N, B, C, COMPUTE, ROWS, DEPTH)
        pair = (j[None, :] < N) & (i[:, None] != j[None, :])
        e = tl.where(pair, tl.exp(-d), 0.0)
        w = (g_i[:, None] + tl.load(g_ptr + j * B + b, mask=j < N, other=0.0).to(COMPUTE)[None, :]) * e
        if h_ptr is not None:
            w *= -q
            total_g -= e * q
        difference = mine - _tile(m_ptr, j[None, :, None], b, c, N, B, C, COMPUTE)
        total -= tl.sum(w[:, :, None] * _sign(difference), axis=1)
    k = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    at = dm_ptr + (i[:, None] * B + b) * C + k
    tl.store(at, rounded(total, dm_ptr.dtype.element_ty), mask=(i[:, None] < N) & (k < C))
    if h_ptr is not None and tl.program_id(1) == 0:
        tl.store(dg_ptr + i * B + b, rounded(tl.sum(total_g, axis=1), dg_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def _gram_kernel(
    gram_ptr,
    sq_a_ptr,
    sq_b_ptr,
    sums_ptr,
    weights_ptr,
    R,
    M,
    GAMMAS: tl.constexpr,
    COUNT: tl.constexpr,
    UPPER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """gram becomes W = dk / dgram; sums and weights receive the row sums of k and W."""
    COMPUTE: tl.constexpr = gram_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    sq_a = tl.load(sq_a_ptr + row, mask=row < R, other=0.0)
    sums = tl.zeros((ROWS, COLUMNS), COMPUTE)
    weights = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(tl.cdiv(M, COLUMNS)):
        column = step * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        inside = (row < R) & (column < M)
        gram = tl.load(gram_ptr + row * M + column, mask=inside, other=0.0)
        d = sq_a + tl.load(sq_b_ptr + column, mask=column < M, other=0.0) - 2 * gram
        d = tl.where(d < 0, 0.0, d)
        k = tl.zeros_like(gram)
        w = tl.zeros_like(gram)
        for s in tl.static_range(COUNT):
            e = tl.exp(-d * GAMMAS[s])
            k += e
            w += e * (2 * GAMMAS[s])
        pair = inside & (column > row) if UPPER else inside
        k = tl.where(pair, k, 0.0)
        w = tl.where(pair, w, 0.0)
        tl.store(gram_ptr + row * M + column, w, mask=inside)
        sums += k
        weights += w
    tl.store(sums_ptr + row, tl.sum(sums, axis=1)[:, None], mask=row < R)
    tl.store(weights_ptr + row, tl.sum(weights, axis=1)[:, None], mask=row < R)


# --- launchers ------------------------------------------------------------------------------------------------------------------


def _blocks(m: Tensor, gradient: bool) -> dict[str, Any]:
    """Tile of rows and of dimensions: so many that no register is spilled (sm_80, sm_90, sm_100)."""
    n, _, c = m.shape
    if INTERPRETED:
        return {"ROWS": min(power_of_two(n), 128), "DEPTH": min(power_of_two(c), 64)}
    return {"ROWS": 16, "DEPTH": min(power_of_two(c), 16 // (1 + gradient) // (1 + (m.dtype == torch.float64))), "num_warps": 4}


def pairwise_features(m: Tensor) -> Tensor:
    """o [N, B]."""
    n, b, c = m.shape
    o = m.new_empty(n, b)
    if o.numel() == 0:
        return o
    blocks = _blocks(m, False)
    with on_device(m):
        _features_kernel[(ceil_div(n, blocks["ROWS"]) * b,)](m, o, n, b, c, **blocks)
    return o


def _gradients(h: Tensor | None, g: Tensor, m: Tensor, dg: Tensor | None, dm: Tensor) -> None:
    n, b, c = m.shape
    blocks = _blocks(m, True)
    with on_device(m):
        _features_grad_kernel[(ceil_div(n, blocks["ROWS"]) * b, ceil_div(c, blocks["DEPTH"]))](h, g, m, dg, dm, n, b, c, **blocks)


def pairwise_features_grad(g: Tensor, m: Tensor) -> Tensor:
    """dm [N, B, C]."""
    dm = torch.empty_like(m)
    if m.numel() > 0:
        _gradients(None, g, m, None, dm)
    return dm


def pairwise_features_grad2(h: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """dg [N, B], dm [N, B, C]."""
    if m.numel() == 0:
        return torch.zeros_like(g), torch.zeros_like(m)
    dg, dm = torch.empty_like(g), torch.empty_like(m)
    _gradients(h, g, m, dg, dm)
    return dg, dm


def pairwise_gram_(gram: Tensor, sq_a: Tensor, sq_b: Tensor, gammas: list[float], upper: bool) -> tuple[Tensor, Tensor]:
    """sums [R], weights [R]; gram becomes W."""
    rows, columns = gram.shape
    sums, weights = torch.empty_like(sq_a), torch.empty_like(sq_a)
    if rows == 0:
        return sums, weights
    width = min(power_of_two(columns), 1 << 14 if INTERPRETED else GRAM_COLUMNS)
    height = min(power_of_two(rows), max((1 << 20 if INTERPRETED else GRAM_COLUMNS) // width, 1))
    with on_device(gram):
        _gram_kernel[(ceil_div(rows, height),)](
            gram,
            sq_a,
            sq_b,
            sums,
            weights,
            rows,
            columns,
            GAMMAS=tuple(gammas),
            COUNT=len(gammas),
            UPPER=upper,
            ROWS=height,
            COLUMNS=width,
            num_warps=4,
        )
    return sums, weights
