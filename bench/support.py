"""What the benches share: groups of rivals, the correctness gate, alternating samples, and rows for pytest-benchmark.

How a figure is made. pytest-benchmark runs one test after the other, so that a machine that slows down half-way would look like a
speed-up. Here a group (one op, pass, dtype and size) is measured once, when its first row is asked for: every rival is checked
against the definition, warmed up, and then sampled in turn, round after round, the order rotated. A sample is a fixed number of
calls, about SAMPLE seconds long, between two reads of a clock that waits for the GPU. Each row of pytest-benchmark then *replays*
its rival's samples: the timer that it is given hands out recorded durations, and the function that it "times" does nothing. So its
table, --benchmark-json and --benchmark-compare work as ever, on alternated samples. With --benchmark-disable the gate of each row
runs once, and nothing is measured.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gankern
from gankern import backend, use_backend
from gankern.training import precision

EAGER = "eager"  # every group has this rival; ratios are its median over the rival's
COMPILE = "compile"
AUTOMATIC = "gankern"  # what a user gets; "gankern-<backend>" is a forced one
SAMPLE = 5e-4  # seconds that a sample lasts at least
ROUNDS = (15, 301)  # fewest and most rounds, between which the time budget of a group decides
BUDGET = {"cpu": 1.5, "cuda": 0.25}  # seconds of samples for one group
SLOW = (6.0, 5)  # a group whose fewest rounds would take so many seconds makes as many as fit into them, but so many at least

# Largest ||got - want|| / ||want|| against float64 that may be timed.
TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}

Value = Tensor | Sequence[Tensor]
Outputs = dict[str, Value]
Function = Callable[..., Outputs]


class Work(NamedTuple):
    """What one call must do: the fewest bytes (each input read once, each output written once), its products' flops, its images."""

    bytes: int = 0
    flops: int = 0
    images: int = 0


class Settings(NamedTuple):
    """What the options of bench/conftest.py said."""

    device: torch.device
    all_rivals: bool = False
    rounds: int = 0  # 0: as the budget of a group allows
    smoke: bool = False  # --benchmark-disable


class Group:
    """One comparison: the same work done by several rivals, of which EAGER is one.

    Attributes:
        name: unique in its file, as "forward fp32 64x256".
        rivals: the rows, in the order of the table.
        work: what each of them must do.
        dtype: "fp32", "tf32" or "bf16".
        grad: False runs it under no_grad.
        memory: whether the memory of a call is measured too.
    """

    grad = True
    memory = False

    def __init__(self, name: str, rivals: Sequence[str], work: Work, dtype: str, device: torch.device) -> None:
        self.name, self.rivals, self.work, self.dtype, self.device = name, tuple(rivals), work, dtype, device

    def check(self, rival: str) -> None:
        """Raise AssertionError if this rival computes anything but the definition."""
        raise NotImplementedError

    def build(self, rival: str) -> Callable[[], object]:
        """The call to time."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what check and build made."""

    def context(self, rival: str) -> AbstractContextManager[Any]:
        """Entered around a whole sample, so that it costs the timed calls nothing: precision, the forced backend, no_grad."""
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(self.grad))
        stack.enter_context(precision.products(self.dtype, self.device))
        if rival.startswith("gankern-"):
            stack.enter_context(use_backend(rival.removeprefix("gankern-")))
        return stack


