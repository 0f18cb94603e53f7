"""The examples run, and a plain one becomes a gankern one by few lines: same losses from the same seed, a short diff."""

from __future__ import annotations

import difflib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern

pytestmark = pytest.mark.usefixtures("steady")
FOLDER = Path(__file__).parent.parent / "examples"
STEPS = 3
# Before and after, and the lines that may differ: removed and added together, imports and the docstring's too.
PAIRS = {
    ("mlp_gan", "mlp_gan_gankern"): 17,
    ("dcgan", "dcgan_gankern"): 17,
    ("cgan", "cgan_gankern"): 17,
    ("wgan_gp", "wgan_gp_gankern"): 17,
    ("wgan_gp", "wgan_gp_one_pass"): 21,
    ("sngan", "sngan_gankern"): 18,
    ("lightning_gan", "lightning_gan_gankern"): 15,
}
SCRIPTS = sorted({name for pair in PAIRS for name in pair})
each_pair = pytest.mark.parametrize(("before", "after"), PAIRS)


def need_lightning(name: str) -> None:
    if name.startswith("lightning") and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install lightning")


def losses(name: str, tmp_path: Path, steps: int = STEPS) -> Tensor:
    """What training the example by `steps` steps returns, [steps, losses]; the picture must have been written."""
    need_lightning(name)
    path = tmp_path / f"{name}.png"
    found = runpy.run_path(str(FOLDER / f"{name}.py"))["train"](steps=steps, batch_size=16, seed=3, out=str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    return torch.tensor(found, dtype=torch.float64)


def test_every_example_is_tested() -> None:
    assert sorted(f.stem for f in FOLDER.glob("*.py")) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_from_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    need_lightning(name)
    picture = tmp_path / "out.png"
    arguments = ["--steps", "1", "--batch-size", "4", "--seed", "1", "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert picture.stat().st_size > 1000
    if not name.startswith("lightning"):
        assert "step 1  " in capsys.readouterr().out


@each_pair
def test_diff_is_short(before: str, after: str) -> None:
    old, new = ((FOLDER / f"{name}.py").read_text().splitlines() for name in (before, after))
    changed = [line for line in difflib.unified_diff(old, new, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= PAIRS[before, after], "\n".join(changed)
    assert max(len(old), len(new)) <= 110


@each_pair
def test_losses_are_the_same(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both draw the same random numbers: dropout's masks and interpolate's eps are gankern's own, so they are replaced."""
    monkeypatch.setattr(nn, "Dropout", without_dropout)
    monkeypatch.setattr(gankern, "gradient_penalty", with_torchs_eps(gankern.gradient_penalty))
    plain, ours = losses(before, tmp_path), losses(after, tmp_path)
    error = (ours - plain).abs() / plain.abs().max()
    assert error[0, 0] <= 5e-6  # the critic's first loss
    assert error.max() <= 2e-3  # Adam's first updates have size 1 even where the gradient is rounding


@pytest.mark.parametrize(("before", "after"), [("cgan", "cgan_gankern"), ("wgan_gp", "wgan_gp_gankern")])
def test_losses_are_alike_with_gankerns_random_numbers(before: str, after: str, tmp_path: Path) -> None:
    plain, ours = losses(before, tmp_path, 8), losses(after, tmp_path, 8)
    torch.testing.assert_close(ours.mean(0), plain.mean(0), rtol=0.1, atol=0.02)


def without_dropout(p: float) -> nn.Module:
    return nn.Identity()


def with_torchs_eps(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(critic: nn.Module, real: Tensor, fake: Tensor, **options: Any) -> Tensor:
        return penalty(critic, real, fake, eps=torch.rand(len(real), device=real.device), **options)

    return wrapped
