"""The engines: a replayed step equals an eager one bit for bit, whatever changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gankern
from gankern.training import PRESETS, Trainer
from gankern.training import graph as engines
from gankern.training.graph import Compile, Eager, Graph, Losses, graph_problem, make
from tests import small
from tests.replay import Recording, record

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = ("gan", "cgan", "wgan-gp", "ctgan-like")  # 200 steps, the others 20
# All that a step may have, in one small GAN.
FULL = {"clip_gradients": 0.5, "clip_weights": 0.3, "g_dropout": 0.2, "g_norm": "batch", "latent": "uniform", "n_critic": 2}


def pair(
    preset: str, capture: Any = record, device: str = "cpu", steps: int = 1, capturable: bool = True, **changes: Any
) -> tuple[Eager, Graph]:
    settings = small.config(preset, **changes)
    trainers = [small.trainer(settings, device, capturable=capturable) for _ in range(2)]
    streams = [small.batches(settings, device) for _ in range(2)]
    torch.manual_seed(7)
    return Eager(trainers[0], streams[0]), Graph(trainers[1], streams[1], steps=steps, capture=capture)


def run(engine: Eager, steps: int, event: Callable[[Eager, int], object] = lambda *_: None) -> list[Tensor]:
    """From the default generator's seed 7: the losses of each step; event(engine, i) comes before step i."""
    torch.manual_seed(7)
    history = []
    for i in range(steps):
        event(engine, i)
        history.append(torch.stack(list(engine.step().values())).clone())
    return history


def differences(a: Eager, b: Eager) -> list[str]:
    """Names of what is not bit for bit the same: weights, buffers, optimisers, EMA, random states, stream, losses."""
    mine, other = (e.trainer.state_dict() | {f"data.{k}": v for k, v in e.batches.state_dict().items()} for e in (a, b))
    assert mine.keys() == other.keys()
    found = [k for k, v in mine.items() if not (torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k])]
    return found + ["readings"] * (a.losses.request().read() != b.losses.request().read())


