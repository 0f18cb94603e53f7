"""SGD with momentum for a training step, ready for CUDA-graph capture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gankern.training.optimizers._in_place import Ahead, InPlace, Slots


class SGD(InPlace, torch.optim.SGD):
    """torch.optim.SGD(fused=True), the same numbers: b <- momentum b + g, p <- p - lr b.

    Args: as for `Adam`, and
        momentum: >= 0; 0 keeps no state.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.0, capturable: bool = False) -> None:
        self.names = ("momentum_buffer",) if momentum else ()
        own, rate = self.begin(parameters, lr, capturable)
        torch.optim.SGD.__init__(self, own, lr=rate, momentum=momentum, fused=True)
        self.fill()

    def apply(self, parameters: list[Tensor], gradients: list[Any], slots: Sequence[list[Tensor]]) -> None:
        torch._fused_sgd_(
            parameters, gradients, *(slots or [[]]), lr=self.lr, momentum=self.param_groups[0]["momentum"], weight_decay=0.0,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip

    def ahead(self, parameters: list[Tensor], gradients: Sequence[Tensor], slots: Slots, count: Tensor) -> Ahead:
        moves, momentum = list(gradients), self.param_groups[0]["momentum"]
        if slots:
            moves = [momentum * b + g for b, g in zip(slots["momentum_buffer"], gradients, strict=True)]
        return [p - self.lr * b for p, b in zip(parameters, moves, strict=True)], dict.fromkeys(slots, moves)
