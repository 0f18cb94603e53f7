"""GANLoss: one adversarial objective as a pair of losses, computed by the `gan_loss` op."""

from __future__ import annotations

from torch import Tensor, nn

from gankern import checks
from gankern.ops._objectives import OBJECTIVES
from gankern.ops.gan_loss import GanLoss, gan_loss


class GANLoss(nn.Module):
    """What critic and generator minimise. Each method returns `GanLoss`: `loss`, and detached `d_real`, `d_fake`, `accuracy`.

    Args:
        objective: "non-saturating" or "minimax", as in `gankern.gan_loss`.
        real_label: the critic's target for real samples, in [0, 1]; 0.9 is one-sided label smoothing.
        fake_label: the critic's target for fake samples, in [0, 1].

    The labels are the critic's alone: the generator always aims at D(G(z)) = 1 (Salimans et al. 2016, section 3.4, smooth
    nothing but the critic's positive targets).

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    def __init__(self, objective: str = "non-saturating", real_label: float = 1.0, fake_label: float = 0.0) -> None:
        super().__init__()
        checks.one_of("GANLoss", "objective", objective, OBJECTIVES)
        checks.number("GANLoss", "real_label", real_label, 0.0, 1.0)
        checks.number("GANLoss", "fake_label", fake_label, 0.0, 1.0)
        self.objective = objective
        self.real_label = float(real_label)
        self.fake_label = float(fake_label)

    def discriminator(self, real: Tensor, fake: Tensor) -> GanLoss:
        """The critic's loss from its logits of real and of fake samples, any shapes."""
        return gan_loss(real, fake, self.objective, real_label=self.real_label, fake_label=self.fake_label)

    def discriminator_from(self, logits: Tensor, n_real: int) -> GanLoss:
        """The critic's loss from one vector of logits whose first `n_real` entries belong to real samples."""
        return gan_loss(logits, None, self.objective, n_real=n_real, real_label=self.real_label, fake_label=self.fake_label)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> GanLoss:
        """The generator's loss from the critic's logits of fake samples; `real` logits only enter the statistics."""
        return gan_loss(real, fake, self.objective, "generator")

    def extra_repr(self) -> str:
        return f"{self.objective!r}, real_label={self.real_label:g}, fake_label={self.fake_label:g}"