def slower(engine: Eager, i: int, at: int) -> None:
    if i == at:
        engine.trainer.opt_g.set_lr(3e-3)
        engine.trainer.opt_d.set_lr(1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_replays_equal_eager_steps(preset: str) -> None:
    steps = 200 if preset in LONG else 20
    eager, replayed = pair(preset)
    histories = [run(e, steps, lambda e, i: slower(e, i, steps // 2)) for e in (eager, replayed)]
    assert [i for i, (x, y) in enumerate(zip(*histories, strict=True)) if not torch.equal(x, y)] == []
    assert differences(eager, replayed) == []
    assert replayed.trainer.steps_done == steps
    assert replayed.known is replayed.batches.order  # copied once an epoch, not once a step
    if preset in LONG:
        assert replayed.batches.epoch >= 4


@pytest.mark.parametrize("backend_name", ["automatic", "reference"])
def test_replays_with_clipping_dropout_and_norms(backend_name: str) -> None:
    def both() -> None:
        eager, replayed = pair("gan", **FULL)
        run(eager, 25), run(replayed, 25)
        assert differences(eager, replayed) == []

    if backend_name == "automatic":
        both()
    else:
        with gankern.use_backend(backend_name):
            both()


@pytest.mark.parametrize("technique", small.TECHNIQUES)
def test_replays_with_techniques(technique: str) -> None:
    eager, replayed = pair("gan", n_critic=2, **small.TECHNIQUES[technique])
    run(eager, 12), run(replayed, 12)
    assert differences(eager, replayed) == []


@pytest.mark.parametrize(("preset", "steps"), [("cgan", 20), ("wgan-gp", 10), ("sngan", 8), ("ctgan-like", 20)])
def test_replays_of_the_reference_show_every_operator(preset: str, steps: int) -> None:
    """The fused ops are one entry of a recording each; their definitions are plain PyTorch, all of which is replayed."""
    with gankern.use_backend("reference"):
        eager, replayed = pair(preset)
        run(eager, steps), run(replayed, steps)
    assert differences(eager, replayed) == []
    recording: Any = replayed.replays[1][0]
    assert not any(func.namespace == "gankern" for func, *_ in recording.calls)


@pytest.mark.parametrize("preset", ["gan", "sngan", "dcgan-32"])
def test_replays_in_bfloat16(preset: str) -> None:
    eager, replayed = pair(preset, precision="bf16")
    run(eager, 8), run(replayed, 8)
    assert differences(eager, replayed) == []


def test_first_replay_is_the_first_step_of_a_continued_run() -> None:
    """Capture changes nothing: weights, buffers, optimisers, clock and random states are those of before."""
    settings = small.config("dcgan-32")
    t, stream = small.trainer(settings, capturable=True), small.batches(settings)
    run(Eager(t, stream), 3)
    tensors = {k: v for k, v in t.state_dict().items() if isinstance(v, Tensor)}
    before = small.state(t)
    engine = Graph(t, stream, capture=record)
    after = t.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items())
    lasting = [k for k in tensors if not k.startswith("rng.") and not k.endswith(".step")]
    assert all(tensors[k].data_ptr() == after[k].data_ptr() for k in lasting)
    assert t.clock is not None
    assert t.clock.item() == 3
    other, other_stream = small.trainer(settings, capturable=True), small.batches(settings)
    plain = Eager(other, other_stream)
    run(plain, 3)
    run(plain, 4), run(engine, 4)
    assert differences(plain, engine) == []


def test_several_steps_in_a_replay() -> None:
    eager, replayed = pair("cgan", steps=4)
    run(eager, 100)
    torch.manual_seed(7)
    made = []
    while replayed.trainer.steps_done < 100:
        before = replayed.trainer.steps_done
        replayed.step(most=min(100 - before, 7))
        made.append(replayed.trainer.steps_done - before)
    assert set(made) == {1, 4}  # the odd ones at the ends of epochs and of the run
    assert made.count(4) > 15
    assert differences(eager, replayed) == []
    replayed.step(most=3)
    assert replayed.trainer.steps_done == 101


def test_batch_of_another_size_goes_the_eager_way_between_replays() -> None:
    """And so does a step of the trainer that the engine knows nothing of."""
    odd = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def event(engine: Eager, i: int) -> None:
        if i in (5, 9):
            engine.step((odd,))
        if i == 7:
            engine.trainer.step(odd)
            next(engine.batches)

    eager, replayed = pair("gan")
    histories = [run(e, 40, event) for e in (eager, replayed)]
    assert all(torch.equal(x, y) for x, y in zip(*histories, strict=True))
    assert differences(eager, replayed) == []
    assert replayed.trainer.steps_done == 43


def test_the_stream_tells_its_order_and_place() -> None:
    stream = small.batches(small.config("gan"))
    for _ in range(80):
        first = stream.indices()
        assert torch.equal(first, stream.order[stream.position - 6 : stream.position])
    assert stream.epoch == 2


def test_loaded_state_is_what_replays_go_on_from() -> None:
    eager, replayed = pair("gan")
    for engine in (eager, replayed):
        run(engine, 50)
        saved, place = small.state(engine.trainer), engine.batches.state_dict()
        for _ in range(5):
            engine.step()
        engine.trainer.load_state_dict(saved)
        engine.batches.load_state_dict(place)
        for _ in range(4):
            engine.step()
    assert differences(eager, replayed) == []


# --- what the comparison sees


def test_numbers_baked_into_a_step_are_seen() -> None:
    """Learning rate and EMA decay as Python numbers: the replay keeps those of the recording."""
    eager, replayed = pair("gan", capturable=False)
    run(eager, 6), run(replayed, 6)
    assert {k.split(".")[0] for k in differences(eager, replayed)} == {"ema"}  # its decay grows in the first steps
    eager, replayed = pair("gan", capturable=False, ema=0.0)
    for e in (eager, replayed):
        run(e, 6, lambda e, i: slower(e, i, 3))
    assert any(k.startswith("generator") for k in differences(eager, replayed))


def test_a_batch_baked_into_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(self: Graph, count: int) -> None:
        self.out = self.trainer.step(*self.gather(self.batches.order[: self.batches.batch_size]))
        self.losses.write(self.out)

    monkeypatch.setattr(Graph, "body", fixed)
    eager, replayed = pair("gan")
    assert torch.equal(run(eager, 1)[0], run(replayed, 1)[0])
    eager.step(), replayed.step()
    assert differences(eager, replayed) != []


def test_a_recording_refuses_numbers_for_the_host() -> None:
    with Recording(), pytest.raises(RuntimeError, match="gives the host a number"):
        torch.ones(()).item()


# --- failures and fall-backs


def test_failed_capture_leaves_the_trainer_as_it_was() -> None:
    settings = small.config("sngan")
    t, stream = small.trainer(settings, capturable=True), small.batches(settings)
    before = small.state(t), stream.state_dict()

    def broken(body: Callable[[], None], rewind: Callable[[], None], trainer: Trainer) -> Recording:
        record(body, rewind, trainer)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(RuntimeError, match="not permitted"):
        Graph(t, stream, capture=broken)
    after = t.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before[0].items())
    assert stream.state_dict()["position"] == before[1]["position"]


class FakeCuda:
    """As much of torch.cuda as a capture asks for: notes what it is asked, and in which sync mode."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.mode: Any = 0
        graph = SimpleNamespace(
            register_generator_state=lambda rng: self.notes.append("register"), reset=lambda: self.notes.append("reset")
        )
        stream = SimpleNamespace(wait_stream=lambda other: self.notes.append("wait"))
        for name, value in {
            "device": lambda _: nullcontext(), "stream": lambda _: nullcontext(), "Stream": lambda: stream,
            "CUDAGraph": lambda: graph, "current_stream": lambda: stream, "graph": self.capture,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    @contextmanager
    def capture(self, graph: Any, stream: Any) -> Iterator[None]:
        self.notes.append("begin")
        yield
        self.notes.append("end")


@pytest.mark.parametrize("failing", [0, 3, 4])
def test_capture_warms_up_looks_for_waits_and_cleans_up(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of its calls; body number `failing` raises."""
    cuda, runs = FakeCuda(monkeypatch), [0]

    def body() -> None:
        runs[0] += 1
        cuda.notes.append(f"body {cuda.mode}")
        if runs[0] == failing:
            raise RuntimeError("not permitted")

    t: Any = SimpleNamespace(device=torch.device("cuda"), rng=None)
    with pytest.raises(RuntimeError, match="not permitted") if failing else nullcontext():
        engines.cuda_graph(body, lambda: cuda.notes.append("rewind"), t)
    assert cuda.mode == 0
    want = ["wait", *["rewind", "body 0"] * 2, "rewind", "body error"]
    if failing != 3:
        want += ["wait", "register", "begin", "body 0", "reset" if failing else "end"]
    assert cuda.notes == want


def test_make_takes_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small.config("gan")
    t, stream = small.trainer(settings), small.batches(settings)
    for name in ("auto", "eager"):
        engine = make(name, t, stream)
        assert (type(engine), engine.name, engine.why) == (Eager, "eager", "")
    with pytest.raises(ValueError, match=r"^train: engine must be auto, eager or compile on cpu, got graph$"):
        make("graph", t, stream)
    with pytest.raises(ValueError, match=r"^train: engine must be one of auto, eager, graph, compile, got 'fast'$"):
        make("fast", t, stream)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    engine = make("compile", t, stream)
    assert (engine.name, engine.why) == ("eager", "compile failed: RuntimeError: no compiler")
    run(engine, 2)


class OwnStep(Trainer):
    def step(self, real: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        return super().step(real, *labels)


def test_reasons_against_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    t = small.trainer(small.config("gan"), capturable=True)
    with pytest.raises(RuntimeError, match=r"^Graph: a graph needs CUDA, the trainer is on cpu$"):
        Graph(t, small.batches(t.config))
    with pytest.raises(ValueError, match=r"^Graph: steps must be a finite number >= 1, got 0$"):
        Graph(t, small.batches(t.config), steps=0)
    stream = SimpleNamespace(resident=True)
    assert graph_problem(t, stream) == "a graph needs CUDA, the trainer is on cpu"  # type: ignore[arg-type]
    t.device = torch.device("cuda")
    assert graph_problem(t, stream) == ""  # type: ignore[arg-type]
    t.__class__ = OwnStep
    assert graph_problem(t, stream) == "a graph knows Trainer.step, OwnStep has a step of its own"  # type: ignore[arg-type]
    stream.resident = False
    monkeypatch.setattr(engines, "Losses", lambda *_: None)
    assert graph_problem(t, stream) == "a graph needs the data on cuda, which has no room for it"  # type: ignore[arg-type]
    assert make("graph", t, stream).why == "a graph needs the data on cuda, which has no room for it"  # type: ignore[arg-type]
    t.clock = None
    assert graph_problem(t, stream) == "a graph needs a trainer made with capturable=True"  # type: ignore[arg-type]


# --- losses


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_losses_are_read_late_and_the_first_bad_step_is_known(size: int) -> None:
    losses = Losses(size, torch.device("cpu"))
    assert losses.request().read() == (0, {}, "")

    def row(step: int) -> dict[str, Tensor]:
        values = [step, -step, float("nan") if step >= 9 else 0.5, float("inf") if step == 9 else 0.25]
        return {k: torch.tensor(float(v)) for k, v in zip(engines.LOSSES, values, strict=True)}

    pending = []
    for step in range(1, 21):
        losses.begin(step - 1, 1)
        losses.write(row(step))
        pending.append(losses.request() if step in (3, 8, 9, 20) else None)
    readings = [p.read() for p in pending if p is not None]
    assert [r.step for r in readings] == [3, 8, 9, 20]
    assert readings[0] == (3, {"d_loss": 3.0, "g_loss": -3.0, "d_real": 0.5, "d_fake": 0.25}, "")
    assert readings[1].bad == ""
    assert readings[2].bad == "d_real is nan, d_fake is inf at step 9"
    assert readings[3].bad == ("d_real is nan, d_fake is inf at step 9" if size == 50 else "a loss is not finite at step 9")
    again = losses.request().read()  # nothing new since
    assert (again.step, again.bad, again.values["d_loss"]) == (20, readings[3].bad, 20.0)


def test_losses_of_steps_made_elsewhere_are_left_out() -> None:
    losses = Losses(4, torch.device("cpu"))
    for step in (1, 2, 7, 8):  # 3 to 6 were somebody else's
        losses.begin(step - 1, 1)
        losses.write({name: torch.tensor(float(step)) for name in engines.LOSSES})
    reading = losses.request().read()
    assert (reading.step, reading.values["d_loss"]) == (8, 8.0)


def test_divergence_is_dated_alike_by_both_engines() -> None:
    eager, replayed = pair("gan", lr_g=1e38, lr_d=1e38, log_every=30)
    first = 0
    torch.manual_seed(7)
    while not first and eager.trainer.steps_done < 60:
        if not all(v.isfinite() for v in eager.step().values()):
            first = eager.trainer.steps_done
    assert first > 0
    run(replayed, 40)
    assert f" at step {first}" in replayed.losses.request().read().bad


# --- compiled networks


def test_compiled_networks_take_the_same_steps() -> None:
    """torch.compile's own tracing, without a code generator behind it: the numbers stay, so do names and random states."""
    settings = small.config("gan", g_dropout=0.0, d_dropout=0.0)
    plain, traced = ((small.trainer(settings), small.batches(settings)) for _ in range(2))
    eager, compiled = Eager(*plain), Compile(*traced, backend="eager")
    assert (compiled.name, compiled.why) == ("compile", "")
    assert type(compiled.trainer.critic).__name__ == "Autograd"
    run(eager, 3), run(compiled, 3)
    for key, value in eager.trainer.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(compiled.trainer.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert differences(eager, compiled).count("rng.noise") == 0


def test_failed_compilation_leaves_the_trainer_as_it_was() -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    settings = small.config("gan")
    t = small.trainer(settings)
    before, parts = small.state(t), (t.forward, t.critic)
    with pytest.raises(Exception, match="no compiler"):
        Compile(t, small.batches(settings), backend=broken)
    assert (t.forward, t.critic) == parts
    after = t.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items())


def test_compiled_critic_with_a_penalty_stays_eager() -> None:
    settings = small.config("wgan-gp")
    t = small.trainer(settings)
    critic = t.critic
    engine = Compile(t, small.batches(settings), backend="eager")
    assert engine.why == "the critic is not compiled: torch.compile gives its penalty no second derivative"
    assert t.critic is critic
    assert t.forward is not t.generator
    assert all(v.isfinite() for v in engine.step().values())
