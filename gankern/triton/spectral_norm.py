"""spectral_norm of many weights: each weight [OUTER, ROWS, INNER] in memory, its matrix [ROWS, OUTER * INNER].

Contract in gankern/ops/spectral_norm.py. Every kernel runs over all weights: it reads pointers and shapes from a table on the
device, which a kernel fills from its own arguments, so that a captured CUDA graph needs nothing from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, on_device, rounded

# A row of the table, int64: what a kernel must know of one weight.
W, G, OUT, U0, V0, STATE, PARTIALS, OUTER, ROWS, INNER, FIELDS = map(tl.constexpr, range(11))
FILL = 32  # entries of the table that one launch fills
SHARE = tl.constexpr(512)  # rows of one program of the transposed product
DOT = tl.constexpr(8192)  # elements of one program of the dot product

if INTERPRETED:  # it charges for each program and each step
    ROW_BLOCK, COLUMN_BLOCK, DEPTH, ELEMENTS = 32, 256, 512, 8192
else:
    ROW_BLOCK, COLUMN_BLOCK, DEPTH, ELEMENTS = 8, 32, 128, 1024

_UNSPECIALISED = ["first", *(f"x{i}" for i in range(FILL))]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _fill_kernel(
    table_ptr, first: tl.int64,
    x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64, x4: tl.int64, x5: tl.int64, x6: tl.int64, x7: tl.int64,
    x8: tl.int64, x9: tl.int64, x10: tl.int64, x11: tl.int64, x12: tl.int64, x13: tl.int64, x14: tl.int64, x15: tl.int64,
    x16: tl.int64, x17: tl.int64, x18: tl.int64, x19: tl.int64, x20: tl.int64, x21: tl.int64, x22: tl.int64, x23: tl.int64,
    x24: tl.int64, x25: tl.int64, x26: tl.int64, x27: tl.int64, x28: tl.int64, x29: tl.int64, x30: tl.int64, x31: tl.int64,
):  # fmt: skip
    """table[first + i] = x_i; the annotations keep small and large numbers from being two kernels."""
    at = table_ptr + first
    values = (
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, x16, x17, x18, x19, x20, x21, x22, x23,
        x24, x25, x26, x27, x28, x29, x30, x31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(at + i, values[i])


@triton.jit
def _entry(table_ptr, blocks_ptr, N):
    """The weight of this program (its row of the table) and which of the weight's blocks it is; blocks [N + 1] are running sums."""
    program = tl.program_id(0)
    k = 0
    while (k + 1 < N) & (tl.load(blocks_ptr + k + 1) <= program):
        k += 1
    return table_ptr + k * FIELDS, program.to(tl.int64) - tl.load(blocks_ptr + k)


