"""Where a run's scalars, pictures and words go besides its own files: TensorBoard, Weights & Biases, both, or neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gankern.cli.common import Refused
from gankern.training import TrainConfig
from gankern.training.run_dir import RunDir


class Boards:
    """The boards that `config.track` names.

    TensorBoard's event files and the folder `wandb` lie in the run's directory. A resumed run takes back what TensorBoard shows of
    later steps; at Weights & Biases it goes on with the same id, and the steps made again are there twice.

    Args:
        first: the step from which the run goes on; 0: a new run.

    Raises:
        Refused: Weights & Biases does not start, such as without an account and WANDB_MODE=offline.
    """

    def __init__(self, run: RunDir, config: TrainConfig, first: int) -> None:
        self.path = run.path
        self.events: Any = None
        self.wandb: Any = None
        if config.track in ("tensorboard", "both"):
            self.events = _events(run.path, first)
        if config.track in ("wandb", "both"):
            import wandb

            earlier = sorted(run.path.glob("wandb/*run-*-*"))
            try:
                self.wandb = wandb.init(
                    project="gankern",
                    name=run.path.name,
                    dir=run.path,
                    id=earlier[-1].name.rpartition("-")[2] if earlier else None,
                    resume="allow",
                    config={"preset": run.preset, **config.to_json()},
                    settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
                )
            except wandb.Error as error:
                raise Refused(
                    f"wandb must start (WANDB_MODE=offline needs no account), got: {' '.join(str(error).split())}"
                ) from error
            self.wandb.define_metric("*", step_metric="step")  # rows of a step may come after pictures of a later one

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if self.events is not None:
            self.events.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log({tag: value, "step": step})

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        """uint8 [H, W, 1 or 3]."""
        if self.events is not None:
            self.events.add_image(tag, picture.numpy(), step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({tag: wandb.Image(picture.numpy()), "step": step})

    def add_text(self, tag: str, text: str, step: int) -> None:
        if self.events is not None:
            self.events.add_text(tag, text, step)
        if self.wandb is not None:
            self.wandb.log({tag: text, "step": step})

    def rewind(self, step: int) -> None:
        """The steps after this one are made again."""
        if self.events is not None:
            self.events.close()
            self.events = _events(self.path, step)

    def flush(self) -> None:
        if self.events is not None:
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def _events(path: Path, step: int) -> Any:
    """A writer of event files that takes back what is shown of the steps after this one."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
