"""Outcome: what an adversarial loss returns besides the loss."""

from __future__ import annotations

from torch import Tensor


class Outcome:
    """Detached numbers of the pass that computed a loss: `_loss`, and `stats` [3]. NaN where there is no logit."""

    __slots__ = ("_loss", "stats")

    _loss: Tensor
    stats: Tensor

    @property
    def value(self) -> Tensor:
        """The loss, detached."""
        return self._loss.detach()

    @property
    def d_real(self) -> Tensor:
        """Mean sigmoid of the real logits, D(x); NaN without a real half."""
        return self.stats[..., 0]

    @property
    def d_fake(self) -> Tensor:
        """Mean sigmoid of the fake logits, D(G(z)); NaN without a fake half."""
        return self.stats[..., 1]

    @property
    def accuracy(self) -> Tensor:
        """Share of logits that the critic calls right: real ones > 0, fake ones <= 0."""
        return self.stats[..., 2]
