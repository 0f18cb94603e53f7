"""Several gloo processes are one process with the whole batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gankern.training import Trainer, distributed
from gankern.training.critics import Autograd
from gankern.training.graph import Eager, Graph
from tests import replay, small
from tests.support import DEVICE

pytestmark = pytest.mark.skipif(not dist.is_available() or DEVICE != "cpu", reason="gloo processes on the CPU")

# Dropout masks are each process's own; Adam would make a step out of the rounding of a gradient that is 0.
SGD: dict[str, Any] = {"optimizer_d": "sgd", "optimizer_g": "sgd", "lr_d": 0.05, "lr_g": 0.05, "ttur": 0.0}
PLAIN: dict[str, Any] = {"d_dropout": 0.0, "batch_size": 8, **SGD}
SYNC: dict[str, Any] = {**PLAIN, "sync_batch_norm": True}
# A preset and settings: what several processes do exactly as one does.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", PLAIN),
    "gan by Adam": ("gan", {"d_dropout": 0.0, "batch_size": 8}),
    "wgan-gp": ("wgan-gp", PLAIN),
    "wgan-gp by autograd": ("wgan-gp", PLAIN),
    "sngan": ("sngan", SYNC),
    "dcgan": ("dcgan", SYNC),
    "dcgan with two BatchNorms": ("dcgan-64", {**SYNC, "size": 8}),
    "cgan": ("cgan", PLAIN),
    "acgan": ("acgan", SYNC),
    "ragan": ("ragan", SYNC),
    "ragan with noisy labels": ("gan", {**PLAIN, "loss": "relativistic-average", "label_noise": 0.3}),
    "lsgan, ranges": ("gan", {**PLAIN, "loss": "lsgan", "real_label_range": (0.7, 1.2), "label_noise": 0.2}),
    "dragan": ("gan", {**PLAIN, "penalty": "dragan"}),
    "r1r2": ("gan", {**PLAIN, "penalty": "r1r2", "pack": 2}),
    "began": ("began", {**SYNC, "began_lambda": 0.1}),
    "ebgan": ("ebgan", SYNC),
    "gmmn": ("gmmn", {**PLAIN, "mmd_root": True}),
    "mmd-gan": ("mmd-gan", {**SYNC, "penalty": "gp"}),
    "matching": ("gan", {**PLAIN, "generator_loss": "matching"}),
    "unrolled": ("unrolled", {**PLAIN, "unroll": 2}),
    "vae-gan": ("vae-gan", SYNC),
    "techniques": ("gan", {**small.TECHNIQUES["most"], **PLAIN}),
    "unrolled with techniques": ("gan", {**small.TECHNIQUES["most-unrolled"], **PLAIN, "spectral_norm": False}),
}
FOUR = ("gan", "wgan-gp", "sngan", "dcgan")  # of four processes too
STEPS = 2
TRAINED = ("generator.", "discriminator.", "encoder.", "ema.", "critic.", "replay.", "historical_averaging.")


def made(name: str) -> Eager:
    preset, changes = EXACT[name]
    settings = small.config(preset, **changes)
    trainer = small.trainer(settings, one_pass=False if "autograd" in name else None)
    return Eager(trainer, small.batches(settings))


def trained(name: str) -> dict[str, Tensor]:
    """What `STEPS` steps leave: state, gradients and losses."""
    engine = made(name)
    losses = []
    for _ in range(STEPS):
        engine.step()
        losses.append(list(engine.losses.request().read().values.values()))
    t = engine.trainer
    found = {key: value.clone() for key, value in t.state_dict().items() if isinstance(value, Tensor)}
    for role, optimizer in (("g", t.opt_g), ("d", t.opt_d)):
        found[f"gradient.{role}"] = torch.cat(
            [p.grad.flatten() for p in optimizer.parameters if p.grad is not None] or [torch.zeros(0)]
        )
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)}


def child(rank: int, count: int, folder: str, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=count)
    torch.save(body(*arguments), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def processes(count: int, folder: Path, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What body(*arguments) gives in each of so many processes."""
    torch.multiprocessing.start_processes(child, (count, str(folder), body, arguments), nprocs=count, start_method="fork")
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runs(names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    return {name: trained(name) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return runs(tuple(EXACT))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Tensor]]]]:
    """By the number of processes."""
    return {n: processes(n, tmp_path_factory.mktemp("several"), runs, names) for n, names in ((2, tuple(EXACT)), (4, FOUR))}


@pytest.mark.parametrize(("count", "name"), [*((2, name) for name in EXACT), *((4, name) for name in FOUR)])
def test_several_processes_are_one_with_the_whole_batch(
    count: int, name: str, alone: dict[str, dict[str, Tensor]], several: dict[int, list[dict[str, dict[str, Tensor]]]]
) -> None:
    """To rounding: losses, gradients, weights, and all that lasts."""
    want, (first, *others) = alone[name], [run[name] for run in several[count]]
    assert first.keys() == want.keys()
    for key, value in want.items():
        for other in others:
            assert torch.equal(other[key], first[key]), f"{key} differs between the processes"
        if key in ("rng.noise", "losses") or key.startswith(("gradient.", *TRAINED)):
            scale = value.double().abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=lambda m, key=key: f"{key}: {m}")