class OpGroup(Group):
    """A group of functions (*inputs) -> outputs by name, checked against the definition in float64.

    Subclasses give `function(rival)`, `inputs(exact)` (fresh tensors of the group's dtype; exact=True: numbers on which rounding
    decides no sign) and `expected(inputs64, got)`.
    """

    optional: Sequence[str] = ()  # outputs that not every rival computes

    def __init__(self, name: str, rivals: Sequence[str], work: Work, dtype: str, device: torch.device) -> None:
        super().__init__(name, rivals, work, dtype, device)
        self._functions: dict[str, Function] = {}

    def function(self, rival: str) -> Function:
        raise NotImplementedError

    def inputs(self, exact: bool) -> list[Tensor]:
        raise NotImplementedError

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        """The definition's outputs in float64; `got` is there for rivals that draw random numbers."""
        raise NotImplementedError

    def check(self, rival: str) -> None:
        inputs = self.inputs(exact=True)
        with self.context(rival):
            got = self._function(rival)(*inputs)
        doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        assert_close(got, self.expected(doubles, got), TOLERANCE[self.dtype], self.optional)

    def build(self, rival: str) -> Callable[[], object]:
        function, inputs = self._function(rival), self.inputs(exact=False)
        return lambda: function(*inputs)

    def _function(self, rival: str) -> Function:
        if rival not in self._functions:
            self._functions[rival] = self.function(rival)
        return self._functions[rival]

    def close(self) -> None:
        self._functions.clear()


def assert_close(got: Outputs, want: Outputs, tolerance: float, optional: Sequence[str] = ()) -> None:
    """The same outputs, each of the same size, and ||got - want|| <= tolerance * ||want|| (NaN is never close).

    An output may be one tensor or several, which count as one. `optional` ones may be missing from `got`.
    """
    assert got.keys() | set(optional) == want.keys() | set(optional), f"outputs must be {sorted(want)}, got {sorted(got)}"
    for name in got:
        a, b = _flat(got[name]), _flat(want[name])
        assert a.shape == b.shape, f"{name}: {a.numel()} elements, expected {b.numel()}"
        error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        assert error <= tolerance, f"{name}: relative error {error:.3g} against float64, allowed {tolerance:g}"


def _flat(value: Value) -> Tensor:
    parts = [value] if isinstance(value, Tensor) else value
    return torch.cat([t.detach().double().flatten() for t in parts])


