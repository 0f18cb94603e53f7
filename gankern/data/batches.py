"""Batches: the endless, reproducible stream of training batches from a Dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gankern import checks
from gankern.data.dataset import OP, Dataset
from gankern.data.images import to_float

RESIDENT_FRACTION = 0.5  # of the GPU memory that is free: a data set up to this size is copied there once


class Batches:
    """Endless batches without replacement: each epoch a new order, its last partial batch dropped.

    The samples stay uint8 (or float32) in one place: on `device`, unless that is a GPU without room (RESIDENT_FRACTION); then in
    host memory, whence each batch is gathered into pinned memory and copied without waiting. Conversion is the last step.
    The order is drawn on the CPU by the object's own generator, so it is the same on every device.

        batches = Batches(load("mnist"), 64, seed=0, device="cuda")
        images = next(batches)                       # [64, 1, 28, 28] float32 in [-1, 1]
        images, labels = batches.with_labels()       # labels [64] int64

    Args:
        data: images (uint8 becomes float32 in [-1, 1]), or samples of any other shape.
        batch_size: samples a batch, 1 <= batch_size <= len(data).
        seed: of the orders, >= 0.
        device: where batches are wanted.

    Raises:
        ValueError, TypeError: an argument out of range or of another type.
    """

    def __init__(self, data: Dataset, batch_size: int, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if not isinstance(data, Dataset):
            checks.fail(TypeError, OP, "data", "be a gankern.data.Dataset", type(data).__name__)
        checks.integer(OP, "batch_size", batch_size, 1)
        checks.integer(OP, "seed", seed, 0)
        if batch_size > len(data):
            checks.fail(ValueError, OP, "batch_size", f"be at most the {len(data)} {data.kind} of {data.name}", batch_size)
        self.batch_size = batch_size
        self.device = torch.device(device)
        size = data.samples.numel() * data.samples.element_size()
        self.resident = self.device.type != "cuda" or size <= RESIDENT_FRACTION * torch.cuda.mem_get_info(self.device)[0]
        home = self.device if self.resident else torch.device("cpu")
        self._shape = data.shape
        self._samples = data.samples.to(home).flatten(1)
        self._labels = None if data.labels is None else data.labels.to(home)
        self._generator = torch.Generator().manual_seed(seed)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._epoch_state = self._generator.get_state()
        home = self._samples.device
        order = torch.randperm(len(self._samples), generator=self._generator, pin_memory=home.type == "cuda")
        self._order = order.to(home, non_blocking=True)

    def indices(self) -> Tensor:
        """The next batch as numbers of samples: int64 [batch_size], where the data is. Advances the stream."""
        if self._position + self.batch_size > len(self._order):
            self._start_epoch(self._epoch + 1)
        start = self._position
        self._position += self.batch_size
        return self._order[start : self._position]

    def samples(self, indices: Tensor) -> Tensor:
        """The samples with these numbers (int64 [B], where the data is): float32 [B, ...] on `device`."""
        return to_float(self._gather(self._samples, indices)).view(-1, *self._shape)

    def labels(self, indices: Tensor) -> Tensor:
        """Their labels: int64 [B] on `device`.

        Raises:
            ValueError: the data has none.
        """
        if self._labels is None:
            checks.fail(ValueError, OP, "labels", "be in the data", "none")
        return self._gather(self._labels, indices)

    def _gather(self, source: Tensor, indices: Tensor) -> Tensor:
        if self.resident:
            return source.index_select(0, indices)
        pinned = torch.empty((len(indices), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
        return torch.index_select(source, 0, indices, out=pinned).to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self.samples(self.indices())

    def with_labels(self) -> tuple[Tensor, Tensor]:
        """The next batch: samples float32 [B, ...], and labels int64 [B]."""
        indices = self.indices()
        return self.samples(indices), self.labels(indices)

    @property
    def epoch(self) -> int:
        """Epochs begun before this one."""
        return self._epoch

    @property
    def order(self) -> Tensor:
        """The numbers of all samples in this epoch's order: int64 [N], where the data is. Each epoch has a tensor of its own."""
        return self._order

    @property
    def position(self) -> int:
        """Where in `order` the next batch begins, unless too few are left there."""
        return self._position

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: ints size, epoch and position (samples), and the generator's state before this epoch (uint8)."""
        return {"size": len(self._order), "epoch": self._epoch, "position": self._position, "generator": self._epoch_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, whatever the seed and device were.

        Raises:
            ValueError, TypeError: a state of a data set of another size, or a place that is none.
        """
        if state["size"] != len(self._order):
            checks.fail(ValueError, OP, "state", f"come from a data set of {len(self._order)} samples", f"one of {state['size']}")
        checks.integer(OP, "epoch", state["epoch"], 0)
        checks.integer(OP, "position", state["position"], 0)
        self._generator.set_state(state["generator"].cpu())
        self._start_epoch(state["epoch"])
        self._position = state["position"]
