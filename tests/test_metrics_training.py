"""Metrics of a run while it trains: what they measure, what they keep, end and cost, and that they change nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gankern import data, metrics
from gankern.cli.main import main, train_main
from gankern.data.images import to_float
from gankern.metrics import digit_features, load_digit_classifier
from gankern.training import TrainConfig, checkpoint, quality
from gankern.training.quality import METRICS, Judge
from gankern.training.run_dir import RunDir, locate

pytestmark = pytest.mark.usefixtures("steady")
Capture = pytest.CaptureFixture[str]
# All that draws random numbers: dropout in both networks, also when sampling, and EMA.
FLAGS = "--data ring --limit 150 --z-dim 3 --g-widths 8 --d-widths 8 --batch-size 16 --device cpu --ema 0.9 --g-dropout 0.1"
FLAGS += " --no-report --sample-dropout --d-dropout 0.3 --log-every 5 --sample-every 0 --checkpoint-every 0"
METRIC_FLAGS = "--metrics fid,kid,1nn,prdc,wasserstein,modes --metric-every 4 --metric-samples 60 --metric-budget 0 --keep-best fid"
NAME = "00000-gan-ring-b16"


def train(out: Path, *flags: str) -> int:
    return train_main(["gan", "--outdir", str(out), *FLAGS.split(), *" ".join(flags).split()])


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Without times."""
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "time_s", "images_per_s")} for row in found]


def saved(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step:06d}.safetensors"


def state(path: Path) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.load(path).items() if key != "time_s"}


