"""Several processes that train one run together, by torch.distributed: data parallel, as one process with the whole batch.

Where a process group is initialised, every process has the same networks and the same random stream for the noise. It takes its
part of each batch (`shard`), draws the noise of the whole batch and keeps its part (`draw`), and averages the gradients before an
update (`average_`). What is no mean over samples goes through `mean` and `gather`, which are differentiable to any order. Without a
group all functions here return what they are given.

The convention: what all processes minimise is the mean of the processes' losses. A loss that was computed from gathered tensors is
the same everywhere, and so is its own mean.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gankern import checks
from gankern.ops._all_reduce import AllReduce, alone, joined, lost, sum_

__all__ = [
    "alone",
    "average_",
    "broadcast_",
    "by_first",
    "check",
    "draw",
    "everyone",
    "gather",
    "joined",
    "mean",
    "own_device",
    "rank",
    "seed_own",
    "session",
    "set_streams",
    "shard",
    "streams",
    "together",
    "world_size",
]

if TYPE_CHECKING:
    from gankern.training.config import TrainConfig

T = TypeVar("T")
# The longest that a process may be waited for, while the first one measures or draws pictures. One that ends is noticed at once.
TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    return dist.get_rank() if joined() else 0


def world_size() -> int:
    return dist.get_world_size() if joined() else 1


def check(config: TrainConfig) -> None:
    """Raise ValueError if the processes cannot have equal parts of a batch, or parts that the settings do not allow."""
    n = world_size()
    if config.batch_size % n:
        checks.fail(ValueError, "train", "batch_size", f"be a multiple of {n}, the number of processes", config.batch_size)
    try:
        dataclasses.replace(config, batch_size=config.batch_size // n)
    except ValueError as error:
        raise ValueError(f"{error} in each of {n} processes") from None


# --- tensors


def shard(t: Tensor, parts: int = 1) -> Tensor:
    """This process's rows of a tensor that all have alike: of [parts * B, ...] its B / N of each part, in the order of ranks."""
    if not joined():
        return t
    return t.unflatten(0, (parts, world_size(), -1))[:, rank()].flatten(0, 1)


def draw(make: Callable[[int], Tensor], count: int, parts: int = 1) -> Tensor:
    """This process's `count` rows of make(count * N), random numbers that all processes draw alike."""
    return shard(make(count * world_size()), parts)


def mean(t: Tensor) -> Tensor:
    """The mean of the processes' tensors, of one shape; differentiable to any order."""
    return AllReduce.apply(t, None) / world_size() if joined() else t


def gather(t: Tensor) -> Tensor:
    """[B, ...] of all processes as one [N * B, ...] in the order of ranks; differentiable to any order."""
    if not joined():
        return t
    before, after = rank() * len(t), (world_size() - 1 - rank()) * len(t)
    return AllReduce.apply(torch.cat([t.new_zeros(before, *t.shape[1:]), t, t.new_zeros(after, *t.shape[1:])]), None)


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Make the tensors those of the first process."""
    for t in tensors if joined() else ():
        dist.broadcast(t, 0)


@torch.no_grad()
def average_(tensors: list[Tensor]) -> None:
    """Make each tensor the mean over the processes, by one sum of them all."""
    if joined() and tensors:
        total = sum_(torch.cat([t.flatten() for t in tensors])).div_(world_size())
        parts = total.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


# --- processes


@contextmanager
def session() -> Iterator[None]:
    """Inside, the processes that torchrun has started are one group: NCCL for tensors on a GPU, gloo for all others."""
    if joined() or not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    store, number, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    # torchrun may keep its store over a restart: the addresses of the processes before must not be found there
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after a fault: it may wait for a process that is gone


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, if the device is one: each process of a machine has the one of its number.

    Raises:
        ValueError: a GPU is named for several processes, or there are too few.
    """
    if not joined() or device.type != "cuda":
        return device
    number, count = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
    if device.index is not None and world_size() > 1:
        checks.fail(ValueError, "train", "device", "be auto, cuda or cpu for several processes, each with a GPU of its own", device)
    if number >= count:
        checks.fail(ValueError, "train", "processes", f"be at most the {count} GPUs of the machine", f"number {number + 1}")
    device = torch.device("cuda", number if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def everyone(value: T) -> list[T]:
    """What each process brings along, in the order of ranks."""
    if not joined():
        return [value]
    values: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise lost(error) from error
    return values


@contextmanager
def together() -> Iterator[None]:
    """What one process raises inside ends all: the first that raised says why, the others exit with status 2 and no word."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    faults = [r for r, failed in enumerate(everyone(fault is not None)) if failed]
    if fault is not None and rank() == faults[0]:
        raise fault
    if faults:
        raise SystemExit(2)


def by_first(make: Callable[[], T]) -> T:
    """make() of the first process, for all. What it raises ends all, as under `together`."""
    value: list[Any] = [None]
    with together():
        value = [make()] if rank() == 0 else value
    if joined():
        try:
            dist.broadcast_object_list(value)
        except RuntimeError as error:
            raise lost(error) from error
    return value[0]


# --- random states


def seed_own(seed: int, step: int = 0) -> None:
    """Give PyTorch's default generators, of which dropout draws, a stream that is this process's own; the first keeps its."""
    if rank():
        torch.manual_seed(random.Random(f"{seed} {rank()} {step}").getrandbits(63))


def streams(device: torch.device) -> dict[str, Tensor]:
    """The states of those generators in all processes but the first, which has its own in `Trainer.state_dict`. All must call."""
    if not joined():
        return {}
    own = {"default": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rank{r}.{name}": state for r, states in enumerate(everyone(own)) if r for name, state in states.items()}


def set_streams(saved: dict[str, Tensor], device: torch.device, seed: int, step: int) -> int:
    """Go on with what `streams` gave for as many processes; for another number of them each gets a new stream.

    Returns:
        Of how many processes it was.
    """
    count = 1 + len({key.partition(".")[0] for key in saved})
    if rank() and count == world_size():
        torch.set_rng_state(saved[f"rank{rank()}.default"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved[f"rank{rank()}.cuda"], device)
    else:
        seed_own(seed, step)
    return count
