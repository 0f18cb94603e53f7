"""HistoricalAveraging: each network is drawn to the mean of what it has been."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gankern.training.techniques._technique import Technique

if TYPE_CHECKING:
    from gankern.training.optimizers import InPlace
    from gankern.training.trainer import Trainer


class HistoricalAveraging(Technique):
    """Each loss has w |theta - mean of theta_1 ... theta_t|² besides, theta_i the parameters before the network's i-th update.

    w is historical_averaging; theta_t are the present parameters, the mean is a constant of the gradient, 2 w (theta - mean), which
    is added to that of the loss. The losses of the log are without the term.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.3.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.means = {
            name: [p.detach().clone() for p in optimizer.parameters]
            for name, optimizer in (("g", trainer.opt_g), ("d", trainer.opt_d))
        }
        self.counts = {name: torch.zeros((), device=self.device) for name in self.means}

    @torch.no_grad()
    def gradients(self, optimizer: InPlace) -> None:
        name = {id(self.trainer.opt_g): "g", id(self.trainer.opt_d): "d"}[id(optimizer)]
        means, count = self.means[name], self.counts[name]
        count += 1
        away = torch._foreach_sub(optimizer.parameters, means)  # mean_t - mean_(t-1) = (theta - mean_(t-1)) / t
        torch._foreach_add_(means, torch._foreach_div(away, count))
        torch._foreach_mul_(away, 2 * self.config.historical_averaging * (1 - 1 / count))
        for p, gap in zip(optimizer.parameters, away, strict=True):
            p.grad = gap if p.grad is None else p.grad.add_(gap)

    def state(self) -> dict[str, Tensor]:
        means = {f"{name}.{i}": mean for name, values in self.means.items() for i, mean in enumerate(values)}
        return means | {f"{name}.count": count for name, count in self.counts.items()}
