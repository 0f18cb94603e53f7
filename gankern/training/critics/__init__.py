"""How the critic is asked: its loss with its penalty, and the generator's loss through it.

Each way has
    discriminator(real, fake, *labels)   the critic's objective; `.backward()` gives its parameters their gradients
    generator(fake, real, *labels)       the generator's; `.backward()` gives the graph of `fake` its gradient
and both return what has `backward`, `loss`, `value`, `d_real` and `d_fake`, the last three detached scalars. `labels`: nothing, or
the classes [B] of a conditional critic. `choose` picks the way from the settings and takes the one pass wherever it fits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gankern.losses import GANLoss
from gankern.training.config import TrainConfig
from gankern.training.critics import one_pass as _one_pass
from gankern.training.critics._common import Loss, WithTerm, frozen
from gankern.training.critics.autograd import Autograd
from gankern.training.critics.one_pass import OnePass

__all__ = ["Autograd", "Critic", "Loss", "OnePass", "WithTerm", "choose", "frozen"]


class Critic(Protocol):
    loss: GANLoss

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss: ...
    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss: ...


def choose(net: nn.Module, config: TrainConfig, rng: torch.Generator, one_pass: bool | None = None) -> Critic:
    """The way to ask this critic for config.loss and config.penalty.

    Args:
        rng: source of the penalty's points.
        one_pass: whether real and fake may share a pass. None: yes, unless samples of a batch see each other in the critic.
    """
    loss = GANLoss(config.objective, config.label_smoothing, config.fake_label)
    settings = config.penalty, config.penalty_weight, rng
    if one_pass is not False and _one_pass.fits(net, config.penalty):
        return OnePass(net, loss, *settings)
    return Autograd(net, loss, *settings, one_pass)
