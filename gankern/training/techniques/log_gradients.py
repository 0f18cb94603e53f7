"""LogGradients: the norms of both networks' gradients, beside the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gankern.training.techniques._technique import Technique

if TYPE_CHECKING:
    from gankern.training.optimizers import InPlace
    from gankern.training.trainer import Trainer


class LogGradients(Technique):
    """g_grad_norm and d_grad_norm: the 2-norm over all parameters, before clipping; d_ at the critic's last update of the step."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.norms = {name: torch.zeros((), device=self.device) for name in ("g_grad_norm", "d_grad_norm")}

    @torch.no_grad()
    def gradients(self, optimizer: InPlace) -> None:
        norms = torch._foreach_norm([p.grad for p in optimizer.parameters if p.grad is not None])
        name = "g_grad_norm" if optimizer is self.trainer.opt_g else "d_grad_norm"
        self.norms[name].copy_(torch.linalg.vector_norm(torch.stack(norms)))

    def columns(self) -> dict[str, Tensor]:
        return self.norms
