"""What the trials share: a trainer on a data set, run for so many steps, with looks at it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from gankern import data
from gankern.training import TrainConfig, Trainer
from gankern.training.graph import make
from gankern.training.networks import networks


def train(config: TrainConfig, dataset: data.Dataset, looks: int, look: Callable[[Trainer], Any]) -> tuple[list[Any], float]:
    """config.steps steps; what `look` says at `looks` equally spaced steps up to the last, and the seconds of training."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(*networks(config, dataset.shape), config, device)
    batches = data.Batches(dataset, config.batch_size * config.n_critic, seed=config.seed, device=device)
    engine = make("auto", trainer, batches)
    # On a CPU each trial has one thread: its own time is that of an idle machine, whatever else runs.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seen, seconds = [], 0.0
    for i in range(1, looks + 1):
        until, start = config.steps * i // looks, clock()
        while trainer.steps_done < until:
            engine.step(most=until - trainer.steps_done)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += clock() - start
        seen.append(look(trainer))
    return seen, seconds
