"""The objectives of gan_loss: which term each half pays, and the terms themselves in plain PyTorch.

A term is a functor of (logit a, target t): value, slope and curvature. t = 1 is what a real sample pays, t = 0 what a fake one
does, between them the mixture. csrc/math.h and gankern/triton/gan_loss.py have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Label = float | Tensor


class Term(NamedTuple):
    """One functor of (logit a, target t); `code` is its number in the kernels."""

    code: int
    value: Callable[[Tensor, Label], Tensor]
    slope: Callable[[Tensor, Label], Tensor]
    curvature: Callable[[Tensor, Label], Tensor]


# exp(x) is continued beyond this x by its tangent: values, gradients and the squares that Adam keeps stay in float32's range
EXP_LIMIT = 30.0


def _exp(x: Tensor) -> Tensor:
    return _exp_slope(x) * (1 + F.relu(x - EXP_LIMIT))


def _exp_slope(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=EXP_LIMIT))


def _exp_curvature(x: Tensor) -> Tensor:
    return torch.where(x > EXP_LIMIT, 0.0, _exp_slope(x))


def _mix(t: Label, real: Tensor, fake: Tensor) -> Tensor:
    """t * real + (1 - t) * fake, where a share of 0 leaves out even what is infinite."""
    if isinstance(t, Tensor):
        return torch.where(t == 0, 0.0, t * real) + torch.where(t == 1, 0.0, (1 - t) * fake)
    return real if t == 1 else fake if t == 0 else t * real + (1 - t) * fake


def _full(a: Tensor, value: Label) -> Tensor:
    return torch.zeros_like(a) + value


def _beyond(v: Tensor) -> Tensor:
    """The slope of relu: 0 where v <= 0, else 1 (NaN too, as in autograd)."""
    return 1 - (v <= 0).to(v.dtype)


def _bce(a: Tensor, t: Label) -> Tensor:
    # nothing overflows or cancels; autograd is right at a = 0 too, where relu(a) - t a + log1p(exp(-|a|)) would have the slope -t
    return (t - 1) * F.logsigmoid(-a) - t * F.logsigmoid(a)


def _bce_slope(a: Tensor, t: Label) -> Tensor:
    return torch.sigmoid(a) - t


def _bce_curvature(a: Tensor, t: Label) -> Tensor:
    return torch.sigmoid(a) * torch.sigmoid(-a)


TERMS = {
    # binary cross entropy of sigmoid(a) against t: (1 - t) softplus(a) + t softplus(-a)
    "bce": Term(0, _bce, _bce_slope, _bce_curvature),
    # -a for real ones, a for fake ones
    "linear": Term(
        code=1,
        value=lambda a, t: (1 - 2 * t) * a,
        slope=lambda a, t: _full(a, 1 - 2 * t),
        curvature=lambda a, t: torch.zeros_like(a),
    ),
    # (a - t)^2 / 2
    "square": Term(
        code=2,
        value=lambda a, t: 0.5 * (a - t) ** 2,
        slope=lambda a, t: a - t,
        curvature=lambda a, t: torch.ones_like(a),
    ),
    # (a - 1)^2 / 2 for real ones, (a + 1)^2 / 2 for fake ones
    "square-sides": Term(
        code=3,
        value=lambda a, t: _mix(t, 0.5 * (a - 1) ** 2, 0.5 * (a + 1) ** 2),
        slope=lambda a, t: a - (2 * t - 1),
        curvature=lambda a, t: torch.ones_like(a),
    ),
    # max(0, 1 - a) for real ones, max(0, 1 + a) for fake ones
    "hinge": Term(
        code=4,
        value=lambda a, t: _mix(t, F.relu(1 - a), F.relu(1 + a)),
        slope=lambda a, t: _mix(t, -_beyond(1 - a), _beyond(1 + a)),
        curvature=lambda a, t: torch.zeros_like(a),
    ),
    # the f-divergences: -g(a) for real ones, f*(g(a)) for fake ones. KL: g = a, f*(t) = exp(t - 1)
    "kl": Term(
        code=5,
        value=lambda a, t: _mix(t, -a, _exp(a - 1)),
        slope=lambda a, t: _mix(t, _full(a, -1.0), _exp_slope(a - 1)),
        curvature=lambda a, t: _mix(t, torch.zeros_like(a), _exp_curvature(a - 1)),
    ),
    # g = -exp(-a), f*(t) = -1 - log(-t)
    "reverse-kl": Term(
        code=6,
        value=lambda a, t: _mix(t, _exp(-a), a - 1),
        slope=lambda a, t: _mix(t, -_exp_slope(-a), torch.ones_like(a)),
        curvature=lambda a, t: _mix(t, _exp_curvature(-a), torch.zeros_like(a)),
    ),
    # g = a, f*(t) = t^2 / 4 + t
    "pearson": Term(
        code=7,
        value=lambda a, t: _mix(t, -a, a * (0.25 * a + 1)),
        slope=lambda a, t: _mix(t, _full(a, -1.0), 0.5 * a + 1),
        curvature=lambda a, t: _mix(t, torch.zeros_like(a), _full(a, 0.5)),
    ),
    # squared Hellinger: g = 1 - exp(-a), f*(t) = t / (1 - t)
    "hellinger": Term(
        code=8,
        value=lambda a, t: _mix(t, _exp(-a) - 1, _exp(a) - 1),
        slope=lambda a, t: _mix(t, -_exp_slope(-a), _exp_slope(a)),
        curvature=lambda a, t: _mix(t, _exp_curvature(-a), _exp_curvature(a)),
    ),
    # g = log 2 - log(1 + exp(-a)), f*(t) = -log(2 - exp(t))
    "jensen-shannon": Term(9, lambda a, t: _bce(a, t) - math.log(2), _bce_slope, _bce_curvature),
}


class Part(NamedTuple):
    """What one half pays: weight * term(logit, label), the label being the caller's real_label or fake_label, or a number."""

    term: str
    weight: float
    label: str | float


