"""Feature matching: the generator brings the mean features of its samples to those of the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.training import distributed
from gankern.training.critics._common import MINIBATCH, Computed, Critic, Loss, frozen


class Features:
    """The features by which a critic judges: what its last linear layer takes, without minibatch features.

    Args:
        net: samples (and classes) -> scores.

    Raises:
        ValueError: it has no linear layer.
    """

    def __init__(self, net: nn.Module) -> None:
        linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
        if not linears:
            checks.fail(ValueError, "train", "feature_matching", "have a critic with a linear layer", type(net).__name__)
        self.net, self.last = net, next((m for m in net.modules() if isinstance(m, MINIBATCH)), linears[-1])
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.told = not getattr(net, "classifies", False)  # the labels

    def of(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, F], scores) of samples."""
        found: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            scores: Any = self.net(x, *labels) if self.told else self.net(x)
        finally:
            handle.remove()
        return found[-1], scores[0] if isinstance(scores, tuple) else scores

    def distance(self, fake: Tensor, real: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(|mean f(real) - mean f(fake)|² [], scores of real, scores of fake); only fake has a gradient."""
        with torch.no_grad():
            wanted, of_real = self.of(real, *labels)
        with frozen(self.parameters):
            got, of_fake = self.of(fake, *labels)
        gap = distributed.mean(got.float().mean(0) - wanted.float().mean(0))
        return gap.square().sum(), of_real, of_fake


class Matching(Critic):
    """The critic's side is `critic`'s; the generator minimises |mean f(x) - mean f(G(z))|² alone, f the critic's `Features`.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.1.
    """

    def __init__(self, critic: Critic, net: nn.Module) -> None:
        self.critic, self.features, self.loss = critic, Features(net), critic.loss

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        return self.critic.discriminator(real, fake, *labels)

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        loss, of_real, of_fake = self.features.distance(fake, real, *labels)
        return Computed(loss, *(torch.sigmoid(scores.detach().float()).mean() for scores in (of_real, of_fake)))
