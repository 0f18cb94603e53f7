"""Layers that let a critic look at a whole minibatch: learned closeness features, the plain squared distance, the deviation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.ops.pairwise import minibatch_distance, minibatch_features

KINDS = ("discrimination", "distance", "stddev")


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


class MinibatchStdDev(nn.Module):
    """[x, s]: s is the mean, over all features and positions, of their standard deviations over the minibatch. No parameters.

    The deviation is sqrt(variance + 1e-8), in float32 for 16-bit x: s has a gradient where samples are equal. Any derivative order.

    Shape: [N, C, *] -> [N, C + 1, *], s in all places of the new channel; N >= 1.

    Raises:
        ValueError, TypeError: an x of fewer than two dimensions or of a dtype that is not supported.

    Source: Karras, Aila, Laine, Lehtinen, "Progressive growing of GANs", ICLR 2018, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        op = "MinibatchStdDev"
        checks.tensor(op, "x", x)
        checks.floating(op, "x", x)
        if x.dim() < 2:
            checks.fail(ValueError, op, "x", "have two dimensions or more", f"shape {list(x.shape)}")
        v = x.float() if x.dtype.itemsize == 2 else x
        s = ((v - v.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        return torch.cat([x, s.to(x.dtype).expand_as(x[:, :1])], 1)


def add_minibatch_features(critic: nn.Module, kind: str, out_features: int = 100, kernel_dim: int = 5) -> nn.Module:
    """Put a layer of minibatch features before the last nn.Linear of a critic, which then takes them too.

        critic = add_minibatch_features(DCGANDiscriminator(), "stddev")

    That layer becomes nn.Sequential(features, nn.Linear): its weight and bias stay as they were, the columns of the new features
    are drawn as nn.Linear draws them. Before or after `gankern.fuse`; before spectral norm and before an optimiser is made. The
    samples of a batch are no longer judged each by itself: real and fake ones belong in passes of their own (`one_pass=False` of
    the trainer), and a gradient penalty differentiates the features too.

    Args:
        critic: any network that ends in an nn.Linear whose input is [N, F], such as those of gankern.models; changed in place.
        kind: "discrimination", "distance" or "stddev": MinibatchDiscrimination, MinibatchDistance, MinibatchStdDev.
        out_features, kernel_dim: of MinibatchDiscrimination; the paper has 100 and 5.

    Returns:
        critic.

    Raises:
        ValueError: an unknown kind, sizes below 1, no nn.Linear that can be widened, or an auto-encoder, which has no score.
        TypeError: critic is no torch.nn.Module.
    """
    op = "add_minibatch_features"
    if not isinstance(critic, nn.Module):
        checks.fail(TypeError, op, "critic", "be a torch.nn.Module", type(critic).__name__)
    checks.one_of(op, "kind", kind, KINDS)
    if hasattr(critic, "decode"):
        checks.fail(ValueError, op, "critic", "give a score, not a reconstruction", type(critic).__name__)
    name, last = next(((n, m) for n, m in reversed(list(critic.named_modules())) if isinstance(m, nn.Linear)), ("", None))
    if type(last) is not nn.Linear or not name:
        checks.fail(ValueError, op, "critic", "have a plain nn.Linear as its last linear layer", type(last or critic).__name__)
    features: nn.Module
    if kind == "discrimination":
        features, more = MinibatchDiscrimination(last.in_features, out_features, kernel_dim), out_features
    else:
        features, more = MinibatchDistance() if kind == "distance" else MinibatchStdDev(), 1
    wide = nn.Linear(last.in_features + more, last.out_features, last.bias is not None)
    with torch.no_grad():
        wide.weight[:, : last.in_features] = last.weight
        if last.bias is not None:
            wide.bias.copy_(last.bias)
    critic.set_submodule(name, nn.Sequential(features, wide).to(last.weight))
    return critic
