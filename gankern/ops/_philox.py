"""The one source of random bits: Philox4x32-10, counter based, the same numbers on every backend.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. This file is the definition;
csrc/philox.h and Triton's `tl.philox` give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A fresh 63-bit seed, int64 [1], drawn from PyTorch's generator on `device`: reproducible, and anew in each graph replay."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Four 32-bit words for each 64-bit counter.

    Args:
        seed: int64 [1], the key.
        counter: int64, any shape.

    Returns:
        int64 [*counter.shape, 4], each word in [0, 2^32).
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_threshold(p: float) -> int:
    """An element is kept when its 16-bit draw is at least this: p in steps of 1/65536."""
    return round(p * 65536)


def dropout_keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of a [rows, columns] matrix dropout keeps.

    Element (m, n) takes 16-bit lane n % 8 of the Philox call with counter m * ceil(columns / 8) + n // 8; lane k is the low
    (k even) or high (k odd) half of word k // 2. One call is so one byte of the bit mask that the kernels store.

    Returns:
        bool [rows, columns].
    """
    groups = (columns + 7) // 8
    words = philox(seed, torch.arange(rows * groups, device=seed.device))
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(rows, groups * 8)
    return lanes[:, :columns] >= dropout_threshold(p)
