"""Stopping and resuming: an interrupted run ends as an uninterrupted one, on the CPU bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gankern.cli.fit import Reporter
from gankern.cli.main import train_main
from gankern.training import Trainer, checkpoint
from gankern.training.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that has a state: EMA, dropout in both networks, BatchNorm, and epochs of 6 batches.
FLAGS = (
    "--z-dim 4 --g-widths 8 --d-widths 16 8 --batch-size 16 --device cpu --ema 0.9 --g-norm batch --g-dropout 0.1 --d-dropout 0.3"
)
FLAGS += " --label-smoothing 0.9 --log-every 1 --sample-every 0 --checkpoint-every 0"
NAME = "00000-gan-dots-b16"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (100, 5, 5), dtype=np.uint8))
    return path


def words(images: Path, out: Path, *more: str) -> list[str]:
    return ["gan", "--data", str(images), "--outdir", str(out), *FLAGS.split(), *more]


def losses(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in rows]


def assert_same_end(a: Path, b: Path, steps: int) -> None:
    """The same losses at each step, and the same state at the last one."""
    assert [row["step"] for row in losses(a)] == list(range(1, steps + 1))
    assert losses(a) == losses(b)
    state_a, state_b = (checkpoint.load(run / f"checkpoint-{steps:06d}.safetensors") for run in (a, b))
    assert state_a.keys() == state_b.keys()
    assert {"generator.0.weight", "ema.0.weight", "opt_d.0.exp_avg", "rng.noise", "rng.default", "data.generator"} <= state_a.keys()
    for key, value in state_a.items():
        assert torch.equal(value, state_b[key]) if isinstance(value, Tensor) else value == state_b[key], key
    assert (a / f"fakes{steps:06d}.png").read_bytes() == (b / f"fakes{steps:06d}.png").read_bytes()


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 steps without a break."""
    out = tmp_path_factory.mktemp("whole")
    assert train_main(words(images, out, "--steps", "23")) == 0
    return out / NAME


