"""spectral_norm of a network of 12 layers against torch.nn.utils.parametrizations.spectral_norm on each layer.

"forward" is the 12 normalised weights in training mode, one power iteration each, under no_grad; "train" the same with a graph;
"backward" also the gradients of the 12 parameters. Networks: MLPs of width 64, 256 and 1024; "conv", an SN-GAN critic of 3x3 and
4x4 convolutions with 3 to 512 channels and three linear layers; "resnet", convolutions of 128 channels; "deconv", transposed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as eager_spectral_norm

from bench.support import EAGER, Function, Group, OpGroup, Outputs, Settings, Work, gankern_rivals
from gankern.ops.spectral_norm import unchecked

Layer = tuple[tuple[int, ...], int]  # shape of the weight, its dim


def _conv(*channels: int, kernel: int = 3) -> list[Layer]:
    return [((b, a, kernel, kernel), 0) for a, b in pairwise(channels)]


NETWORKS: dict[str, list[Layer]] = {
    **{f"mlp-{width}": [((width, width), 0)] * 12 for width in (64, 256, 1024)},
    "conv": [
        *(((b, a, k, k), 0) for a, b, k in ((3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4))),
        *(((b, a, k, k), 0) for a, b, k in ((256, 512, 3), (512, 512, 3), (512, 512, 1))),
        *(((b, a), 0) for a, b in ((512, 512), (512, 128), (128, 1))),
    ],
    "resnet": [*_conv(3, *[128] * 11), ((1, 128), 0)],
    "deconv": [((128, 128, 4, 4), 1)] * 12,
}
PASSES = ("forward", "train", "backward")


def groups(settings: Settings) -> list[Group]:
    return [Network(settings, which, name) for name in NETWORKS for which in PASSES]


def bench_spectral_norm(row: Callable[[], None]) -> None:
    row()


class Network(OpGroup):
    def __init__(self, settings: Settings, which: str, name: str) -> None:
        layers = NETWORKS[name]
        elements = sum(torch.Size(shape).numel() for shape, _ in layers)
        # forward reads W and writes W / sigma; backward also reads g and writes dW; 2 products an iteration
        work = Work(4 * elements * (4 if which == "backward" else 2), 4 * elements)
        super().__init__(f"{which} {name}", [EAGER, *gankern_rivals(settings.device)], work, "fp32", settings.device)
        self.which, self.layers, self.grad = which, layers, which != "forward"

    def inputs(self, exact: bool) -> list[Tensor]:
        """The weights, then u, v, then the cotangents; the buffers move in place, so each rival is given its own."""
        weights = [torch.randn(*shape) for shape, _ in self.layers]
        us = [F.normalize(torch.randn(shape[dim]), dim=0) for shape, dim in self.layers]
        vs = [F.normalize(torch.randn(w.numel() // len(u)), dim=0) for w, u in zip(weights, us, strict=True)]
        gs = [torch.randn_like(w) for w in weights]
        tensors = [t.to(self.device) for t in (*weights, *us, *vs, *gs)]
        for w in tensors[: len(weights)]:
            w.requires_grad_(self.grad)
        return tensors

    def normalise(self, rival: str) -> Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]:
        dims = [dim for _, dim in self.layers]
        if rival != EAGER:
            return lambda weights, us, vs: unchecked(weights, us, vs, dims, 1, 1e-12)
        modules: list[torch.nn.Module] = []

        def by_modules(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
            if not modules or modules[0].parametrizations["weight"].original is not weights[0]:
                modules[:] = [_holder(*given) for given in zip(weights, us, vs, dims, strict=True)]
            return [m.weight for m in modules]

        return by_modules

    def function(self, rival: str) -> Function:
        normalise, n = self.normalise(rival), len(self.layers)

        def run(*tensors: Tensor) -> Outputs:
            weights, us, vs, gs = (list(tensors[i * n : (i + 1) * n]) for i in range(4))
            ys = normalise(weights, us, vs)
            if self.which != "backward":
                return {"y": ys}
            return {"y": ys, "dw": torch.autograd.grad(ys, weights, gs)}

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        """u and v have moved by one iteration when the rival ran, so the definition runs on them without another."""
        n = len(self.layers)
        weights, us, vs, gs = (inputs64[i * n : (i + 1) * n] for i in range(4))
        ys = unchecked(weights, us, vs, [dim for _, dim in self.layers], 0, 1e-12)
        return {"y": ys} if self.which != "backward" else {"y": ys, "dw": torch.autograd.grad(ys, weights, gs)}


def _holder(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> torch.nn.Module:
    """A module whose `weight` PyTorch's spectral norm makes of this very weight, u and v."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    eager_spectral_norm(module, dim=dim)
    chain = module.parametrizations["weight"]
    del chain.original
    chain.register_parameter("original", None)
    chain.__dict__["original"] = weight
    chain._modules["0"]._u, chain._modules["0"]._v = u, v
    return module
