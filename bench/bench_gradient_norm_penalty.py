"""gradient_norm_penalty alone, and gradient_penalty with its backward pass through MLP critics, against eager PyTorch.

"backward" is the penalty of a given gradient and its derivative; "double" differentiates once more, as an unrolled GAN does.
"critic" is a whole WGAN-GP penalty of a critic of linear and LeakyReLU layers, with the gradients of all its parameters. Rivals:

eager            the penalty as people write it, a critic of nn.Linear and nn.LeakyReLU
compile          torch.compile of it, the input gradient by torch.func.grad (else it cannot be traced); one size, --all-rivals: all
gankern, ...     gradient_penalty; "critic": of the drop-in modules
gankern-plain    "critic": gradient_penalty of eager's critic
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import gankern
from bench.support import AUTOMATIC, COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals

SHAPES = ((16, 784), (64, 784), (256, 784), (64, 3, 32, 32), (16, 3, 128, 128))
PASSES = ("backward", "double")
BATCHES = (16, 64, 256)
CRITICS = ((784, 512, 256, 1), (784, 1024, 512, 256, 1))
COMPILED = (64, CRITICS[0])
PLAIN = "gankern-plain"


def groups(settings: Settings) -> list[Group]:
    norms: list[Group] = [Norms(settings, which, shape) for shape in SHAPES for which in PASSES]
    return norms + [Critic(settings, batch, sizes) for sizes in CRITICS for batch in BATCHES]


def bench_gradient_norm_penalty(row: Callable[[], None]) -> None:
    row()


def eager_penalty(grad: Tensor) -> Tensor:
    return ((grad.view(grad.size(0), -1).norm(2, dim=1) - 1) ** 2).mean()


class Norms(OpGroup):
    def __init__(self, settings: Settings, which: str, shape: tuple[int, ...]) -> None:
        numel = torch.Size(shape).numel()
        work = Work(4 * numel * {"backward": 2, "double": 4}[which])  # g in, its gradient out; double: also c in, one more out
        rivals = [EAGER, *gankern_rivals(settings.device)]
        super().__init__(f"{which} {'x'.join(map(str, shape))}", rivals, work, "fp32", settings.device)
        self.which, self.shape = which, shape

    def inputs(self, exact: bool) -> list[Tensor]:
        g = torch.randn(self.shape, device=self.device) / (torch.Size(self.shape).numel() / self.shape[0]) ** 0.5
        return [(2 * g).requires_grad_(), torch.randn(self.shape, device=self.device)]

    def function(self, rival: str) -> Function:
        def run(g: Tensor, c: Tensor) -> Outputs:
            value = gankern.gradient_norm_penalty(g).value if rival.startswith("gankern") else eager_penalty(g)
            (d,) = torch.autograd.grad(value, g, create_graph=self.which == "double")
            out: Outputs = {"value": value, "grad": d}
            if self.which == "double":
                out["second"] = torch.autograd.grad((d * c).sum(), g)
            return out

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(EAGER)(*inputs64)


class Critic(OpGroup):
    def __init__(self, settings: Settings, batch: int, sizes: Sequence[int]) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device), PLAIN]
        if settings.all_rivals or (batch, sizes) == COMPILED:
            rivals.insert(1, COMPILE)
        weights = sum(a * b for a, b in itertools.pairwise(sizes))
        # weights in, their gradients out; forward, input gradient, tangent and weight-gradient products
        work = Work(4 * 2 * weights, 4 * 2 * batch * weights)
        super().__init__(f"critic {batch} {'-'.join(map(str, sizes))}", rivals, work, "fp32", settings.device)
        self.batch, self.sizes = batch, sizes

    def inputs(self, exact: bool) -> list[Tensor]:
        """real, fake, eps; weights and biases."""
        shapes = [s for a, b in itertools.pairwise(self.sizes) for s in ((b, a), (b,))]
        parameters = [(torch.randn(s) * (2 / s[-1]) ** 0.5 if len(s) == 2 else torch.zeros(s)) for s in shapes]
        samples = [torch.randn(self.batch, self.sizes[0]), torch.randn(self.batch, self.sizes[0]), torch.rand(self.batch)]
        if exact:  # biases 8 deviations off zero: no rounding turns a sign, so every rival has the same slopes
            for i, bias in enumerate(parameters[1::2]):
                bias.copy_((torch.randint(0, 2, bias.shape) * 2 - 1) * 8.0 ** (i + 1))
        return [t.to(self.device) for t in samples] + [p.to(self.device).requires_grad_() for p in parameters]

    def function(self, rival: str) -> Function:
        fused = rival.startswith("gankern") and rival != PLAIN
        slope = 0.2

        def score(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
            for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
                x = (
                    gankern.linear_lrelu(x, weight, bias, slope)
                    if fused
                    else nn.functional.leaky_relu(nn.functional.linear(x, weight, bias), slope)
                )
            return nn.functional.linear(x, *parameters[-2:])

        def eager(real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Tensor:
            e = eps.view(-1, 1)
            x = (e * real + (1 - e) * fake).requires_grad_()
            out = score(x, parameters)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True, retain_graph=True)
            return 10 * eager_penalty(grad)

        def by_func(real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Tensor:
            e = eps.view(-1, 1)
            grad = torch.func.grad(lambda x: score(x, parameters).sum())(e * real + (1 - e) * fake)
            return 10 * eager_penalty(grad)

        def ours(real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Tensor:
            return gankern.gradient_penalty(lambda x: score(x, parameters), real, fake, eps=eps)

        penalty = ours if rival.startswith("gankern") else compiled(by_func) if rival == COMPILE else eager

        def run(*inputs: Tensor) -> Outputs:
            value = penalty(*inputs)
            return {"value": value, "grad": torch.autograd.grad(value, inputs[3::2])}  # a penalty has no gradient in a bias

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(EAGER)(*inputs64)

    def context(self, rival: str) -> AbstractContextManager[Any]:
        return super().context(AUTOMATIC if rival == PLAIN else rival)
