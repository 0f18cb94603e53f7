"""The CUDA graph of a whole step on a GPU (`make gpu`): equal to eager steps bit for bit, as test_graph.py shows on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gankern.training import PRESETS, Trainer
from gankern.training.graph import LOSSES, Losses, make
from tests import small
from tests.support import DEVICE
from tests.test_graph import FULL, differences, pair, run, slower

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("preset", PRESETS)
def test_graph_equals_eager_on_a_gpu(preset: str) -> None:
    eager, graph = pair(preset, capture=None, device="cuda")
    histories = [run(e, 200, lambda e, i: slower(e, i, 100)) for e in (eager, graph)]
    torch.cuda.synchronize()
    assert [i for i, (x, y) in enumerate(zip(*histories, strict=True)) if not torch.equal(x, y)] == []
    assert differences(eager, graph) == []


@pytest.mark.usefixtures("deterministic")
def test_graph_of_several_steps_with_everything_on_a_gpu() -> None:
    eager, graph = pair("gan", capture=None, device="cuda", steps=3, **FULL)
    run(eager, 100)
    torch.manual_seed(7)
    while graph.trainer.steps_done < 100:
        graph.step(most=100 - graph.trainer.steps_done)
    assert differences(eager, graph) == []


def test_capture_error_on_a_gpu_falls_back_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that waits for the device cannot be captured; the run goes on eagerly from where it was."""
    settings = small.config("gan")
    t, stream = small.trainer(settings, "cuda"), small.batches(settings, "cuda")
    before = small.state(t)
    update = Trainer.update

    def waits(self: Trainer, optimizer: Any) -> None:
        optimizer.count.item()
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
