"""The commands: what they print, write and refuse."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

import gankern
from gankern import backend
from gankern.cli import doctor, train
from gankern.cli.common import Refused
from gankern.cli.help import GROUPS, shown
from gankern.cli.main import main, train_main
from gankern.cli.probes import PROBES
from gankern.ops import gan_loss, linear_lrelu
from gankern.training import PRESETS, TrainConfig, checkpoint, precision, presets
from gankern.training.combinations import idle
from gankern.training.config import Loss
from gankern.training.graph import Graph
from gankern.training.networks import CONDITIONAL
from gankern.training.trainer import Trainer
from tests.replay import record

TINY = ["--z-dim", "4", "--g-widths", "8", "--d-widths", "8", "--batch-size", "16", "--device", "cpu"]
SMALL = {"conv_width": 4, "g_widths": 8, "d_widths": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 colour images of 6 x 6."""
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (100, 3, 6, 6), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 grey images of 6 x 6 in three classes."""
    path = tmp_path_factory.mktemp("data") / "kinds.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8), labels=np.arange(60) % 3)
    return path


@pytest.fixture(scope="module")
def conditional_run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of cgan; do not write to it."""
    out = tmp_path_factory.mktemp("runs")
    flags = ["--steps", "4", "--log-every", "2", "--ema", "0.5"]
    assert train_main(["cgan", "--data", str(labelled), "--outdir", str(out), *TINY, *flags]) == 0
    return out / "00000-cgan-kinds-b16"


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps with EMA; do not write to it."""
    out = tmp_path_factory.mktemp("runs")
    flags = ["--steps", "20", "--log-every", "6", "--sample-every", "10", "--checkpoint-every", "8", "--ema", "0.9"]
    assert train_main(["gan", "--data", str(images), "--outdir", str(out), *TINY, *flags]) == 0
    return out / "00000-gan-dots-b16"


Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, status: int, prog: str = "gankern-train") -> str:
    """The one sentence on standard error of a command that was refused."""
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"{prog}: ")
    return err.removeprefix(f"{prog}: ").strip()


# --- training


def test_run_directory_holds_what_it_promises(run: Path) -> None:
    names = {p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents.")}
    pictures = {"reals.png", "fakes_init.png", "fakes000010.png", "fakes000020.png", "losses.png", "report.html"}
    assert (
        names == {"config.json", "log.jsonl", "checkpoint-000016.safetensors", "checkpoint-000020.safetensors", ".lock"} | pictures
    )
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12, 18, 20]
    for row in rows:
        assert row.keys() == {"step", "time_s", "images_per_s", "d_loss", "g_loss", "d_real", "d_fake"}
        assert row["images_per_s"] > 0
        assert 0 < row["d_real"] < 1
        assert 0 < row["d_fake"] < 1
    assert rows[0]["time_s"] <= rows[-1]["time_s"]
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["shape"], config["images"]) == ("gan", [3, 6, 6], 100)
    assert config["settings"]["ema"] == 0.9
    assert config["versions"]["gankern"] == gankern.__version__
    for name in ("reals.png", "fakes_init.png", "fakes000020.png"):
        with Image.open(run / name) as picture:
            assert (picture.size, picture.mode) == ((48, 48), "RGB")
    pixels = {name: (run / name).read_bytes() for name in ("fakes_init.png", "fakes000010.png", "fakes000020.png")}
    assert len(set(pixels.values())) == 3


def test_reals_are_the_data(run: Path, images: Path) -> None:
    first = np.load(images)["images"][0].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(Image.open(run / "reals.png"))[:6, :6], first)


def test_tensorboard_events(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/d_loss", "loss/g_loss", "score/d_real", "score/d_fake", "speed/images_per_s"}
    assert [e.step for e in events.Scalars("loss/g_loss")] == [6, 12, 18, 20]
    assert set(events.Tags()["images"]) == {"reals", "fakes"}


def test_pictures_use_fixed_latents(run: Path, images: Path, tmp_path: Path) -> None:
    """The same seed gives the same first picture, another seed another one."""
    for number, seed in enumerate((0, 0, 1)):
        flags = ["--steps", "1", "--ema", "0.9", "--seed", str(seed)]
        assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *flags]) == 0
        same = (tmp_path / f"0000{number}-gan-dots-b16" / "fakes_init.png").read_bytes() == (run / "fakes_init.png").read_bytes()
        assert same == (seed == 0)


def test_quiet_without_a_terminal(images: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, "--steps", "30", "--log-every", "5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["new", "finished"]


def test_plain_lines_now_and_then(images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gankern.cli.progress.QUIET_S", 0.0)
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, "--steps", "10", "--log-every", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["step", "5/10"], ["step", "10/10"]]
    words = (" samples/s, ", " d_loss ", " (1.376 when the critic cannot tell)", " g_loss ", "D(x) ", "D(G(z)) ", "ETA 0:")
    assert all(word in lines[1] for word in words)
    assert re.match(r"finished 10 steps: d_loss \d+\.\d{3} \(1\.376 when .*\), g_loss .*; samples: ", lines[-1])


def test_live_bar_on_a_terminal(images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, "--steps", "10", "--log-every", "5"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("10/10", " samples/s ", " D ", " G ", "D(x) ", "D(G(z)) ", "ETA 0:00:00"))


def test_divergence_stops_the_run(images: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--steps", "50", "--log-every", "1", "--lr-d", "1e38", "--lr-g", "1e38"]
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *flags]) == 1
    assert "gankern-train: training diverged: " in capsys.readouterr().err
    (directory,) = tmp_path.iterdir()
    for line in (directory / "log.jsonl").read_text().splitlines() if (directory / "log.jsonl").exists() else ():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_dry_run_tells_all_and_writes_nothing(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "runs"
    assert train_main(["gan", "--data", str(images), "--outdir", str(out), "--dry-run", *TINY]) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    assert "batch_size             16" in text
    assert "generator, 1,012 parameters" in text  # 4 * 8 + 8 + 8 * 108 + 108
    assert "discriminator, 881 parameters" in text  # 108 * 8 + 8 + 8 + 1
    assert "100 images [3, 6, 6]" in text
    assert "conv_width" not in text  # of no effect here
    assert "device    cpu" in text
    assert "at equilibrium (see gankern explain non-saturating)\n  d_loss         1.376\n" in text
    for op in ("linear_lrelu", "gan_loss"):
        assert any(line.split()[0] == op and line.split()[1] in backend.NAMES for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str, labelled: Path, tmp_path: Path, capsys: Capture) -> None:
    """Small networks, the preset's own settings else; the log counts the images of the data, not those of each critic update."""
    config = PRESETS[preset].config
    batch = 20 if config.pack > 1 else 6
    source = ["--data", str(labelled), "--size", str(config.size or 8)] if config.data == "mnist" else ["--limit", "500"]
    widths = [f"--{name.replace('_', '-')}={width}" for name, width in SMALL.items() if name not in idle(config)]
    flags = f"--steps 20 --log-every 20 --batch-size {batch} --z-dim 4 --device cpu"
    assert train_main([preset, *source, "--outdir", str(tmp_path), *flags.split(), *widths]) == 0
    (run,) = tmp_path.glob("00000-*")
    (row,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rounding = 0.001 * row["images_per_s"] + 0.06 * row["time_s"]  # time_s is in milliseconds, images_per_s in tenths
    assert abs(row["images_per_s"] * row["time_s"] - 20 * batch) <= rounding
    assert (run / "fakes000020.png").is_file()
    assert json.loads((run / "config.json").read_text())["classes"] == (3 if config.arch in CONDITIONAL else 0)
    assert sample(run, tmp_path / "x.npz", "--n", "5") == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape[0] == 5


def test_conditional_run_shows_one_class_a_column(conditional_run: Path) -> None:
    with Image.open(conditional_run / "fakes000004.png") as picture:
        assert picture.size == (3 * 6, 21 * 6)  # the most of 64 that fill three columns


def test_sample_of_a_conditional_run(conditional_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """--class k gives each z the class k; without it the classes take turns, in columns."""

    def draw(*flags: str) -> np.ndarray[Any, Any]:
        assert sample(conditional_run, tmp_path / "x.npz", "--n", "6", *flags) == 0
        with np.load(tmp_path / "x.npz") as file:
            return np.array(file["samples"])

    each, turns = [draw("--class", str(k)) for k in range(3)], draw()
    assert not np.allclose(each[0], each[1], atol=1e-4)
    for i in range(6):
        np.testing.assert_allclose(turns[i], each[i % 3][i], rtol=0, atol=1e-6)
    assert sample(conditional_run, tmp_path / "x.png", "--n", "6") == 0
    assert Image.open(tmp_path / "x.png").size == (18, 12)
    capsys.readouterr()
    assert refused(capsys, sample(conditional_run, tmp_path / "x.png", "--class", "3"), "gankern sample") == (
        "--class must be in [0, 2], got 3"
    )


def test_conditional_run_goes_on_with_its_classes(conditional_run: Path, labelled: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--data", str(labelled), "--outdir", str(tmp_path), *TINY, "--log-every", "2", "--ema", "0.5"]
    assert train_main(["cgan", *flags, "--steps", "2"]) == 0
    assert train_main(["cgan", *flags, "--steps", "4", "--resume", "auto"]) == 0
    whole, parts = (
        [json.loads(row) for row in (r / "log.jsonl").read_text().splitlines()]
        for r in (conditional_run, tmp_path / "00000-cgan-kinds-b16")
    )
    assert [row["d_loss"] for row in whole] == [row["d_loss"] for row in parts]
    with np.load(labelled) as file:
        other = {"images": file["images"], "labels": file["labels"] % 2}
    np.savez(labelled.with_name("two.npz"), **other)
    (tmp_path / "00000-cgan-kinds-b16" / "config.json").write_text(
        (tmp_path / "00000-cgan-kinds-b16" / "config.json").read_text().replace(str(labelled), str(labelled.with_name("two.npz")))
    )
    capsys.readouterr()
    flags[1] = str(labelled.with_name("two.npz"))
    want = f"resume: data must have the 3 classes of {tmp_path / '00000-cgan-kinds-b16'}, got 2"
    assert refused(capsys, train_main(["cgan", *flags, "--steps", "6", "--resume", "auto"])) == want


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cgan"], "--data must have labels for --arch cgan, got none"),
        (
            ["wgan-gp", "--batch-size", "30"],
            "--batch-size times --n-critic must be at most the 100 images of dots, got 30 * 5 = 150",
        ),
        (["gan", "--engine", "graph"], "--engine must be auto, eager or compile on cpu, got graph"),
    ],
)
def test_presets_refuse(words: list[str], sentence: str, images: Path, tmp_path: Path, capsys: Capture) -> None:
    status = train_main([words[0], "--data", str(images), "--outdir", str(tmp_path / "runs"), *TINY, *words[1:]])
    assert refused(capsys, status) == sentence
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def graph_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with the graph engine, whose graph is a recording that the CPU replays."""
    monkeypatch.setattr(train, "make", lambda name, trainer, batches: Graph(trainer, batches, capture=record))


def log(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in rows]


GRAPHED = "--log-every 5 --sample-every 7 --checkpoint-every 11 --keep 0 --d-dropout 0.3 --no-ema-warmup"


def test_graph_engine_writes_the_same_run(images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Rows are written one log later, and before each picture's and checkpoint's step ends; none is lost."""
    words = ["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *GRAPHED.split(), "--steps", "33"]
    assert train_main(words) == 0
    request.getfixturevalue("graph_engine")
    assert train_main(words) == 0
    eager, graph = (tmp_path / f"0000{i}-gan-dots-b16" for i in range(2))
    assert [row["step"] for row in log(graph)] == [5, 10, 15, 20, 25, 30, 33]
    assert log(graph) == log(eager)
    names = {p.name for p in eager.iterdir() if "tfevents" not in p.name}
    assert names == {p.name for p in graph.iterdir() if "tfevents" not in p.name}
    assert {"fakes000007.png", "fakes000028.png", "checkpoint-000011.safetensors", "checkpoint-000033.safetensors"} <= names
    for step in (11, 22, 33):
        state, other = (checkpoint.load(run / f"checkpoint-{step:06d}.safetensors") for run in (eager, graph))
        for key in state:
            assert torch.equal(state[key], other[key]) if isinstance(state[key], torch.Tensor) else state[key] == other[key], key


@pytest.mark.usefixtures("graph_engine")
def test_graph_engine_saves_nothing_after_a_divergence(images: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--steps", "50", "--log-every", "20", "--checkpoint-every", "10", "--lr-d", "1e38", "--lr-g", "1e38"]
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *flags]) == 1
    err = capsys.readouterr().err
    assert re.match(r"gankern-train: training diverged: .* at step [1-9]; the log stops before it\n$", err)
    (run,) = tmp_path.iterdir()
    assert not list(run.glob("checkpoint-*"))
    assert not (run / "log.jsonl").exists()


@pytest.mark.parametrize("cost", [1.5, 0.5])
def test_bf16_that_costs_more_is_said(
    cost: float, images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0.01 < precision.bf16_cost(torch.device("cpu")) < 100
    monkeypatch.setattr(precision, "bf16_cost", lambda device: cost)
    flags = ["--precision", "bf16", "--steps", "2"]
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *flags]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    words = "note: bfloat16 products take 1.5 times as long as float32 ones on this CPU; --precision fp32 is faster"
    assert notes == ([words] if cost > 1 else [])


def test_engine_that_falls_back_says_why_once(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    flags = ["--engine", "compile", "--steps", "3", "--log-every", "1"]
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "engine eager: compile failed: RuntimeError: no compiler"
    assert len([line for line in lines if line.startswith("engine")]) == 1


def test_default_dry_run_is_the_mlp_gan_on_mnist(capsys: Capture) -> None:
    assert train_main(["gan", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "60000 images [1, 28, 28]" in text
    assert "generator, 1,486,352 parameters" in text
    assert "discriminator, 1,460,225 parameters" in text


def test_folder_of_pictures_with_broken_files(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (9 + i, 12), (30 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    flags = ["--size", "8", "--channels", "1", "--batch-size", "4", "--steps", "2"]
    assert train_main(["gan", "--data", str(folder), "--outdir", str(tmp_path / "runs"), *TINY[:-4], *flags]) == 0
    out = capsys.readouterr().out
    assert "skipped 1 unreadable file" in out
    assert "bad.png" in out
    assert "8 images of pics [1, 8, 8]" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], f"a preset must be named: {', '.join(PRESETS)} (see gankern-train --help)"),
        (["wgan9"], f"preset must be one of {', '.join(PRESETS)}, got 'wgan9'"),
        (["gan", "--stepz", "3"], "Unrecognized options: --stepz, 3, perhaps --steps"),
        (["gan", "--steps", "many"], "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (["gan", "--steps", "0"], "--steps must be a finite number >= 1, got 0"),
        (["gan", "--mmd-root"], "--mmd-root must be left out without --loss mmd, got True"),
        (
            ["dcgan", "--d-widths", "8", "4"],
            "--d-widths must be left out with --arch dcgan, whose networks do not have it, got 8 4",
        ),
        (["gan", "--arch=dcgan", "--d-dropout=0.3"], "--d-dropout must be left out with --arch dcgan, whose networks do not"),
        (["gan", "--loss", "wgan"], "--loss must have a bounded critic: --penalty, --spectral-norm or --clip-weights"),
        (["gan", "--batch-size", "9", "--pack", "2"], "--batch-size must be a multiple of pack (2), got 9"),
        (
            ["gan", "--loss", "wgan", "--clip-weights", "1", "--label-smoothing=0.8"],
            "--label-smoothing must be 1 with --loss wgan, which has no targets, got 0.8 (see",
        ),
        (["gan", "--precision", "fp8"], "invalid choice 'fp8' for argument '--precision'"),
        (["gan", "--precision", "tf32"], "--precision must be fp32 or bf16 on cpu, got tf32"),
        (["gan", "--device", "tpu"], "--device must be auto, cpu or cuda[:number], got 'tpu'"),
        (["gan", "--device", "cuda:99"], "--device must be one that torch"),
        (["gan", "--data", "/nowhere/x"], "data: source must be mnist, "),
        (["gan", "--batch-size", "70000"], "--batch-size must be at most the 60000 images of mnist, got 70000"),
        (
            ["gan", "--lr", "1e-3"],
            "Unrecognized options: --lr, 1e-3, perhaps --lr-d or --lr-g is meant (see gankern-train gan --help)",
        ),
        (["gan", "--size", "28", "--data", "ring"], "--size must be left out for samples that are no images, got 28"),
        (["gan", "--outdir", "{file}"], "{file} must be a folder, got a file"),
        (["gan", "--outdir", "{file}/runs"], "Not a directory: {file}/runs"),
        (
            ["gan", "--resume", "/nowhere/x"],
            "run: /nowhere/x must be a run directory or a checkpoint, got no such path",
        ),
        (["gan", "--resume", "{dir}"], "run: {dir} must be a run directory with a config.json, got none there"),
    ],
)
def test_train_refuses(flags: list[str], sentence: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    places = {"file": str(tmp_path / "file"), "dir": str(tmp_path / "dir")}
    device = ["--device", "cpu"] if len(flags) > 1 and "--device" not in flags else []
    status = train_main([f.format(**places) for f in flags] + device)
    assert refused(capsys, status).startswith(sentence.format(**places))
    assert {p.name for p in tmp_path.iterdir()} == {"file", "dir"}


@pytest.mark.parametrize("loss", get_args(Loss))
def test_any_loss_goes_before_the_settings_of_the_preset(loss: Loss, capsys: Capture) -> None:
    bounds = ["--penalty", "gp"] if loss in ("wgan", "mmd-gan") else []
    config = train.parse("gan", ["--loss", loss, *bounds])
    assert config.loss == loss
    said = capsys.readouterr().out
    preset = PRESETS["gan"].config.label_smoothing
    assert config.label_smoothing in (preset, 1.0)
    why = f"label_smoothing {preset} of the preset is left out with --loss {loss}, which has no targets\n"
    assert said == ("" if config.label_smoothing == preset else why)
    # Settings that the command names are not left out
    if said:
        with pytest.raises(Refused, match=f"train: label_smoothing must be 1 with --loss {loss}, .* got {preset}"):
            train.parse("gan", ["--loss", loss, "--label-smoothing", str(preset), *bounds])


@pytest.mark.parametrize(
    ("preset", "left_out"),
    [
        ("hinge", {"spectral_norm": False}),
        ("wgan-gp", {"penalty": "none"}),
        ("improved", {"label_smoothing": 1.0, "feature_matching": 0.0, "minibatch_features": "none"}),
    ],
)
def test_loss_without_a_critic_goes_before_the_preset(preset: str, left_out: dict[str, object], capsys: Capture) -> None:
    config = train.parse(preset, ["--loss", "mmd"])
    said = capsys.readouterr().out
    for name, plain in left_out.items():
        assert getattr(config, name) == plain
        assert f"{name} {getattr(PRESETS[preset].config, name)} of the preset is left out with --loss mmd, wh" in said


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (["wgan", "--penalty", "gp"], {"clip_weights": 0.0}),
        (["vae-gan", "--arch", "cdcgan"], {"reconstruction": 0.0, "kl": 0.0}),
        (["vae-gan", "--reconstruction", "0"], {"kl": 0.0}),
    ],
    ids=" ".join,
)
def test_flag_goes_before_all_of_the_preset_that_hangs_on_it(
    words: list[str], left_out: dict[str, object], capsys: Capture
) -> None:
    config = train.parse(words[0], words[1:])
    said = capsys.readouterr().out
    for name, plain in left_out.items():
        assert getattr(config, name) == plain
        assert f"{name} {getattr(PRESETS[words[0]].config, name)} of the preset is left out with --" in said


class Terminal(io.StringIO):
    """A standard output of which tyro asks whether it may draw boxes and use colours."""

    def __init__(self, encoding: str, colours: bool) -> None:
        super().__init__()
        self._encoding, self.colours = encoding, colours

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self.colours


@pytest.mark.parametrize(
    "terminal", [Terminal("utf-8", True), Terminal("utf-8", False), Terminal("ascii", True), Terminal("ascii", False)]
)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "x"], "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        (["--steps", "0"], "train: steps must be a finite number >= 1, got 0"),
        (["--stepz", "3"], "Unrecognized options: --stepz, 3, perhaps --steps is meant"),
    ],
)
def test_bad_flags_on_any_terminal(terminal: Terminal, flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(Refused) as refusal:
        train.parse("gan", flags)
    assert str(refusal.value) == f"{sentence} (see gankern-train gan --help)"


def test_forced_backend_that_cannot_run_is_refused(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "problem", lambda name, device: "it is not there" if name == "triton" else "")
    with gankern.use_backend("triton"):
        status = train_main(["gan", "--device", "cpu", "--dry-run"])
    assert refused(capsys, status).endswith("got 'triton': it is not there")


def test_missing_extra_says_how_to_install_it(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("rich", "tyro") else find(name, *a))
    status = train_main(["gan"])
    assert refused(capsys, status) == 'tyro, rich must be installed for this: pip install "gankern[train]"'


@pytest.mark.parametrize("columns", [60, 100])
def test_help_explains_every_setting(columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        train_main(["gmmn", "--steps", "3", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    groups = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert groups == list(GROUPS.values())
    told = re.split(r"^  --", text, flags=re.MULTILINE)[1:]
    assert [entry.split()[0].rstrip(",").replace("-", "_") for entry in told] == [f.name for f in dataclasses.fields(TrainConfig)]
    for entry, value in zip(told, dataclasses.asdict(PRESETS["gmmn"].config).values(), strict=True):
        flag, body = entry.split("\n", 1)
        assert max(map(len, body.splitlines())) <= columns
        words = " ".join(body.split())
        said = {"True": "on", "False": "off", "": "nothing"}.get(shown(value), shown(value))
        assert re.search(rf"\. \(default: {re.escape(said)}\)", words), flag
    assert "--penalty {none,gp,lp,0gp,dragan,r1,r2,r1r2}" in text
    assert "One of non-saturating, " in " ".join(text.split())


def test_what_the_preset_has_of_no_effect_is_no_matter() -> None:
    assert train.parse("gan", ["--arch", "dcgan", "--momentum", "0"]).d_dropout == 0.3


def test_flags_are_the_inverse_of_parsing() -> None:
    words = ["--g-widths", "3", "4", "--no-ema-warmup", "--lr-g", "0.001", "--data", "my data", "--dry-run", "--size", "9"]
    config = train.parse("gan", words)
    assert (config.g_widths, config.ema_warmup, config.lr_g, config.data, config.dry_run) == ((3, 4), False, 1e-3, "my data", True)
    assert train.parse("gan", presets.flags("gan", config)) == config
    assert presets.flags("gan", PRESETS["gan"].config) == []


# --- gankern, sample, presets


def test_gankern_itself(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{gankern.__version__}\n"
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)
    assert train_main(["--help"]) == 0
    assert "gan " in capsys.readouterr().out
    names = "train, sample, evaluate, export, presets, report, watch, explain, doctor, reproduce or bench"
    assert f"command must be {names}, got 'fly'" in refused(capsys, main(["fly"]), "gankern")


def sample(run: Path, out: Path, *flags: str) -> int:
    return main(["sample", str(run), "--out", str(out), "--device", "cpu", *flags])


def test_sample_npz(run: Path, tmp_path: Path, capsys: Capture) -> None:
    def draw(*flags: str) -> np.ndarray[Any, Any]:
        assert sample(run, tmp_path / "x.npz", *flags) == 0
        with np.load(tmp_path / "x.npz") as file:
            assert file.files == ["samples"]
            return np.array(file["samples"])

    first = draw("--n", "7", "--seed", "3")
    assert "7 samples of" in capsys.readouterr().out
    assert (first.shape, first.dtype) == ((7, 3, 6, 6), np.float32)
    assert first.min() >= -1
    assert first.max() <= 1
    assert np.array_equal(first, draw("--n", "7", "--seed", "3"))
    assert np.array_equal(first, draw("--n", "7", "--seed", "3", "--weights", "ema"))
    assert not np.array_equal(first, draw("--n", "7", "--seed", "4"))
    assert not np.array_equal(first, draw("--n", "7", "--seed", "3", "--weights", "last"))
    assert sample(run / "checkpoint-000016.safetensors", tmp_path / "old.npz", "--n", "7", "--seed", "3") == 0
    assert not np.array_equal(first, np.load(tmp_path / "old.npz")["samples"])


def test_sample_png_and_folder_show_the_same(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path / "x.png", "--n", "10") == 0
    assert sample(run, tmp_path / "deep" / "folder", "--n", "10") == 0
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (18, 24, 3)
    files = sorted((tmp_path / "deep" / "folder").iterdir())
    assert [p.name for p in files] == [f"{i}.png" for i in range(10)]
    for i, path in enumerate(files):
        row, column = divmod(i, 4)
        cell = grid[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
        assert np.array_equal(np.asarray(Image.open(path)), cell)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n", "0"], "--n must be >= 1, got 0"),
        (["--n", "some"], "argument --n: invalid int value: 'some' (see gankern sample --help)"),
        (["--seed", "-1"], "--seed must be in [0, 2^62), got -1"),
        (["--out", "x.gif"], "--out must end in .png or .npz or be a folder, got 'x.gif'"),
        (["--class", "3"], "--class must be left out: the model of preset gan has no classes, got 3"),
        (["--weights", "best"], "argument --weights: invalid choice: 'best'"),
        (["--device", "tpu"], "device must be auto, cpu or cuda[:number], got 'tpu'"),
        (["--out", "/dev/null/x.png"], "/dev/null must be a folder, got a file"),
    ],
)
def test_sample_refuses(flags: list[str], sentence: str, run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert refused(capsys, main(["sample", str(run), *flags]), "gankern sample").startswith(sentence)


def test_sample_needs_a_run_with_a_checkpoint(run: Path, tmp_path: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert "no such path" in refused(capsys, main(["sample", str(tmp_path / "no")]), "gankern sample")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "must have a checkpoint, got none" in refused(capsys, main(["sample", str(tmp_path)]), "gankern sample")
    (tmp_path / "config.json").write_text("{")
    assert "must be JSON" in refused(capsys, main(["sample", str(tmp_path)]), "gankern sample")
    settings = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"preset": "lost"}))
    (tmp_path / "checkpoint-000001.safetensors").touch()
    assert "must be of a known preset" in refused(capsys, main(["sample", str(tmp_path)]), "gankern sample")


# --- doctor


def test_doctor_reports_and_succeeds(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (f"gankern {gankern.__version__}", f"torch {torch.__version__}", "devices", "C++ for CPU", "CUDA", "Triton"):
        assert word in text
    for op in PROBES:
        (line, *_) = [line for line in text.splitlines() if line.strip().startswith(op.strip())]
        assert any(name in line for name in backend.NAMES)
        assert "the automatic choice" in line or "plain PyTorch calls" in line
    if not backend.CPU_PROBLEM:
        assert "stable ABI of torch 2." in text


def test_doctor_says_what_is_forced(capsys: Capture) -> None:
    with gankern.use_backend("reference"):
        assert main(["doctor"]) == 0
    assert "linear_lrelu           reference: forced" in capsys.readouterr().out


def test_doctor_fails_on_a_broken_library(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CUDA_PROBLEM", "built but broken: undefined symbol: f")
    assert main(["doctor"]) == 1
    assert "broken: CUDA: built but broken: undefined symbol: f" in capsys.readouterr().out


def wrong_numbers(kernels: Any) -> Any:
    def act(*arguments: Any) -> Any:
        y, bits = kernels.linear_lrelu_act(*arguments)
        return y + 1.0, bits

    return SimpleNamespace(linear_lrelu_act=act, linear_lrelu_act_grad=kernels.linear_lrelu_act_grad)


def crash(*_: Any) -> Any:
    raise RuntimeError("illegal\ninstruction")


@pytest.mark.parametrize(
    ("module", "broken", "sentence"),
    [
        (linear_lrelu, wrong_numbers, "linear_lrelu on cpu with backend {} differs from the reference"),
        (gan_loss, lambda _: SimpleNamespace(gan_loss=crash), "gan_loss on cpu with backend {}: RuntimeError: illegal instruction"),
    ],
)
def test_doctor_finds_a_kernel_that_does_not_work(
    module: ModuleType, broken: Callable[[Any], Any], sentence: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = [name for name in backend.NAMES[1:] if not backend.problem(name, "cpu")]
    if not able:
        pytest.skip("only the reference can run here")
    kernels = module._kernels
    monkeypatch.setattr(module, "_kernels", lambda name: broken(kernels(name)))
    assert main(["doctor"]) == 1
    assert f"broken: {sentence.format(able[0])}" in capsys.readouterr().out


def test_doctor_tells_the_choice_with_and_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_lrelu, "_choose", lambda device, p, elements: "compiled" if p else "reference")
    rows = {op.strip(): (name, why) for op, name, why in doctor.backends(torch.device("cpu"))}
    assert rows["linear_lrelu"][0] == "reference"
    assert rows["linear_lrelu"][1].startswith("plain PyTorch calls")
    assert rows["with dropout"][0] == "compiled"


def test_a_forced_name_that_is_none_is_one_sentence(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_name", "fast")
    for command in (["doctor"], ["train", "gan", "--dry-run"]):
        assert main(command) == 2
        assert (
            capsys.readouterr().err.strip().endswith("GANKERN_BACKEND: name must be one of reference, compiled, triton, got 'fast'")
        )


@pytest.fixture
def fresh() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run_python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    return run_python


def test_help_and_doctor_load_no_plotting(fresh: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys; from gankern.cli.main import main\n"
        "assert main(['train', '--help']) == 0 and main(['doctor']) == 0\n"
        "heavy = {'matplotlib', 'tensorboard', 'PIL', 'rich', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_python_m_gankern() -> None:
    done = subprocess.run([sys.executable, "-m", "gankern", "fly"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gankern: command must be")


def test_faults_in_the_work_are_not_dressed_up(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "step", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        train_main(["gan", "--data", str(images), "--outdir", str(tmp_path), *TINY, "--steps", "2"])
