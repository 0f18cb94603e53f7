"""Whether there are several processes, and the sum over them, in place and as a differentiable function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_alone = False


def joined() -> bool:
    """Whether there is a process group, be it of one process, and this is not `alone`."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and not _alone


@contextmanager
def alone() -> Iterator[None]:
    """For what one process does while the others wait: inside there is no group."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def sum_(t: Tensor, group: Any = None) -> Tensor:
    """Make t, contiguous, the sum of the tensors that all processes of a torch.distributed group bring along.

    Raises:
        ConnectionError: a process is gone, or does not answer within the group's time limit.
    """
    try:
        torch.distributed.all_reduce(t, group=group)
    except RuntimeError as error:
        raise lost(error) from error
    return t


def lost(error: RuntimeError) -> ConnectionError:
    """What torch.distributed says when a process does not answer, in one sentence."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return ConnectionError(f"torch.distributed: every process must answer, got: {first}")


class AllReduce(Function):
    """`sum_` of a copy: (t, group) -> the sum over the processes. Its derivative is the same sum, to any order.

    Every process must make the same calls, and the same backward passes, in the same order.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return sum_(t.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return AllReduce.apply(grad, ctx.group), None
