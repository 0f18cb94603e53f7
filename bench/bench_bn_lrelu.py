"""bn_lrelu against eager PyTorch and torch.compile: the layers of a DCGAN and of MLP generators.

"forward" and "evaluation" run under no_grad, "backward" is forward and the gradients of x, weight and bias in training mode,
"double" what a gradient penalty costs one layer: forward, dx with create_graph=True, and the gradients of sum(dx²) in x and weight.
"cl" is channels-last. torch.compile has rows at two sizes, none in "double", which AOTAutograd cannot; --all-rivals: at all sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern import bn_lrelu

VECTORS = ((16, 256), (64, 256), (64, 1024), (256, 512), (256, 1024))
IMAGES = ((16, 64, 16, 16), (64, 64, 16, 16), (64, 128, 14, 14), (64, 128, 8, 8), (64, 256, 7, 7), (64, 512, 4, 4))
COMPILED = ((64, 256), (64, 64, 16, 16))
PASSES = ("forward", "evaluation", "backward", "double")
SLOPE = 0.2


def groups(settings: Settings) -> list[Group]:
    shapes = [(s, False) for s in VECTORS] + [(s, last) for s in IMAGES for last in (False, True)]
    return [Norm(settings, which, shape, last) for shape, last in shapes for which in PASSES]


def bench_bn_lrelu(row: Callable[[], None]) -> None:
    row()


def eager(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training), SLOPE)


def ours(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    return bn_lrelu(x, mean, var, weight, bias, training, negative_slope=SLOPE)


class Norm(OpGroup):
    def __init__(self, settings: Settings, which: str, shape: tuple[int, ...], channels_last: bool) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device)]
        if which != "double" and (settings.all_rivals or (shape in COMPILED and not channels_last)):
            rivals.insert(1, COMPILE)
        # x in, y out; x and dy in, y and dx out; ddx as well, ddy and the second dx out
        tensors = {"forward": 2, "evaluation": 2, "backward": 4, "double": 7}[which]
        name = f"{which} {'x'.join(map(str, shape))}{' cl' * channels_last}"
        super().__init__(name, rivals, Work(4 * tensors * torch.Size(shape).numel()), "fp32", settings.device)
        self.which, self.shape, self.channels_last = which, shape, channels_last
        self.grad = which in ("backward", "double")

    def inputs(self, exact: bool) -> list[Tensor]:
        """x, running mean, running variance, weight, bias and the cotangent of y. Exact: rounding decides no sign."""
        c = self.shape[1]
        x, dy = (torch.randn(self.shape) for _ in range(2))
        made = [x, torch.zeros(c), torch.ones(c), torch.rand(c) + 0.5, torch.randn(c), dy]
        for _ in range(3 * exact):
            z = F.batch_norm(*(t.double() for t in made[:5]), self.which != "evaluation")
            x[z.abs() < 1e-4] += 1e-2
        if self.channels_last:
            made = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]
        made = [t.to(self.device) for t in made]
        for i in (0, 3, 4):
            made[i].requires_grad_(self.grad)
        return made

    def function(self, rival: str) -> Function:
        which, training = self.which, self.which != "evaluation"
        norm = ours if rival.startswith("gankern") else compiled(eager) if rival == COMPILE else eager

        def run(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Outputs:
            y = norm(x, mean, var, weight, bias, training)
            out: Outputs = {"y": y}
            if which == "backward":
                out["dx"], out["dweight"], out["dbias"] = torch.autograd.grad(y, (x, weight, bias), dy)
            elif which == "double":
                (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
                out["second x"], out["second weight"] = torch.autograd.grad(dx.square().sum(), (x, weight))
            return out

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(EAGER)(*inputs64)
