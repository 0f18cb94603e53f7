"""The sentences of bad input: every public function refuses with `op: argument must expectation, got value`.

`ValueError` for a shape, range or device, `TypeError` for a type or dtype, `RuntimeError` for a backend that cannot run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(kind: type[Exception], op: str, argument: str, expectation: str, got: object) -> NoReturn:
    """Raise `kind` with the one sentence that every refusal of this package has."""
    raise kind(f"{op}: {argument} must {expectation}, got {got}")


def tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "be a torch.Tensor", type(value).__name__)
    if value.layout is not torch.strided or value.is_nested:
        fail(TypeError, op, argument, "be a dense tensor", "a nested one" if value.is_nested else value.layout)


def sequence(op: str, argument: str, value: object) -> None:
    if not isinstance(value, (list, tuple)):
        fail(TypeError, op, argument, "be a list or tuple", type(value).__name__)


def floating(op: str, argument: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        fail(TypeError, op, argument, "be float64, float32, bfloat16 or float16", _dtype(value.dtype))


def same_dtype(op: str, argument: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        fail(TypeError, op, argument, f"have dtype {_dtype(dtype)}", _dtype(value.dtype))


def same_device(op: str, argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        fail(ValueError, op, argument, f"be on {device}", value.device)


def shape(op: str, argument: str, value: Tensor, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        fail(ValueError, op, argument, f"have shape {list(expected)}", list(value.shape))


def dims(op: str, argument: str, value: Tensor, count: int) -> None:
    if value.dim() != count:
        fail(ValueError, op, argument, f"have {count} dimension{'s' * (count != 1)}", f"shape {list(value.shape)}")


def number(op: str, argument: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse anything but a finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(TypeError, op, argument, "be a number", type(value).__name__)
    if not (low <= value <= high and abs(value) <= sys.float_info.max):  # no isfinite: it cannot take an int beyond a float's range
        bounds = "" if low == -math.inf else f" >= {low:g}"
        wanted = f"be a finite number{bounds}" if high == math.inf else f"be in [{low:g}, {high:g}]"
        fail(ValueError, op, argument, wanted, value)


def integer(op: str, argument: str, value: int, low: int) -> None:
    """Refuse anything but an int >= low."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(TypeError, op, argument, "be an int", type(value).__name__)
    number(op, argument, value, low)


def one_of(op: str, argument: str, value: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    try:
        found = value in allowed
    except (RuntimeError, ValueError):  # what compares element by element, and has no truth value
        found = False
    if not found:
        fail(ValueError, op, argument, f"be one of {', '.join(map(str, allowed))}", repr(value))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
