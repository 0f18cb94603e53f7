"""The techniques: what may be added to a step with any objective. One file for each, and a line in `TECHNIQUES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gankern.training.techniques._technique import Technique
from gankern.training.techniques.feature_matching import FeatureMatching
from gankern.training.techniques.historical_averaging import HistoricalAveraging
from gankern.training.techniques.instance_noise import InstanceNoise
from gankern.training.techniques.labels import Labels
from gankern.training.techniques.log_gradients import LogGradients
from gankern.training.techniques.replay import Replay
from gankern.training.techniques.vae import VAE

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer

__all__ = [
    "TECHNIQUES",
    "VAE",
    "FeatureMatching",
    "HistoricalAveraging",
    "InstanceNoise",
    "Labels",
    "LogGradients",
    "Replay",
    "Technique",
    "wanted",
]

# The fields of TrainConfig that switch each on where they are not 0, "none", False or ().
TECHNIQUES: dict[str, type[Technique]] = {
    "instance_noise": InstanceNoise,
    "real_label_range": Labels,
    "fake_label_range": Labels,
    "label_noise": Labels,
    "replay": Replay,
    "feature_matching": FeatureMatching,
    "reconstruction": VAE,
    "historical_averaging": HistoricalAveraging,
    "log_gradients": LogGradients,  # the last one: what the others add to the gradients is in the norms
}


def wanted(trainer: Trainer) -> dict[str, Technique]:
    """The techniques that the trainer's settings ask for, each by the first of its fields that does."""
    found: dict[type[Technique], str] = {}
    for name, technique in TECHNIQUES.items():
        if getattr(trainer.config, name) not in (0, "none", False, ()):
            found.setdefault(technique, name)
    return {name: technique(trainer) for technique, name in found.items()}
