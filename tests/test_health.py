"""The health of a run: what is measured, what is said of it, and the way back after a divergence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern import data
from gankern.cli import train
from gankern.cli.main import train_main
from gankern.cli.train import parse
from gankern.data import Dataset
from gankern.metrics import load_digit_classifier, nearest_neighbour_test
from gankern.training import PRESETS, Trainer, checkpoint
from gankern.training.critics import WithTerm
from gankern.training.first_bad import first_bad
from gankern.training.graph import Graph
from gankern.training.health import CHECKS, QUIET, Monitor, advice
from gankern.training.vitals import COUNT, Examiner, Vitals
from tests import small
from tests.replay import record

pytestmark = pytest.mark.usefixtures("steady")
Capture = pytest.CaptureFixture[str]
CONFIG = PRESETS["gan"].config
RING = PRESETS["unrolled"].config


# --- what is measured


@pytest.mark.parametrize(
    "preset",
    [
        "gan",
        "dcgan",
        "wgan-gp",
        "sngan",
        "cgan",
        "acgan",
        "ebgan",
        "gmmn",
        "mmd-gan",
        "unrolled",
        "improved",
        "ctgan-like",
        "vae-gan",
    ],
)
def test_looks_leave_the_training_as_it_is(preset: str) -> None:
    """Bit for bit: weights, buffers, optimisers, random numbers, and the modes of all layers."""
    settings = small.config(preset, seed=3)
    states = []
    for looks in (False, True):
        trainer, batches = small.trainer(settings), small.batches(settings)
        examiner = Examiner(trainer, small.images(settings), small.classes(settings)) if looks else None
        modes = {name: m.training for name, m in trainer.discriminator.named_modules()}
        for _ in range(3):
            real, labels = batches.with_labels()
            trainer.step(*((real, labels) if small.classes(settings) else (real,)))
            if examiner is not None:
                vitals = examiner.look()
                assert vitals is not None
                assert (vitals.ranked is None) == (settings.loss in ("mmd", "mmd-gan"))
        assert {name: m.training for name, m in trainer.discriminator.named_modules()} == modes
        states.append(small.state(trainer) | {"default": torch.get_rng_state()})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) if isinstance(value, Tensor) else value == states[1][key], key


class Given(nn.Module):
    """A generator of given samples."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.samples, self.weight = samples, nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.samples[: len(z)]


