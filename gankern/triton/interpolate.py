"""interpolate: real, fake and their mixture [B, D], eps [B]. Contract in gankern/ops/interpolate.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton import INTERPRETED, ceil_div, on_device, power_of_two, rounded


@triton.jit
def _interpolate_kernel(real_ptr, fake_ptr, eps_ptr, seed_ptr, out_ptr, used_ptr, B, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (i, j) takes ROWS samples and COLUMNS of their elements; those with j = 0 store the eps."""
    COMPUTE: tl.constexpr = used_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if eps_ptr is None:
        low = row.to(tl.uint32)
        zero = low * 0
        word, _, _, _ = tl.philox(tl.load(seed_ptr + zero), low, (row >> 32).to(tl.uint32), zero, zero)
        eps = (word >> 8).to(tl.int32).to(COMPUTE) * 5.9604644775390625e-08  # 2^-24
    else:
        eps = tl.load(eps_ptr + row, mask=row < B, other=0.0)
    at = row[:, None] * D + column
    inside = (row[:, None] < B) & (column < D)
    x = tl.load(real_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    y = tl.load(fake_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    mixed = eps[:, None] * x + (1.0 - eps[:, None]) * y
    tl.store(out_ptr + at, rounded(mixed, out_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(used_ptr + row, eps, mask=row < B)


def interpolate(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_hat like real, eps [B]."""
    out = torch.empty_like(real)
    used = real.new_empty(real.shape[0], dtype=torch.float64 if real.dtype == torch.float64 else torch.float32)
    if out.numel() == 0:
        return out, used
    b = real.shape[0]
    d = real.numel() // b
    columns = min(power_of_two(d), 1 << 16 if INTERPRETED else 1024)
    rows = min(power_of_two(b), max((1 << 16 if INTERPRETED else 1024) // columns, 1))
    with on_device(real):
        _interpolate_kernel[(ceil_div(b, rows), ceil_div(d, columns))](
            real, fake, eps, seed, out, used, b, d, ROWS=rows, COLUMNS=columns
        )
    return out, used
