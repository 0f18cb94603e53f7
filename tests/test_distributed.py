"""Several gloo processes are one process with the whole batch; they start, refuse, stop, resume and fail together."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from gankern.cli.main import train_main
from gankern.training import Trainer, checkpoint, distributed
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
    wait = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=count, timeout=wait)
    torch.save(body(*arguments), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def processes(count: int, folder: Path, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What body(*arguments) gives in each of so many processes."""
    torch.multiprocessing.start_processes(child, (count, str(folder), body, arguments), nprocs=count, start_method="fork")
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module", autouse=True)
def ready_to_fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread; and all imported that a run imports, which each child would do again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert said(words(tmp_path_factory.mktemp("first"), "--steps", "1"))[0] == 0
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


# --- what is each process's own


def alike_but_not_one(name: str) -> dict[str, Tensor]:
    preset, changes = EXACT[name]
    settings = small.config(preset, **{**changes, "sync_batch_norm": False})
    engine = Eager(small.trainer(settings), small.batches(settings))
    engine.step()
    engine.step()
    return {key: value for key, value in engine.trainer.state_dict().items() if isinstance(value, Tensor)}


def test_batch_norm_of_each_process(tmp_path: Path) -> None:
    """Without --sync-batch-norm: equal weights, from gradients through the statistics of a part."""
    first, other = processes(2, tmp_path, alike_but_not_one, "dcgan")
    alone = alike_but_not_one("dcgan")
    own = {key for key in first if not torch.equal(first[key], other[key])}
    assert own
    assert all("running" in key for key in own)
    assert not torch.allclose(first["generator.0.weight"], alone["generator.0.weight"], rtol=1e-4, atol=1e-7)


def parts() -> list[Any]:
    settings = small.config("wgan-gp", batch_size=8)
    rows = torch.arange(16)
    taken = [distributed.shard(rows, 2), distributed.shard(rows), distributed.draw(lambda n: torch.arange(n), 4)]
    faults = []
    for check in (
        lambda: distributed.check(small.config("gan", batch_size=9)),
        lambda: distributed.check(small.config("gan-bn", batch_size=2)),
        lambda: distributed.check(small.config("gan", batch_size=6, pack=2)),
        lambda: distributed.own_device(torch.device("cuda:1")),
        lambda: distributed.own_device(torch.device("cuda")),
    ):
        with pytest.raises(ValueError) as fault:
            check()
        faults.append(str(fault.value))
    distributed.check(settings)
    return [*(t.tolist() for t in taken), faults]


def test_parts_and_refusals(tmp_path: Path) -> None:
    first, other = processes(2, tmp_path, parts)
    assert first[:3] == [[0, 1, 2, 3, 8, 9, 10, 11], [*range(8)], [0, 1, 2, 3]]
    assert other[:3] == [[4, 5, 6, 7, 12, 13, 14, 15], [*range(8, 16)], [4, 5, 6, 7]]
    assert first[3] == [
        "train: batch_size must be a multiple of 2, the number of processes, got 9",
        "train: batch_size must be >= 2 with BatchNorm, got 1 in each of 2 processes",
        "train: batch_size must be a multiple of pack (2), got 3 in each of 2 processes",
        "train: device must be auto, cuda or cpu for several processes, each with a GPU of its own, got cuda:1",
        "train: processes must be at most the 0 GPUs of the machine, got number 1",
    ]


# --- a graph of the whole step, by the stand-in for a capture


def both_engines(name: str) -> list[list[float]]:
    preset, changes = EXACT[name]
    settings = small.config(preset, **changes)
    found = []
    for graph in (False, True):
        trainer, batches = small.trainer(settings, capturable=True), small.batches(settings)
        engine = Graph(trainer, batches, capture=replay.record) if graph else Eager(trainer, batches)
        for _ in range(3):
            engine.step()
        weights = torch.cat([p.detach().flatten() for p in (*trainer.generator.parameters(), *trainer.discriminator.parameters())])
        found.append([*engine.losses.request().read().values.values(), *weights.tolist()])
    return found