class First(nn.Module):
    """A critic whose score is a sample's first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, 0] + self.weight


def examiner_of(dataset: Dataset, samples: Tensor, **settings: Any) -> Examiner:
    return Examiner(Trainer(Given(samples), First(), dataclasses.replace(CONFIG, **settings)), dataset)


def test_vitals_of_points_by_hand() -> None:
    real = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])  # distances 5, 5, 10
    fake = torch.tensor([[1.0, 0.0], [4.0, 0.0], [1.0, 0.0]])  # 3, 0, 3
    examiner = examiner_of(Dataset(real), fake)
    examiner.trainer.opt_g.parameters[0].grad = torch.tensor(-0.5)
    rows = [{"d_real": 0.7, "d_fake": 0.2, "d_loss": 1.0}, {"d_real": 0.9, "d_fake": 0.2, "d_loss": 3.0}]
    first = examiner.look(rows)
    assert first is not None
    scale = 20 / 3
    assert first.spread == pytest.approx(2 / scale)
    assert first.ranked == pytest.approx((0 + 2 + 3) / 9)  # 0 > none; 3 > 1, 1; 6 > 1, 4, 1
    assert (first.gradient, first.gap, first.swing) == pytest.approx((0.5, 0.6, 2**0.5))
    assert (first.moved, first.shift, first.turn, first.shares) == (None,) * 4
    examiner.trainer.generator.samples = fake + torch.tensor([0.0, 10.0])
    second = examiner.look()
    assert second is not None
    assert (second.moved, second.shift, second.turn) == (pytest.approx(10 / scale), pytest.approx(10 / scale), None)
    assert second.spread == pytest.approx(first.spread)
    examiner.trainer.generator.samples = fake
    third = examiner.look()
    assert third is not None
    assert (third.shift, third.turn) == pytest.approx((10 / scale, 0.0))
    test = nearest_neighbour_test(real=real, fake=fake)
    assert (third.nn_real, third.nn_fake) == (test.real, test.fake)


def test_samples_that_are_not_finite_have_no_vitals() -> None:
    assert examiner_of(Dataset(torch.eye(3)), torch.tensor([[0.0, 1.0, torch.nan]] * 3)).look() is None


def test_modes_and_digits_are_counted() -> None:
    ring = data.load("ring", seed=0)
    assert ring.mixture is not None
    vitals = examiner_of(ring, ring.mixture.centres[torch.arange(COUNT) % 2], data="ring").look()
    assert vitals is not None
    assert vitals.shares == (0.5, 0.5, 0, 0, 0, 0, 0, 0)
    assert vitals.sure == 1.0
    digits = data.load("mnist", limit=2500)
    assert digits.labels is not None
    ones = digits.samples[digits.labels == 1][:COUNT].float() / 127.5 - 1
    vitals = examiner_of(digits, ones).look()
    assert vitals is not None
    assert vitals.shares is not None
    assert vitals.shares[1] > 0.97
    assert (vitals.sure or 0) > 0.95
    assert vitals.nn_real < 0.97  # they lie among the data
    monitor = Monitor(CONFIG)
    signs = [sign for i in range(4) for sign in monitor.look(vitals._replace(step=i + 1))]
    assert [sign.kind for sign in signs] == ["collapse"]
    assert signs[0].saw.startswith("mode collapse: the samples are of about 1.")
    assert signs[0].saw.endswith(" of 10 digits")


def test_other_pictures_of_that_size_are_no_digits() -> None:
    noise = torch.randint(0, 256, (COUNT, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    vitals = examiner_of(Dataset(noise), torch.zeros(COUNT, 1, 28, 28)).look()
    assert vitals is not None
    assert vitals.shares is None


# --- what is said


def looks(config: Any, **columns: Any) -> list[list[str]]:
    """The kinds that begin at each look; a column is a list, or one value for all looks."""
    count = max(len(c) for c in columns.values() if isinstance(c, list))
    plain = {"spread": 1.0, "nn_real": 0.9, "nn_fake": 0.9, "ranked": 0.9, "moved": 0.3, "gradient": 1.0}
    monitor, found = Monitor(config), []
    for i in range(count):
        row = {k: c[i] if isinstance(c, list) else c for k, c in (plain | columns).items()}
        found.append([sign.kind for sign in monitor.look(Vitals(step=i + 1, **row))])
    return found


EVEN, ONE = (0.125,) * 8, (1.0, *[0.0] * 7)
CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "critic wins, with smooth labels": (CONFIG, {"ranked": 1.0, "gap": [0.899] * 3}, ["", "", "critic"]),
    "critic nearly wins": (CONFIG, {"ranked": 1.0, "gap": [0.88] * 5}, [""] * 5),
    "critic wins now and then": (CONFIG, {"ranked": [1.0, 1.0, 0.99, 1.0, 1.0], "gap": 0.9}, [""] * 5),
    "wgan: always right is no fault": (PRESETS["wgan-gp"].config, {"ranked": 1.0, "gap": [1.0] * 5}, [""] * 5),
    "wgan: always right, and no way on": (
        PRESETS["wgan-gp"].config,
        {"ranked": 1.0, "moved": [0.01] * 3},
        ["", "", "critic"],
    ),
    "frozen": (CONFIG, {"ranked": 1.0, "moved": [None, 0.0, 0.0], "spread": 0.01}, ["", "", "generator"]),
    "converged": (CONFIG, {"ranked": 0.5, "moved": [0.0] * 5, "gradient": [1.0, 0.1, 0.001, 1e-5, 1e-6]}, [""] * 5),
    "gradient fades": (CONFIG, {"ranked": 1.0, "gradient": [1.0, 0.5, 0.049, 0.048]}, ["", "", "", "gradient"]),
    "gradient is nothing for Adam": (CONFIG, {"ranked": 1.0, "gradient": [1e-9] * 2}, ["", "gradient"]),
    "all alike": (CONFIG, {"spread": [0.9, 0.07, 0.06, 0.06]}, ["", "", "", "collapse"]),
    "coming apart": (CONFIG, {"spread": [0.04, 0.05, 0.06, 0.07, 0.078]}, [""] * 5),
    "few modes": (RING, {"shares": [EVEN, ONE, ONE, ONE]}, ["", "", "", "collapse"]),
    "few modes for a moment": (RING, {"shares": [EVEN, ONE, ONE, EVEN, EVEN]}, [""] * 5),
    "classes of what is no digit yet": (CONFIG, {"shares": [ONE] * 4, "sure": 0.9, "nn_real": 1.0}, [""] * 4),
    "one class": (CONFIG, {"shares": [ONE] * 3, "sure": 0.9}, ["", "", "collapse"]),
    "classes that come apart": (CONFIG, {"shares": [ONE] * 4, "sure": 0.9, "spread": [0.3, 0.44, 0.52, 0.56]}, [""] * 4),
    "hops between modes": (
        RING,
        {"shares": [(0.5, 0.5, *[0] * 6), (*[0] * 6, 0.5, 0.5)] * 3},
        ["", "", "collapse", "", "oscillation", ""],
    ),
    "back and forth": (
        CONFIG,
        {"shift": [None, *[0.6] * 5], "turn": [None, None, *[0.0] * 4]},
        [""] * 5 + ["oscillation"],
    ),
    "one way": (CONFIG, {"shift": [None, 0.6, 0.6, 0.6, 0.6, 0.6], "turn": [None, None, 1.2, 1.2, 1.2, 1.2]}, [""] * 6),
    "loss swings": (CONFIG, {"swing": [0.2, 0.3, 1.5, 1.5]}, ["", "", "", "oscillation"]),
    "loss swings once": (CONFIG, {"swing": [0.2, 3.0, 0.2, 3.0]}, [""] * 4),
    "loss without a size of its own swings": (
        PRESETS["wgan-gp"].config,
        {"swing": [2.0, 1.0, 1.0, 1.0, 11.0, 12.0]},
        [""] * 5 + ["oscillation"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_signs(case: str) -> None:
    config, columns, want = CASES[case]
    assert looks(config, **columns) == [[kind] if kind else [] for kind in want]


def test_a_sign_is_told_once_until_it_has_been_away() -> None:
    spread = [0.01] * 6 + [1.0] * QUIET + [0.01] * 3 + [1.0] + [0.01] * 4
    begun = [i for i, kinds in enumerate(looks(CONFIG, spread=spread), 1) if kinds]
    assert begun == [3, 6 + QUIET + 3]


def test_looks_that_were_taken_back_are_forgotten() -> None:
    """A sign that began before is no news after it; one that began later is told again."""
    monitor = Monitor(CONFIG)
    told = [
        (step, sign.kind)
        for step, spread in ((1, 0.01), (2, 0.01), (3, 0.01), (4, 0.01), (3, 0.01), (4, 0.01), (2, 0.01), (3, 0.01))
        for sign in monitor.look(Vitals(step, spread, 1.0, 1.0))
    ]
    assert told == [(3, "collapse"), (3, "collapse"), (3, "collapse")]
    assert [v.step for v in monitor.history] == [1, 2, 3]


@pytest.mark.parametrize("preset", ["gan", "dcgan", "wgan-gp", "cgan", "unrolled", "ebgan"])
def test_advice_is_of_flags_that_go_with_the_run(preset: str) -> None:
    for kind in (*CHECKS, "divergence"):
        words = advice(kind, PRESETS[preset].config)
        assert words.startswith("--")
        for flags in words.split(" or "):
            assert parse(preset, flags.split()) != PRESETS[preset].config


# --- runs that were made to fail, and healthy ones


def go(out: Path, preset: str, *flags: str) -> tuple[int, Path]:
    quiet = ["--sample-every", "0", "--checkpoint-every", "0", "--log-every", "10", "--device", "cpu", "--outdir", str(out)]
    status = train_main([preset, *quiet, *flags])
    return status, max(out.iterdir())


def rows(run: Path, name: str = "health.jsonl") -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


SMALL = ("--g-widths", "64", "128", "--d-widths", "128", "64", "--batch-size", "32", "--limit", "2000")
CONV = ("--conv-width", "6", "--batch-size", "16", "--limit", "2000")
FAILING = {
    "critic": ("dcgan", "--conv-width", "8", "--batch-size", "32", "--steps", "160", "--health-every", "40", "--lr-d", "2e-2"),
    "generator": ("gan", *SMALL, "--steps", "120", "--health-every", "40", "--lr-g", "0"),
    "gradient": ("gan-minimax", *SMALL, "--steps", "150", "--health-every", "10", "--lr-g", "1e-7", "--lr-d", "2e-3"),
}
HEALTHY = {
    "gan": (*SMALL, "--steps", "200"),
    "dcgan": (*CONV, "--steps", "200"),
    "lsgan": (*CONV, "--steps", "200"),
    "wgan-gp": (*SMALL, "--steps", "150"),
    "unrolled": ("--steps", "600", "--unroll", "0", "--pack", "2", "--batch-size", "128"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_failing_runs_are_told(kind: str, tmp_path: Path, capsys: Capture) -> None:
    status, run = go(tmp_path, *FAILING[kind])
    assert status == 0
    told = [row for row in rows(run) if row["kind"] == kind]
    assert len(told) == 1
    assert told[0].keys() == {"step", "kind", "saw", "try"}
    assert f"step {told[0]['step']}: {told[0]['saw']}; try {told[0]['try']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("preset", HEALTHY)
def test_healthy_runs_are_left_in_peace(preset: str, tmp_path: Path) -> None:
    _, run = go(tmp_path, preset, *HEALTHY[preset], "--health-every", "50")
    assert rows(run) == []
    assert len(rows(run, "vitals.jsonl")) == int(HEALTHY[preset][HEALTHY[preset].index("--steps") + 1]) // 50


def test_ring_without_packing_is_told_once_even_if_it_is_resumed(tmp_path: Path) -> None:
    """Three looks before the break, three after it: the sign that lasts is no news."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--unroll", "0", "--health-every", "100", "--batch-size", "128"]
    _, run = go(tmp_path, "unrolled", *flags, "--steps", "300")
    (first,) = rows(run)
    assert (first["step"], first["kind"]) == (300, "collapse")
    with (run / "vitals.jsonl").open("a") as file:  # of a run that was killed later than its last checkpoint
        file.write('{"step": 301, "spread": 1.0, "nn_real": 1.0, "nn_fake": 1.0}\n{"step"')
    assert go(tmp_path, "unrolled", *flags, "--steps", "600", "--resume", str(run))[0] == 0
    assert [row["step"] for row in rows(run) if row["kind"] == "collapse"] == [300]
    assert [row["step"] for row in rows(run, "vitals.jsonl")] == [100, 200, 300, 400, 500, 600]
    events = EventAccumulator(str(run)).Reload()
    assert "health/collapse/text_summary" in events.Tags()["tensors"]
    assert "health/spread" in events.Tags()["scalars"]


