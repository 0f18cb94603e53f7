"""Every preset with small networks, and a trainer with its batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gankern.data import Batches, Dataset
from gankern.training import PRESETS, TrainConfig, Trainer
from gankern.training.critics import Critic, choose
from gankern.training.networks import CONDITIONAL, IMAGES
from gankern.training.optimizers import make

CLASSES = 3
WIDTHS: dict[str, Any] = {"z_dim": 5, "g_widths": (8, 10), "d_widths": (9, 7), "conv_width": 4}
BATCH = {"ctgan-like": 20}
# Settings that switch the techniques of a step on, for the preset "gan".
TECHNIQUES: dict[str, dict[str, Any]] = {
    "instance-noise": {"instance_noise": 0.3, "instance_noise_steps": 10},
    "label-ranges": {"real_label_range": (0.7, 1.2), "fake_label_range": (0.0, 0.3)},
    "label-noise": {"label_noise": 0.2},
    "sgd": {"optimizer_d": "sgd", "optimizer_g": "sgd", "momentum": 0.9, "ttur": 2.0},
    "unroll": {"unroll": 2},
    "unroll-minimax": {"unroll": 2, "generator_loss": "saturating"},
    "replay": {"replay": 7},
    "feature-matching": {"feature_matching": 0.5},
    "matching": {"generator_loss": "matching"},
    "log-gradients": {"log_gradients": True},
    "historical-averaging": {"historical_averaging": 0.1},
    "r1r2": {"penalty": "r1r2"},
    "spectral-norm-g": {"spectral_norm_g": True},
    "vae": {"reconstruction": 0.01, "kl": 0.1},
    "vae-features": {"reconstruction": 0.01, "kl": 0.1, "reconstruct": "features"},
    "most": {
        "instance_noise": 0.3, "label_noise": 0.1, "real_label_range": (0.7, 1.2), "replay": 9, "feature_matching": 0.5,
        "historical_averaging": 0.1, "reconstruction": 0.01, "kl": 0.1, "log_gradients": True, "spectral_norm_g": True,
        "penalty": "r1r2", "optimizer_d": "sgd", "optimizer_g": "rmsprop", "clip_weights": 0.5, "clip_gradients": 2.0, "ttur": 2.0,
    },
    "most-unrolled": {
        "unroll": 2, "label_noise": 0.1, "replay": 9, "feature_matching": 0.5, "reconstruction": 0.01, "penalty": "lp",
        "optimizer_d": "rmsprop", "clip_weights": 0.5, "loss": "relativistic-average", "spectral_norm": True,
    },
    "rmsprop": {"optimizer_d": "rmsprop", "optimizer_g": "rmsprop"},
}  # fmt: skip


def config(preset: str, **changes: Any) -> TrainConfig:
    base = PRESETS[preset].config
    return dataclasses.replace(base, **{"batch_size": BATCH.get(preset, 6), **WIDTHS, **changes})


def shape(settings: TrainConfig) -> tuple[int, ...]:
    if settings.arch.endswith("-toy"):
        return (2,)
    side = settings.size or (8 if settings.arch in IMAGES else 6)  # convolutions have no smaller one
    return (1, side, side)


def classes(settings: TrainConfig) -> int:
    return CLASSES if settings.arch in CONDITIONAL else 0


def images(settings: TrainConfig, count: int = 200) -> Dataset:
    """Noise, and classes in turn."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *shape(settings)), generator=generator, dtype=torch.uint8)
    return Dataset(pixels, torch.arange(count) % CLASSES, "noise", tuple(map(str, range(CLASSES))))


def trainer(settings: TrainConfig, device: torch.device | str = "cpu", **options: Any) -> Trainer:
    torch.manual_seed(settings.seed)
    return Trainer(*PRESETS["gan"].build(settings, shape(settings), classes(settings)), settings, device, **options)


def ask(net: nn.Module, settings: TrainConfig, rng: torch.Generator | None = None, one_pass: bool | None = None) -> Critic:
    """The way to ask this critic, as a trainer chooses it."""
    optimizer = make(settings.optimizer_d, net.parameters(), settings.rate_d, settings)
    return choose(net, settings, rng or torch.Generator(), one_pass, optimizer)


def batches(settings: TrainConfig, device: torch.device | str = "cpu") -> Batches:
    return Batches(images(settings), settings.batch_size * settings.n_critic, seed=settings.seed, device=device)


def state(t: Trainer) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in t.state_dict().items()}
