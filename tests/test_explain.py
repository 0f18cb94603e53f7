"""gankern explain, and the table behind it: every stated number is computed here from the objective itself."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
import torch

import gankern
from gankern.cli.explain import Reader
from gankern.cli.main import main
from gankern.losses import GANLoss
from gankern.losses.explanations import EXPLANATIONS, Value, expected
from gankern.ops._objectives import OBJECTIVES
from gankern.training import TrainConfig, pictures

Capture = pytest.CaptureFixture[str]
FREE = {"wgan", *(name for name, row in OBJECTIVES.items() if row.relative != "no")}  # where any constant logit is a best one


def test_every_loss_is_explained() -> None:
    assert set(EXPLANATIONS) == set(typing.get_args(typing.get_type_hints(TrainConfig)["loss"]))


def best_logit(objective: str, **labels: float) -> float:
    """The constant logit at which the critic's gradient vanishes, by bisection; the gradient rises with it."""
    low, high = -20.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        w = torch.tensor(middle, dtype=torch.float64, requires_grad=True)
        gankern.gan_loss(w.expand(4), n_real=2, objective=objective, **labels).backward()
        assert w.grad is not None
        low, high = (middle, high) if w.grad < 0 else (low, middle)
    return middle


def numbers(objective: str, logit: float, **labels: float) -> dict[str, float]:
    a = torch.full((4,), logit, dtype=torch.float64)
    loss = GANLoss(objective, **labels)
    critic, generator = loss.discriminator(a, a), loss.generator(a, a)
    values = {"d_loss": critic.value, "g_loss": generator.value, "d_real": critic.d_real, "d_fake": critic.d_fake}
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stated_numbers_are_those_of_the_best_critic(objective: str) -> None:
    row = EXPLANATIONS[objective]
    logits = [-2.0, 0.0, 3.0] if objective in FREE else [-0.9, 0.0, 0.9] if objective == "hinge" else [best_logit(objective)]
    found = [numbers(objective, logit) for logit in logits]
    for name in found[0]:
        value: Value = getattr(row, name)
        got = [f[name] for f in found]
        if value.number is None:
            assert max(got) - min(got) > 0.2, f"{name} has the fixed value {got[0]}"
        else:
            assert got == pytest.approx([value.number] * len(got), abs=1e-9), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_words_of_a_number_give_the_number(objective: str) -> None:
    names = {"log": math.log, "sigmoid": lambda a: 1 / (1 + math.exp(-a))}
    for value in EXPLANATIONS[objective]:
        if isinstance(value, Value) and value.number is not None and value.words:
            formula = re.sub(r"log 2", "log(2)", re.sub(r"^2 log", "2*log", value.words))
            assert eval(formula, names) == pytest.approx(value.number, abs=1e-15)


@pytest.mark.parametrize(
    "objective", ["non-saturating", "minimax", "maximum-likelihood", "lsgan", "lsgan-pearson", "fgan-jensen-shannon"]
)
def test_smoothed_labels_move_the_values(objective: str) -> None:
    labels = {"real_label": 0.9, "fake_label": 0.2}
    logit = best_logit(objective, **labels)
    got = {name: value.number for name, value in expected(objective, **labels).items()}
    assert got == pytest.approx(numbers(objective, logit, **labels), abs=1e-7)
    assert got["d_loss"] != pytest.approx(EXPLANATIONS[objective].d_loss.number, abs=1e-3)


def test_relativistic_values_know_no_labels() -> None:
    smooth = numbers("relativistic-average", 0.7, real_label=0.9)
    assert smooth["d_loss"] == pytest.approx(expected("relativistic-average", 0.9)["d_loss"].number)


def test_signs_of_relativistic_losses_are_no_single_logits() -> None:
    for name, row in OBJECTIVES.items():
        assert row.relative == "no" or not any("D(x)" in words for words in EXPLANATIONS[name].failures), name


def test_ebgan_pays_the_margin_whatever_energy_all_samples_have() -> None:
    for energy in torch.linspace(0.1, 2.9, 5, dtype=torch.float64):
        e = energy.clone().requires_grad_()
        loss = e + (3.0 - e).clamp_min(0)
        loss.backward()
        assert e.grad == 0
        assert loss.item() == pytest.approx(expected("ebgan", margin=3.0)["d_loss"].number)


@pytest.mark.parametrize("size", [8, 64])
def test_mmd_of_one_law_is_biased_as_stated(size: int) -> None:
    """(2 / B) (K - mean k): the mean of many estimates, and mean k from pairs of independent samples."""
    draws = torch.Generator().manual_seed(0)
    sigmas = (0.5, 1.0, 2.0)
    x, y = (torch.randn(400, size, 2, generator=draws, dtype=torch.float64) for _ in range(2))
    got = torch.stack([gankern.mmd2(a, b, sigmas) for a, b in zip(x, y, strict=True)]).mean()
    d = (x - y).square().sum(2)
    mean_k = sum(torch.exp(-d / (2 * s * s)).mean() for s in sigmas)
    assert got.item() == pytest.approx(2 / size * (3 - float(mean_k)), rel=0.05)


