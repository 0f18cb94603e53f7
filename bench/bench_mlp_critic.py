"""mlp_critic against what plain PyTorch can do: the loss and every parameter gradient of a WGAN-GP critic, the penalty alone, and
the generator's side.

"critic" is one WGAN-GP critic step without the optimiser. eager passes real, fake and x̂ one after the other; eager-tuned passes
real and fake as one batch; compile is eager-tuned with the penalty by torch.func.grad, compiled as a whole; gankern-modules is
eager with LinearLeakyReLU modules and `gankern.gradient_penalty`. All add the penalty last, as people write it: the order counts,
by the memory that is freed and mapped again (batch 16: 14 % of eager). "penalty" is the penalty with its gradients.

"generator" is the generator's loss through the critic (non-saturating) with its gradient at the fakes. eager has a critic whose
parameters require gradients, and computes them; eager-tuned and compile have a frozen one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, assert_close, compiled, gankern_rivals
from gankern import gradient_penalty, mlp_critic, mlp_critic_generator, mlp_critic_penalty
from gankern.nn import LinearLeakyReLU

SIZES = (784, 1024, 512, 256, 1)
LAYERS = len(SIZES) - 1
BATCHES = (16, 64, 256)
TUNED, MODULES = "eager-tuned", "gankern-modules"
SLOPE = 0.2


def groups(settings: Settings) -> list[Group]:
    dtypes = ("fp32", "tf32", "bf16") if settings.device.type == "cuda" else ("fp32",)
    kinds: tuple[tuple[str, type[Critic]], ...] = (("critic", Critic), ("penalty", Critic), ("generator", Generator))
    return [kind(settings, which, batch, dtype) for which, kind in kinds for dtype in dtypes for batch in BATCHES]


def bench_mlp_critic(row: Callable[[], None]) -> None:
    row()


class Critic(OpGroup):
    def __init__(self, settings: Settings, which: str, batch: int, dtype: str) -> None:
        rivals = [EAGER, *([TUNED] if which != "penalty" else []), *gankern_rivals(settings.device)]
        rivals += [MODULES] if which != "generator" else []
        if settings.all_rivals or batch == BATCHES[1]:
            rivals.insert(1, COMPILE)
        matrices = [a * b for a, b in itertools.pairwise(SIZES)]
        rows = 3 if which == "critic" else 1
        # weights: all rows; forward: all rows, but x̂ on a line needs no first layer; adjoints: all rows but, on the first layer, x̂
        # alone; tangents: x̂ alone, not the last layer
        products = 2 * rows * sum(matrices) + rows * sum(matrices[1:]) + matrices[0] + sum(matrices[:-1])
        products -= matrices[0] if which == "critic" else 0
        parameters = sum(matrices) + sum(SIZES[1:])
        element = 2 if dtype == "bf16" else 4
        work = Work(element * (2 * parameters + (2 if which == "critic" else 1) * batch * SIZES[0]), 2 * batch * products, batch)
        if which == "generator":
            work = Work(element * (parameters + 2 * batch * SIZES[0]), 4 * batch * sum(matrices), batch)
        super().__init__(f"{which} {dtype} {batch}", rivals, work, dtype, settings.device)
        self.which, self.batch = which, batch

    def check(self, rival: str) -> None:
        """In float64, in which rounding decides no sign: in float32 a unit near 0 would, and the WGAN's gradients half cancel."""
        inputs = self.inputs(exact=True)
        with self.context(rival):
            assert_close(self._function(rival)(*inputs), self.function(EAGER)(*inputs), 1e-10)

    def inputs(self, exact: bool) -> list[Tensor]:
        """real, fake, eps, then the weights and the biases."""
        dtype = torch.float64 if exact else torch.bfloat16 if self.dtype == "bf16" else torch.float32
        tensors = [torch.randn(self.batch, SIZES[0]), torch.randn(self.batch, SIZES[0]), torch.rand(self.batch, 1)]
        weights = [torch.empty(b, a).uniform_(-(a**-0.5), a**-0.5) for a, b in itertools.pairwise(SIZES)]
        biases = [torch.empty(b).uniform_(-0.03, 0.03) for b in SIZES[1:]]
        moved = [t.to(self.device, dtype) for t in (*tensors, *weights, *biases)]
        return [t.requires_grad_(i >= 3) for i, t in enumerate(moved)]

    def context(self, rival: str) -> AbstractContextManager[Any]:
        return super().context(EAGER if rival == MODULES else rival)  # no backend's name

    def function(self, rival: str) -> Function:
        if rival == MODULES:
            return Modules(self.which)
        if rival.startswith("gankern"):
            return self.ours
        by_autograd = functional if rival == COMPILE else penalty
        one_batch = rival != EAGER

        def step(real: Tensor, fake: Tensor, eps: Tensor, parameters: list[Tensor]) -> Tensor:
            if self.which == "penalty":
                return by_autograd(parameters, eps * real + (1 - eps) * fake)
            if one_batch:
                scores = critic(parameters, torch.cat([real, fake]))
                loss = scores[len(real) :].mean() - scores[: len(real)].mean()
            else:
                loss = critic(parameters, fake).mean() - critic(parameters, real).mean()
            return loss + by_autograd(parameters, eps * real + (1 - eps) * fake)

        call = compiled(step) if rival == COMPILE else step

        def run(real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Outputs:
            loss = call(real, fake, eps, list(parameters))
            wanted = list(parameters) if self.which == "critic" else list(parameters[:LAYERS])
            return {"loss": loss, "grads": torch.autograd.grad(loss, wanted)}

        return run

    def ours(self, real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Outputs:
        weights, biases = parameters[:LAYERS], parameters[LAYERS:]
        if self.which == "critic":
            out = mlp_critic(real, fake, weights, biases, SLOPE, objective="wgan", penalty_weight=10.0, eps=eps)
        else:
            out = mlp_critic_penalty(torch.lerp(fake, real, eps), weights, biases, SLOPE)
        return {"loss": out.value, "grads": [g for g in out.grads if g is not None]}


class Generator(Critic):
    def function(self, rival: str) -> Function:
        if rival.startswith("gankern"):
            return self.ours

        def step(fake: Tensor, parameters: list[Tensor]) -> Tensor:
            scores = critic(parameters, fake)
            return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

        call = compiled(step) if rival == COMPILE else step

        def run(_: Tensor, fake: Tensor, __: Tensor, *parameters: Tensor) -> Outputs:
            fake = fake.detach().requires_grad_()
            given = list(parameters) if rival == EAGER else [p.detach() for p in parameters]
            loss = call(fake, given)
            grads = torch.autograd.grad(loss, [fake, *given] if rival == EAGER else [fake])
            return {"loss": loss, "grads": grads[0]}

        return run

    def ours(self, _: Tensor, fake: Tensor, __: Tensor, *parameters: Tensor) -> Outputs:
        out = mlp_critic_generator(fake.detach().requires_grad_(), parameters[:LAYERS], parameters[LAYERS:], SLOPE)
        return {"loss": out.value, "grads": [g for g in out.grads if g is not None]}


class Modules:
    """The drop-in modules, with parameters that are made of the first ones given."""

    def __init__(self, which: str) -> None:
        self.which, self.seen, self.net = which, list[Tensor](), nn.Sequential()

    def __call__(self, real: Tensor, fake: Tensor, eps: Tensor, *parameters: Tensor) -> Outputs:
        if not self.seen or self.seen[0] is not parameters[0]:
            self.seen = [*parameters]
            hidden = [LinearLeakyReLU(a, b, negative_slope=SLOPE) for a, b in itertools.pairwise(SIZES[:-1])]
            self.net = nn.Sequential(*hidden, nn.Linear(SIZES[-2], SIZES[-1]))
            for i, layer in enumerate(self.net):
                layer.weight, layer.bias = nn.Parameter(parameters[i].detach()), nn.Parameter(parameters[LAYERS + i].detach())
        loss = self.net(fake).mean() - self.net(real).mean() if self.which == "critic" else 0
        loss = loss + gradient_penalty(self.net, real, fake, eps=eps.flatten())
        weights, biases = [m.weight for m in self.net], [m.bias for m in self.net]
        return {"loss": loss, "grads": torch.autograd.grad(loss, weights + biases if self.which == "critic" else weights)}


def critic(parameters: list[Tensor], x: Tensor) -> Tensor:
    for i in range(LAYERS - 1):
        x = F.leaky_relu(F.linear(x, parameters[i], parameters[LAYERS + i]), SLOPE)
    return F.linear(x, parameters[LAYERS - 1], parameters[-1])


def penalty(parameters: list[Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(parameters, x).sum(), x, create_graph=True)
    return 10.0 * (g.norm(2, dim=1) - 1).square().mean()


def functional(parameters: list[Tensor], x: Tensor) -> Tensor:
    g = torch.func.grad(lambda x: critic(parameters, x).sum())(x)
    return 10.0 * (g.norm(2, dim=1) - 1).square().mean()