def test_weights_are_the_same_with_and_without_looks(tmp_path: Path) -> None:
    """Off, on, and in a run too short for a look; the digits' classifier is loaded anew."""
    load_digit_classifier.cache_clear()
    states = []
    for every in (0, 2, 5):
        _, run = go(tmp_path, "gan", *SMALL, "--steps", "4", "--health-every", str(every))
        assert (run / "vitals.jsonl").exists() == (every == 2)
        states.append({key: value for key, value in state(run, 4).items() if not key.startswith("watch.")})
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_data_that_are_all_the_same_are_not_looked_at(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "same.npz", images=np.full((40, 6, 6), 7, dtype=np.uint8))
    status, run = go(
        tmp_path / "runs", "gan", "--data", str(tmp_path / "same.npz"), "--batch-size", "8", "--health-every", "1", "--steps", "2"
    )
    assert status == 0
    assert not (run / "vitals.jsonl").exists()


# --- divergence

TINY = ("--data", "grid", "--g-widths", "8", "--d-widths", "8", "--z-dim", "3", "--batch-size", "50", "--d-dropout", "0.3")
TINY = (*TINY, "--steps", "20", "--health-every", "5", "--keep", "0")


def poison(monkeypatch: pytest.MonkeyPatch, times: int, done: int = 7) -> None:
    """A gradient that is not a number, in the step after `done`, the first so many times that it is made."""
    begin, left = Trainer.__init__, [times]

    def begin_with_hook(self: Trainer, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)

        def spoil(gradient: Tensor) -> Tensor:
            if self.steps_done != done or not left[0]:
                return gradient
            left[0] -= 1
            return torch.cat([gradient[:1] * torch.nan, gradient[1:]])

        self.opt_g.parameters[2].register_hook(spoil)

    monkeypatch.setattr(Trainer, "__init__", begin_with_hook)