@triton.jit
def _pointer(entry, field: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(entry + field).to(tl.pointer_type(DTYPE))


@triton.jit
def _length(x_ptr, n, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The 2-norm of n numbers."""
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        total += x * x
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit
def _at_least(x, low):
    """NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit(do_not_specialize=["N"])
def _rows_kernel(
    table_ptr, blocks_ptr, N,
    FIRST: tl.constexpr, EVALUATE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    ROW_BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """s = W v into u of the state, or in an evaluation into the partials."""
    entry, block = _entry(table_ptr, blocks_ptr, N)
    outer, rows, inner = tl.load(entry + OUTER), tl.load(entry + ROWS), tl.load(entry + INNER)
    columns = outer * inner
    w_ptr, state = _pointer(entry, W, DTYPE), _pointer(entry, STATE, COMPUTE)
    h = block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    total = tl.zeros((ROW_BLOCK, DEPTH), COMPUTE)
    for start in range(0, columns, DEPTH):
        j = start + tl.arange(0, DEPTH)[None, :]
        a = j // inner
        w = tl.load(w_ptr + (a * rows + h) * inner + (j - a * inner), mask=(h < rows) & (j < columns), other=0.0).to(COMPUTE)
        if FIRST:
            v = tl.load(_pointer(entry, V0, DTYPE) + j, mask=j < columns, other=0.0).to(COMPUTE)
        else:
            v = tl.load(state + rows + j, mask=j < columns, other=0.0)
        total += w * v
    s_ptr = _pointer(entry, PARTIALS, COMPUTE) if EVALUATE else state
    i = block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    tl.store(s_ptr + i, tl.sum(total, axis=1), mask=i < rows)


@triton.jit(do_not_specialize=["N"])
def _columns_kernel(
    table_ptr, blocks_ptr, N,
    EPS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partials [shares, columns] = Wᵀ u, u = s / |s|."""
    entry, block = _entry(table_ptr, blocks_ptr, N)
    outer, rows, inner = tl.load(entry + OUTER), tl.load(entry + ROWS), tl.load(entry + INNER)
    columns = outer * inner
    strips = tl.cdiv(columns, COLUMN_BLOCK)
    share = block // strips
    w_ptr, state = _pointer(entry, W, DTYPE), _pointer(entry, STATE, COMPUTE)
    length = _at_least(_length(state, rows, 1024, COMPUTE), EPS)
    j = (block - share * strips) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)[None, :]
    a = j // inner
    end = tl.minimum(rows, (share + 1) * SHARE)
    total = tl.zeros((DEPTH, COLUMN_BLOCK), COMPUTE)
    for start in range(share * SHARE, end, DEPTH):
        h = start + tl.arange(0, DEPTH)[:, None]
        w = tl.load(w_ptr + (a * rows + h) * inner + (j - a * inner), mask=(h < end) & (j < columns), other=0.0).to(COMPUTE)
        total += w * (tl.load(state + h, mask=h < end, other=0.0) / length)
    tl.store(_pointer(entry, PARTIALS, COMPUTE) + share * columns + j, tl.sum(total, axis=0)[None, :], mask=j < columns)


@triton.jit
def _finish_kernel(
    table_ptr, EPS: tl.constexpr, EVALUATE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """u, v and sigma of one weight a program, from s and the shares of Wᵀ u; in an evaluation from the given ones and W v."""
    entry = table_ptr + tl.program_id(0) * FIELDS
    rows = tl.load(entry + ROWS)
    columns = tl.load(entry + OUTER) * tl.load(entry + INNER)
    state, partials = _pointer(entry, STATE, COMPUTE), _pointer(entry, PARTIALS, COMPUTE)
    if EVALUATE:
        u0_ptr, v0_ptr = _pointer(entry, U0, DTYPE), _pointer(entry, V0, DTYPE)
        total = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, rows, BLOCK):
            h = start + tl.arange(0, BLOCK)
            u = tl.load(u0_ptr + h, mask=h < rows, other=0.0).to(COMPUTE)
            total += u * tl.load(partials + h, mask=h < rows, other=0.0)
            tl.store(state + h, u, mask=h < rows)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK)
            tl.store(state + rows + j, tl.load(v0_ptr + j, mask=j < columns, other=0.0).to(COMPUTE), mask=j < columns)
        tl.store(state + rows + columns, tl.sum(total, axis=0))
    else:
        length = _at_least(_length(state, rows, BLOCK, COMPUTE), EPS)
        shares = tl.cdiv(rows, SHARE)
        squares = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK)
            t = tl.zeros((BLOCK,), COMPUTE)
            for k in range(shares):
                t += tl.load(partials + k * columns + j, mask=j < columns, other=0.0)
            squares += t * t
        raw = tl.sqrt(tl.sum(squares, axis=0))
        size = _at_least(raw, EPS)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK)
            t = tl.zeros((BLOCK,), COMPUTE)
            for k in range(shares):
                t += tl.load(partials + k * columns + j, mask=j < columns, other=0.0)
            tl.store(state + rows + j, t / size, mask=j < columns)
        for start in range(0, rows, BLOCK):
            h = start + tl.arange(0, BLOCK)
            tl.store(state + h, tl.load(state + h, mask=h < rows, other=0.0) / length, mask=h < rows)
        tl.store(state + rows + columns, raw * (raw / size))  # u . W v = t . v


@triton.jit(do_not_specialize=["N"])
def _scale_kernel(table_ptr, blocks_ptr, N, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ELEMENTS: tl.constexpr):
    """out = w / sigma."""
    entry, block = _entry(table_ptr, blocks_ptr, N)
    rows = tl.load(entry + ROWS)
    columns = tl.load(entry + OUTER) * tl.load(entry + INNER)
    sigma = tl.load(_pointer(entry, STATE, COMPUTE) + rows + columns)
    i = block * ELEMENTS + tl.arange(0, ELEMENTS)
    w = tl.load(_pointer(entry, W, DTYPE) + i, mask=i < rows * columns, other=0.0).to(COMPUTE)
    tl.store(_pointer(entry, OUT, DTYPE) + i, rounded(w / sigma, DTYPE), mask=i < rows * columns)


@triton.jit(do_not_specialize=["N"])
def _dot_kernel(table_ptr, blocks_ptr, N, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """partials [block of the weight] = <g, w> of DOT elements."""
    entry, block = _entry(table_ptr, blocks_ptr, N)
    n = tl.load(entry + OUTER) * tl.load(entry + ROWS) * tl.load(entry + INNER)
    g_ptr, w_ptr = _pointer(entry, G, DTYPE), _pointer(entry, W, DTYPE)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, DOT, BLOCK):
        i = block * DOT + start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i, mask=i < n, other=0.0).to(COMPUTE)
        total += g * tl.load(w_ptr + i, mask=i < n, other=0.0).to(COMPUTE)
    tl.store(_pointer(entry, PARTIALS, COMPUTE) + block, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["N"])
def _grad_kernel(table_ptr, blocks_ptr, N, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ELEMENTS: tl.constexpr):
    """out = (g - <g, w / sigma> u vᵀ) / sigma."""
    entry, block = _entry(table_ptr, blocks_ptr, N)
    rows, inner = tl.load(entry + ROWS), tl.load(entry + INNER)
    columns = tl.load(entry + OUTER) * inner
    n = rows * columns
    partials, u_ptr = _pointer(entry, PARTIALS, COMPUTE), _pointer(entry, STATE, COMPUTE)
    total = tl.zeros((256,), COMPUTE)
    for start in range(0, tl.cdiv(n, DOT), 256):
        k = start + tl.arange(0, 256)
        total += tl.load(partials + k, mask=k < tl.cdiv(n, DOT), other=0.0)
    sigma = tl.load(u_ptr + rows + columns)
    factor = tl.sum(total, axis=0) / sigma
    i = block * ELEMENTS + tl.arange(0, ELEMENTS)
    run = i // inner
    a = run // rows
    u = tl.load(u_ptr + (run - a * rows), mask=i < n, other=0.0)
    v = tl.load(u_ptr + rows + a * inner + (i - run * inner), mask=i < n, other=0.0)
    g = tl.load(_pointer(entry, G, DTYPE) + i, mask=i < n, other=0.0).to(COMPUTE)
    tl.store(_pointer(entry, OUT, DTYPE) + i, rounded((g - factor * u * v) / sigma, DTYPE), mask=i < n)


# --- launchers ------------------------------------------------------------------------------------------------------------------

_TL = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Shape = tuple[int, int, int]  # outer, rows, inner


def _shape(weight: Tensor, dim: int) -> Shape:
    return weight.shape[:dim].numel(), weight.shape[dim], weight.shape[dim + 1 :].numel()


def _accumulate(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class _Launcher:
    """The table of a call's weights, and of each kernel's blocks, in one int64 tensor."""

    def __init__(
        self, like: Tensor, entries: list[list[int]], counts: Sequence[Callable[[Shape], int]], shapes: list[Shape]
    ) -> None:
        self.n, self.like = len(entries), like
        values, self.grids, self.starts = [x for entry in entries for x in entry], [], []
        for count in counts:
            self.starts.append(len(values))
            total = 0
            values.append(total)
            for shape in shapes:
                total += count(shape)
                values.append(total)
            self.grids.append(total)
        self.table = torch.empty(ceil_div(len(values), FILL) * FILL, dtype=torch.int64, device=like.device)
        values += [0] * (self.table.numel() - len(values))
        for first in range(0, len(values), FILL):
            _fill_kernel[(1,)](self.table, first, *values[first : first + FILL])
        self.types = {"DTYPE": _TL[like.dtype], "COMPUTE": _TL[_accumulate(like)]}

    def run(self, kernel: triton.JITFunction, which: int, **constants: object) -> None:
        if self.grids[which]:
            kernel[(self.grids[which],)](self.table, self.table[self.starts[which] :], self.n, **self.types, **constants)


def spectral_norm(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int], iterations: int, eps: float
) -> tuple[list[Tensor], Tensor]:
    """W / sigma of each weight, and the state."""
    first, compute = weights[0], _accumulate(weights[0])
    shapes = [_shape(w, dim) for w, dim in zip(weights, dims, strict=True)]
    ys = [torch.empty_like(w) for w in weights]
    state = first.new_empty(sum(o * i + r + 1 for o, r, i in shapes), dtype=compute)
    sums = [ceil_div(r, SHARE.value) * o * i if iterations else r for o, r, i in shapes]
    partials = first.new_empty(sum(sums), dtype=compute)
    entries, at, sum_at = [], state.data_ptr(), partials.data_ptr()
    for w, y, left, right, shape, size in zip(weights, ys, u, v, shapes, sums, strict=True):
        entries.append([w.data_ptr(), 0, y.data_ptr(), left.data_ptr(), right.data_ptr(), at, sum_at, *shape])
        at += (shape[0] * shape[2] + shape[1] + 1) * compute.itemsize
        sum_at += size * compute.itemsize
    counts = (
        lambda s: ceil_div(s[1], ROW_BLOCK),
        lambda s: ceil_div(s[0] * s[2], COLUMN_BLOCK) * ceil_div(s[1], SHARE.value),
        lambda s: ceil_div(s[0] * s[1] * s[2], ELEMENTS),
    )
    with on_device(first):
        launcher = _Launcher(first, entries, counts, shapes)
        evaluate = iterations == 0
        for i in range(max(iterations, 1)):
            launcher.run(_rows_kernel, 0, FIRST=i == 0, EVALUATE=evaluate, ROW_BLOCK=ROW_BLOCK, DEPTH=DEPTH)
            if not evaluate:
                launcher.run(_columns_kernel, 1, EPS=eps, COLUMN_BLOCK=COLUMN_BLOCK, DEPTH=min(DEPTH, 64))
            _finish_kernel[(len(shapes),)](launcher.table, EPS=eps, EVALUATE=evaluate, BLOCK=1024, **launcher.types)
        launcher.run(_scale_kernel, 2, ELEMENTS=ELEMENTS)
    return ys, state


def spectral_norm_grad(
    grads: Sequence[Tensor], weights: Sequence[Tensor], state: Tensor, offsets: Sequence[int], dims: Sequence[int]
) -> list[Tensor]:
    """dW of each weight."""
    first = weights[0]
    shapes = [_shape(w, dim) for w, dim in zip(weights, dims, strict=True)]
    outs = [torch.empty_like(w) for w in weights]
    sums = [ceil_div(w.numel(), DOT.value) for w in weights]
    partials = state.new_empty(sum(sums))
    entries, sum_at = [], partials.data_ptr()
    for w, g, out, offset, shape, size in zip(weights, grads, outs, offsets, shapes, sums, strict=True):
        at = state.data_ptr() + offset * state.itemsize
        entries.append([w.data_ptr(), g.data_ptr(), out.data_ptr(), 0, 0, at, sum_at, *shape])
        sum_at += size * state.itemsize
    counts = (lambda s: ceil_div(s[0] * s[1] * s[2], DOT.value), lambda s: ceil_div(s[0] * s[1] * s[2], ELEMENTS))
    with on_device(first):
        launcher = _Launcher(first, entries, counts, shapes)
        launcher.run(_dot_kernel, 0, BLOCK=ELEMENTS)
        launcher.run(_grad_kernel, 1, ELEMENTS=ELEMENTS)
    return outs
