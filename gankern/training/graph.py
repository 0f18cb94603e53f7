"""The engines that make the steps of a training run: one call after another, one CUDA graph, or compiled networks.

    engine = make("auto", trainer, batches)
    while trainer.steps_done < 1000:
        losses = engine.step()
    engine.losses.request().read()      # the numbers; the only place that waits for the device

All have `step`, `losses` and `name`, and `why`: the reason why it is not what was asked for, in words, or "".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gankern import checks
from gankern.data import Batches
from gankern.training.critics import Autograd, OnePass
from gankern.training.networks import CONDITIONAL
from gankern.training.trainer import Trainer

ENGINES = ("auto", "eager", "graph", "compile")
LOSSES = ("d_loss", "g_loss", "d_real", "d_fake")
WARM_UP = 3  # steps before a capture: libraries choose their kernels and allocate their workspaces in them
MOST_ROWS = 1024
NEVER = 2**63 - 1


class Eager:
    """Trainer.step of one batch after another, with the labels where the networks are conditional.

    Args:
        trainer: whose steps are made.
        batches: where their batches come from, n_critic * B images each.
        why: the reason why it is this engine, if another one was asked for.
    """

    name = "eager"
    lag = 0  # readings of the losses that may be under way while the device goes on

    def __init__(self, trainer: Trainer, batches: Batches, why: str = "") -> None:
        self.trainer, self.batches, self.why = trainer, batches, why
        self.labelled = trainer.config.arch in CONDITIONAL
        columns = [name for technique in trainer.techniques.values() for name in technique.columns()]
        self.losses = Losses(min(trainer.config.log_every, MOST_ROWS), trainer.device, (*LOSSES, *columns))

    def step(self, batch: tuple[Tensor, ...] | None = None, most: int = 1) -> dict[str, Tensor]:
        """Make one step, or as many as a replay holds if that is at most `most`; trainer.steps_done tells how many.

        Args:
            batch: (real, *labels) as Trainer.step takes them, of any size. None: the next of `batches`.
            most: >= 1.

        Returns:
            The losses of the last step made, as Trainer.step does; the next step may overwrite them.
        """
        real, *labels = self.gather(self.batches.indices()) if batch is None else batch
        self.losses.begin(self.trainer.steps_done, 1)
        out = self.trainer.step(real, *labels)
        self.losses.write(out)
        return out

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        samples = self.batches.samples(indices)
        return (samples, self.batches.labels(indices)) if self.labelled else (samples,)


class Replay(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None], Callable[[], None], Trainer], Replay]


class Graph(Eager):
    """Whole steps as one CUDA graph: gather of the batch, noise, all updates, EMA and losses are one launch.

    A replay needs nothing from the host: the images' numbers come from an epoch's order on the device (copied there once an epoch),
    read at a place that the graph moves on; learning rates, step count and EMA decay are tensors. It draws the random numbers that
    the eager steps would draw, and its first step is the first one: what the warm-up changed is put back, in place. A batch of
    another size or origin, given to `step`, goes the eager way, as does a step of the trainer made beside it. The parameters'
    `grad` after a replay is of no use.

    Args:
        trainer: made with capturable=True (the default on CUDA).
        batches: with the data on the trainer's device (`batches.resident`).
        steps: in one replay, made whenever `step` may make that many and the epoch has them. (On no GPU measured yet; 1 is plain.)
        capture: makes the graph: `cuda_graph`, or a stand-in that tests can do without a GPU.

    Raises:
        ValueError, TypeError: steps is no int >= 1.
        RuntimeError, or whatever a capture raises: the step cannot be captured. The trainer is as it was then.
    """

    name = "graph"
    lag = 1

    def __init__(self, trainer: Trainer, batches: Batches, steps: int = 1, capture: Capture | None = None) -> None:
        checks.integer("Graph", "steps", steps, 1)
        problem = graph_problem(trainer, batches) if capture is None else ""
        if problem:
            raise RuntimeError(f"Graph: {problem}")
        super().__init__(trainer, batches)
        n, device = batches.batch_size, trainer.device
        self.steps = min(steps, len(batches.order) // n)
        self.losses = Losses(max(self.steps, len(self.losses.ring)), device, self.losses.names)
        self.known, self.at = batches.order, -1  # whose copy `order` is, and what `place` holds
        self.order, self.offsets = batches.order.clone(), torch.arange(n, device=device)
        self.place = torch.zeros((), dtype=torch.int64, device=device)
        saved = {key: v.clone() if isinstance(v, Tensor) else v for key, v in trainer.state_dict().items()}
        self.replays: dict[int, tuple[Replay, dict[str, Tensor]]] = {}
        self.out: dict[str, Tensor] = {}
        try:
            for count in {1, self.steps}:
                graph = (capture or cuda_graph)(lambda count=count: self.body(count), self.rewind, trainer)  # type: ignore[misc]
                self.replays[count] = graph, self.out
        finally:
            self.rewind()
            trainer.load_state_dict(saved)

    def rewind(self) -> None:
        self.place.zero_()
        self.losses.slot.zero_()

    def body(self, count: int) -> None:
        """What a graph holds: `count` steps, from the images at `place` on."""
        for _ in range(count):
            real, *labels = self.gather(self.order.index_select(0, self.place + self.offsets))
            self.out = self.trainer.step(real, *labels)
            self.losses.write(self.out)
            self.place += len(self.offsets)

    def step(self, batch: tuple[Tensor, ...] | None = None, most: int = 1) -> dict[str, Tensor]:
        if batch is not None:
            return super().step(batch)
        trainer, batches, n = self.trainer, self.batches, self.batches.batch_size
        count = self.steps if self.steps * n <= min(most * n, len(batches.order) - batches.position) else 1
        for _ in range(count):
            batches.indices()  # the stream's own account, which checkpoints hold
        if batches.order is not self.known:
            self.order.copy_(batches.order)
            self.known = batches.order
        if batches.position != self.at + count * n:
            self.place.fill_(batches.position - count * n)
        self.at = batches.position
        self.losses.begin(trainer.steps_done, count)
        graph, out = self.replays[count]
        graph.replay()
        trainer.steps_done += count
        return out


def cuda_graph(body: Callable[[], None], rewind: Callable[[], None], trainer: Trainer) -> Replay:
    """Capture body() after a warm-up on the same side stream; `rewind` is called before each warm-up.

    What waits for the device raises in the last warm-up already: a capture that has begun is not always left without a trace.
    """
    with torch.cuda.device(trainer.device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        before = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(stream):
                for i in reversed(range(WARM_UP)):
                    if i == 0:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # that this mode is a prototype
                            torch.cuda.set_sync_debug_mode("error")
                    rewind()
                    body()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph.register_generator_state(trainer.rng)
        try:
            with torch.cuda.graph(graph, stream=stream):
                body()
        except BaseException:
            graph.reset()  # else the generators stay in capture
            raise
    return graph


class Compile(Eager):
    """Eager steps with networks that torch.compile has compiled for this batch size.

    A critic with a penalty stays as it is, as compiled code has no second derivative, and so does one that gives more than logits.
    `why` says so.

    Args:
        trainer: gets the compiled networks; their weights and its state_dict stay what they are.
        batches: the first batch is used to compile.
        options: of torch.compile, such as mode or backend.

    Raises:
        Whatever torch.compile raises. The trainer is as it was then.
    """

    name = "compile"

    def __init__(self, trainer: Trainer, batches: Batches, **options: Any) -> None:
        super().__init__(trainer, batches)
        before, config = (trainer.forward, trainer.critic), trainer.config
        saved = {key: v.clone() if isinstance(v, Tensor) else v for key, v in trainer.state_dict().items()}
        try:
            trainer.forward = torch.compile(trainer.generator, dynamic=False, **options)
            critic = trainer.critic
            if type(critic) not in (Autograd, OnePass):
                self.why = "the critic is not compiled: its objective is not one of logits alone"
            elif config.penalty == "none":
                net: Any = torch.compile(trainer.discriminator, dynamic=False, **options)
                trainer.critic = Autograd(net, critic.loss, "none", 0.0, trainer.rng, getattr(critic, "one_pass", True))
            else:
                self.why = "the critic is not compiled: torch.compile gives its penalty no second derivative"
            trainer.step(*self.gather(batches.order[: batches.batch_size]))
        except BaseException:
            trainer.forward, trainer.critic = before
            raise
        finally:
            trainer.load_state_dict(saved)


def make(engine: str, trainer: Trainer, batches: Batches) -> Eager:
    """The engine of this name; "auto" is the graph on CUDA, else eager. Where it cannot be had, Eager with the reason in `why`.

    Raises:
        ValueError: no such engine, or "graph" on a device that is not CUDA.
    """
    checks.one_of("train", "engine", engine, ENGINES)
    kind = trainer.device.type
    if engine == "graph" and kind != "cuda":
        checks.fail(ValueError, "train", "engine", f"be auto, eager or compile on {kind}", "graph")
    if engine == "eager" or (engine == "auto" and kind != "cuda"):
        return Eager(trainer, batches)
    cls = Compile if engine == "compile" else Graph
    try:
        problem = graph_problem(trainer, batches) if cls is Graph else ""
        return Eager(trainer, batches, problem) if problem else cls(trainer, batches)
    except Exception as error:
        return Eager(trainer, batches, f"{cls.name} failed: {first_line(error)}")


def graph_problem(trainer: Trainer, batches: Batches) -> str:
    """Why the steps of this trainer cannot be captured, or ""."""
    if trainer.device.type != "cuda":
        return f"a graph needs CUDA, the trainer is on {trainer.device}"
    if trainer.clock is None:
        return "a graph needs a trainer made with capturable=True"
    if not batches.resident:
        return f"a graph needs the data on {trainer.device}, which has no room for it"
    if type(trainer).step is not Trainer.step:
        return f"a graph knows Trainer.step, {type(trainer).__name__} has a step of its own"
    return ""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")


class Reading(NamedTuple):
    """The losses of step number `step` ({} if none has been made); which was the first not to be finite so far and when, or ""."""

    step: int
    values: dict[str, float]
    bad: str


class Losses:
    """The losses of the last steps, kept on the device and read with one copy that nothing waits for.

    Args:
        size: of the ring, in steps.
        device: where the steps are made.
        names: of what `Trainer.step` returns, in the order of the columns.
    """

    def __init__(self, size: int, device: torch.device, names: tuple[str, ...] = LOSSES) -> None:
        self.names = names
        self.ring = torch.zeros(size, len(names), device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # the row that is written next
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)  # the first step with a number that is not finite
        self.start = self.filled = 0  # row i holds step start + i + 1, for i < filled

    def begin(self, done: int, count: int) -> None:
        """Before the `count` steps that follow step number `done`: `write` is called for each of them, here or in a graph."""
        if done != self.start + self.filled or self.filled + count > len(self.ring):
            self._look()
            self.slot.zero_()
            self.start, self.filled = done, 0
        self.filled += count

    def write(self, out: dict[str, Tensor]) -> None:
        """On the device alone, so that a graph can hold it."""
        row = torch.stack([out[name] for name in self.names]).to(self.ring.dtype)
        self.ring.index_copy_(0, self.slot, row.unsqueeze(0))
        self.slot += 1

    def _look(self) -> None:
        """Note the first bad step of the ring."""
        if self.filled:
            steps = torch.arange(self.start + 1, self.start + self.filled + 1, device=self.ring.device)
            bad = torch.where(self.ring[: self.filled].isfinite().all(1), NEVER, steps).min()
            torch.minimum(self.first_bad, bad, out=self.first_bad)

    def forget(self) -> None:
        """All steps so far, and that one of them was bad."""
        self.first_bad.fill_(NEVER)
        self.start, self.filled = -1, 0

    def request(self) -> Pending:
        """Start the copy to the host of what is there now."""
        self._look()
        return Pending(self)


class Pending:
    """A copy of `losses` to the host, under way."""

    def __init__(self, losses: Losses) -> None:
        device = losses.ring.device
        self.start, self.names = losses.start, losses.names
        self.rows, self.first_bad = (
            torch.empty(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda").copy_(t, non_blocking=True)
            for t in (losses.ring[: losses.filled], losses.first_bad)
        )
        self.event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def read(self) -> Reading:
        """Wait for this copy, not for what the device was asked since."""
        if self.event is not None:
            self.event.synchronize()
        rows, bad = self.rows.tolist(), int(self.first_bad)
        words = "" if bad == NEVER else f"a loss is not finite at step {bad}"
        if self.start < bad <= self.start + len(rows):
            pairs = zip(self.names, rows[bad - self.start - 1], strict=True)
            words = ", ".join(f"{k} is {v}" for k, v in pairs if not abs(v) < float("inf")) + f" at step {bad}"
        return Reading(self.start + len(rows), dict(zip(self.names, rows[-1], strict=True)) if rows else {}, words)
