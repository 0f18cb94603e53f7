"""gankern reproduce: what is run, counted, claimed and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from gankern import data
from gankern.cli.main import main
from gankern.data import to_float
from gankern.reproduce import TABLES, Claim, Result, Row, Table, Trial, run
from gankern.reproduce.fgan import FITS, PUBLISHED
from gankern.reproduce.plane import coverage as plane_coverage
from gankern.reproduce.stacked import coverage
from gankern.reproduce.table import rising, spread
from gankern.training import TrainConfig

Capture = pytest.CaptureFixture[str]


def trial(config: TrainConfig) -> Trial:
    """Numbers that depend on the settings, the seed and the process's threads alone."""
    return Trial({"score": config.n_critic + 0.1 * config.seed, "threads": float(torch.get_num_threads())}, 1.0, [])


def draw(path: Path, results: dict[str, Result]) -> None:
    Image.new("L", (len(results), 1)).save(path)


def table(*claims: Claim) -> Table:
    rows = (Row("one", TrainConfig(n_critic=1, steps=7), {"score": "1.0±.1"}), Row("two", TrainConfig(n_critic=2, steps=7)))
    return Table("little", "Nobody, 2026, table 0", "Nothing is trained.", ("score", "threads"), rows, trial, claims, draw, seeds=2)


def test_a_table_is_run_and_written(tmp_path: Path) -> None:
    lines: list[str] = []
    right, wrong = rising("score", "one", "two"), rising("score", "two", "one")
    assert run(table(right), tmp_path, workers=2, report=lines.append)
    assert sum("seed" in line for line in lines) == 4
    content = json.loads((tmp_path / "little.json").read_text())
    assert content["pass"]
    one, two = content["rows"]
    assert (one["name"], one["steps"], one["seeds"], one["published"]) == ("one", 7, [0, 1], {"score": "1.0±.1"})
    assert one["own"] == {"score": [1.0, 1.1], "threads": [1.0, 1.0]}
    assert two["own"]["score"] == [2.0, 2.1]
    page = (tmp_path / "little.md").read_text()
    assert "| one | 7 | 1.05 ± 0.071 | 1.0±.1 | 1 ± 0 | - | 1 |" in page
    assert "- holds: mean score: one < two" in page
    assert Image.open(tmp_path / "little.png").size == (2, 1)
    assert not run(table(right, wrong), tmp_path, seeds=1, steps=3, workers=1, report=lines.append)
    content = json.loads((tmp_path / "little.json").read_text())
    assert [claim["holds"] for claim in content["claims"]] == [True, False]
    assert [row["steps"] for row in content["rows"]] == [3, 3]
    assert "- **does not hold**: mean score: two < one" in (tmp_path / "little.md").read_text()


def test_the_full_form_has_its_own_settings_and_trials(tmp_path: Path) -> None:
    full = dataclasses.replace(table(), full_seeds=3, full={"steps": 90, "n_critic": 5})
    assert run(full, tmp_path, full=True, report=lambda line: None)
    content = json.loads((tmp_path / "little.json").read_text())
    assert content["form"] == "full"
    assert [(row["steps"], row["own"]["score"]) for row in content["rows"]] == [(90, [5.0, 5.1, 5.2])] * 2
    run(full, tmp_path, full=True, steps=11, seeds=1, report=lambda line: None)
    assert [row["steps"] for row in json.loads((tmp_path / "little.json").read_text())["rows"]] == [11, 11]


def result(*scores: float) -> Result:
    return Result(Row("r", TrainConfig()), {seed: Trial({"score": score}, 0.0, []) for seed, score in enumerate(scores)})


@pytest.mark.parametrize(
    ("scores", "strict", "loose"), [((1.0, 2.0, 3.0), True, True), ((1.0, 1.0, 2.0), False, True), ((1.0, 3.0, 2.0), False, False)]
)
def test_rising(scores: tuple[float, ...], strict: bool, loose: bool) -> None:
    results = {name: result(score - 1, score + 1) for name, score in zip("abc", scores, strict=True)}
    assert rising("score", *"abc").holds(results) == strict
    assert rising("score", *"abc", strictly=False).holds(results) == loose


