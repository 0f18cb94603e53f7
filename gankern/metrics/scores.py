"""Inception Score and Mode Score, from the class probabilities that a classifier gives to the samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs


class InceptionScore(NamedTuple):
    """What `inception_score` finds, in [1, K] for K classes: higher is better.

    mean, std: over the splits, population standard deviation.
    """

    mean: float
    std: float


@torch.no_grad()
def inception_score(*, fake: Tensor, splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))): each sample is of a clear class, and all classes occur.

    Args:
        fake: [N, K], class probabilities of the fake samples: floating, >= 0, each row sums to 1, N >= splits.
        splits: parts of equal size, each scored with its own p(y), >= 1.
        seed: of the order of the samples before they are split; PyTorch's global random state is left as it was.

    Returns:
        InceptionScore, computed in float64.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 4.
    """
    op = "inception_score"
    _inputs.probabilities(op, fake=fake)
    checks.integer(op, "splits", splits, 1)
    checks.number(op, "splits", splits, 1, len(fake))
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(seed)).to(fake.device)
    each = torch.stack([_information(part).exp() for part in fake.double()[order].tensor_split(splits)])
    return InceptionScore(each.mean().item(), each.std(correction=0).item())


@torch.no_grad()
def mode_score(*, real: Tensor, fake: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y)) - KL(p(y) || p*(y))): an Inception Score that the missing of the data's class shares lowers.

    Args:
        real: [N, K], class probabilities of the real samples, whose mean is p*(y): floating, >= 0, each row sums to 1, N >= 1.
        fake: [M, K], class probabilities of the fake samples, M >= 1.

    Returns:
        In [0, K], higher is better; 0 if fake samples have a class that no real sample has. In float64, on all samples at once.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.

    Source: Che et al., "Mode regularized generative adversarial networks", ICLR 2017, section 4.1, in the form of Xu et al., "An
    empirical study on evaluation metrics of generative adversarial networks", 2018, section 2.
    """
    _inputs.probabilities("mode_score", real=real, fake=fake)
    share = fake.double().mean(0)
    return (_information(fake.double()) - _kl(share, real.double().mean(0))).exp().item()


def _information(probabilities: Tensor) -> Tensor:
    return _kl(probabilities, probabilities.mean(0)).mean()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
