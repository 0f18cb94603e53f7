"""FeatureMatching: the generator's loss has the distance of the critic's mean features besides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gankern.training.critics.matching import Features
from gankern.training.techniques._technique import Technique

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer


class FeatureMatching(Technique):
    """feature_matching * |mean f(x) - mean f(G(z))|², f what the last linear layer of the critic takes; f(x) has no gradient.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.1.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.features = Features(trainer.discriminator)

    def term(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Tensor:
        seen = self.trainer.seen
        return self.config.feature_matching * self.features.distance(seen(fake), seen(real), *labels)[0]
