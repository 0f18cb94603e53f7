"""Checkpoints and run directories: whole or not there, damage is found and named, one run at a time, a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import random
import re
import resource
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from gankern.cli import train as command
from gankern.cli.main import main, train_main
from gankern.training import PRESETS, checkpoint, files
from gankern.training.graph import Eager, Graph
from gankern.training.run_dir import RunDir
from tests import small
from tests.replay import record

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = "--z-dim 4 --g-widths 32 --d-widths 128 --batch-size 16 --device cpu --log-every 1 --sample-every 0 --keep 0"
Capture = pytest.CaptureFixture[str]


# --- one file


STATE: dict[str, Any] = {"a.x": torch.arange(3), "b.y": torch.ones((), dtype=torch.bfloat16), "none": torch.ones(0, 2), "step": 4}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = a.keys() == b.keys()
    return same and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def test_checkpoint_keeps_types_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1})
    assert checkpoint.load(path) == {"step": 1}
    checkpoint.save(path, STATE | {"word": "é", "number": 0.1})
    assert equal(checkpoint.load(path), STATE | {"word": "é", "number": 0.1})
    assert checkpoint.load(path, ("b.",)).keys() == {"b.y", "step", "word", "number"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", STATE)
    checkpoint.save(tmp_path / "b", {k: STATE[k] for k in sorted(STATE, reverse=True)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_damaged_byte_is_seen(tmp_path: Path) -> None:
    """Three damages of each byte, and each shorter file: a refusal, or the very same state (of spaces around the header)."""
    path = tmp_path / "c"
    checkpoint.save(path, STATE)
    good, harmless = path.read_bytes(), 0
    for i in range(len(good)):
        for bits in (0x01, 0x20, 0xFF):
            path.write_bytes(good[:i] + bytes([good[i] ^ bits]) + good[i + 1 :])
            with contextlib.suppress(ValueError):
                assert equal(checkpoint.load(path), STATE), f"byte {i}"
                harmless += 1
    assert harmless <= 8
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=f"^checkpoint: {path} must be undamaged, got: "):
            checkpoint.load(path)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_foreign_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c"

    def refusal() -> str:
        with pytest.raises(ValueError) as caught:
            checkpoint.load(path)
        return str(caught.value)

    assert refusal().startswith(f"checkpoint: {path} must be readable, got: No such file")
    for content in (b"", pickle.dumps(Bomb())):
        path.write_bytes(content)
        assert refusal().startswith(f"checkpoint: {path} must be undamaged, got: ")
    assert not Path("exploded").exists()
    save_file({"x": torch.ones(2)}, path)
    assert refusal() == f"checkpoint: {path} must be written by gankern, got another safetensors file"
    for content, word in (
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ("[" * 100_000, "RecursionError"),
        ('{"format": 2, "state": 3, "crc32": {}}', "TypeError"),
    ):
        save_file({}, path, {checkpoint.KEY: f"{zlib.crc32(content.encode()):08x}{content}"})
        assert refusal().startswith(f"checkpoint: {path} must hold what gankern writes, got {word}: ")
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save(path, STATE)
    monkeypatch.undo()
    assert refusal() == f"checkpoint: {path} must have format 2, got 99"


@pytest.mark.parametrize("where", ["write", "flush", "rename"])
def test_interrupted_save_leaves_the_old_one(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "write":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    elif where == "flush":
        monkeypatch.setattr(files, "sync", full_disk)
    else:
        monkeypatch.setattr(os, "replace", full_disk)
    try:
        with pytest.raises(OSError, match="File too large" if where == "write" else "No space"):
            checkpoint.save(path, {"step": 2, "x": torch.ones(10_000)})
    finally:
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# --- every preset


def made(engine: type[Eager], preset: str, seed: int) -> Eager:
    """An engine whose random states and weights are those of `seed`."""
    settings = small.config(preset, seed=seed)
    torch.manual_seed(seed)
    trainer, stream = small.trainer(settings, capturable=engine is Graph), small.batches(settings)
    torch.manual_seed(seed)
    return Graph(trainer, stream, capture=record) if engine is Graph else Eager(trainer, stream)


def state_of(e: Eager) -> dict[str, Any]:
    return small.state(e.trainer) | {f"data.{k}": v for k, v in e.batches.state_dict().items()}


@pytest.mark.parametrize("engine", [Eager, Graph])
@pytest.mark.parametrize("preset", PRESETS)
def test_resume_is_bit_exact(preset: str, engine: type[Eager], tmp_path: Path) -> None:
    """5 steps = 3 steps, a checkpoint, another process' objects of another seed, 2 steps: losses and state. What is in neither the
    settings nor the checkpoint would be that of the other seed."""
    whole = made(engine, preset, 0)
    losses = [torch.stack(list(whole.step().values())).clone() for _ in range(3)]
    checkpoint.save(tmp_path / "c", state_of(whole))
    losses += [torch.stack(list(whole.step().values())).clone() for _ in range(2)]
    resumed = made(engine, preset, 1)
    state = checkpoint.load(tmp_path / "c")
    resumed.batches.load_state_dict({k.removeprefix("data."): v for k, v in state.items() if k.startswith("data.")})
    resumed.trainer.load_state_dict({k: v for k, v in state.items() if not k.startswith("data.")})
    for want in losses[3:]:
        assert torch.equal(torch.stack(list(resumed.step().values())), want)
    checkpoint.save(tmp_path / "a", state_of(whole))
    checkpoint.save(tmp_path / "b", state_of(resumed))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (100, 5, 5), dtype=np.uint8))
    return path


def train(images: Path, out: Path, *more: str) -> int:
    return train_main(["gan", "--data", str(images), "--outdir", str(out), *FLAGS.split(), *more])


NAME = "00000-gan-dots-b16"


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps; do not write to it."""
    out = tmp_path_factory.mktemp("whole")
    assert train(images, out, "--steps", "9", "--checkpoint-every", "3") == 0
    return out / NAME


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / NAME))


