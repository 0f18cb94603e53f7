"""Vitals: the numbers by which `gankern.training.health` judges a run, and how they are measured, on one batch of samples."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.data import Dataset, to_float
from gankern.metrics import judge_digits, nearest_neighbour_test
from gankern.models import sample_latent
from gankern.training.critics.energy import error
from gankern.training.run_dir import is_number
from gankern.training.trainer import Trainer, generate
from gankern.training.views import coverage_of

COUNT = 256  # real samples, and fakes, in a look
SIDE = 16  # pixels to which images are averaged down for their distances
CONFIDENT, KINDS = 0.95, 5  # mean confidence of the digits' classifier, and how many it finds in data that are taken for digits


class Vitals(NamedTuple):
    """What a look found; None where it has no meaning. Distances are multiples of the mean distance of two real samples.

    step: steps made.
    spread: mean distance of two fakes.
    nn_real, nn_fake: accuracy of the leave-one-out 1-nearest-neighbour classifier on the real and on the fake samples.
    ranked: share of the pairs of a real and a fake sample that the critic orders rightly: 0.5 if it cannot tell.
    gradient: norm of the generator's last gradient, root mean square over its parameters.
    shares: of the ten digits, or of the modes of a mixture, among the fakes; they sum to 1.
    sure: mean confidence of the digits' classifier; of a mixture the share of fakes within 3 standard deviations of a mode.
    moved: mean distance from the fake of a latent vector to that of the same vector at the look before.
    shift: how far the mean of the fakes has moved since the look before.
    turn: the same since the look before that: two shifts on a straight way, less where it led back.
    gap: median of D(x) - D(G(z)) in the log since the look before.
    swing: standard deviation of d_loss in the log since the look before.
    """

    step: int
    spread: float
    nn_real: float
    nn_fake: float
    ranked: float | None = None
    gradient: float | None = None
    shares: tuple[float, ...] | None = None
    sure: float | None = None
    moved: float | None = None
    shift: float | None = None
    turn: float | None = None
    gap: float | None = None
    swing: float | None = None

    @classmethod
    def read(cls, row: dict[str, Any]) -> Vitals | None:
        """Of a row of vitals.jsonl; None if it is none. What is no number, or has another name, is passed over."""
        found: dict[str, Any] = {k: v for k, v in row.items() if k in cls._fields and is_number(v)}
        shares = row.get("shares")
        if isinstance(shares, list) and all(map(is_number, shares)):
            found["shares"] = tuple(shares)
        return cls(**found) if found.keys() >= {"step", "spread", "nn_real", "nn_fake"} else None


class Examiner:
    """Measures a run between two of its steps: the generator as it is, without averaged weights, on latent vectors of its own.

    Neither the networks, their buffers, nor the random numbers of the training are touched.

    Args:
        trainer: of the run.
        dataset: of the run, at least two different samples.
        classes: of a conditional model; 0: it is none.

    Attributes:
        scale: mean distance of two real samples; 0: there is nothing to compare with.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, classes: int = 0) -> None:
        config, device = trainer.config, trainer.device
        self.trainer, self.dataset = trainer, dataset
        count = min(COUNT, len(dataset)) // config.pack * config.pack
        chosen = torch.linspace(0, len(dataset) - 1, count).long()
        self.z = sample_latent(count, config.z_dim, config.latent, torch.Generator().manual_seed(config.seed + 3)).to(device)
        self.labels = [torch.arange(count, device=device) % classes] if classes else []
        self.real = to_float(dataset.samples[chosen]).to(device)
        self.real_labels = [dataset.labels[chosen].to(device)] if classes and dataset.labels is not None else []
        self.points = _points(self.real)
        self.scale = _mean_distance(self.points) if count > 1 else 0.0
        self.digits = self.real.shape[1:] == (1, 28, 28) and _are_digits(self.real)
        self.before: list[Tensor] = []

    def go_on(self, before: list[Any]) -> None:
        """After looks of another examiner of the run, whose `before` this was; of other data it is passed over."""
        if all(isinstance(p, Tensor) and (p.shape, p.dtype) == (self.points.shape, self.points.dtype) for p in before):
            self.before = [p.to(self.points.device) for p in before]

    @torch.no_grad()
    def look(self, rows: list[dict[str, float]] | None = None) -> Vitals | None:
        """The vitals of this moment, or None if samples are not finite.

        Args:
            rows: of log.jsonl since the last look, for gap and swing.
        """
        fakes = generate(self.trainer.generator, self.z, *self.labels).float()
        if not fakes.isfinite().all():
            return None
        points, found = _points(fakes), dict[str, Any]()
        if self.digits:
            found["shares"], found["sure"] = judge_digits(fakes.clamp(-1, 1))
        elif (coverage := coverage_of(self.dataset, fakes)) is not None:
            found["shares"], found["sure"] = coverage.shares, coverage.high_quality
        if "shares" in found:
            found["shares"] = tuple(found["shares"].tolist())
        if self.before:
            found["moved"] = (points - self.before[-1]).norm(dim=1).mean().item() / self.scale
        for name, earlier in zip(("shift", "turn"), reversed(self.before), strict=False):
            found[name] = (points.mean(0) - earlier.mean(0)).norm().item() / self.scale
        self.before = [*self.before[-1:], points]
        if rows:
            found["gap"] = statistics.median(row["d_real"] - row["d_fake"] for row in rows)
        if rows and len(rows) > 1:
            found["swing"] = statistics.stdev(row["d_loss"] for row in rows)
        test = nearest_neighbour_test(real=self.points, fake=points)
        ranked, gradient = self._ranked(fakes), self._gradient()
        spread = _mean_distance(points) / self.scale
        return Vitals(self.trainer.steps_done, spread, test.real, test.fake, ranked, gradient, **found)

    def _gradient(self) -> float | None:
        gradients = [p.grad for p in self.trainer.opt_g.parameters if p.grad is not None]
        if not gradients:
            return None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float()).item()
        return norm / sum(g.numel() for g in gradients) ** 0.5

    def _ranked(self, fakes: Tensor) -> float | None:
        net, buffers = self.trainer.discriminator, {k: b.clone() for k, b in self.trainer.discriminator.named_buffers()}
        if not self.trainer.critic.learns or self.trainer.config.loss == "mmd-gan":  # no scores
            return None

        def score(x: Tensor, *labels: Tensor) -> Tensor:
            if getattr(net, "classifies", False):
                return functional_call(net, buffers, (x,))[0].flatten()
            out = functional_call(net, buffers, (x, *labels))
            return -error(x, out) if hasattr(net, "decode") else out.flatten()

        training = {m: m.training for m in net.modules()}
        for m in training:
            m.training = isinstance(m, _BatchNorm)  # its running statistics are of real and fake samples together
        try:
            real, fake = score(self.real, *self.real_labels), score(fakes, *self.labels)
        finally:
            for m, mode in training.items():
                m.training = mode
        difference = real[:, None] - fake
        return ((difference > 0).double().mean() + (difference == 0).double().mean() / 2).item()


def _are_digits(images: Tensor) -> bool:
    """Of several kinds too: noise is, with confidence, an 8."""
    verdict = judge_digits(images)
    return verdict.confidence >= CONFIDENT and int((verdict.shares > 0).sum()) >= KINDS


def _points(samples: Tensor) -> Tensor:
    """[N, D]: images averaged down to SIDE pixels."""
    if samples.dim() == 4 and max(samples.shape[2:]) > SIDE:
        samples = F.adaptive_avg_pool2d(samples, SIDE)
    return samples.flatten(1)


def _mean_distance(points: Tensor) -> float:
    """Of two of them."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum().item() / (len(points) * (len(points) - 1))
