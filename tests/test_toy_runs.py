"""Runs on points in the plane and on tables: what they write, how they go on, and samples of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from gankern.cli import fit
from gankern.cli.main import main, train_main
from gankern.data import load
from gankern.data.toys import COUNT
from gankern.training import PRESETS
from gankern.training.plane import HEIGHT, WIDTH
from gankern.training.run_dir import RunDir
from tests.test_toys import people

Capture = pytest.CaptureFixture[str]
TINY = ["--batch-size", "50", "--z-dim", "3", "--g-widths", "8", "--d-widths", "8", "--device", "cpu"]
RHYTHM = ["--log-every", "2", "--sample-every", "2", "--checkpoint-every", "0"]


def go(preset: str, data: str | Path, out: Path, *flags: str) -> int:
    return train_main([preset, "--data", str(data), "--outdir", str(out), *TINY, *RHYTHM, *flags])


def rows(run: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def film_length(run: Path) -> int:
    with Image.open(run / "training.gif") as film:
        return getattr(film, "n_frames", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 7 steps on the ring; do not write to it."""
    out = tmp_path_factory.mktemp("runs")
    assert go("gan", "ring", out, "--steps", "7") == 0
    return out / "00000-gan-ring-b50"


def test_run_on_points_writes_pictures_film_and_modes(run: Path) -> None:
    shown = {"fakes_init.png", "fakes000002.png", "fakes000004.png", "fakes000006.png", "fakes000007.png", "reals.png"}
    others = {"config.json", "log.jsonl", "modes.jsonl", "losses.png", "report.html", "training.gif"}
    others |= {"checkpoint-000007.safetensors", ".lock"}
    found = {p.name for p in run.iterdir() if p.is_file() and "tfevents" not in p.name}
    assert found == shown | others
    for name in shown:
        with Image.open(run / name) as picture:
            assert picture.size == (WIDTH, HEIGHT)
    assert film_length(run) == 5
    lines = rows(run, "modes.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 7]
    for line in lines:
        assert line.keys() == {"step", "modes", "high_quality", "reverse_kl"}
        assert 0 <= line["modes"] <= 8
        assert 0 <= line["high_quality"] <= 1
    config = json.loads((run / "config.json").read_text())
    assert (config["shape"], config["samples"], config["settings"]["data"]) == ([2], COUNT, "ring")


def test_the_generator_of_points_is_unbounded(run: Path) -> None:
    generator, _ = PRESETS["gan"].build(RunDir(run).config, (2,))
    assert not any(isinstance(m, nn.Tanh) for m in generator.modules())
    generator, _ = PRESETS["gan"].build(RunDir(run).config, (1, 6, 6))
    assert any(isinstance(m, nn.Tanh) for m in generator.modules())


def test_resumed_film_and_modes_are_those_of_an_uninterrupted_run(run: Path, tmp_path: Path) -> None:
    """Stopped after a picture later than its last checkpoint, and with another rhythm of pictures before."""
    assert go("gan", "ring", tmp_path, "--steps", "3") == 0
    part = tmp_path / "00000-gan-ring-b50"
    for step in (5, 6):  # as a run that was killed leaves them; the first of no use to the resumed run, the second half written
        (part / f"fakes{step:06d}.png").write_bytes((part / "fakes000002.png").read_bytes()[: 5000 * step])
    (part / "fakes000003.png").unlink()  # of the shorter run's end
    lines = (part / "modes.jsonl").read_text().splitlines(keepends=True)
    (part / "modes.jsonl").write_text("".join(line for line in lines if '"step": 3' not in line) + '{"step": 5, "modes": 1}\n{"st')
    assert go("gan", "ring", tmp_path, "--steps", "7", "--resume", "auto") == 0
    assert film_length(part) == 5
    assert rows(part, "modes.jsonl") == rows(run, "modes.jsonl")
    for step in (2, 4, 6, 7):
        name = f"fakes{step:06d}.png"
        assert (part / name).read_bytes() == (run / name).read_bytes()


def test_a_stopped_run_has_its_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = fit.Trainer.step

    def stop_after_three(self: fit.Trainer, *batch: Tensor) -> dict[str, Tensor]:
        out = step(self, *batch)
        if self.steps_done == 3:
            fit.signal.raise_signal(fit.signal.SIGINT)
        return out

    monkeypatch.setattr(fit.Trainer, "step", stop_after_three)
    assert go("gan", "grid", tmp_path, "--steps", "7") == 128 + fit.signal.SIGINT
    assert film_length(tmp_path / "00000-gan-grid-b50") == 2


def sample(run: Path, out: Path, *flags: str) -> int:
    return main(["sample", str(run), "--out", str(out), "--device", "cpu", *flags])


def test_samples_of_points(run: Path, tmp_path: Path, capsys: Capture) -> None:
    for kind in ("npz", "csv", "png"):
        assert sample(run, tmp_path / f"x.{kind}", "--n", "6") == 0
    drawn = np.load(tmp_path / "x.npz")["samples"]
    assert drawn.shape == (6, 2)
    assert (tmp_path / "x.csv").read_text().startswith("x1,x2\n")
    np.testing.assert_allclose(np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1), drawn, rtol=1e-8)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)
    capsys.readouterr()
    assert sample(run, tmp_path, "--n", "6") == 2
    want = f"gankern sample: --out must end in .png, .npz or .csv for samples that are no images, got '{tmp_path}'\n"
    assert capsys.readouterr().err == want


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "people.csv"
    path.write_text("age,income,seven,children\n" + "\n".join(",".join(map(str, row)) for row in people().tolist()))
    return path


def test_run_on_a_table(table: Path, tmp_path: Path, capsys: Capture) -> None:
    """Samples come back in the table's units; the constant column, which the networks see as zeros, is its value."""
    assert go("ctgan-like", table, tmp_path, "--steps", "2") == 0
    run = tmp_path / "00000-ctgan-like-people-b50"
    assert film_length(run) == 2
    assert not (run / "modes.jsonl").exists()
    for kind in ("npz", "csv", "png"):
        assert sample(run, tmp_path / f"x.{kind}", "--n", "40") == 0
    drawn = np.load(tmp_path / "x.npz")["samples"]
    z = (drawn - people().mean(0)) / [*people().std(0)[:2], 1.0, people().std(0)[3]]
    assert np.all(drawn[:, 2] == 7.0)
    assert np.abs(z).max() < 5  # of untrained networks; raw units would be hundreds of s.d. away
    back = load(tmp_path / "x.csv")
    assert back.table is not None
    assert back.table.columns == ("age", "income", "seven", "children")
    np.testing.assert_allclose(back.table.restore(back.samples).numpy(), drawn, rtol=1e-4, atol=1e-3)
    other = table.read_text()
    try:
        table.write_text(other.replace("income", "debt"))
        capsys.readouterr()
        assert go("ctgan-like", table, tmp_path, "--steps", "4", "--resume", "auto") == 2
        assert f"resume: data must have the columns of {run}, with their means" in capsys.readouterr().err
    finally:
        table.write_text(other)
    assert go("ctgan-like", table, tmp_path, "--steps", "4", "--resume", "auto") == 0


@pytest.mark.parametrize(
    "broken", [[], {"columns": ["a"]}, {"columns": ["a"] * 4, "mean": [0] * 4, "std": [1] * 3}, {"columns": 3}]
)
def test_a_damaged_table_of_a_run_is_refused(broken: Any, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text()) | {"shape": [4], "table": broken}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json must have a table of 4 columns, mean and std, got "):
        RunDir(tmp_path)
