"""GANLoss: one adversarial objective as a pair of losses, computed by the `gan_loss` op."""

from __future__ import annotations

import math
from typing import NoReturn

from torch import Tensor, nn

from gankern import checks
from gankern.ops._objectives import OBJECTIVES, Label
from gankern.ops.gan_loss import GanLoss, gan_loss


class GANLoss(nn.Module):
    """What critic and generator minimise. Each method returns `GanLoss`: `loss`, and detached `d_real`, `d_fake`, `accuracy`.

    Args:
        objective: a row of the table of `gankern.gan_loss`, which has the formulas, their sources and the expected equilibrium
            values: "non-saturating", "minimax", "maximum-likelihood", "lsgan", "hinge", "wgan", "fgan-..." or "relativistic...".
        real_label: the critic's target for real samples, in [0, 1]; 0.9 is one-sided label smoothing.
        fake_label: the critic's target for fake samples, in [0, 1].
        generator_label: the generator's target for fake samples, in [0, 1].

    The labels of the critic are its alone: by default the generator aims at real samples' 1 (Salimans et al. 2016, section 3.4,
    smooth nothing but the critic's positive targets). The attributes real_label and fake_label may be set to tensors, one target a
    logit, for the calls that follow. For "lsgan" the labels fake_label, real_label and generator_label are the a,
    b and c of Mao et al. 2017, any finite numbers: (0, 1, 1) by default; "lsgan-pearson" is (-1, 1, 0) by itself.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    def __init__(
        self, objective: str = "non-saturating", real_label: float = 1.0, fake_label: float = 0.0, generator_label: float = 1.0
    ) -> None:
        super().__init__()
        checks.one_of("GANLoss", "objective", objective, OBJECTIVES)
        low, high = (-math.inf, math.inf) if objective == "lsgan" else (0.0, 1.0)
        labels = {"real_label": real_label, "fake_label": fake_label, "generator_label": generator_label}
        for name, value in labels.items():
            checks.number("GANLoss", name, value, low, high)
        self.objective = objective
        self.real_label: Label = float(real_label)
        self.fake_label: Label = float(fake_label)
        self.generator_label = float(generator_label)

    @property
    def relativistic(self) -> bool:
        """Whether `generator` needs the real logits too."""
        return OBJECTIVES[self.objective].relative != "no"

    def forward(self, *logits: Tensor) -> NoReturn:
        """Refused: logits do not tell whose loss is meant."""
        wanted = "be .discriminator(real, fake) or .generator(fake)"
        checks.fail(TypeError, "GANLoss", "what is called", wanted, "the module itself")

    def discriminator(self, real: Tensor, fake: Tensor) -> GanLoss:
        """The critic's loss from its logits of real and of fake samples, any shapes."""
        return gan_loss(real, fake, self.objective, real_label=self.real_label, fake_label=self.fake_label)

    def discriminator_from(self, logits: Tensor, n_real: int) -> GanLoss:
        """The critic's loss from one vector of logits whose first `n_real` entries belong to real samples."""
        return gan_loss(logits, None, self.objective, n_real=n_real, real_label=self.real_label, fake_label=self.fake_label)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> GanLoss:
        """The generator's loss from the critic's logits of fake samples.

        `real` logits only enter the statistics; a relativistic objective needs them (ValueError without).
        """
        return gan_loss(real, fake, self.objective, "generator", real_label=self.generator_label)

    def extra_repr(self) -> str:
        labels = {"real_label": self.real_label, "fake_label": self.fake_label, "generator_label": self.generator_label}
        words = [f"{name}={'drawn' if isinstance(value, Tensor) else format(value, 'g')}" for name, value in labels.items()]
        return ", ".join([repr(self.objective), *words])