def divergences(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row["kind"] == "divergence"]


def state(run: Path, step: int) -> dict[str, Any]:
    return checkpoint.load(run / f"checkpoint-{step:06d}.safetensors")


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key], key


def test_divergence_goes_back_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Met once in the run, and once when its steps are made again to find the cause."""
    _, clean = go(tmp_path, "gan", *TINY, "--checkpoint-every", "5")
    poison(monkeypatch, 2)
    status, run = go(tmp_path, "gan", *TINY, "--checkpoint-every", "5", "--log-every", "1")
    assert status == 0
    (told,) = divergences(run)
    assert told["step"] == 5
    assert "first of all the gradient of generator.1.weight has " in told["saw"]
    assert "entries that are not finite, at step 8; back to step 5 with other noise, 1 of 3 times" in told["saw"]
    assert "--clip-gradients 1" in told["try"]
    assert [row["step"] for row in rows(run, "log.jsonl")] == list(range(1, 21))
    assert [row["step"] for row in rows(run, "vitals.jsonl")] == [5, 10, 15, 20]
    assert_same(state(run, 5), state(clean, 5))
    later = state(run, 10)
    assert all(v.isfinite().all() for v in later.values() if isinstance(v, Tensor) and v.is_floating_point())
    assert not torch.equal(later["rng.noise"], state(clean, 10)["rng.noise"])
    capsys.readouterr()


def test_rollbacks_are_counted_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time draws other noise than the first one would."""
    found = []
    for breaks in (["20"], ["10", "20"]):
        out, more = tmp_path / breaks[0], ["--resume", "auto", "--no-report", "--checkpoint-every", "5"]
        with monkeypatch.context() as patch:
            poison(patch, 2)
            poison(patch, 2, done=12)
            for steps in breaks:
                status, run = go(out, "gan", *TINY, *more, "--steps", steps)
                assert status == 0
        assert [row["saw"].endswith(f"{i + 1} of 3 times") for i, row in enumerate(divergences(run))] == [True, True]
        found.append((state(run, 20), divergences(run), rows(run, "vitals.jsonl")))
    assert_same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_divergence_that_comes_back_ends_with_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    _, clean = go(tmp_path, "gan", *TINY, "--checkpoint-every", "5")
    poison(monkeypatch, 100)
    status, run = go(tmp_path, "gan", *TINY, "--rollbacks", "2", "--log-every", "3")
    assert status == 1
    err = capsys.readouterr().err
    assert err.startswith("gankern-train: training diverged: ")
    assert err.endswith("the log stops before it\n")
    assert len(divergences(run)) == 3
    assert divergences(run)[-1]["saw"].endswith("; it has gone back 2 times")
    assert [row["step"] for row in rows(run, "log.jsonl")] == [3]
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-000005.safetensors"]
    assert_same(state(run, 5), state(clean, 5))
    monkeypatch.undo()
    assert go(tmp_path, "gan", *TINY, "--resume", str(run))[0] == 0


