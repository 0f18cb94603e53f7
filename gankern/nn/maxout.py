"""Maxout: a unit whose activation is learned, as the largest of several linear functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import checks


class Maxout(nn.Linear):
    """y_j = the largest over p of x W_pjᵀ + b_pj: `pieces` linear functions a unit, a convex piecewise-linear activation.

    Args:
        in_features: size of the last dimension of x, >= 1.
        out_features: size of the last dimension of y, >= 1.
        pieces: linear functions a unit, >= 1.
        device, dtype: of the parameters.

    Parameters: weight [pieces * out_features, in_features] and bias [pieces * out_features], all first pieces before all second
    ones; drawn as nn.Linear's. Pieces that are equal share the gradient.

    Shape: [*, in_features] -> [*, out_features]. Derivatives of any order.

    Raises:
        ValueError, TypeError: sizes that are no ints >= 1.

    Source: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout networks", ICML 2013.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features), ("pieces", pieces)):
            checks.integer("Maxout", name, value, 1)
        super().__init__(in_features, pieces * out_features, device=device, dtype=dtype)
        self.out_features, self.pieces = out_features, pieces

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).unflatten(-1, (self.pieces, self.out_features)).amax(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pieces={self.pieces}"
