"""Auxiliary: the critic tells the class of a sample besides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.losses import GANLoss
from gankern.training.critics._common import Loss, WithTerm, frozen
from gankern.training.critics.autograd import Autograd


class Auxiliary(Autograd):
    """Both networks minimise, besides the adversarial loss, the cross entropy of the class that the critic reads off a sample.

    With CE = -log P(class), critic: the adversarial loss + w (mean CE(real) + mean CE(fake)); generator: its own + w mean CE(fake).

    Args:
        net: samples -> (logits [B], logits of the classes [B, classes]); it is not told the labels, and has `classifies` = True.
        class_weight: w, >= 0.
        Others as `Autograd`.

    Source: Odena, Olah, Shlens, "Conditional image synthesis with auxiliary classifier GANs", ICML 2017, eq. 2 and 3.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: GANLoss,
        penalty: str,
        penalty_weight: float,
        rng: torch.Generator,
        one_pass: bool | None = None,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__(net, loss, penalty, penalty_weight, rng, one_pass)
        self.class_weight = class_weight

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        (wanted,) = labels
        if self.one_pass:
            logits, classes = self.net(torch.cat([real, fake]))
            out: Loss = self.loss.discriminator_from(logits, len(real))
            entropy = 2 * F.cross_entropy(classes, torch.cat([wanted, wanted]))
        else:
            (of_real, classes), (of_fake, more) = self.net(real), self.net(fake)
            out = self.loss.discriminator(of_real, of_fake)
            entropy = F.cross_entropy(classes, wanted) + F.cross_entropy(more, wanted)
        return self.penalised(WithTerm(out, self.class_weight * entropy), lambda x: self.net(x)[0], real, fake)

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        (wanted,) = labels
        with frozen(self.parameters):
            reference = self.net(real)[0] if self.loss.relativistic else None
            logits, classes = self.net(fake)
        return WithTerm(self.loss.generator(logits, reference), self.class_weight * F.cross_entropy(classes, wanted))