def test_what_is_not_met_again_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1)
    status, run = go(tmp_path, "gan", *TINY)
    assert status == 0
    assert "made once more, these steps were all finite; back to step 5" in divergences(run)[0]["saw"]


def test_weights_that_broke_in_the_last_step_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of step 10 are finite, what its update leaves behind is not."""
    poison(monkeypatch, 2, done=9)
    status, run = go(tmp_path, "gan", *TINY, "--checkpoint-every", "10")
    assert status == 0
    (told,) = divergences(run)
    assert told["saw"].startswith(
        "training diverged: generator.1.weight is not finite after step 10; first of all the gradient of "
    )
    assert all(v.isfinite().all() for v in state(run, 10).values() if isinstance(v, Tensor) and v.is_floating_point())


def test_graph_engine_goes_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is spoiled between two replays; the ring of losses, which the graph writes, begins anew."""
    plain, left = Graph.step, [1]

    def step(self: Graph, batch: tuple[Tensor, ...] | None = None, most: int = 1) -> dict[str, Tensor]:
        out = plain(self, batch, most)
        if self.trainer.steps_done == 8 and left[0]:
            left[0] -= 1
            self.trainer.opt_g.parameters[2].detach().view(-1)[0] = torch.nan
        return out

    monkeypatch.setattr(Graph, "step", step)
    monkeypatch.setattr(train, "make", lambda name, trainer, batches: Graph(trainer, batches, capture=record))
    status, run = go(tmp_path, "gan", *TINY, "--log-every", "1")
    assert status == 0
    assert [row["step"] for row in divergences(run)] == [5]
    assert [row["step"] for row in rows(run, "log.jsonl")] == list(range(1, 21))
    assert all(v.isfinite().all() for v in state(run, 20).values() if isinstance(v, Tensor) and v.is_floating_point())
    gradients = [row["gradient"] for row in rows(run, "vitals.jsonl")]
    assert len(set(gradients)) == len(gradients) == 4


