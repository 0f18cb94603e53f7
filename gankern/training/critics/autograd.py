"""Autograd: any critic that gives logits, by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gankern.losses import GANLoss
from gankern.regularizers import gradient_penalty
from gankern.training import distributed
from gankern.training.critics._common import PENALTIES, Critic, Loss, WithTerm, draw_eps, frozen, mixes


class Autograd(Critic):
    """By autograd, for any network. Real and fake go through it in one pass where that changes nothing."""

    def __init__(
        self,
        net: nn.Module,
        loss: GANLoss | None,
        penalty: str,
        penalty_weight: float,
        rng: torch.Generator,
        one_pass: bool | None = None,
    ) -> None:
        self.net, self.loss, self.rng = net, loss, rng
        self.penalty: dict[str, Any] = PENALTIES[penalty] and {**PENALTIES[penalty], "weight": penalty_weight}
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.one_pass = not mixes(net) if one_pass is None else one_pass

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        if self.one_pass:
            logits = self.net(torch.cat([real, fake]), *(torch.cat([c, c]) for c in labels))
            out = self.loss.discriminator_from(logits, logits.numel() * len(real) // (len(real) + len(fake)))
        else:
            out = self.loss.discriminator(self.net(real, *labels), self.net(fake, *labels))
        return self.penalised(out, *self.judged(self.net, real, fake, *labels), *labels)

    def judged(self, judge: Any, real: Tensor, fake: Tensor, *labels: Tensor) -> tuple[Any, Tensor, Tensor]:
        """What takes which inputs, as the penalty sees it: `judge` the samples; of a critic of packs, its layers the packs."""
        net: Any = self.net
        if self.penalty and not labels and hasattr(net, "inputs"):
            return net.layers, net.inputs(real), net.inputs(fake)
        return judge, real, fake

    def penalised(self, out: Loss, net: Callable[..., Tensor], real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        """The loss and the penalty of the scores that `net` gives."""
        if not self.penalty:
            return out
        eps = draw_eps(real, self.rng) if self.penalty["sample"] == "line" else None
        penalty = self.penalty
        if penalty["sample"] == "dragan" and distributed.joined():
            penalty, real = {**penalty, "sample": "real"}, self._around(real)
        cond = tuple(torch.cat([c, c]) for c in labels) if self.penalty["sample"] == "both" else labels
        term = gradient_penalty(
            net, real, fake, cond=cond or None, eps=eps, generator=self.rng, attached=fake.requires_grad, **penalty
        )
        return WithTerm(out, term)

    def _around(self, real: Tensor) -> Tensor:
        """The points of DRAGAN, by the standard deviation of the samples of all processes."""
        like: dict[str, Any] = {"dtype": real.dtype, "device": real.device, "generator": self.rng}
        noise = distributed.draw(lambda n: torch.rand(n, *real.shape[1:], **like), len(real))
        variance = distributed.mean((real - distributed.mean(real.mean())).square().mean())
        return real + 0.5 * variance.sqrt() * noise

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        with frozen(self.parameters):
            reference = self.net(real, *labels) if self.loss.relativistic else None
            return self.loss.generator(self.net(fake, *labels), reference)
