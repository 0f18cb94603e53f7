"""interpolate, the points at which a gradient penalty is taken, against eager PyTorch, eps drawn in each call.

eager is what people write: eps = torch.rand(B, 1, ...), eps * real + (1 - eps) * fake. There is no backward pass: x̂ is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern import interpolate

SHAPES = ((16, 784), (64, 784), (256, 784), (64, 3, 32, 32), (16, 3, 128, 128))
COMPILED = (64, 784)


def groups(settings: Settings) -> list[Group]:
    return [Mixture(settings, shape) for shape in SHAPES]


def bench_interpolate(row: Callable[[], None]) -> None:
    row()


class Mixture(OpGroup):
    def __init__(self, settings: Settings, shape: tuple[int, ...]) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device)]
        if settings.all_rivals or shape == COMPILED:
            rivals.insert(1, COMPILE)
        work = Work(4 * 3 * torch.Size(shape).numel())  # two samples in, one out
        super().__init__("x".join(map(str, shape)), rivals, work, "fp32", settings.device)
        self.shape = shape
        self.grad = False

    def inputs(self, exact: bool) -> list[Tensor]:
        return [torch.randn(self.shape, device=self.device) for _ in range(2)]

    def function(self, rival: str) -> Function:
        def eager(real: Tensor, fake: Tensor) -> Tensor:
            eps = torch.rand(real.shape[0], *[1] * (real.dim() - 1), device=real.device)
            return eps * real + (1 - eps) * fake

        mix = interpolate if rival.startswith("gankern") else compiled(eager) if rival == COMPILE else eager

        def run(real: Tensor, fake: Tensor) -> Outputs:
            return {"x_hat": mix(real, fake)}

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        # eps is random: it is read off the rival's output, by least squares for each sample, and all else must follow from it
        x_hat = got["x_hat"]
        assert isinstance(x_hat, Tensor)
        real, fake = (t.flatten(1) for t in inputs64)
        way = real - fake
        eps = ((x_hat.double().flatten(1) - fake) * way).sum(1, keepdim=True) / way.square().sum(1, keepdim=True)
        assert -1e-6 <= eps.min() < eps.max() <= 1 + 1e-6, "eps must lie in [0, 1] and differ between samples"
        return {"x_hat": (eps * real + (1 - eps) * fake).reshape(self.shape)}
