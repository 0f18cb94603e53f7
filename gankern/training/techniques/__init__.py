"""The techniques: what may be added to a step with any objective. One file for each, and a line in `TECHNIQUES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gankern.training.techniques._technique import Technique
from gankern.training.techniques.instance_noise import InstanceNoise

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer

__all__ = ["TECHNIQUES", "InstanceNoise", "Technique", "wanted"]

# The field of TrainConfig that switches each on where it is not 0, "none" or False.
TECHNIQUES: dict[str, type[Technique]] = {
    "instance_noise": InstanceNoise,
}


def wanted(trainer: Trainer) -> dict[str, Technique]:
    """The techniques that the trainer's settings ask for, by field."""
    return {
        name: technique(trainer)
        for name, technique in TECHNIQUES.items()
        if getattr(trainer.config, name) not in (0, "none", False)
    }
