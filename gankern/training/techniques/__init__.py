"""The techniques: what may be added to a step with any objective. One file for each, and a line in `TECHNIQUES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gankern.training.techniques._technique import Technique
from gankern.training.techniques.instance_noise import InstanceNoise
from gankern.training.techniques.labels import Labels

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer

__all__ = ["TECHNIQUES", "InstanceNoise", "Labels", "Technique", "wanted"]

# The fields of TrainConfig that switch each on where they are not 0, "none", False or ().
TECHNIQUES: dict[str, type[Technique]] = {
    "instance_noise": InstanceNoise,
    "real_label_range": Labels,
    "fake_label_range": Labels,
    "label_noise": Labels,
}


def wanted(trainer: Trainer) -> dict[str, Technique]:
    """The techniques that the trainer's settings ask for, each by the first of its fields that does."""
    found: dict[type[Technique], str] = {}
    for name, technique in TECHNIQUES.items():
        if getattr(trainer.config, name) not in (0, "none", False, ()):
            found.setdefault(technique, name)
    return {name: technique(trainer) for technique, name in found.items()}
