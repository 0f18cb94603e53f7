"""Spectral normalisation of weights: a drop-in for PyTorch's, layer by layer, and one call for all layers of a network.

Both register a parametrization, with the parameter and buffer names of `torch.nn.utils.parametrizations.spectral_norm`: a
state_dict fits both ways, and `torch.nn.utils.parametrize` (is_parametrized, remove_parametrizations, cached) works as with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gankern import checks
from gankern.ops import spectral_norm as op

OP = "spectral_norm"
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    """The parametrization W -> W / sigma(W); in training mode each call first does its power iterations.

    Args:
        weight: the tensor to be normalised: any shape of one dimension or more; a vector is divided by its length.
        n_power_iterations: at each call in training mode, >= 1.
        dim: the dimension that counts the outputs.
        eps: lower bound of the norms divided by.

    Buffers: _u [rows], _v [columns] of the weight's matrix, after 15 iterations from a random start; none for a vector.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        checks.integer(OP, "n_power_iterations", n_power_iterations, 1)
        checks.number(OP, "eps", eps, 0.0)
        if not -weight.dim() <= dim < weight.dim():
            checks.fail(ValueError, OP, "dim", f"be in [{-weight.dim()}, {weight.dim() - 1}]", dim)
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.dim(), eps
        self.ready: Tensor | None = None  # W / sigma, while the network runs that normalises all its layers at once
        if weight.dim() > 1:
            rows, columns = op.as_matrix(weight.detach(), self.dim).shape
            u, v = (F.normalize(weight.detach().new_empty(n).normal_(0, 1), dim=0, eps=eps) for n in (rows, columns))
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)
            op.spectral_norm([weight.detach()], [u], [v], [self.dim], 15, eps)

    def forward(self, weight: Tensor) -> Tensor:
        if self.ready is not None:
            return self.ready
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        iterations = self.n_power_iterations if self.training else 0
        return op.unchecked([weight], [self._u], [self._v], [self.dim], iterations, self.eps)[0]

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Normalise a weight of one layer, as `torch.nn.utils.parametrizations.spectral_norm` does: module.weight is W / sigma(W).

    Same signature, state_dict and values; in training mode each access of the weight does `n_power_iterations` of the power
    method on the buffers _u and _v first, in evaluation mode none. Gradients of any order reach `parametrizations.weight.original`,
    u and v being constants.

    Args:
        module: the layer, changed in place.
        name: of the parameter: one dimension (it is then divided by its length) or more.
        n_power_iterations: >= 1.
        eps: lower bound of the norms divided by, >= 0.
        dim: the dimension that counts the outputs; None is 1 for transposed convolutions, else 0.

    Returns:
        module.

    Raises:
        ValueError: no such parameter, or a number out of range.
        TypeError: the weight's dtype is none of float64, float32, bfloat16 and float16.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.
    """
    _register(module, name, n_power_iterations, eps, dim)
    return module


def spectral_norm_(network: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12) -> nn.Module:
    """Normalise the weights of all layers of a network, all of them in one call at the beginning of each of its forward passes.

    Every submodule's parameter `name` of two or more dimensions is taken (linear, convolutions, transposed ones, embeddings ...);
    one that has a parametrization already is left alone. Names, buffers and values are those of `spectral_norm` on each layer.

    In training mode each forward pass of `network` does `n_power_iterations` once, and all uses of a layer within the pass see the
    same weight; PyTorch's iterates at each use. Two passes before a backward pass are right: each keeps the u and v that it used.
    Outside a pass of `network` (a submodule called by itself, a weight read) a layer behaves as under `spectral_norm`. A layer
    whose parametrization is removed leaves the group. The passes of one network must not run in two threads at once.

    Args:
        network: changed in place; what wraps it (DistributedDataParallel) calls it and so keeps this.
        name: of the parameters.
        n_power_iterations: >= 1.
        eps: lower bound of the norms divided by, >= 0.

    Returns:
        network.

    Raises:
        ValueError: no layer has such a parameter, or a number is out of range.
        TypeError: a weight's dtype is none of float64, float32, bfloat16 and float16; network is no torch.nn.Module.
    """
    if not isinstance(network, nn.Module):
        checks.fail(TypeError, "spectral_norm_", "network", "be a torch.nn.Module", type(network).__name__)
    layers = [m for m in network.modules() if (w := m._parameters.get(name)) is not None and w.dim() > 1]
    if not layers:
        wanted = f"have a layer with a {name!r} of two dimensions or more, not yet parametrised"
        checks.fail(ValueError, "spectral_norm_", "network", wanted, "none")
    group = _Group([(layer, name, _register(layer, name, n_power_iterations, eps, None)) for layer in layers])
    network.register_forward_pre_hook(group.begin)
    network.register_forward_hook(group.end, always_call=True)
    return network


class _Group:
    """The hooks of a network: all its weights before a pass, none of them after."""

    def __init__(self, members: list[tuple[nn.Module, str, SpectralNorm]]) -> None:
        self.members = members

    def originals(self) -> Iterator[tuple[SpectralNorm, Tensor]]:
        """Each parametrization that is still in its place, and the weight that it normalises."""
        for layer, name, norm in self.members:
            lists = layer._modules.get("parametrizations")
            chain = None if lists is None else lists._modules.get(name)
            if chain is not None and chain._modules.get("0") is norm:
                yield norm, chain.original  # type: ignore[misc]

    def begin(self, network: nn.Module, args: Any) -> None:
        alike: dict[Any, list[tuple[SpectralNorm, Tensor]]] = {}
        for norm, weight in self.originals():
            iterations = norm.n_power_iterations if norm.training else 0
            alike.setdefault((weight.device, weight.dtype, iterations, norm.eps), []).append((norm, weight))
        for (_, _, iterations, eps), pairs in alike.items():
            norms, weights = zip(*pairs, strict=True)
            ys = op.unchecked(weights, [n._u for n in norms], [n._v for n in norms], [n.dim for n in norms], iterations, eps)
            for norm, y in zip(norms, ys, strict=True):
                norm.ready = y

    def end(self, network: nn.Module, args: Any, output: Any) -> None:
        for _, _, norm in self.members:
            norm.ready = None


def _register(module: nn.Module, name: str, n_power_iterations: int, eps: float, dim: int | None) -> SpectralNorm:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        checks.fail(ValueError, OP, "name", f"be a parameter or buffer of {type(module).__name__}", repr(name))
    checks.floating(OP, name, weight)
    norm = SpectralNorm(weight, n_power_iterations, int(isinstance(module, _TRANSPOSED)) if dim is None else dim, eps)
    parametrize.register_parametrization(module, name, norm)
    return norm
