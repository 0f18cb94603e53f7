"""Technique: where in a training step something may be added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gankern.training.optimizers import InPlace
    from gankern.training.trainer import Trainer


class Technique:
    """One thing more in a step. Each method below is called once at its place and changes nothing until it is overridden.

    A CUDA graph holds the step: a method must not wait for the device, and what lasts from step to step is a tensor in `state`,
    made in `__init__` and changed in place. Random numbers come from `self.rng`, the trainer's own; those for
    samples by `distributed.draw`, so that several processes draw what one would.

    Args:
        trainer: of the run; its networks and optimisers exist, nothing has been trained.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.rng, self.device = trainer, trainer.config, trainer.rng, trainer.device

    def before_critic(self, real: Tensor, fake: Tensor) -> None:
        """Before each update of the critic."""

    def fakes(self, fake: Tensor) -> Tensor:
        """The fakes [B, ...] that the critic learns from in an update."""
        return fake

    def seen(self, samples: Tensor) -> Tensor:
        """What the critic is shown in place of samples, real or fake, by either network's update; differentiable."""
        return samples

    def term(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Tensor | None:
        """What the generator's loss has besides, [], attached to the graph of fake."""
        return None

    def gradients(self, optimizer: InPlace) -> None:
        """After the backward pass of the network whose optimiser this is, before its update."""

    def after_step(self) -> None:
        """At the end of a step."""

    def columns(self) -> dict[str, Tensor]:
        """Numbers [] of the step for the log, besides the losses; the same names at each step, from the beginning."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, the tensors themselves: they are loaded in place."""
        return {}

    def optimizers(self) -> dict[str, Any]:
        """Those of networks that it brings along; their state is saved under these names."""
        return {}

    def models(self) -> dict[str, Any]:
        """The networks that it brings along; likewise."""
        return {}
