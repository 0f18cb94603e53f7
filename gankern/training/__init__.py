"""Training: settings, presets, one adversarial step, checkpoints, run directories. No terminal output is made here."""

from gankern.training.config import TrainConfig
from gankern.training.presets import PRESETS, Preset
from gankern.training.trainer import Ema, Trainer

__all__ = ["PRESETS", "Ema", "Preset", "TrainConfig", "Trainer"]