@pytest.mark.parametrize("first", [1, 6, 11])
def test_resumed_run_equals_a_whole_one(first: int, images: Path, whole: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train_main(words(images, tmp_path, "--steps", str(first))) == 0
    torch.manual_seed(999)  # whatever has been drawn in between
    torch.rand(7)
    assert train_main(words(images, tmp_path, "--steps", "23", "--resume", "auto")) == 0
    assert f"continuing {tmp_path / NAME} after step {first}" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert_same_end(tmp_path / NAME, whole, 23)


def test_other_noise_would_be_seen(images: Path, whole: Path, tmp_path: Path) -> None:
    assert train_main(words(images, tmp_path, "--steps", "23", "--seed", "1")) == 0
    assert losses(tmp_path / NAME) != losses(whole)


def test_signal_in_the_loop_saves_and_says_how_to_resume(
    images: Path, whole: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def signalled(self: Trainer, real: Tensor) -> dict[str, Tensor]:
        if self.steps_done == 8:
            signal.raise_signal(signal.SIGTERM)
        return step(self, real)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        assert train_main(words(images, tmp_path, "--steps", "23")) == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    last = capsys.readouterr().out.splitlines()[-1]
    said = re.fullmatch(r"stopped after step 9, all saved; to resume: gankern-train (.*)", last)
    assert said is not None
    assert train_main(shlex.split(said[1])) == 0
    assert_same_end(tmp_path / NAME, whole, 23)


def test_signal_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn and logged of step 0 is there once when the run goes on."""
    begin, more = Reporter.begin, ("--limit", "100", "--steps", "2", "--no-report", "--resume", "auto")

    def signalled(self: Reporter) -> None:
        begin(self)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "begin", signalled)
        assert train_main(words(Path("ring"), tmp_path, *more)) == 143
    assert train_main(words(Path("ring"), tmp_path, *more)) == 0
    assert [row["step"] for row in RunDir(tmp_path / "00000-gan-ring-b16").rows("modes.jsonl")] == [0, 2]


def test_ctrl_c_and_resume_equal_a_whole_run(images: Path, tmp_path: Path) -> None:
    """A real SIGINT to a real process, at whatever step it comes."""
    command = [sys.executable, "-m", "gankern", "train", *words(images, tmp_path / "cut", "--steps", "1000000")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    log = tmp_path / "cut" / NAME / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (stopped,) = re.findall(r"stopped after step (\d+), all saved; to resume: gankern-train gan ", out)
    steps = int(stopped) + 15
    assert train_main(words(images, tmp_path / "cut", "--steps", str(steps), "--resume", "auto")) == 0
    assert train_main(words(images, tmp_path / "whole", "--steps", str(steps))) == 0
    assert_same_end(tmp_path / "cut" / NAME, tmp_path / "whole" / NAME, steps)


def test_finished_run_is_left_alone(images: Path, whole: Path, capsys: Capture) -> None:
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}
    for resume in ("auto", str(whole), str(whole / "checkpoint-000023.safetensors")):
        assert train_main(words(images, whole.parent, "--steps", "23", "--resume", resume)) == 0
        assert capsys.readouterr().out.endswith("is finished: 23 steps made, 23 asked for; nothing to do\n")
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"} == before


def test_auto_starts_a_run_where_there_is_none(images: Path, whole: Path, tmp_path: Path, capsys: Capture) -> None:
    """None of this preset and data: a run on other data does not count."""
    other = tmp_path / "other.npz"
    shutil.copy(images, other)
    shutil.copytree(whole, tmp_path / "runs" / NAME)
    assert train_main(words(other, tmp_path / "runs", "--steps", "2", "--resume", "auto")) == 0
    assert "to continue: starting one" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [NAME, "00001-gan-other-b16"]


def test_auto_continues_the_newest(images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert train_main(words(images, tmp_path, "--steps", "2")) == 0
    monkeypatch.chdir(images.parent)  # the data by another path
    capsys.readouterr()
    assert train_main(words(Path(images.name), tmp_path, "--steps", "3", "--resume", "auto")) == 0
    assert f"continuing {tmp_path / NAME.replace('00000', '00001')} after step 2" in capsys.readouterr().out


def test_run_without_a_checkpoint_starts_over(images: Path, whole: Path, tmp_path: Path, capsys: Capture) -> None:
    """As after a crash before the first checkpoint."""
    shutil.copytree(whole, tmp_path / NAME)
    (tmp_path / NAME / "checkpoint-000023.safetensors").unlink()
    assert train_main(words(images, tmp_path, "--steps", "23", "--resume", "auto")) == 0
    assert "has no checkpoint yet: starting it over" in capsys.readouterr().out
    assert_same_end(tmp_path / NAME, whole, 23)


def test_resume_from_an_earlier_checkpoint(images: Path, whole: Path, tmp_path: Path) -> None:
    assert train_main(words(images, tmp_path, "--steps", "23", "--checkpoint-every", "5", "--keep", "0")) == 0
    names = sorted(p.name for p in (tmp_path / NAME).glob("checkpoint-*"))
    assert names == [f"checkpoint-{s:06d}.safetensors" for s in (5, 10, 15, 20, 23)]
    early = tmp_path / NAME / "checkpoint-000010.safetensors"
    assert train_main(words(images, tmp_path, "--steps", "23", "--resume", str(early))) == 0
    assert_same_end(tmp_path / NAME, whole, 23)


def test_crash_after_a_checkpoint_repeats_what_was_lost(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 11 to 13 were logged but not saved: the log gets each row once."""
    step = Trainer.step

    def crashing(self: Trainer, real: Tensor) -> dict[str, Tensor]:
        if self.steps_done == 13:
            raise MemoryError
        return step(self, real)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", crashing)
        with pytest.raises(MemoryError):
            train_main(words(images, tmp_path, "--steps", "23", "--checkpoint-every", "10"))
    assert losses(tmp_path / NAME)[-1]["step"] == 13
    assert train_main(words(images, tmp_path, "--steps", "23", "--resume", "auto")) == 0
    assert_same_end(tmp_path / NAME, whole, 23)


def test_other_settings_are_refused_by_name(images: Path, whole: Path, capsys: Capture) -> None:
    capsys.readouterr()
    more = ["--steps", "30", "--resume", str(whole), "--batch-size", "8", "--lr-d", "0.1", "--log-every", "7"]
    assert train_main(words(images, whole.parent, *more)) == 2
    want = (
        f"gankern-train: resume: settings must be those of {whole}, got others in batch_size (16, now 8), lr_d (0.0002, now 0.1)\n"
    )
    assert capsys.readouterr().err == want
