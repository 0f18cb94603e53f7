"""Precision of the training step: fp32, tf32 or bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from gankern import checks

NAMES = ("fp32", "tf32", "bf16")


def check(name: str, device: torch.device) -> None:
    """Raise ValueError if this precision cannot be had on this device."""
    checks.one_of("train", "precision", name, NAMES)
    if name == "tf32" and device.type != "cuda":
        checks.fail(ValueError, "train", "precision", f"be fp32 or bf16 on {device.type}", "tf32")


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """For forward passes: bfloat16 products under "bf16", else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if name == "bf16" else nullcontext()


@contextmanager
def products(name: str, device: torch.device) -> Iterator[None]:
    """For a whole step: float32 products and convolutions on CUDA run in tf32 under "tf32", in true float32 else."""
    if device.type != "cuda":
        yield
        return
    # not allow_tf32, which raises once anybody has set fp32_precision
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
