"""Dataset: a whole data set in memory, images or points or rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks

OP = "data"


class Mixture(NamedTuple):
    """Equally likely Gaussians: their centres, float32 [K, D], and the standard deviation of every coordinate."""

    centres: Tensor
    std: float


class Table(NamedTuple):
    """Names, means and standard deviations of the columns of a table whose samples are standardised; one entry a column."""

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def plain(cls, features: int) -> Table:
        """Of samples that are not standardised: columns x1, x2 ..."""
        return cls(tuple(f"x{i + 1}" for i in range(features)), (0.0,) * features, (1.0,) * features)

    def restore(self, samples: Tensor) -> Tensor:
        """Standardised samples [N, F] -> float64 [N, F] in the units of the table."""
        mean, std = (torch.tensor(numbers, dtype=torch.float64, device=samples.device) for numbers in (self.mean, self.std))
        return mean + std * samples


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set of samples of one shape.

    Args:
        samples: [N, ...], N >= 1; float32, or uint8 (0 to 255, kept so to save memory; batches are in [-1, 1]). Images
            are [N, C, H, W] in [-1, 1]; points and rows of a table are [N, F], of any range.
        labels: [N], int64, an index into `classes`, or None.
        name: short, for run directories: "mnist", or the name of the folder or file.
        classes: the name of each class, () without labels.
        skipped: one "file: reason" for each file that could not be read.
        note: in words, what was found in the source and how it was taken.
        mixture: the law of the samples, where it is a mixture of Gaussians.
        table: of what the samples are the standardised rows.

    Raises:
        ValueError, TypeError: samples or labels of another shape or dtype, or no sample.
    """

    samples: Tensor
    labels: Tensor | None = None
    name: str = "samples"
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    note: str = ""
    mixture: Mixture | None = None
    table: Table | None = None

    def __post_init__(self) -> None:
        checks.tensor(OP, "samples", self.samples)
        if self.samples.dtype not in (torch.uint8, torch.float32):
            checks.fail(TypeError, OP, "samples", "be uint8 or float32", str(self.samples.dtype).removeprefix("torch."))
        if self.samples.dim() < 2:
            checks.fail(ValueError, OP, "samples", "have shape [N, ...]", list(self.samples.shape))
        if self.samples.numel() == 0:
            checks.fail(ValueError, OP, "samples", "hold at least one number of one sample", f"shape {list(self.samples.shape)}")
        if self.labels is not None:
            checks.tensor(OP, "labels", self.labels)
            checks.shape(OP, "labels", self.labels, (len(self.samples),))
            checks.same_dtype(OP, "labels", self.labels, torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each sample: (C, H, W) of an image, (F,) of a point or row."""
        return tuple(self.samples.shape[1:])

    @property
    def kind(self) -> str:
        """ "images" or "samples", for sentences."""
        return "images" if len(self.shape) == 3 else "samples"