class Objective(NamedTuple):
    """real, fake: the critic's halves. generator, generator_real: what the generator pays for fake and for real logits.

    relative: what each logit is replaced by before it meets its term.
    """

    real: Part
    fake: Part | None
    generator: Part
    generator_real: Part | None = None
    relative: str = "no"

    @property
    def zero_sum(self) -> bool:
        """Whether the generator pays, for fake logits, minus what the critic does with the labels 1 and 0."""
        if self.relative != "no" or self.fake is None:
            return False
        return self.generator == Part(self.fake.term, -1.0, "fake") or self.generator.term == self.fake.term == "linear"


RELATIVE = ("no", "pair", "average")  # the logit; minus its partner in the other half; minus the mean of the other half
SIDES = ("discriminator", "generator")
REDUCTIONS = ("none", "mean", "sum")
NOTHING = ("bce", 0.0, 0.0)


def _critic(term: str, generator: Part) -> Objective:
    return Objective(Part(term, 1.0, "real"), Part(term, 1.0, "fake"), generator)


def _pairs(term: str) -> Objective:
    """f(a_r - a_f) once: for these terms what the fake half would pay, f2(-y), is f1(y) again."""
    return Objective(Part(term, 1.0, "real"), None, Part(term, 1.0, "real"), relative="pair")


def _averages(term: str) -> Objective:
    real, fake = Part(term, 1.0, "real"), Part(term, 1.0, "fake")
    return Objective(real, fake, generator=real, generator_real=fake, relative="average")


_DIVERGENCES = {name: name for name in ("kl", "reverse-kl", "pearson", "hellinger", "jensen-shannon")} | {"gan": "bce"}

OBJECTIVES = {
    # Goodfellow et al. 2014, eq. 1 and the remark after it: the generator minimises -log D(G(z))
    "non-saturating": _critic("bce", Part("bce", 1.0, "real")),
    # Goodfellow et al. 2014, eq. 1: the generator minimises log(1 - D(G(z)))
    "minimax": _critic("bce", Part("bce", -1.0, "fake")),
    # Goodfellow 2016, section 3.2.4: the generator minimises -exp(a), and exp(a) = e exp(a - 1), the KL's term of fake ones
    "maximum-likelihood": _critic("bce", Part("kl", -math.e, 0.0)),
    # Mao et al. 2017, eq. 2, with b = real_label, a = fake_label and, on the generator's side, c = real_label
    "lsgan": _critic("square", Part("square", 1.0, "real")),
    # Mao et al. 2017, eq. 8, with (a, b, c) = (-1, 1, 0): the generator minimises a Pearson divergence
    "lsgan-pearson": _critic("square-sides", Part("square", 1.0, 0.0)),
    # Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17
    "hinge": _critic("hinge", Part("linear", 1.0, "real")),
    # Arjovsky et al. 2017, algorithm 1
    "wgan": _critic("linear", Part("linear", 1.0, "real")),
    # Nowozin et al. 2016, eq. 6 with table 2: the generator minimises -f*(g(a)); section 3.2: or -g(a) instead
    **{f"fgan-{name}": _critic(term, Part(term, -1.0, "fake")) for name, term in _DIVERGENCES.items()},
    **{f"fgan-{name}-alternative": _critic(term, Part(term, 1.0, "real")) for name, term in _DIVERGENCES.items()},
    # Jolicoeur-Martineau 2019, eq. 8-9 (pairs) and 14-15 (averages)
    "relativistic": _pairs("bce"),
    "relativistic-lsgan": _pairs("square-sides"),
    "relativistic-hinge": _pairs("hinge"),
    "relativistic-average": _averages("bce"),
    "relativistic-average-lsgan": _averages("square-sides"),
    "relativistic-average-hinge": _averages("hinge"),
}


class Spec(NamedTuple):
    """What each half pays, labels filled in: (term, weight, target) twice; then the reduction's number and that of RELATIVE."""

    real: tuple[str, float, float]
    fake: tuple[str, float, float]
    reduction: int
    relative: int = 0

    def arguments(self, real_targets: Tensor | None, fake_targets: Tensor | None) -> tuple[Any, ...]:
        (r, rw, rt), (f, fw, ft) = self.real, self.fake
        return TERMS[r].code, rw, rt, real_targets, TERMS[f].code, fw, ft, fake_targets, self.reduction