def test_a_replayed_step_has_its_sums_over_the_processes(tmp_path: Path) -> None:
    for eager, replayed in processes(2, tmp_path, both_engines, "wgan-gp"):
        assert replayed == eager


# --- the command

FLAGS = "--data ring --limit 200 --z-dim 4 --g-widths 8 --d-widths 16 8 --batch-size 16 --device cpu --ema 0.9 --keep 0"
FLAGS += " --log-every 1 --sample-every 0 --checkpoint-every 3"
NAME = "00000-gan-ring-b16"


def words(out: Path, *more: str) -> list[str]:
    return ["gan", "--outdir", str(out), *FLAGS.split(), *more]


def said(words: list[str], *others: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in this process; `others`: what processes beside the first are told."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train_main((words, *others)[min(distributed.rank(), len(others))])
        except SystemExit as ending:
            status = int(str(ending.code))
    return status, out.getvalue(), err.getvalue()


def saved(out: Path, step: int) -> dict[str, Any]:
    return checkpoint.load(out / NAME / f"checkpoint-{step:06d}.safetensors")


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key], key


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key, value in a.items():
        if key.startswith(("generator.", "discriminator.", "ema.", "rng.noise", "data.")):
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps of two processes, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    (status, out, err), (other, nothing, _) = processes(2, folder, said, words(folder, "--steps", "6"))
    assert (status, other, nothing) == (0, 0, ""), err
    assert "finished 6 steps" in out
    return folder


