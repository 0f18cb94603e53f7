"""The optimisers of a step, by name: the numbers of torch.optim's, for a step that is called often or held by a CUDA graph.

All are `InPlace`: their state exists from the start and stays where it is; learning rate and step count are tensors if capturable.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gankern.training.config import TrainConfig
from gankern.training.optimizers._in_place import InPlace
from gankern.training.optimizers.adam import Adam
from gankern.training.optimizers.rmsprop import RMSprop
from gankern.training.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "InPlace", "RMSprop", "make"]


def make(name: str, parameters: Iterable[nn.Parameter], lr: float, config: TrainConfig, capturable: bool = False) -> InPlace:
    """The optimiser `name` ("adam", "sgd" or "rmsprop") with the rest of its settings from config."""
    if name == "sgd":
        return SGD(parameters, lr, config.momentum, capturable)
    if name == "rmsprop":
        return RMSprop(parameters, lr, capturable=capturable)
    return Adam(parameters, lr, (config.beta1, config.beta2), capturable=capturable)
