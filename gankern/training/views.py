"""What a run shows of its samples: images in a grid, points in the plane, or the columns of a table."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gankern.data import Dataset, Table, to_float
from gankern.metrics import ModeCoverage, modes
from gankern.training import pictures
from gankern.training.plane import Plane


class View(Protocol):
    """Pictures of one run, uint8 [H, W, 1 or 3]; `count` samples in each, fewer if there are fewer real ones."""

    count: int

    def reals(self) -> Tensor: ...
    def fakes(
        self, samples: Tensor, step: int, critic: nn.Module | None = None, coverage: ModeCoverage | None = None
    ) -> Tensor: ...


class Grid:
    """Images in rows; with classes, one class a column."""

    def __init__(self, dataset: Dataset, classes: int = 0) -> None:
        few = 0 < classes <= 64
        self.count = 64 - 64 % classes if few else 64
        self.columns = classes if few else None
        self.dataset = dataset

    def reals(self) -> Tensor:
        return pictures.grid(to_float(some(self.dataset, 64)))

    def fakes(self, samples: Tensor, step: int, critic: nn.Module | None = None, coverage: ModeCoverage | None = None) -> Tensor:
        return pictures.grid(samples, self.columns)


class Columns:
    """A histogram of each column, in the units of the table."""

    count = 5000

    def __init__(self, dataset: Dataset) -> None:
        self.table = dataset.table or Table.plain(dataset.shape[0])
        self.real = self.table.restore(some(dataset, self.count))

    def reals(self) -> Tensor:
        return pictures.histograms(self.real, None, self.table.columns, "data")

    def fakes(self, samples: Tensor, step: int, critic: nn.Module | None = None, coverage: ModeCoverage | None = None) -> Tensor:
        return pictures.histograms(self.real, self.table.restore(samples.cpu()), self.table.columns, f"step {step}")


def view_of(dataset: Dataset, classes: int = 0) -> View:
    """The view that fits the shape of the samples; `classes`: of a conditional generator."""
    if dataset.kind == "images":
        return Grid(dataset, classes)
    return Plane(dataset) if dataset.shape == (2,) else Columns(dataset)


def coverage_of(dataset: Dataset, samples: Tensor) -> ModeCoverage | None:
    """How samples cover the modes of the data, where these are known and the samples finite."""
    if dataset.mixture is None or not samples.isfinite().all():
        return None
    return modes(samples, *dataset.mixture)


def some(dataset: Dataset, count: int) -> Tensor:
    """At most so many samples, spread evenly over the data."""
    return dataset.samples[torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()]
