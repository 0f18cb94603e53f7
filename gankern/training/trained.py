"""What a run has learned: its generator, from a checkpoint, ready to be sampled."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.models import sample_latent
from gankern.training import checkpoint, run_dir
from gankern.training.presets import PRESETS
from gankern.training.trainer import generate

OP = "run"


class Trained:
    """The generator of a checkpoint, on the CPU.

    Args:
        path: a run directory, whose newest whole checkpoint is taken, with a warning for each damaged one; or a checkpoint.
        weights: "ema", "last", or "auto": the averaged ones if the run has them.

    Attributes:
        run: the run directory.
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
        saved, state, damaged = checkpoint.load_newest(found, (head,))
        for sentence in damaged:
            warnings.warn(f"{sentence}; {saved} is used", stacklevel=2)
        self.step = run_dir.step_of(saved)
        self.generator: nn.Module
        self.generator, _ = PRESETS[self.run.preset].build(config, self.run.shape, self.run.classes)
        self.generator.load_state_dict({key.removeprefix(head): v for key, v in state.items() if key.startswith(head)})

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """n samples, float32 [n, *shape] on the CPU.

        Args:
            seed: of the latent vectors, and of the dropout where the run keeps it.
            labels: classes, int64 [n]. None: all in turn, where the model has classes.
        """
        config, device = self.run.config, next(self.generator.parameters()).device
        inputs = [sample_latent(n, config.z_dim, config.latent, torch.Generator().manual_seed(seed))]
        if self.run.classes:
            inputs.append(torch.arange(n) % self.run.classes if labels is None else labels)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            samples = generate(self.generator, *(t.to(device) for t in inputs), dropout=config.sample_dropout)
        return samples.float().cpu()