def test_spread() -> None:
    assert spread([2.0]) == "2"
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1"


def test_modes_of_stacked_digits() -> None:
    """Real triples are called what their labels say, but for the classifier's 0.5 % of errors a digit."""
    dataset = data.load("stacked-mnist", split="test", limit=600, seed=3)
    assert dataset.labels is not None
    samples = to_float(dataset.samples)
    found, kl = coverage(samples)
    assert abs(found - len(dataset.labels.unique())) <= 12
    shares = torch.bincount(dataset.labels, minlength=1000).double() / 600
    assert kl == pytest.approx(torch.xlogy(shares, 1000 * shares).sum().item(), abs=0.1)
    assert coverage(samples[:1].expand(50, -1, -1, -1)) == (1, pytest.approx(6.9078, abs=1e-3))  # log 1000


def test_stacked_mnist_stacks_digits() -> None:
    digits, dataset = data.load("mnist", split="test"), data.load("stacked-mnist", split="test", limit=5, seed=1)
    assert digits.labels is not None
    assert dataset.labels is not None
    assert dataset.shape == (3, 28, 28)
    for image, label in zip(dataset.samples, dataset.labels.tolist(), strict=True):
        for channel, digit in zip(image, (label // 100, label // 10 % 10, label % 10), strict=True):
            (same,) = (digits.samples[:, 0] == channel).flatten(1).all(1).nonzero().T
            assert digit in digits.labels[same].tolist()
    assert not torch.equal(dataset.samples, data.load("stacked-mnist", split="test", limit=5, seed=2).samples)


def test_a_trial_looks_at_the_end_and_on_the_way() -> None:
    (config,) = {row.config for row in TABLES["pacgan1-ring"].rows if row.name == "PacGAN2"}
    trial = plane_coverage(dataclasses.replace(config, steps=20, batch_size=20))
    assert len(trial.looks) == 10
    assert trial.looks[0].shape == (1000, 2)
    assert not torch.equal(trial.looks[0], trial.looks[-1])
    assert 0 <= trial.numbers["fewest_modes"] <= trial.numbers["modes"] <= 8
    again = plane_coverage(dataclasses.replace(config, steps=20, batch_size=20))
    assert again.numbers == trial.numbers
    assert torch.equal(again.looks[-1], trial.looks[-1])


def test_published_fits_are_those_of_quadrature() -> None:
    assert all(row.published == PUBLISHED.get(row.name, {}) for row in TABLES["fgan"].rows)
    for name, numbers in PUBLISHED.items():
        _, least, mu, sigma = FITS[name]
        assert [float(numbers[key]) for key in ("divergence", "mu", "sigma")] == pytest.approx([least, mu, sigma], abs=1e-3)


def test_pacgan_counts_packs() -> None:
    """100 packs an update, whatever a pack holds."""
    for name in ("pacgan1-ring", "pacgan1-grid"):
        for row in TABLES[name].rows:
            assert row.config.batch_size == 100 * row.config.pack


def test_the_command_runs_and_lists(tmp_path: Path, capsys: Capture) -> None:
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in TABLES)
    flags = ["--steps", "2", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    assert main(["reproduce", "wgan-gp-toys", *flags]) == 1  # two steps hold no mode
    assert "DOES NOT HOLD: 8 Gaussians: all 8 modes" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"wgan-gp-toys.json", "wgan-gp-toys.md", "wgan-gp-toys.png"}
    with Image.open(tmp_path / "wgan-gp-toys.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["pacgan9"], f"TABLE must be one of {', '.join(TABLES)}, got 'pacgan9'"),
        (["fgan", "--seeds", "-1"], "--seeds must be >= 1, got -1"),
        (["fgan", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["fgan", "--workers", "0"], "--workers must be >= 1, got 0"),
    ],
)
def test_the_command_refuses(flags: list[str], sentence: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["reproduce", *flags, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
