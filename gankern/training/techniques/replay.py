"""Replay: half of the fakes from which the critic learns were made by earlier generators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gankern.training import distributed
from gankern.training.techniques._technique import Technique

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer


class Replay(Technique):
    """A buffer of `replay` fakes. Of each B fakes of a critic's update h = B // 2 (of a packed critic, whole packs) come from it.

    They are drawn without replacement, then h of the new fakes take the places of others, drawn alike: free places first. While the
    buffer holds fewer than h, new fakes stand in. Several processes have the fakes of all in buffers that are alike.

    Source: Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", CVPR 2017, section
    2.3.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        sample = trainer.sample(torch.zeros(1, self.config.z_dim))
        self.buffer = torch.zeros(self.config.replay, *sample.shape[1:], device=self.device)
        self.filled = torch.zeros(self.config.replay, device=self.device)  # 1 where there is a fake

    def fakes(self, fake: Tensor) -> Tensor:
        pack, fake = self.config.pack, distributed.gather(fake)
        half = len(fake) // pack // 2 * pack
        if not half:
            return distributed.shard(fake)
        order = self._uniform().add_(self.filled).topk(half).indices  # those that are there first
        there = self.filled[order].reshape(half, *[1] * (fake.dim() - 1))
        old = torch.where(there > 0, self.buffer[order].to(fake.dtype), fake[-half:])
        places = self._uniform().sub_(self.filled).topk(half).indices  # free ones first
        self.buffer.index_copy_(0, places, fake[:half].to(self.buffer.dtype))
        self.filled.index_fill_(0, places, 1.0)
        return distributed.shard(torch.cat([fake[:-half], old]))

    def _uniform(self) -> Tensor:
        return torch.rand(len(self.filled), device=self.device, generator=self.rng)

    def state(self) -> dict[str, Tensor]:
        return {"buffer": self.buffer, "filled": self.filled}