def test_the_first_process_writes(whole: Path) -> None:
    assert [path.name for path in whole.glob("*-gan-*")] == [NAME]
    rows = [json.loads(line) for line in (whole / NAME / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    state = saved(whole, 6)
    assert not torch.equal(state["rank1.default"], state["rng.default"])


def test_the_same_number_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    for i, steps in enumerate(("3", "6")):
        (folder := tmp_path / str(i)).mkdir()
        assert processes(2, folder, said, words(tmp_path, "--steps", steps, "--resume", "auto"))[0][0] == 0
    assert_same(saved(tmp_path, 6), saved(whole, 6))


def test_another_number_resumes_to_rounding(tmp_path: Path) -> None:
    """Without dropout: one process for 6 steps, and two for 3, then one; what is not so is said."""
    more = ("--d-dropout", "0", "--resume", "auto", "--steps")
    assert said(words(tmp_path / "one", *more, "6"))[0] == 0
    assert processes(2, tmp_path, said, words(tmp_path / "two", *more, "3"))[0][0] == 0
    status, out, _ = said(words(tmp_path / "two", *more, "6"))
    assert status == 0
    assert "trained by 2 processes so far, by 1 from here on. The same to rounding: weights" in out
    assert "see 16 samples at a time in place of 8" in out
    assert_close(saved(tmp_path / "one", 6), saved(tmp_path / "two", 6))


def test_a_refusal_of_one_is_one_of_all(tmp_path: Path) -> None:
    good = words(tmp_path, "--steps", "2")
    for name, told, sentence in (
        (
            "all",
            [[*good, "--batch-size", "9"]],
            "gankern-train: --batch-size must be a multiple of 2, the number of processes, got 9",
        ),
        ("second", [good, [*good, "--data", str(tmp_path / "none")]], f"{tmp_path / 'none'}"),
    ):
        (folder := tmp_path / name).mkdir()
        results = processes(2, folder, said, *told)
        assert [status for status, _, _ in results] == [2, 2]
        errors = [err for _, _, err in results]
        assert sum(map(bool, errors)) == 1
        assert sentence in "".join(errors)
        assert "".join(errors).count("\n") == 1
    assert not (tmp_path / NAME).exists()


def disturbed(step: int, rank: int, what: Callable[[Trainer], None], told: list[str]) -> tuple[int, str, str]:
    """`said`, with what(trainer) before the step that follows step number `step`, in the process of this rank."""
    plain = Trainer.step

    def stepped(self: Trainer, real: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        if (self.steps_done, distributed.rank()) == (step, rank):
            what(self)
        return plain(self, real, *labels)

    Trainer.step = stepped  # type: ignore[method-assign]
    try:
        return said(told)
    finally:
        Trainer.step = plain  # type: ignore[method-assign]


def terminated(trainer: Trainer) -> None:
    signal.raise_signal(signal.SIGTERM)


def killed(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@torch.no_grad()
def ruined(trainer: Trainer) -> None:
    next(trainer.discriminator.parameters()).fill_(float("nan"))


def test_a_signal_to_one_ends_all_after_the_same_step(whole: Path, tmp_path: Path) -> None:
    results = processes(2, tmp_path, disturbed, 3, 1, terminated, words(tmp_path, "--steps", "6"))
    assert [status for status, _, _ in results] == [143, 143]
    assert re.search(r"^stopped after step 4, all saved; to resume: gankern-train gan ", results[0][1], re.MULTILINE)
    (tmp_path / "again").mkdir()
    assert processes(2, tmp_path / "again", said, words(tmp_path, "--steps", "6", "--resume", "auto"))[0][0] == 0
    assert_same(saved(tmp_path, 6), saved(whole, 6))


def test_what_diverges_in_one_ends_all(tmp_path: Path) -> None:
    results = processes(2, tmp_path, disturbed, 4, 1, ruined, words(tmp_path, "--steps", "6"))
    assert [status for status, _, _ in results] == [1, 1]
    assert "training diverged: " in results[0][2]
    assert "at step 5" in results[0][2]


def test_the_first_process_measures_and_may_end_all(tmp_path: Path) -> None:
    """With a generator that stands still no look is better than the first one."""
    measured = ("--metrics", "1nn", "--metric-every", "2", "--metric-samples", "40", "--keep-best", "1nn", "--stop-after", "1")
    told = words(tmp_path, "--steps", "40", "--lr-g", "0", *measured, "--metric-budget", "0")
    results = processes(2, tmp_path, said, told)
    assert [status for status, _, _ in results] == [0, 0], results
    assert re.search(r"^ended after step \d, all saved: 1nn is no better in 1 look", results[0][1], re.MULTILINE), results[0][1]


def started(folder: Path, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Two processes, as `processes`, one of which may not end well."""
    context = torch.multiprocessing.get_context("fork")
    both = [context.Process(target=child, args=(rank, 2, str(folder), body, arguments)) for rank in range(2)]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others(rank: int, tmp_path: Path) -> None:
    both = started(tmp_path, disturbed, 4, rank, killed, words(tmp_path, "--steps", "100000"))
    both[rank].join(60)
    start = time.monotonic()
    both[1 - rank].join(30)
    assert time.monotonic() - start < 30
    assert both[rank].exitcode == -signal.SIGKILL
    assert both[1 - rank].exitcode not in (0, None)
    status, _, err = torch.load(tmp_path / str(1 - rank))
    assert status == 1
    assert "stopped after step 4, torch.distributed: every process must answer, got: " in err
    assert "all is saved up to step 3; to resume: gankern-train gan" in err


def test_what_is_started_again_after_a_kill_goes_on_from_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    """As torchrun does with --max-restarts."""
    told = words(tmp_path, "--steps", "6", "--resume", "auto")
    both = started(tmp_path, disturbed, 4, 1, killed, told)
    for process in both:
        process.join(60)
    assert all(process.exitcode for process in both)
    (tmp_path / "again").mkdir()
    assert processes(2, tmp_path / "again", said, told)[0][0] == 0
    assert_same(saved(tmp_path, 6), saved(whole, 6))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_torchrun_restarts_what_was_killed(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    command = [*torchrun, "gankern.cli.train", *words(tmp_path, "--steps", "120", "--resume", "auto")]
    log = tmp_path / NAME / "log.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as agent:
        while not (log.exists() and log.read_text().count("\n") >= 20):
            assert agent.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        out, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0
    assert f"continuing {tmp_path / NAME} after step " in out
    assert "finished 120 steps" in out
