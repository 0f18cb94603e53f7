"""Batches whose samples lie in memory one after another: what a kernel that works sample by sample takes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """Dense, the batch outermost and the channels innermost."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()]) and not t.is_contiguous()


def dense(t: Tensor, channels_last: bool) -> Tensor:
    """t as a contiguous [B, ...] tensor; channels-last, with the channels moved to the end, so that nothing is copied."""
    return (t.movedim(1, -1) if channels_last else t).contiguous()


def restored(t: Tensor, channels_last: bool) -> Tensor:
    """What `dense` was given."""
    return t.movedim(-1, 1) if channels_last else t


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
