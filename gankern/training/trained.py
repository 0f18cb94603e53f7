"""What a run has learned: its generator, from a checkpoint, ready to be sampled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gankern import checks, data
from gankern.models import sample_latent
from gankern.training import checkpoint, run_dir
from gankern.training.config import TrainConfig
from gankern.training.networks import Shape, networks
from gankern.training.presets import PRESETS
from gankern.training.trainer import check_entries, generate

OP = "run"


def load_data(config: TrainConfig) -> data.Dataset:
    """The data of a run.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: see `gankern.data.load`.
    """
    size, channels, limit = (value or None for value in (config.size, config.channels, config.limit))
    return data.load(config.data, size=size, channels=channels, limit=limit, seed=config.seed)


class Trained:
    """The generator of a checkpoint, on the CPU.

    Args:
        path: a run directory, whose newest whole checkpoint is taken, with a warning for each damaged one; or a checkpoint.
        weights: "ema", "last", or "auto": the averaged ones if the run has them.

    Attributes:
        run: the run directory.
        path: the checkpoint.
        step: of the checkpoint.
        source: "ema" or "generator", whose weights they are.
        generator: z [B, z_dim] (and classes [B]) -> samples [B, *run.shape].

    Raises:
        ValueError: no run, no checkpoint, a damaged one, an unknown preset, or weights that the run does not have.
    """

    def __init__(self, path: Path, weights: str = "auto") -> None:
        self.run, found = run_dir.locate(path)
        config = self.run.config
        if not found:
            checks.fail(ValueError, OP, str(self.run.path), "have a checkpoint", "none")
        if self.run.preset not in PRESETS:
            checks.fail(ValueError, OP, str(self.run.path), f"be of a known preset ({', '.join(PRESETS)})", repr(self.run.preset))
        if weights == "ema" and config.ema == 0.0:
            checks.fail(ValueError, OP, "weights", f"be auto or last: {self.run.path} was trained without EMA", repr(weights))
        self.source = "ema" if weights != "last" and config.ema > 0.0 else "generator"
        head = f"{self.source}."
        self.path, state, damaged = checkpoint.load_newest(found, (head,))
        for sentence in damaged:
            warnings.warn(f"{sentence}; {self.path} is used", stacklevel=2)
        self.step = run_dir.step_of(self.path)
        weights_of = {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
        self.generator = build(config, self.run.shape, self.run.classes, weights_of)

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """n samples, float32 [n, *shape] on the CPU.

        Args:
            seed: of the latent vectors, and of the dropout where the run keeps it.
            labels: classes, int64 [n]. None: all in turn, where the model has classes.
        """
        return draw(self.generator, self.run.config, self.run.classes, n, seed, labels)


def build(config: TrainConfig, shape: Shape, classes: int, state: dict[str, Tensor]) -> nn.Module:
    """The generator of these settings with these weights, on the CPU. Nothing is allocated before they are found to fit.

    Raises:
        ValueError: an entry is missing, left over, or of another shape or dtype; settings that no network has.
    """
    with torch.device("meta"), _Unfilled():
        generator, _ = networks(config, shape, classes)
    check_entries(state, generator.state_dict(), "generator")
    generator.load_state_dict(state, assign=True)
    return generator


class _Unfilled(TorchFunctionMode):
    """Leaves normal_ out: on the meta device it fills nothing, and imports for a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.normal_, nn.init.normal_):
            return (*args, *(kwargs or {}).values())[0]
        return function(*args, **(kwargs or {}))


def draw(generator: nn.Module, config: TrainConfig, classes: int, n: int, seed: int, labels: Tensor | None) -> Tensor:
    """See `Trained.sample`."""
    device = next(generator.parameters()).device
    inputs = [sample_latent(n, config.z_dim, config.latent, torch.Generator().manual_seed(seed))]
    if classes:
        inputs.append(torch.arange(n) % classes if labels is None else labels)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        samples = generate(generator, *(t.to(device) for t in inputs), dropout=config.sample_dropout)
    return samples.float().cpu()