def test_no_rollbacks_stop_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1)
    status, run = go(tmp_path, "gan", *TINY, "--rollbacks", "0")
    assert status == 1
    assert divergences(run) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("real", "the batch of real samples has 1 of 216 entries that are not finite"),
        ("penalty", "the penalty term of the discriminator's loss is nan"),
        ("term", "the feature_matching term of the generator's loss is nan"),
        ("sum", "a term added to the discriminator's loss is nan"),
        ("weight", "discriminator.0.weight after its update has 1 of "),
        ("nothing", ""),
    ],
)
def test_the_first_bad_tensor_has_its_name(spoil: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small.config("gan", penalty="gp", historical_averaging=0.1, feature_matching=0.1)
    trainer, real = small.trainer(settings), next(small.batches(settings))
    if spoil == "real":
        real[0, 0, 0, 0] = torch.inf
    ask, bad = trainer.critic.discriminator, torch.tensor(torch.nan, requires_grad=True)
    if spoil == "penalty":

        def penalised(*samples: Tensor) -> Any:
            out: Any = ask(*samples)
            out.penalty.fill_(torch.nan)
            return out

        monkeypatch.setattr(trainer.critic, "discriminator", penalised)
    if spoil == "sum":
        monkeypatch.setattr(trainer.critic, "discriminator", lambda *samples: WithTerm(ask(*samples), bad))
    if spoil == "term":
        monkeypatch.setattr(trainer.techniques["feature_matching"], "term", lambda *_: bad)
    if spoil == "weight":
        apply = trainer.opt_d.apply

        def broken(parameters: Any, *rest: Any) -> None:
            apply(parameters, *rest)
            parameters[0].detach().view(-1)[3] = torch.nan

        monkeypatch.setattr(trainer.opt_d, "apply", broken)
    found = first_bad(trainer, real)
    assert found.startswith(words)
    assert bool(found) == bool(words)
    assert trainer.steps_done == 1
    assert "update" not in vars(trainer)
