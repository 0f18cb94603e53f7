"""The techniques of a step: each against its formula, resumable bit for bit, and refused where it has no meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.training import TrainConfig, Trainer
from tests import small


def spied(settings: TrainConfig) -> tuple[Trainer, list[tuple[Tensor, ...]]]:
    """A trainer, and a list that gets (real, fake, logits of real, logits of fake) of each update of its critic, before it."""
    trainer, seen = small.trainer(settings), []
    ask = trainer.critic.discriminator

    def asked(real: Tensor, fake: Tensor, *labels: Tensor) -> Any:
        with torch.no_grad():
            seen.append((real, fake, *(trainer.discriminator(x, *labels) for x in (real, fake))))
        return ask(real, fake, *labels)

    trainer.critic.discriminator = asked  # type: ignore[method-assign]
    return trainer, seen


def reals(settings: TrainConfig, seed: int = 0) -> Tensor:
    n = settings.batch_size * settings.n_critic
    return torch.rand(n, *small.shape(settings), generator=torch.Generator().manual_seed(seed)) * 2 - 1


PLAIN: dict[str, Any] = {"d_dropout": 0.0, "label_smoothing": 1.0, "ema": 0.0}


@pytest.mark.parametrize("technique", small.TECHNIQUES)
@pytest.mark.parametrize("preset", ["gan", "dcgan"])
def test_resumed_steps_equal_uninterrupted_ones(technique: str, preset: str) -> None:
    settings = small.config(preset, **small.TECHNIQUES[technique])
    whole, first, second = (small.trainer(settings) for _ in range(3))
    batches = [reals(settings, i) for i in range(4)]
    torch.manual_seed(1)
    for x in batches:
        whole.step(x)
    torch.manual_seed(1)
    for x in batches[:2]:
        first.step(x)
    saved = small.state(first)
    torch.manual_seed(2)
    second.load_state_dict(saved)
    for x in batches[2:]:
        second.step(x)
    ends = whole.state_dict(), second.state_dict()
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]) if isinstance(value, Tensor) else value == ends[1][key], key


@pytest.mark.parametrize("technique", small.TECHNIQUES)
def test_technique_changes_the_step(technique: str) -> None:
    plain, other = (small.trainer(small.config("gan", **changes)) for changes in ({}, small.TECHNIQUES[technique]))
    for t in (plain, other):
        torch.manual_seed(1)
        for i in range(3):
            t.step(reals(t.config, i))
    same = [torch.equal(a, b) for a, b in zip(plain.generator.parameters(), other.generator.parameters(), strict=True)]
    assert not all(same)


# --- labels


@pytest.mark.parametrize("preset", ["gan", "dcgan", "ctgan-like"])
def test_drawn_labels_enter_the_loss(preset: str) -> None:
    ranges: dict[str, Any] = {"real_label_range": (0.7, 1.2), "fake_label_range": (0.0, 0.3)}
    loss: dict[str, Any] = {"loss": "non-saturating", "penalty": "none", "d_norm": "none"}
    t, seen = spied(small.config(preset, **{**PLAIN, **loss, **ranges}))
    out = t.step(reals(t.config))
    (_, _, a, b), (real, fake) = seen[0], (t.critic.loss.real_label, t.critic.loss.fake_label)
    assert isinstance(real, Tensor)
    assert isinstance(fake, Tensor)
    assert len(a) == len(real) == t.config.batch_size // t.config.pack
    expected = F.softplus(a) - real * a + F.softplus(b) - fake * b
    torch.testing.assert_close(out["d_loss"], expected.mean())


def test_labels_are_drawn_from_their_ranges_and_swapped() -> None:
    many: dict[str, Any] = {"batch_size": 20000, "d_widths": (2,), "g_widths": (2,)}
    t = small.trainer(small.config("gan", real_label_range=(0.7, 1.2), fake_label_range=(0.0, 0.3), label_noise=0.1, **many))
    x = torch.zeros(20000, *small.shape(t.config))
    t.step(x)
    real, fake = t.critic.loss.real_label, t.critic.loss.fake_label
    for own, (low, high), (a, b) in ((real, (0.7, 1.2), (0.0, 0.3)), (fake, (0.0, 0.3), (0.7, 1.2))):
        inside = own[(own >= low) & (own <= high)]
        assert torch.equal(own[(own < low) | (own > high)].clamp(a, b), own[(own < low) | (own > high)])
        assert abs(len(inside) / len(own) - 0.9) < 0.01
        assert abs(inside.mean() - (low + high) / 2) < 0.005
        assert abs(inside.std() - (high - low) / 12**0.5) < 0.005
    assert not torch.equal(real, (t.step(x), t.critic.loss.real_label)[1])  # anew at each update
    single = small.trainer(small.config("gan", label_noise=0.25, label_smoothing=0.9, fake_label=0.1, **many))
    single.step(x)
    values, counts = single.critic.loss.real_label.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.1, 0.9]))
    assert abs(counts[0] / 20000 - 0.25) < 0.01
    assert "real_label=drawn" in repr(single.critic.loss)


# --- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"real_label_range": (1.2, 0.7)}, "real_label_range must be two numbers, the smaller one first, or nothing"),
        ({"real_label_range": (0.7,)}, "real_label_range must be two numbers"),
        ({"real_label_range": (0.9, 1.2)}, "real_label_range must have its middle in .0, 1. with --loss non-saturating"),
        ({"fake_label_range": (-0.4, 0.3)}, "fake_label_range must have its middle"),
        ({"label_noise": 1.1}, "label_noise must be in .0, 1."),
        ({"loss": "hinge", "real_label_range": (0.9, 1.0)}, "real_label_range must be left out with --loss hinge"),
        ({"loss": "mmd", "label_noise": 0.1}, "label_noise must be 0 with --loss mmd"),
    ],
)
def test_refused_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^train: {words}"):
        TrainConfig(**changes)


def test_settings_at_the_border_are_taken() -> None:
    TrainConfig(loss="lsgan", real_label_range=(1.0, 2.0))
    TrainConfig(loss="hinge", label_noise=0.1)
