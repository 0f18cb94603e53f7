"""Triton kernels and their launchers, one file an op, imported when the op first runs on this backend.

A launcher takes and returns plain tensors: no autograd, no checks. What holds for every file:
    every load is upcast at once: float64 stays, all else computes in float32; results are rounded once, when stored.
    offsets are 64 bits wide; every reduction has a fixed order and no float atomics, so the same input gives the same bits.
    functions named *_kernel are launched; the other jitted functions are parts of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels run under Triton's interpreter, on CPU tensors. It charges for each program and step, so blocks are as large as the data.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """The value in DTYPE, rounded to nearest even, as a GPU rounds; the interpreter truncates to bfloat16 and spoils subnormals."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)  # not NaN, whose bits could carry over into the sign
    return value.to(DTYPE)


@triton.jit
def leaky_relu(z, SLOPE: tl.constexpr):
    """With slope 0 it is 0 at minus infinity too, where the product is NaN."""
    if SLOPE == 0:
        return tl.where(z < 0, 0.0, z)
    return tl.where(z > 0, z, z * SLOPE)


def on_device(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current CUDA device: make it the one that holds `t`."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
