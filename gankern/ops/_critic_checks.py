"""What `mlp_critic` and its kin refuse, each in one sentence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gankern import checks
from gankern.ops._critic_loss import OP

SIDED = ("one", "two")


def check_layers(op: str, argument: str, x: Any, weights: Any, biases: Any, slopes: Any, dropout: Any) -> torch.dtype | None:
    """Refuse bad layers and samples; returns the dtype that autocast asks for, or None."""
    checks.tensor(op, argument, x)
    checks.floating(op, argument, x)
    if x.dim() < 2:
        checks.fail(ValueError, op, argument, "have shape [B, *]", f"shape {list(x.shape)}")
    checks.sequence(op, "weights", weights)
    checks.sequence(op, "biases", biases)
    if not weights:
        checks.fail(ValueError, op, "weights", "hold at least one matrix", "none")
    if len(biases) != len(weights):
        checks.fail(ValueError, op, "biases", f"hold {len(weights)} vectors or None, as many as weights", len(biases))
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    inputs = math.prod(x.shape[1:])
    dtype, device = None if autocast else x.dtype, x.device
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if _fits(w, dtype, device) and (b is None or _fits(b, dtype, device)):  # at a glance: a third of the time
            size = w.shape
            if len(size) == 2 and size[1] == inputs and (b is None or b.shape == size[:1]):
                inputs = size[0]
                continue
        checks.tensor(op, f"weights[{i}]", w)
        checks.dims(op, f"weights[{i}]", w, 2)
        if w.shape[1] != inputs:
            checks.fail(ValueError, op, f"weights[{i}]", f"have {inputs} columns", f"shape {list(w.shape)}")
        inputs = w.shape[0]
        for name, value in ((f"weights[{i}]", w), (f"biases[{i}]", b)):
            if value is not None:
                checks.tensor(op, name, value)
                checks.same_device(op, name, value, x.device)
                checks.floating(op, name, value)
                if not autocast:
                    checks.same_dtype(op, name, value, x.dtype)
        if b is not None:
            checks.shape(op, f"biases[{i}]", b, (inputs,))
    if inputs != 1:
        checks.fail(
            ValueError, op, f"weights[{len(weights) - 1}]", "have one row: the critic's score", f"shape {list(weights[-1].shape)}"
        )
    for name, value, high in (("slopes", slopes, math.inf), ("dropout", dropout, 1.0)):
        values = [value] if isinstance(value, (int, float)) else value
        if not isinstance(values, (list, tuple)):
            checks.fail(TypeError, op, name, "be a number, or one for each hidden layer", type(value).__name__)
        if values is value and len(values) != len(weights) - 1:
            checks.fail(ValueError, op, name, f"hold {len(weights) - 1} numbers, one for each hidden layer", len(values))
        for v in values:
            checks.number(op, name, v, 0.0, high)
    return torch.get_autocast_dtype(kind) if autocast else None


def _fits(t: Any, dtype: torch.dtype | None, device: torch.device) -> bool:
    return isinstance(t, Tensor) and t.dtype == dtype and t.device == device and t.layout is torch.strided


def check_penalty(op: str, weight: Any, target: Any, sided: Any) -> None:
    checks.number(op, "penalty_weight" if op == OP else "weight", weight, 0.0)
    checks.number(op, "target", target, 0.0)
    checks.one_of(op, "sided", sided, SIDED)


def check_rows(op: str, argument: str, value: Any, other: str, like: Tensor) -> None:
    checks.tensor(op, argument, value)
    checks.same_dtype(op, argument, value, like.dtype)
    checks.same_device(op, argument, value, like.device)
    if value.dim() < 2 or math.prod(value.shape[1:]) != math.prod(like.shape[1:]):
        wanted = f"have {math.prod(like.shape[1:])} elements a sample, as {other}"
        checks.fail(ValueError, op, argument, wanted, f"shape {list(value.shape)}")
