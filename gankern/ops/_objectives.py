"""The objectives of gan_loss: which term each half pays, and the terms themselves in plain PyTorch.

A term is a functor of (logit a, target t): value, slope and curvature. csrc/math.h and gankern/triton/gan_loss.py have the same.
"""

from __future__ import annotations

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


TERMS = {
    # binary cross entropy of sigmoid(a) against t: (1 - t) softplus(a) + t softplus(-a); nothing overflows or cancels, and autograd
    # is right at a = 0 too, where relu(a) - t a + log1p(exp(-|a|)) would have the slope -t
    "bce": Term(
        code=0,
        value=lambda a, t: (t - 1) * F.logsigmoid(-a) - t * F.logsigmoid(a),
        slope=lambda a, t: torch.sigmoid(a) - t,
        curvature=lambda a, t: torch.sigmoid(a) * torch.sigmoid(-a),
    ),
}


class Part(NamedTuple):
    """What one half pays: weight * term(logit, label), the label being the caller's real_label or fake_label."""

    term: str
    weight: float
    label: str


class Objective(NamedTuple):
    real: Part
    fake: Part
    generator: Part


OBJECTIVES = {
    # Goodfellow et al. 2014, eq. 1 and the remark after it: the generator minimises -log D(G(z))
    "non-saturating": Objective(real=Part("bce", 1.0, "real"), fake=Part("bce", 1.0, "fake"), generator=Part("bce", 1.0, "real")),
    # Goodfellow et al. 2014, eq. 1: the generator minimises log(1 - D(G(z)))
    "minimax": Objective(real=Part("bce", 1.0, "real"), fake=Part("bce", 1.0, "fake"), generator=Part("bce", -1.0, "fake")),
}
SIDES = ("discriminator", "generator")
REDUCTIONS = ("none", "mean", "sum")
NOTHING = ("bce", 0.0, 0.0)


class Spec(NamedTuple):
    """What each half pays, with the labels filled in: (term, weight, target) twice, and the reduction's number."""

    real: tuple[str, float, float]
    fake: tuple[str, float, float]
    reduction: int

    def arguments(self, real_targets: Tensor | None, fake_targets: Tensor | None) -> tuple[Any, ...]:
        (r, rw, rt), (f, fw, ft) = self.real, self.fake
        return TERMS[r].code, rw, rt, real_targets, TERMS[f].code, fw, ft, fake_targets, self.reduction
