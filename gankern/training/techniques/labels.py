"""Labels: the critic's targets drawn anew for each logit at each of its updates, between two numbers, some of them swapped."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.training import distributed
from gankern.training.critics import Gathered
from gankern.training.techniques._technique import Technique


class Labels(Technique):
    """Targets uniform in real_label_range and fake_label_range; with the probability label_noise a logit gets the other kind's.

    A kind without a range keeps its one target. Under an objective whose loss is linear in the target (all but the least squares;
    there its gradient is) the critic's expected gradient is that of the mean target: for a range its middle, with noise p and means
    r and f (1 - p) r + p f and (1 - p) f + p r. What is drawn adds the noise around it. A target beyond 1, such as 1.2 for binary
    cross entropy, is the same line continued: softplus(a) - 1.2 a.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.4 (smooth targets); Chintala, Denton,
    Arjovsky, Mathieu, "How to train a GAN?", NeurIPS 2016 workshop, tip 6 (ranges 0.7 to 1.2 and 0 to 0.3, swapped labels).
    """

    def before_critic(self, real: Tensor, fake: Tensor) -> None:
        config, loss = self.config, self.trainer.critic.loss
        targets = [
            self._draw(ends or (fixed, fixed), len(samples) // config.pack * distributed.world_size())
            for samples, ends, fixed in (
                (real, config.real_label_range, config.label_smoothing),
                (fake, config.fake_label_range, config.fake_label),
            )
        ]
        if config.label_noise:
            others = targets[1], targets[0]
            targets = [torch.where(self._uniform(len(t)) < config.label_noise, o, t) for t, o in zip(targets, others, strict=True)]
        if not isinstance(loss, Gathered):
            targets = [distributed.shard(t) for t in targets]
        loss.real_label, loss.fake_label = targets

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, device=self.device, generator=self.rng)

    def _draw(self, ends: tuple[float, ...], count: int) -> Tensor:
        low, high = ends
        return low + (high - low) * self._uniform(count) if low < high else torch.full((count,), low, device=self.device)
