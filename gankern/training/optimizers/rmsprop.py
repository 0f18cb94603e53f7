"""RMSprop for a training step, ready for CUDA-graph capture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gankern.training.optimizers._in_place import Ahead, InPlace, Slots, root


class RMSprop(InPlace, torch.optim.RMSprop):
    """torch.optim.RMSprop, the same numbers: v <- alpha v + (1 - alpha) g², p <- p - lr g / (sqrt(v) + eps).

    Args: as for `Adam`, and
        alpha: decay rate of the average, in [0, 1).

    Source: Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012, with PyTorch's alpha.
    """

    names, rule = ("square_avg",), ("alpha", "eps")

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, alpha: float = 0.99, eps: float = 1e-8, capturable: bool = False
    ) -> None:
        own, rate = self.begin(parameters, lr, capturable)
        torch.optim.RMSprop.__init__(self, own, lr=rate, alpha=alpha, eps=eps)
        self.fill()

    def apply(self, parameters: list[Tensor], gradients: list[Any], slots: Sequence[list[Tensor]]) -> None:
        group, (squares,) = self.param_groups[0], slots
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["alpha"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        if isinstance(self.lr, Tensor):
            torch._foreach_div_(roots, -self.lr)
            torch._foreach_addcdiv_(parameters, gradients, roots)
        else:
            torch._foreach_addcdiv_(parameters, gradients, roots, -self.lr)

    def ahead(self, parameters: list[Tensor], gradients: Sequence[Tensor], slots: Slots, count: Tensor) -> Ahead:
        group = self.param_groups[0]
        alpha, eps = group["alpha"], group["eps"]
        squares = [alpha * v + (1 - alpha) * g.square() for v, g in zip(slots["square_avg"], gradients, strict=True)]
        after = [p - self.lr * g / (root(v) + eps) for p, g, v in zip(parameters, gradients, squares, strict=True)]
        return after, {"square_avg": squares}
