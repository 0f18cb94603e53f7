"""Layers that let a critic look at a whole minibatch: learned closeness features, and the plain squared distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.ops.pairwise import minibatch_distance, minibatch_features


class MinibatchDiscrimination(nn.Module):
    """[x, o(x)]: o_b(x_i) = sum over j != i of exp(-||M_ib - M_jb||_1), with M = x T seen as [N, B, C].

    Args:
        in_features: size of the last dimension of x.
        out_features: B, how many features are added.
        kernel_dim: C, in how many dimensions two samples are compared.
        device, dtype: of the parameter.

    Parameter: T [in_features, out_features, kernel_dim], drawn from N(0, 1 / in_features), so that M has about the scale of x and
    the exponentials of a wide layer do not start as 0.

    Shape: [N, in_features] -> [N, in_features + out_features]. In training and evaluation alike the features are those of the batch
    that is given.

    Raises:
        ValueError, TypeError: sizes that are no numbers >= 1, an x that does not fit.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_dim: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("kernel_dim", kernel_dim)):
            checks.integer("MinibatchDiscrimination", name, value, 1)
        self.in_features, self.out_features, self.kernel_dim = in_features, out_features, kernel_dim
        self.T = nn.Parameter(torch.empty(in_features, out_features, kernel_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.T, 0.0, self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        op = "MinibatchDiscrimination"
        checks.tensor(op, "x", x)
        checks.dims(op, "x", x, 2)
        if x.shape[1] != self.in_features:
            checks.fail(ValueError, op, "x", f"have {self.in_features} as its last dimension", f"shape {list(x.shape)}")
        m = (x @ self.T.flatten(1)).unflatten(1, (self.out_features, self.kernel_dim))
        return torch.cat([x, minibatch_features(m).to(x.dtype)], dim=1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel_dim={self.kernel_dim}"


class MinibatchDistance(nn.Module):
    """[x, d(x)]: d_i = mean over j != i of ||x_i - x_j||², as `gankern.minibatch_distance`. No parameters.

    Shape: [N, F] -> [N, F + 1].

    Raises:
        ValueError, TypeError: an x that does not have two dimensions or a supported dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("MinibatchDistance", "x", x)
        checks.dims("MinibatchDistance", "x", x, 2)
        return torch.cat([x, minibatch_distance(x)], dim=1)
