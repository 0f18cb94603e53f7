"""Precision of the training step: fp32, tf32 or bf16."""

from __future__ import annotations

import time
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


def bf16_cost(device: torch.device, rounds: int = 5) -> float:
    """Time of a bfloat16 product on this device over that of the same one in float32: below 1 where the hardware has such products.

    Measured on one of 256x1024 by 1024x1024, in some ten milliseconds.
    """
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            times.append(time.perf_counter() - start)
        took[dtype] = min(times)
    return took[torch.bfloat16] / took[torch.float32]


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
