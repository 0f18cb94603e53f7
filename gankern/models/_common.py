"""What the networks share: checks of their arguments and inputs, and the hidden layers of an MLP in plain PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gankern import checks


def sizes(op: str, argument: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values, each an int >= 1; there may be none."""
    for value in values:
        checks.integer(op, f"each of {argument}", value, 1)
    return tuple(values)


def sample_shape(op: str, argument: str, values: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample, of at least one dimension."""
    if not values:
        checks.fail(ValueError, op, argument, "have at least one dimension", "()")
    return sizes(op, argument, values)


def square(op: str, argument: str, values: Sequence[int]) -> tuple[int, int]:
    """(channels, side) of the shape [C, S, S] of an image."""
    if len(values) != 3 or values[1] != values[2]:
        checks.fail(ValueError, op, argument, "be [C, S, S], the shape of a square image", list(values))
    channels, side, _ = sizes(op, argument, values)
    return channels, side


def rows(op: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse anything but [B, *shape]."""
    checks.tensor(op, argument, x)
    if x.dim() == 0 or tuple(x.shape[1:]) != shape:
        checks.fail(ValueError, op, argument, f"have shape [B, {', '.join(map(str, shape))}]", list(x.shape))


def labels_of(op: str, labels: Tensor, count: int) -> None:
    """Refuse anything but int64 [count]; the values are not looked at, as that would wait for the device."""
    checks.tensor(op, "labels", labels)
    checks.same_dtype(op, "labels", labels, torch.int64)
    checks.shape(op, "labels", labels, (count,))


def hidden(
    op: str, inputs: int, widths: Sequence[int], norm: bool, negative_slope: float, dropout: float
) -> tuple[list[nn.Module], int]:
    """Linear, BatchNorm1d if `norm`, LeakyReLU, and Dropout if `dropout` > 0, for each width; and what comes out of the last.

    A linear layer before a BatchNorm has no bias: the norm would take it away again.
    """
    checks.number(op, "negative_slope", negative_slope, 0.0)
    checks.number(op, "dropout", dropout, 0.0, 1.0)
    layers: list[nn.Module] = []
    for width in sizes(op, "widths", widths):
        layers += [nn.Linear(inputs, width, bias=not norm), *([nn.BatchNorm1d(width)] if norm else [])]
        layers += [nn.LeakyReLU(negative_slope), *([nn.Dropout(dropout)] if dropout > 0 else [])]
        inputs = width
    return layers, inputs