def assert_same_state(a: Path, b: Path) -> None:
    mine, other = state(a), state(b)
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Drawing takes longer than all else here, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gankern.training.plane.Plane._draw", lambda *_: torch.zeros(8, 8, 3, dtype=torch.uint8))
        patch.setattr("gankern.training.pictures.plot_losses", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps with every metric that points can have; do not write to it."""
    out = tmp_path_factory.mktemp("measured")
    assert train(out, "--steps 12", METRIC_FLAGS) == 0
    return out / NAME


# --- nothing is changed


def test_weights_are_those_of_a_run_without_metrics(measured: Path, tmp_path: Path) -> None:
    assert train(tmp_path, "--steps 12") == 0
    assert_same_state(saved(measured, 12), saved(tmp_path / NAME, 12))
    assert rows(measured, "log.jsonl") == rows(tmp_path / NAME, "log.jsonl")
    assert not [*(tmp_path / NAME).glob("metric-*"), *(tmp_path / NAME).glob("best*")]


@pytest.mark.parametrize("first", [3, 8])
def test_resumed_run_has_the_rows_and_the_weights_of_a_whole_one(first: int, measured: Path, tmp_path: Path) -> None:
    assert train(tmp_path, f"--steps {first}", METRIC_FLAGS) == 0
    (tmp_path / NAME / "metric-fid.jsonl").open("a").write('{"step": 11, "val')  # as a crash leaves it
    assert train(tmp_path, "--steps 12 --resume auto", METRIC_FLAGS) == 0
    assert_same_state(saved(measured, 12), saved(tmp_path / NAME, 12))
    for log in sorted(p.name for p in measured.glob("metric-*.jsonl")):
        last = [first] if first % 4 else []  # the last step of the first part had a look too
        assert rows(tmp_path / NAME, log) == sorted(
            rows(measured, log) + [row for row in rows(tmp_path / NAME, log) if row["step"] in last], key=lambda row: row["step"]
        )


# --- what is measured


def trainer_of(samples: Callable[..., Tensor], config: TrainConfig) -> Any:
    """A trainer, as far as a Judge knows it."""
    return SimpleNamespace(config=config, device=torch.device("cpu"), sample=samples)


def judge_of(samples: Callable[..., Tensor], config: TrainConfig, dataset: data.Dataset, labelled: bool = False) -> Judge:
    judge = Judge(trainer_of(samples, config), dataset, labelled)
    judge.prepare()
    return judge


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("mnist", limit=600)


def test_rows_are_what_the_metrics_find(measured: Path) -> None:
    assert [row["step"] for row in rows(measured, "metric-fid.jsonl")] == [4, 8, 12]
    names = sorted(p.name for p in measured.glob("metric-*.jsonl"))
    assert names == [f"metric-{name}.jsonl" for name in ("1nn", "fid", "kid", "modes", "prdc", "wasserstein")]
    assert rows(measured, "metric-1nn.jsonl")[0].keys() == {"step", "value", "1nn_real", "1nn_fake"}
    assert rows(measured, "metric-prdc.jsonl")[0].keys() == {"step", "value", "precision", "recall", "density"}
    assert rows(measured, "metric-modes.jsonl")[0].keys() == {"step", "value", "high_quality", "reverse_kl"}


def test_values_on_points_and_fixed_sets() -> None:
    ring = data.load("ring", limit=300)
    fakes = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    asked: list[Tensor] = []

    def sample(z: Tensor) -> Tensor:
        asked.append(z)
        return fakes[: len(z)]

    config = TrainConfig(data="ring", metrics="fid,1nn,prdc,kid,wasserstein,modes", metric_samples=200, seed=5)
    judge = judge_of(sample, config, ring)
    before = torch.get_rng_state()
    found, again = judge.measure(), judge.measure()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(asked[0], asked[1])
    assert asked[0].shape == (200, config.z_dim)
    real, fake = judge.real.samples, fakes[:200]
    assert len(real.unique(dim=0)) == 200
    assert all((ring.samples == point).all(1).any() for point in real[:20])
    want = {
        "fid": metrics.fid(real=real, fake=fake),
        "kid": metrics.kid_full(real=real, fake=fake),
        "1nn": metrics.nearest_neighbour_test(real=real, fake=fake).accuracy,
        "prdc": metrics.prdc(real=real, fake=fake).coverage,
        "wasserstein": metrics.wasserstein(real=real, fake=fake),
        "modes": metrics.modes(fake, *ring.mixture).found,  # type: ignore[misc]
    }
    assert {name: row["value"] for name, row in found.items()} == {name: row["value"] for name, row in again.items()} == want
    other = judge_of(sample, TrainConfig(data="ring", metrics="fid", seed=6), ring)
    assert not torch.equal(judge.index, other.index[:200])


def test_digit_features_are_those_of_the_classifier(digits: data.Dataset) -> None:
    images = to_float(digits.samples[:300])
    net = load_digit_classifier()
    seen = digit_features(images)
    torch.testing.assert_close(seen.probabilities[:, 0], net(images).softmax(1))
    assert digits.labels is not None
    assert (seen.probabilities[:, 0].argmax(1) == digits.labels[:300]).double().mean() > 0.98
    maps = images
    for layer in list(net)[:11]:
        maps = layer(maps)
    torch.testing.assert_close(seen.features[:, 3], maps[:, 0, 3:, 3:].mean((1, 2)))  # the lower right quarter of the first channel
    colour = torch.cat([images[:100], images[100:200], images[200:]], 1)
    whole = digit_features(colour)
    assert whole.features.shape == (100, 768)
    torch.testing.assert_close(whole.features[:, 256:512], seen.features[100:200])
    torch.testing.assert_close(whole.probabilities[:, 2], seen.probabilities[200:, 0])
    large = torch.nn.functional.interpolate(images[:50], (56, 56), mode="nearest")
    assert (digit_features(large).probabilities[:, 0].argmax(1) == digits.labels[:50]).double().mean() > 0.95


def test_modes_and_scores_of_digits(digits: data.Dataset) -> None:
    """Real digits as the fakes: the labels of the data say what is there."""
    assert digits.labels is not None
    three = to_float(digits.samples[(digits.labels < 3).nonzero()[:, 0]])
    config = TrainConfig(metrics="modes,is,mode-score,fid", metric_samples=150)
    judge = judge_of(lambda z: three[: len(z)], config, digits)
    found = judge.measure()
    p = (digits.labels[digits.labels < 3][:150].bincount() / 150).numpy()
    q = (digits.labels[judge.index].bincount() / 150)[:3].numpy()
    assert 3 <= found["modes"]["value"] <= 4  # the classifier errs on one in two hundred
    assert found["modes"]["reverse_kl"] == pytest.approx((p * np.log(p / q)).sum(), abs=0.05)
    assert found["is"]["value"] == pytest.approx(3, abs=0.3)
    assert found["mode-score"]["value"] == pytest.approx(np.exp((p * np.log(q / p**2)).sum()), abs=0.2)  # entropy less KL
    everything = to_float(digits.samples[-150:])
    better = judge_of(lambda z: everything[: len(z)], config, digits).measure()
    assert better["modes"]["value"] == 10
    assert better["mode-score"]["value"] > 9
    assert better["fid"]["value"] < 0.5 * found["fid"]["value"]


def test_modes_of_stacked_digits() -> None:
    stacked = data.load("stacked-mnist", limit=400)
    assert stacked.labels is not None
    few = (stacked.labels < 100).nonzero()[:, 0]  # a zero in the first channel
    samples, config = to_float(stacked.samples[few]), TrainConfig(data="stacked-mnist", metrics="modes", metric_samples=len(few))
    row = judge_of(lambda z: samples, config, stacked).measure()["modes"]
    assert row["value"] == pytest.approx(len(stacked.labels[few].unique()), abs=2)
    shares = torch.bincount(stacked.labels[few], minlength=1000).double() / len(few)
    assert row["reverse_kl"] == pytest.approx(torch.xlogy(shares, 1000 * shares).sum().item(), abs=0.1)


def test_fakes_have_the_classes_of_the_reals(digits: data.Dataset) -> None:
    assert digits.labels is not None
    asked: list[Tensor] = []

    def sample(z: Tensor, labels: Tensor) -> Tensor:
        asked.append(labels)
        return torch.zeros(len(z), 1, 28, 28)

    judge = judge_of(sample, TrainConfig(arch="cgan", metrics="fid", metric_samples=30), digits, True)
    judge.measure()
    assert torch.equal(asked[0], digits.labels[judge.index])


def test_conditional_run_with_all_metrics_of_digits(tmp_path: Path) -> None:
    flags = (
        "--limit 100 --steps 2 --z-dim 3 --g-widths 8 --d-widths 8 --batch-size 8 --device cpu --sample-every 0 --metric-samples 20"
    )
    words = ["cgan", "--outdir", str(tmp_path), *flags.split(), "--metrics", ",".join(METRICS)]
    assert train_main(words) == 0
    for name in METRICS:
        (row,) = rows(tmp_path / "00000-cgan-mnist-b8", f"metric-{name}.jsonl")
        assert row["step"] == 2


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_what_is_not_finite_is_left_out(bad: float) -> None:
    ring = data.load("ring", limit=50)
    config = TrainConfig(data="ring", metrics="kid,modes")
    found = judge_of(lambda z: torch.full((50, 2), bad), config, ring).measure()
    assert found.keys() == ({"modes"} if bad == 1e30 else set())  # the cube of kid's kernel overflows in float32


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("fid", {"value": 1.0}, {"value": 2.0}),
        ("kid", {"value": -0.1}, {"value": 0.0}),
        ("wasserstein", {"value": 0.1}, {"value": 0.2}),
        ("1nn", {"value": 0.45}, {"value": 0.6}),
        ("prdc", {"value": 0.9}, {"value": 0.2}),
        ("is", {"value": 9.0}, {"value": 8.0}),
        ("mode-score", {"value": 9.0}, {"value": 8.0}),
        ("modes", {"value": 8, "high_quality": 0.1, "reverse_kl": 1.0}, {"value": 7, "high_quality": 0.9, "reverse_kl": 0.0}),
        ("modes", {"value": 8, "high_quality": 0.9, "reverse_kl": 1.0}, {"value": 8, "high_quality": 0.1, "reverse_kl": 0.0}),
        ("modes", {"value": 10, "reverse_kl": 0.1}, {"value": 10, "reverse_kl": 0.2}),
    ],
)
def test_which_row_is_better(name: str, better: dict[str, float], worse: dict[str, float]) -> None:
    assert METRICS[name].rank(better) < METRICS[name].rank(worse)


def test_every_metric_has_its_rank_tested() -> None:
    (mark,) = [m for m in test_which_row_is_better.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == METRICS.keys()


# --- the best checkpoint, the early end, the cost


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Have fid be these values, one a look."""

    def script(values: Sequence[float]) -> None:
        it = iter(values)
        monkeypatch.setattr(quality, "measure", lambda *_, **__: {"value": next(it)})

    return script


FID = "--metrics fid --metric-every 2 --metric-samples 20 --metric-budget 0 --keep-best fid"


def kept(run: Path) -> list[int]:
    return [step for step, _ in RunDir(run).checkpoints()]


def test_best_checkpoint_is_kept(scripted: Callable[[Sequence[float]], None], tmp_path: Path, capsys: Capture) -> None:
    scripted([5.0, 3.0, 4.0, 3.0, 6.0])
    assert train(tmp_path, "--steps 10 --keep 1 --checkpoint-every 3", FID) == 0
    run = tmp_path / NAME
    assert kept(run) == [4, 10]
    assert json.loads((run / "best.json").read_text()) == {"metric": "fid", "step": 4, "value": 3.0}
    out = capsys.readouterr().out
    assert "metrics: fid 6; 5 looks, " in out
    assert f"best: fid 3 after step 4, {run / 'best'}\n" in out
    found, (path,) = locate(run / "best")
    assert found.path == run.resolve()
    assert checkpoint.load(path)["step"] == 4
    for name, source in (("best", run / "best"), ("same", saved(run, 4))):
        assert main(["sample", str(source), "--n", "9", "--out", str(tmp_path / f"{name}.npz")]) == 0
    with np.load(tmp_path / "best.npz") as best, np.load(tmp_path / "same.npz") as same:
        np.testing.assert_array_equal(best["samples"], same["samples"])
    # a resumed run goes on from what is there: 3.5 is no better, 2 is
    scripted([3.5, 2.0])
    assert train(tmp_path, "--steps 12 --keep 1 --resume auto", FID) == 0
    assert kept(run) == [4, 12]
    assert train(tmp_path, "--steps 14 --keep 1 --resume auto", FID) == 0
    assert kept(run) == [14]
    assert (run / "best").resolve() == saved(run, 14).resolve()


def test_best_that_lies_after_the_step_of_a_resume_is_forgotten(
    scripted: Callable[[Sequence[float]], None], tmp_path: Path
) -> None:
    scripted([5.0, 4.0, 3.0])
    assert train(tmp_path, "--steps 6 --keep 0", FID) == 0
    run = tmp_path / NAME
    saved(run, 2).unlink()
    scripted([7.0])
    assert train(tmp_path, f"--steps 6 --keep 0 --resume {saved(run, 4)}", FID) == 0
    assert json.loads((run / "best.json").read_text()) == {"metric": "fid", "step": 4, "value": 4.0}
    RunDir(run).rewind(3)
    assert not [*run.glob("best*"), *run.glob("checkpoint*")]
    assert [row["step"] for row in rows(run, "metric-fid.jsonl")] == [2]


def test_link_that_a_crash_lost_is_made_again(scripted: Callable[[Sequence[float]], None], tmp_path: Path) -> None:
    scripted([5.0, 3.0, 4.0])
    assert train(tmp_path, "--steps 4", FID) == 0
    run = tmp_path / NAME
    (run / "best").unlink()
    (run / "best.json").unlink()
    assert train(tmp_path, "--steps 6 --keep 1 --resume auto", FID) == 0
    assert json.loads((run / "best.json").read_text())["step"] == 4
    assert kept(run) == [4, 6]


def test_crash_before_the_best_checkpoint_is_written(
    scripted: Callable[[Sequence[float]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, state: dict[str, Any]) -> None:
        if state["step"] == 6:
            raise KeyboardInterrupt
        write(path, state)

    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", crash)
    scripted([5.0, 4.0, 3.0])
    assert train(tmp_path, "--steps 8 --keep 1", FID) != 0
    run = tmp_path / NAME
    assert kept(run) == [4]
    monkeypatch.setattr(checkpoint, "save", write)
    scripted([6.0, 7.0])
    assert train(tmp_path, "--steps 8 --keep 1 --resume auto", FID) == 0
    assert kept(run) == [4, 8]
    assert json.loads((run / "best.json").read_text()) == {"metric": "fid", "step": 4, "value": 4.0}
    assert (run / "best").resolve() == saved(run, 4).resolve()


def test_early_end(scripted: Callable[[Sequence[float]], None], tmp_path: Path, capsys: Capture) -> None:
    scripted([5.0, 4.0, 6.0, 4.5, 7.0, 8.0])
    assert train(tmp_path, "--steps 50 --stop-after 3", FID) == 0
    run = tmp_path / NAME
    want = "ended after step 10, all saved: fid is no better in 3 looks than 4 after step 4"
    assert capsys.readouterr().out.splitlines()[-1] == want
    assert kept(run) == [4, 10]  # the newest two, one of which is the best
    assert (run / "fakes000010.png").is_file()
    # the looks before a resume count
    assert train(tmp_path, "--steps 50 --stop-after 4 --resume auto", FID) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "ended after step 12, all saved: fid is no better in 4 looks than 4 after step 4"
    )
    # the last step is an end of its own
    scripted([9.0])
    assert train(tmp_path, "--steps 13 --stop-after 4 --resume auto", FID) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("finished 13 steps")


def test_looks_beyond_the_budget_are_left_out(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> dict[str, float]:
        time.sleep(0.3)
        return {"value": 1.0}

    monkeypatch.setattr(quality, "measure", slow)
    assert train(tmp_path, "--steps 10 --metrics fid --metric-every 2 --metric-samples 20 --metric-budget 0.2") == 0
    out = capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / NAME, "metric-fid.jsonl")] == [2, 10]  # ten steps take a few milliseconds
    assert out.count("step 4: no metrics here, nor wherever else they would take over 20% of the training time") == 1
    assert "no metrics here" not in out.split("step 4", 1)[1].split("\n", 1)[1]
    told = re.search(r"metrics: fid 1; 2 looks, (\S+) s, (\S+)% of the training time, 3 more left out by --metric-budget 0.2", out)
    assert told is not None
    seconds, share = map(float, told.groups())
    log = [json.loads(line) for line in (tmp_path / NAME / "log.jsonl").read_text().splitlines()]
    assert log[-1]["time_s"] < 0.3 < 0.6 <= seconds  # the looks are no time of training
    assert share / 100 == pytest.approx(seconds / log[-1]["time_s"], rel=0.5)
    row = json.loads((tmp_path / NAME / "metric-fid.jsonl").read_text().splitlines()[0])
    assert 0.3 <= row["seconds"] < 0.6


def test_events_and_the_progress_line(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("gankern.cli.progress.QUIET_S", 0.0)
    flags = "--metrics fid,1nn --metric-every 4 --metric-samples 30 --metric-budget 0"
    assert train(tmp_path, "--steps 10", flags) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    fid = rows(tmp_path / NAME, "metric-fid.jsonl")
    assert f" fid {fid[0]['value']:.4g} 1nn " in lines[0]  # of step 4, at step 5
    assert f" fid {fid[1]['value']:.4g} 1nn " in lines[1]  # of step 8, at step 10
    events = EventAccumulator(str(tmp_path / NAME)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("metric/fid")] == [(r["step"], pytest.approx(r["value"])) for r in fid]
    assert len(events.Scalars("metric/1nn_fake")) == len(events.Scalars("metric/share_of_training_time")) == 3


# --- refusals


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--metrics fid,fod", r"--metrics must be names of fid, kid, 1nn, .* with commas between, got 'fod'"),
        ("--metrics fid,fid", "--metrics must name each metric once, got 'fid,fid'"),
        ("--metrics fid --metric-every 0", "--metric-every must be >= 1 with --metrics, got 0"),
        ("--metrics fid --metric-samples 9", "--metric-samples must be a finite number >= 10, got 9"),
        ("--metrics fid --keep-best kid", r"--keep-best must be one of --metrics \(fid\), got 'kid'"),
        ("--keep-best kid", r"--keep-best must be one of --metrics \(nothing\), got 'kid'"),
        ("--metrics fid --stop-after 3", "--stop-after must be left out without --keep-best, got 3"),
        ("--metric-every 7", "--metric-every must be left out without --metrics, got 7"),
        ("--metrics fid,is", "--metrics must leave out is for ring: its classes are digits, got fid,is"),
        (
            "--metrics modes --data swissroll",
            "--metrics must leave out modes for swissroll, whose modes are not known, got modes",
        ),
        ("--metrics modes --data stacked-mnist --channels 1", "--metrics must leave out modes for stacked-mnist, .*"),
        (
            "--metrics fid --limit 8 --batch-size 4",
            "--metrics must be left out for data of fewer than 10 samples, got 8 samples",
        ),
    ],
)
def test_refused_in_one_sentence(flags: str, sentence: str, tmp_path: Path, capsys: Capture) -> None:
    assert train(tmp_path / "runs", "--steps 4", flags) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"gankern-train: {sentence}( \(see gankern-train gan --help\))?\n", err), err
    assert not (tmp_path / "runs").exists()


def test_samples_that_are_all_the_same_are_refused(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "same.npy", np.zeros((30, 6, 6), np.uint8))
    assert train(tmp_path / "runs", "--metrics fid --data", str(tmp_path / "same.npy"), "--limit 0") == 2
    assert "metrics must be left out for samples that are all the same, got fid" in capsys.readouterr().err


def test_wasserstein_without_scipy_is_refused(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    find = quality.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "scipy" else find(name, *rest))
    assert train(tmp_path / "runs", "--metrics wasserstein") == 2
    assert 'scipy must be installed for wasserstein, got none (pip install "gankern[metrics]")' in capsys.readouterr().err