def gankern_rivals(device: torch.device) -> list[str]:
    """The automatic choice and each backend that runs natively on this device: Triton's interpreter is never timed."""
    names = [n for n in backend.NAMES if not backend.problem(n, device.type) and not (n == "triton" and device.type == "cpu")]
    return [AUTOMATIC, *(f"gankern-{n}" for n in names)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one size. What was compiled for other groups is forgotten, or the recompile limit would stop it."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# --- the clock -------------------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sample(call: Callable[[], object], inner: int, device: torch.device) -> float:
    """Seconds a call, over `inner` calls."""
    start = clock(device)
    for _ in range(inner):
        call()
    return (clock(device) - start) / inner


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    inner: int | Mapping[str, int] = 1,
    *,
    device: torch.device | str = "cpu",
    context: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Time rivals in turn: one warm-up sample of each, then `rounds` rounds of one sample of each, the order rotated every round.

    Args:
        calls: name -> call.
        rounds: samples of each.
        inner: calls a sample, one number or one a name.
        device: whose work the clock waits for.
        context: entered around each sample, outside the clock.

    Returns:
        name -> `rounds` durations, seconds a call.
    """
    names, device = list(calls), torch.device(device)
    counts = inner if isinstance(inner, Mapping) else dict.fromkeys(names, inner)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with context(name):
                    seconds = sample(calls[name], counts[name], device)
                if turn >= 0:
                    samples[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return samples


def calls_per_sample(call: Callable[[], object], device: torch.device, seconds: float = SAMPLE) -> tuple[int, float]:
    """How many calls last `seconds`, and the seconds of one; warms up on the way."""
    inner, took = 1, sample(call, 1, device)
    took = sample(call, 1, device)
    while took * inner < seconds and inner < 10_000:
        inner = min(10_000, max(inner + 1, math.ceil(1.1 * seconds / max(took, 1e-7))))
        took = sample(call, inner, device)
    return inner, took


# --- memory ----------------------------------------------------------------------------------------------------------------


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call takes from PyTorch's allocator at its peak, above what lives between calls.

    CUDA: the allocator's own count. CPU: the allocations that torch.profiler records; scratch memory of oneDNN is not among them.
    The call must have been warmed up. A CUDA graph allocates when it is captured and not here.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()  # so that what the next call frees has been seen to be allocated
        with record_function("measured"):
            call()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    start = next(e.start_ns() for e in events if e.name() == "measured")
    level, before, peak = 0, 0, 0
    for event in events:
        if event.name() == "[memory]":
            level += event.nbytes()
            if event.start_ns() < start:
                before = peak = level
            peak = max(peak, level)
    return peak - before


@contextmanager
def without_stderr() -> Iterator[None]:
    """Kineto writes there when it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- the ceilings ----------------------------------------------------------------------------------------------------------


class Ceilings:
    """Measured once for each dtype: bytes/s of a large copy (read plus written), flops/s of a large matrix product."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rates: dict[str, tuple[float, float]] = {}

    def rates(self, dtype: str) -> tuple[float, float]:
        if dtype not in self._rates:
            on_gpu = self.device.type == "cuda"
            source = torch.randn(2**28 if on_gpu else 2**25, device=self.device)
            target = torch.empty_like(source)
            n = 8192 if on_gpu else 1536
            a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
            with precision.products(dtype, self.device):
                copy = min(sample(lambda: target.copy_(source), 3, self.device) for _ in range(4))
                product = min(sample(lambda: a @ a, 2, self.device) for _ in range(4))
            self._rates[dtype] = 2 * source.numel() * source.element_size() / copy, 2 * n**3 / product
        return self._rates[dtype]

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds under which no version of this work runs, where its data come from memory; caches can beat it."""
        bandwidth, rate = self.rates(dtype)
        return max(work.bytes / bandwidth, work.flops / rate)


class Products(TorchDispatchMode):
    """Counts the flops of matrix products and convolutions, two a multiplication.

    By the formulas of torch's FlopCounterMode, whose own hooks fail inside autograd.grad.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


# --- one run ---------------------------------------------------------------------------------------------------------------

_recorded: deque[float] = deque()


def replayed_clock() -> float:
    """The timer that pytest-benchmark is given: recorded times, two for each round."""
    return _recorded.popleft()


class TimeIsUp(Exception):
    """The session's limit was reached before this group."""


class Measured(NamedTuple):
    """Samples of a group (seconds a call), its calls a sample, what went wrong with rivals that have none, and extra_memory."""

    samples: dict[str, list[float]]
    inner: dict[str, int]
    problems: dict[str, Exception]
    memory: dict[str, int]


def check(group: Group, rival: str) -> None:
    """The gate, from a fixed seed: a row is right or wrong at each run alike."""
    torch.manual_seed(0)
    group.check(rival)


def measure(group: Group, rounds: int = 0) -> Measured:
    """Check each rival, then time those that are right, alternating."""
    calls: dict[str, Callable[[], object]] = {}
    inner: dict[str, int] = {}
    problems: dict[str, Exception] = {}
    memory: dict[str, int] = {}
    total = 0.0
    try:
        for name in group.rivals:
            try:
                check(group, name)
                with group.context(name):
                    call = group.build(name)
                    inner[name], took = calls_per_sample(call, group.device)
                    if group.memory and not name.endswith("-graph"):
                        memory[name] = extra_memory(call, group.device)
                calls[name] = call
                total += inner[name] * took
            except Exception as problem:
                problems[name] = problem
        if EAGER not in calls:
            return Measured({}, {}, {n: problems.get(n, problems[EAGER]) for n in group.rivals}, {})
        rounds = rounds or rounds_for(total, BUDGET[group.device.type])
        return Measured(alternate(calls, rounds, inner, device=group.device, context=group.context), inner, problems, memory)
    finally:
        group.close()


def rounds_for(seconds: float, budget: float) -> int:
    """How many rounds of so many seconds each."""
    (low, high), (slow, fewest) = ROUNDS, SLOW
    return max(fewest, min(low, int(slow / seconds)), min(high, int(budget / seconds)))


class Session:
    """One run of the benches: its groups, what has been measured, and the rows for the summary."""

    def __init__(self, settings: Settings, seconds: float = 0.0) -> None:
        self.settings = settings
        self.deadline = time.monotonic() + seconds if seconds else math.inf
        self.ceilings = Ceilings(settings.device)
        self.groups: dict[tuple[str, str], Group] = {}
        self.measured: dict[tuple[str, str], Measured] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self, file: str, name: str) -> Measured:
        """The samples of a group, taken when they are first asked for.

        Raises:
            TimeIsUp: too late to begin with it.
        """
        if (file, name) not in self.measured:
            if time.monotonic() > self.deadline:
                raise TimeIsUp
            self.measured[file, name] = measure(self.groups[file, name], self.settings.rounds)
        return self.measured[file, name]

    def result(self, file: str, name: str, rival: str) -> dict[str, Any]:
        """The row of one rival, whose group is measured for it; also kept for the summary.

        Raises:
            TimeIsUp: as `measure` does.
            Exception: what this rival's gate, or its work, raised.
        """
        measured = self.measure(file, name)
        if rival in measured.problems:
            raise measured.problems[rival]
        low, median, high = quartiles(measured.samples[rival])
        row = {"file": file, "group": name, "rival": rival, "median": median, "iqr": high - low}
        self.rows.append(row | self.facts(self.groups[file, name], rival, measured))
        return self.rows[-1]

    def replay(self, benchmark: Any, file: str, name: str, rival: str) -> None:
        """One row of pytest-benchmark: the recorded samples, or, with --benchmark-disable, the gate once."""
        group = self.groups[file, name]
        benchmark.group = f"{file} {name}"
        if not benchmark.enabled:
            try:
                benchmark.pedantic(check, args=(group, rival))
            finally:
                group.close()
            return
        row, measured = self.result(file, name, rival), self.measured[file, name]
        benchmark.extra_info.update(extra_info(row))
        samples, inner = measured.samples[rival], measured.inner[rival]
        _recorded.clear()
        for seconds in samples:
            _recorded.extend((0.0, seconds * inner))
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=inner)

    def facts(self, group: Group, rival: str, measured: Measured) -> dict[str, Any]:
        """What a row has besides its time."""
        median, work = statistics.median(measured.samples[rival]), group.work
        facts: dict[str, Any] = {
            "ratio_to_eager": statistics.median(measured.samples[EAGER]) / median,
            "dtype": group.dtype,
            "device": group.device.type,
            "threads": torch.get_num_threads(),
            "calls_per_sample": measured.inner[rival],
        }
        if rival in measured.memory:
            facts["extra_memory_bytes"] = measured.memory[rival]
        if work.images:
            facts["images_per_s"] = work.images / median
        if work.bytes:
            floor = self.ceilings.floor(work, group.dtype)
            facts |= {
                "bytes": work.bytes,
                "flops": work.flops,
                "gb_per_s": work.bytes / median / 1e9,
                "share_of_floor": floor / median,
            }
        return facts


def extra_info(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row that pytest-benchmark does not know."""
    return {key: value for key, value in row.items() if key not in ("file", "group", "rival", "median", "iqr")}


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one sample, itself three times."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine; pytest-benchmark adds the CPU."""
    facts: dict[str, Any] = {"gankern": gankern.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["triton"] = importlib.metadata.version("triton") if not backend.triton_problem("cuda") else None
    facts["compiler"] = None
    if not backend.CPU_PROBLEM:
        from gankern import _C

        facts["compiler"] = _C.compiler.strip()
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["gpu"] = facts["cuda"] = facts["driver"] = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["gpu"], facts["cuda"] = torch.cuda.get_device_name(device), torch.version.cuda
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0] or None
    return facts
