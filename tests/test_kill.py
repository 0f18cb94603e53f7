"""A run that is killed again and again, at any moment, ends with the files of one that nobody disturbs, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gankern.cli.main import train_main
from gankern.training import pictures

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = "--z-dim 4 --g-widths 8 --d-widths 16 8 --batch-size 16 --device cpu --ema 0.9 --g-norm batch --d-dropout 0.3 --log-every 1"
FLAGS += " --health-every 4"
EVERY = 3  # steps between checkpoints
Start = Callable[[Path, int], list[str]]


@pytest.fixture(scope="module", params=["dots", pytest.param("ring", marks=pytest.mark.long)])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images, or points, which have a film and modes.jsonl; one run has been made, so that a forked process begins at once."""
    out, source = tmp_path_factory.mktemp("data"), request.param
    if source == "dots":
        source = str(out / "dots.npz")
        np.savez(source, images=np.random.default_rng(0).integers(0, 256, (100, 5, 5), dtype=np.uint8))
    assert train_main(["gan", "--data", source, "--outdir", str(out), *FLAGS.split(), "--steps", "1"]) == 0
    return source


def plot(path: Path, rows: list[dict[str, float]], *_: object) -> None:
    """In place of losses.png, most of whose 0.2 s are no writing: the losses as grey values."""
    values = torch.tensor([[row["d_loss"], row["g_loss"]] for row in rows])
    pictures.save_png(path, (values * 100).to(torch.uint8).unsqueeze(-1))


def fork(data: str, out: Path, steps: int, before: Callable[[], object] = lambda: None) -> int:
    """The number of a process that goes on with the run under `out`, or begins it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                pictures.plot_losses = plot
                before()
                words = ["--steps", str(steps), "--checkpoint-every", str(EVERY), "--sample-every", "4", "--resume", "auto"]
                status = train_main(["gan", "--data", data, "--limit", "100", "--outdir", str(out), *FLAGS.split(), *words])
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(out: Path, steps: int) -> dict[str, Any]:
    """What the only run under `out` leaves: without clock times and its own path, TensorBoard's files, whose names are times, and
    checkpoints before the last one, of which there may be more."""
    (run,) = out.glob("0*")
    found: dict[str, Any] = {}
    for path in run.iterdir():
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in rows]
        elif path.name == "config.json":
            found[path.name] = path.read_text().replace(str(out), "")
        elif path.suffix in (".png", ".gif") or path.name == f"checkpoint-{steps:06d}.safetensors":
            found[path.name] = path.read_bytes()
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.mark.parametrize(
    ("kills", "number"),
    [
        (5, signal.SIGKILL),
        (3, signal.SIGTERM),
        pytest.param(50, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(20, signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_killed_run_ends_as_an_undisturbed_one(kills: int, number: signal.Signals, data: str, tmp_path: Path) -> None:
    """A signal after a random number of further steps, and a random time on."""
    steps, whole, cut = 6 * kills, tmp_path / "whole", tmp_path / "cut"
    assert status_of(fork(data, whole, steps)) == 0
    want = results(whole, steps)
    assert {"log.jsonl", "vitals.jsonl", "losses.png", "fakes000008.png", f"checkpoint-{steps:06d}.safetensors"} <= want.keys()
    assert (data == "ring") == ({"modes.jsonl", "training.gif"} <= want.keys())
    chance = random.Random(kills)

    def rows() -> int:
        return sum(path.read_bytes().count(b"\n") for path in cut.glob("0*/log.jsonl"))

    for _ in range(kills):
        child, target = fork(data, cut, steps), rows() // EVERY * EVERY + chance.randint(0, EVERY + 2)
        while rows() < target:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, number)
        assert status_of(child) in (-number, 128 + number), "it was done before"
    assert status_of(fork(data, cut, steps)) == 0
    assert_same(results(cut, steps), want)


def operations(out: Path, at: int) -> Callable[[], None]:
    """Sets a process up to be killed right before its file operation number `at` under `out`."""

    def before() -> None:
        done = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod") and str(arguments[0]).startswith(str(out)):
                done += 1
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return before


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.long)])
def test_kill_at_a_file_operation(stride: int, data: str, tmp_path: Path) -> None:
    """Every `stride`-th: opening, renaming, removing, of all files of a run; and again at the same place of the resumed one."""
    steps, whole = 2 * EVERY + 1, tmp_path / "whole"
    assert status_of(fork(data, whole, steps)) == 0
    want, at, killed = results(whole, steps), stride, True
    while killed:
        out = tmp_path / f"killed{at}"
        out.mkdir()
        killed = status_of(fork(data, out, steps, operations(out, at))) == -signal.SIGKILL
        assert status_of(fork(data, out, steps, operations(out, at))) in (0, -signal.SIGKILL)
        assert status_of(fork(data, out, steps)) == 0
        assert_same(results(out, steps), want)
        at += stride
    assert at > 60
