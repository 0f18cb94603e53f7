"""LinearLeakyReLU: nn.Linear, nn.LeakyReLU and nn.Dropout as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.ops.linear_lrelu import linear_lrelu


class LinearLeakyReLU(nn.Linear):
    """y = dropout(LeakyReLU(x Wᵀ + b)), with nn.Linear's parameters: a state_dict fits both ways.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: learn an additive bias.
        negative_slope: factor for negative inputs, >= 0 (0 is ReLU).
        dropout: probability in [0, 1] of zeroing an output, in training mode only.
        device, dtype: of the parameters.

    Shape: [*, in_features] -> [*, out_features].

    Raises:
        ValueError, TypeError: as `gankern.linear_lrelu`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.number("LinearLeakyReLU", "negative_slope", negative_slope, 0.0)
        checks.number("LinearLeakyReLU", "dropout", dropout, 0.0, 1.0)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.negative_slope = negative_slope
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return linear_lrelu(x, self.weight, self.bias, self.negative_slope, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}, dropout={self.dropout}"