def saved(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step:06d}.safetensors"


def damage(path: Path) -> None:
    """In what every reader needs."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"step', b'"stop', 1))


def test_training_draws_from_torch_alone(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a checkpoint needs no state of Python's and NumPy's generators. (rich and tyro draw, when flags are read.)"""
    import rich.style  # noqa: F401

    def states() -> tuple[Any, bytes]:
        return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002

    fit, seen = command.fit, []

    def watched(preset: str, ready: Any) -> int:
        before = states()
        status = fit(preset, ready)
        seen.append(states() == before)
        return status

    monkeypatch.setattr(command, "fit", watched)
    assert train(images, tmp_path, "--steps", "2") == 0
    assert seen == [True]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(images: Path, run: Path, whole: Path, capsys: Capture) -> None:
    damage(saved(run, 9))
    saved(run, 6).write_bytes(saved(run, 6).read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f"^checkpoint: {saved(run, 9)} must be undamaged, got another checksum of .*; .* is used"):
        assert main(["sample", str(run), "--out", str(run.parent / "x.npz")]) == 0
    assert "after step 3 " in capsys.readouterr().out
    assert train(images, run.parent, "--steps", "9", "--checkpoint-every", "3", "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert f"checkpoint: {saved(run, 9)} must be undamaged, got another checksum of " in out
    assert f"checkpoint: {saved(run, 6)} must be undamaged, got: " in out
    assert out.count(f"; going back to {saved(run, 3)}\n") == 2
    assert f"continuing {run} after step 3\n" in out
    assert [saved(run, step).read_bytes() for step in (6, 9)] == [saved(whole, step).read_bytes() for step in (6, 9)]


def test_no_whole_checkpoint_is_refused_in_one_sentence(images: Path, run: Path, capsys: Capture) -> None:
    """And nothing is touched: starting over would lose what may still be saved."""
    for path in run.glob("checkpoint-*"):
        damage(path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}
    capsys.readouterr()
    words = f"checkpoint: one of 3 must be undamaged, got: checkpoint: {saved(run, 9)} must be undamaged, got another checksum of "
    for call in (
        lambda: train(images, run.parent, "--steps", "20", "--resume", "auto"),
        lambda: main(["sample", str(run), "--out", str(run.parent / "x.npz")]),
    ):
        status = call()
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"} == before
    assert train(images, run.parent, "--steps", "20", "--resume", str(saved(run, 6))) == 2  # the one that is named, or none
    assert f"checkpoint: {saved(run, 6)} must be undamaged" in capsys.readouterr().err


def test_newest_checkpoint_that_may_be_good_is_not_passed_over(
    images: Path, run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go back would remove it: of a later gankern, of another program, or not to be read at the moment."""

    def refusal() -> str:
        before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock" and p.is_file()}
        capsys.readouterr()
        assert train(images, run.parent, "--steps", "20", "--resume", "auto") == 2
        assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock" and p.is_file()} == before
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    state = checkpoint.load(saved(run, 9))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 3)
        checkpoint.save(saved(run, 9), state)
    assert f"checkpoint: {saved(run, 9)} must have format 2, got 3\n" in refusal()
    save_file({"x": torch.ones(2)}, saved(run, 9))
    assert f"checkpoint: {saved(run, 9)} must be written by gankern, got another safetensors file\n" in refusal()
    opened = safetensors.safe_open

    def none_left(path: Path, **options: Any) -> Any:
        if path == saved(run, 9):
            raise OSError(24, "Too many open files")
        return opened(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", none_left)
    assert f"checkpoint: {saved(run, 9)} must be readable, got: Too many open files\n" in refusal()


def test_checkpoints_are_those_when_the_lock_is_had(
    images: Path, run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that had the run saves a last one, and lets it go."""
    saved(run, 9).rename(run.parent / "last")
    locked = RunDir.locked

    def later(self: RunDir) -> Any:
        (run.parent / "last").rename(saved(run, 9))
        saved(run, 6).unlink()
        return locked(self)

    monkeypatch.setattr(RunDir, "locked", later)
    assert train(images, run.parent, "--steps", "9", "--resume", "auto") == 0
    assert "is finished: 9 steps made" in capsys.readouterr().out


def test_checkpoint_of_another_device_or_data_is_refused(images: Path, run: Path, capsys: Capture) -> None:
    def refusal(change: Callable[[dict[str, Any]], object]) -> str:
        state = checkpoint.load(saved(run, 6)) | {"step": 10}
        change(state)
        checkpoint.save(saved(run, 10), state)
        capsys.readouterr()
        assert train(images, run.parent, "--steps", "20", "--resume", "auto") == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "resume: device must be cuda, whose random state" in refusal(lambda s: s.update(device="cuda"))
    assert "must hold the data's size, epoch, position, generator, got size, epoch, generator\n" in refusal(
        lambda s: s.pop("data.position")
    )


def test_logs_are_healed_at_resume(images: Path, run: Path, whole: Path) -> None:
    """Of a last line cut short, zeros after a power cut, and rows of steps that are made again; of any log."""
    rows = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes("".join(rows[:8]).encode() + b'{"step": 9, "d_lo\0\0\0')
    (run / "other.jsonl").write_text('{"step": 6, "value": 1.5}\n{"step": 7, "value": 2.0}\n{"st')
    saved(run, 9).unlink()
    (run / ".tmp-losses.png").touch()
    assert train(images, run.parent, "--steps", "9", "--checkpoint-every", "3", "--resume", "auto") == 0
    assert [row["step"] for row in RunDir(run).rows()] == list(range(1, 10))
    assert (run / "other.jsonl").read_text() == '{"step": 6, "value": 1.5}\n'
    assert saved(run, 9).read_bytes() == saved(whole, 9).read_bytes()
    assert not list(run.glob(".tmp-*"))


def test_rows_that_are_none_of_the_run_are_passed_over(images: Path, run: Path, whole: Path) -> None:
    """Of a log that was changed by hand, or by another version: the run goes on, and its curves are drawn."""
    huge = "1" + 400 * "0"
    for name, lines in (
        ("log", ['"time_s": "x"', '"d_loss": NaN', f'"d_loss": {huge}', '"d_loss": 1e308, "g_loss": 1, "d_real": 1, "d_fake": 1']),
        ("vitals", ['"spread": 1', '"spread": [1], "nn_real": {}, "nn_fake": 1', f'"spread": {huge}, "nn_real": 1, "nn_fake": 1']),
        ("vitals", ['"spread": 1, "nn_real": 1, "nn_fake": 1, "new": 1, "shares": ["x"]']),
        ("vitals", ['"spread": 1, "nn_real": 1, "nn_fake": 1, "shares": [1, 2]']),
        ("metric-1nn", ['"value": "x"', '"value": NaN', f'"value": {huge}']),
    ):
        with (run / f"{name}.jsonl").open("a") as file:
            file.writelines(f'{{"step": 8, {line}}}\n' for line in lines)
    more = ("--metrics", "1nn", "--metric-every", "1", "--metric-samples", "40", "--keep-best", "1nn", "--health-every", "1")
    assert train(images, run.parent, "--steps", "12", *more, "--resume", "auto") == 0
    assert [row["step"] for row in RunDir(run).numbers("vitals.jsonl")][-3:] == [10, 11, 12]
    assert [row for row in RunDir(run).numbers() if "d_loss" in row][:9] == RunDir(whole).numbers()


def test_two_processes_cannot_train_one_run(images: Path, run: Path, capsys: Capture) -> None:
    """The second is told who has it; the lock of a killed process is gone with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with RunDir(run).locked():
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    capsys.readouterr()
    try:
        assert train(images, run.parent, "--steps", "12", "--resume", "auto") == 2
        words = f"gankern-train: run: {run} must not be in use by another process, got process {child} on {os.uname().nodename}\n"
        assert capsys.readouterr() == ("", words)
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before
        assert train(images, run.parent, "--steps", "12", "--resume", "auto", "--dry-run") == 0
        assert main(["sample", str(run), "--out", str(run.parent / "x.npz")]) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert train(images, run.parent, "--steps", "12", "--resume", "auto") == 0
    with (run / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a finished command has let it go


def in_child(work: Callable[[], int]) -> tuple[int, str]:
    """The status of `work` in a forked process, and what that wrote to standard error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with os.fdopen(writer, "w") as err, contextlib.redirect_stderr(err):
                status = work()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        err = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), err


@pytest.mark.parametrize("room", [100, 2_000, 20_000, 45_000])
def test_full_disk_ends_a_run_in_one_sentence(room: int, images: Path, run: Path, whole: Path) -> None:
    """No file may outgrow `room` bytes: so the log, the events, the pictures or the checkpoint meet it. Later it goes on."""
    saved(run, 9).unlink()
    flags = ("--steps", "9", "--checkpoint-every", "3", "--resume", "auto")

    def full() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return train(images, run.parent, *flags)

    status, err = in_child(full)
    sentence = err.splitlines()[-1]
    words = (
        rf"stopped after step \d, cannot write {run}/\S+: .*File too large.*; all is saved up to step 6; to resume: gankern-train "
    )
    assert re.match(rf"gankern-train: ({words}|File too large: {run}/\S+$)", sentence), err
    assert status == (1 if "stopped" in sentence else 2)
    assert train(images, run.parent, *flags) == 0
    assert saved(run, 9).read_bytes() == saved(whole, 9).read_bytes()
    assert (run / "losses.png").read_bytes() == (whole / "losses.png").read_bytes()


def test_read_only_directory_is_refused_in_one_sentence(images: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # where others may look too
        public = Path(name)
        shutil.copy(images, public)
        assert train(public / images.name, public, "--steps", "1") == 0
        public.chmod(0o555)
        (public / NAME).chmod(0o555)

        def powerless(*flags: str) -> tuple[int, str]:
            def work() -> int:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setuid(65534)
                return train(public / images.name, public, *flags)

            return in_child(work)

        for flags, where in ((("--resume", "auto"), rf"{public / NAME}/\.\S+"), ((), rf"{public}/\.\S+")):
            status, err = powerless("--steps", "12", *flags)
            assert re.fullmatch(rf"gankern-train: Permission denied: {where}\n", err), err
            assert status == 2
        public.chmod(0o755)
        (public / NAME).chmod(0o755)