def test_flags_in_the_texts_are_flags_of_a_run() -> None:
    fields = {f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    for name, row in EXPLANATIONS.items():
        words = " ".join([row.critic, row.generator, row.sign, row.symbols, *row.failures])
        assert set(re.findall(r"--([a-z][a-z0-9-]*)", words)) <= fields, name
        for loss in re.findall(r"--loss ([a-z-]+)", words):
            assert loss in EXPLANATIONS
        if "--label-smoothing 0.9" in words:
            TrainConfig(loss=typing.cast(typing.Any, name), label_smoothing=0.9)


# --- the command


@pytest.mark.parametrize("loss", EXPLANATIONS)
def test_explain(loss: str, capsys: Capture) -> None:
    assert main(["explain", loss]) == 0
    out, row = capsys.readouterr().out, EXPLANATIONS[loss]
    flat = " ".join(out.split())
    for words in (row.critic, row.generator, row.source, row.sign, row.symbols, *row.failures, str(row.d_loss), str(row.g_loss)):
        assert " ".join(words.split()) in flat
    assert max(map(len, out.splitlines())) <= 110


def test_explain_lists_the_losses(capsys: Capture) -> None:
    assert main(["explain"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPLANATIONS)


def test_explain_refuses_an_unknown_loss(capsys: Capture) -> None:
    assert main(["explain", "gun"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gankern explain: loss must be one of non-saturating, minimax")
    assert said.endswith("got 'gun'\n")
    assert main(["explain", "gan-minimax"]) == 2
    assert capsys.readouterr().err.endswith("got 'gan-minimax', a preset, whose loss is minimax\n")


# --- the log in words

ROW = {"d_loss": 1.31, "g_loss": 0.7512, "d_real": 0.6, "d_fake": 0.4}


@pytest.mark.parametrize(
    ("settings", "losses", "scores"),
    [
        ({}, "d_loss 1.310 (1.386 = 2 log 2 when the critic cannot tell), g_loss 0.751 (0.6931 = log 2)", ["D(x)", "D(G(z))"]),
        ({"label_smoothing": 0.9}, "d_loss 1.310 (1.376 when the critic cannot tell), g_loss 0.751 (0.7985)", ["D(x)", "D(G(z))"]),
        (
            {"loss": "wgan", "penalty": "gp"},
            "d_loss 1.310 (0 plus the penalty when the critic cannot tell), "
            "g_loss 0.751 (no fixed value: logits have any offset)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"label_noise": 0.1, "generator_loss": "matching"},
            "d_loss 1.310 (no fixed value: the labels are drawn), "
            "g_loss 0.751 (0 = features of the same mean)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"arch": "acgan"},
            "d_loss 1.310 (1.386 = 2 log 2 plus the classes' cross entropy when the critic cannot tell), "
            "g_loss 0.751 (0.6931 = log 2 plus the classes' cross entropy)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"arch": "pacgan-toy", "feature_matching": 1.0, "reconstruction": 2.0},
            "d_loss 1.310 (1.386 = 2 log 2 when the critic cannot tell), "
            "g_loss 0.751 (0.6931 = log 2 plus the features' distance plus the reconstruction's error)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"loss": "ebgan", "margin": 2.0},
            "d_loss 1.310 (2 = the margin when the critic cannot tell), g_loss 0.751 (the energy, plus the pulling-away term)",
            ["E(x)", "E(G(z))"],
        ),
        (
            {"generator_loss": "saturating"},
            "d_loss 1.310 (1.386 = 2 log 2 when the critic cannot tell), g_loss 0.751 (-0.6931 = -log 2)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"generator_loss": "saturating", "unroll": 5, "arch": "acgan"},
            "d_loss 1.310 (1.386 = 2 log 2 plus the classes' cross entropy when the critic cannot tell), "
            "g_loss 0.751 (-0.6931 = -log 2 plus the classes' cross entropy)",
            ["D(x)", "D(G(z))"],
        ),
        (
            {"generator_loss": "saturating", "unroll": 5},
            "d_loss 1.310 (1.386 = 2 log 2 when the critic cannot tell), "
            "g_loss 0.751 (-1.386 = minus the critic's, after its updates)",
            ["D(x)", "D(G(z))"],
        ),
    ],
)  # fmt: skip
def test_a_row_of_the_log_in_words(settings: dict[str, typing.Any], losses: str, scores: list[str]) -> None:
    reader = Reader(TrainConfig(**settings))
    assert reader.losses(ROW) == losses
    assert reader.scores(ROW) == list(zip(scores, (0.6, 0.4), strict=True))


def test_without_a_critic_its_columns_are_left_out() -> None:
    reader = Reader(TrainConfig(loss="mmd"))
    assert reader.losses(ROW).startswith("g_loss 0.751 (close to 0: ")
    assert reader.scores(ROW) == []


@pytest.mark.parametrize("scores", [("D(x)", "D(G(z))"), ("E(x)", "E(G(z))"), ()])
def test_picture_of_the_losses(scores: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only scores of D lie between 0 and 1; without a critic there is one panel."""
    shown: list[typing.Any] = []
    to_picture = pictures.to_picture
    monkeypatch.setattr(pictures, "to_picture", lambda figure: shown.append(figure) or to_picture(figure))
    rows = [{"step": step, **ROW, "d_real": 3.0 * step} for step in range(1, 5)]
    pictures.plot_losses(tmp_path / "losses.png", rows, "run", scores)
    panels = shown[0].axes
    names = [text.get_text() for axes in panels for text in axes.get_legend().get_texts()]
    assert names == (["discriminator loss", "generator loss", *scores] if scores else ["generator loss"])
    if scores:
        assert (panels[1].get_ylim() == (0.0, 1.0)) == (scores[0] == "D(x)")
    assert (tmp_path / "losses.png").is_file()
    pictures.plot_losses(tmp_path / "losses.png", rows[:1], "run", scores)
    assert all(axes.lines[1].get_marker() == "." for axes in shown[1].axes)  # one point would be no line
