"""The CUDA graph of a whole step on a GPU (`make gpu`): equal to eager steps bit for bit, as test_graph.py shows on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gankern
from gankern.training import PRESETS, Trainer
from gankern.training.graph import LOSSES, Losses, make
from gankern.training.optimizers import Adam
from tests import small
from tests.support import DEVICE, need
from tests.test_graph import FULL, differences, pair, run, slower

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def both_engines(preset: str) -> None:
    eager, graph = pair(preset, capture=None, device="cuda")
    histories = [run(e, 200, lambda e, i: slower(e, i, 100)) for e in (eager, graph)]
    assert [i for i, (x, y) in enumerate(zip(*histories, strict=True)) if not torch.equal(x, y)] == []
    assert differences(eager, graph) == []


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("preset", PRESETS)
def test_graph_equals_eager(preset: str) -> None:
    both_engines(preset)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("preset", ["gan", "sngan"])
def test_graph_equals_eager_by_triton(preset: str) -> None:
    need("triton")
    with gankern.use_backend("triton"):
        both_engines(preset)


@pytest.mark.usefixtures("deterministic")
def test_graph_of_several_steps_with_everything() -> None:
    eager, graph = pair("gan", capture=None, device="cuda", steps=3, **FULL)
    run(eager, 100)
    torch.manual_seed(7)
    while graph.trainer.steps_done < 100:
        graph.step(most=100 - graph.trainer.steps_done)
    assert differences(eager, graph) == []


@pytest.mark.parametrize("wait", [lambda opt: opt.count.item(), lambda opt: torch.cuda.synchronize()], ids=["item", "synchronize"])
def test_capture_error_falls_back_with_its_reason(wait: Callable[[Adam], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that waits for the device cannot be captured; the run goes on eagerly from where it was."""
    settings = small.config("gan")
    t, stream = small.trainer(settings, "cuda"), small.batches(settings, "cuda")
    before = small.state(t)
    update = Trainer.update

    def waits(self: Trainer, optimizer: Adam) -> None:
        wait(optimizer)
        update(self, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", waits)
        engine = make("graph", t, stream)
    assert engine.name == "eager"
    assert engine.why.startswith("graph failed: ")
    after = t.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items())
    assert all(v.isfinite() for v in engine.step().values())
    assert make("auto", t, stream).name == "graph"


def test_losses_are_copied_without_waiting_for_later_work() -> None:
    """A reading is of the step at which it was asked for, whatever has been written since."""
    losses = Losses(4, torch.device(DEVICE))
    pending = []
    for step in range(1, 12):
        losses.begin(step - 1, 1)
        losses.write({name: torch.full((), float(step), device=DEVICE) for name in LOSSES})
        pending.append(losses.request())
    assert all(p.rows.is_pinned() for p in pending)
    assert [p.read().values["d_loss"] for p in pending] == list(range(1, 12))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_graph_holds_the_sums_over_processes(tmp_path: Path) -> None:
    """Of one process: NCCL takes a GPU for each."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        both_engines("wgan-gp")
    finally:
        torch.distributed.destroy_process_group()
