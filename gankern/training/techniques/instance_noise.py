"""InstanceNoise: the critic sees every sample, real or fake, through Gaussian noise that fades."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern.training import distributed
from gankern.training.techniques._technique import Technique


class InstanceNoise(Technique):
    """x + s e, e ~ N(0, 1) for each entry, s = instance_noise * max(0, 1 - step / instance_noise_steps); 0 steps: it stays.

    Source: Sønderby et al., "Amortised MAP inference for image super-resolution", ICLR 2017, section 3.2; Arjovsky and Bottou,
    "Towards principled methods for training generative adversarial networks", ICLR 2017, section 3.
    """

    def seen(self, samples: Tensor) -> Tensor:
        like: dict[str, Any] = {"device": samples.device, "dtype": samples.dtype, "generator": self.rng}
        noise = distributed.draw(lambda n: torch.randn(n, *samples.shape[1:], **like), len(samples))
        trainer, steps = self.trainer, self.config.instance_noise_steps
        if steps:
            share = trainer.steps_done / steps if trainer.clock is None else trainer.clock / steps
            noise *= max(0.0, 1.0 - share) if isinstance(share, float) else (1.0 - share).clamp_min(0.0)
        return samples + self.config.instance_noise * noise
