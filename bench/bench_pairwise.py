"""pairwise against eager PyTorch and torch.compile: minibatch features, MMD² and the pulling-away term.

"forward" runs under no_grad, "backward" is the value and its gradients, "double" (features only) what a gradient penalty costs:
the first derivative with create_graph=True and the gradient of the sum of its squares. Sizes are N x B x C (features) and
N x N x D (mmd2, both halves with a gradient; pulling: N x D). eager is what people write: all pairs at once, for MMD² the three
Gram matrices of the MMD-GAN code; 4096 x 4096 x 128 only with --all-rivals. torch.compile has rows at one size;
--all-rivals: at all; none where it cannot differentiate, or does it wrongly (the gradient of MMD², torch 2.13 on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern import minibatch_features, mmd2, pulling_away

SIGMAS = (1.0, 2.0, 4.0, 8.0, 16.0)
FEATURES = ((16, 20, 5), (64, 50, 5), (128, 50, 16))
SAMPLES = ((16, 2), (64, 128), (256, 128), (1024, 128))
LARGE = (4096, 128)
COMPILED = {("features", (64, 50, 5)), ("mmd2", (256, 128))}


def groups(settings: Settings) -> list[Group]:
    found: list[Group] = [
        Pairs(settings, "features", shape, which) for shape in FEATURES for which in ("forward", "backward", "double")
    ]
    sizes = (*SAMPLES, LARGE) if settings.all_rivals else SAMPLES
    found += [Pairs(settings, "mmd2", shape, which) for shape in sizes for which in ("forward", "backward")]
    return found + [Pairs(settings, "pulling", shape, which) for shape in SAMPLES for which in ("forward", "backward")]


def bench_pairwise(row: Callable[[], None]) -> None:
    row()


def eager_features(m: Tensor) -> Tensor:
    return torch.exp(-(m.unsqueeze(1) - m).abs().sum(-1)).sum(1) - 1


def eager_mmd2(x: Tensor, y: Tensor) -> Tensor:
    xx, xy, yy = x @ x.T, x @ y.T, y @ y.T
    rx, ry = xx.diagonal(), yy.diagonal()
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for gram, a, b, sign in ((xx, rx, rx, 1), (yy, ry, ry, 1), (xy, rx, ry, -2)):
        d = a.unsqueeze(1) + b - 2 * gram
        kernel = torch.zeros_like(d)
        for sigma in SIGMAS:
            kernel = kernel + torch.exp(-d / (2 * sigma**2))
        total = total + sign * kernel.mean()
    return total


def eager_pulling(x: Tensor) -> Tensor:
    rows = F.normalize(x, dim=1)
    n = len(x)
    return ((rows @ rows.T).square().sum() - n) / (n * (n - 1))


class Pairs(OpGroup):
    def __init__(self, settings: Settings, what: str, shape: tuple[int, ...], which: str) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device)]
        wrong = which == "double" or (what, which) == (
            "mmd2",
            "backward",
        )  # torch 2.13 on the CPU: the compiled gradient is garbage
        if not wrong and (settings.all_rivals or (what, shape) in COMPILED):
            rivals.insert(1, COMPILE)
        n, elements = shape[0], torch.Size(shape).numel()
        halves = 2 if what == "mmd2" else 1
        products = 0 if what == "features" else (3 if what == "mmd2" else 1) * (1 if which == "forward" else 3)
        passes = {"forward": 1, "backward": 2, "double": 3}[which]
        work = Work(4 * halves * elements * passes, 2 * products * n * n * shape[-1])
        name = f"{what} {which} {'x'.join(map(str, (n, *shape) if what == 'mmd2' else shape))}"
        super().__init__(name, rivals, work, "fp32", settings.device)
        self.what, self.shape, self.which, self.grad = what, shape, which, which != "forward"

    def inputs(self, exact: bool) -> list[Tensor]:
        scale = 1 / self.shape[-1] if self.what == "features" else 1.0
        apart = 2.0 if exact else 0.5  # MMD² of samples of nearly one law is a small difference of large sums
        made = [scale * torch.randn(self.shape, device=self.device) + i * apart for i in range(1 + (self.what == "mmd2"))]
        if self.what == "pulling" and exact:  # and of isotropic points the gradient of the pulling-away term is one too
            made = [t * torch.linspace(1.0, 0.25, self.shape[-1], device=self.device) for t in made]
        return [t.requires_grad_(self.grad) for t in made]

    def function(self, rival: str) -> Function:
        ours = rival.startswith("gankern")
        functions: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
            "features": (minibatch_features, eager_features),
            "mmd2": (mmd2, eager_mmd2),
            "pulling": (pulling_away, eager_pulling),
        }
        fn = functions[self.what][0 if ours else 1]
        if rival == COMPILE:
            fn = compiled(fn)

        def run(*inputs: Tensor) -> Outputs:
            value = fn(*inputs)
            out: Outputs = {"value": value}
            if self.which != "forward":
                grads = torch.autograd.grad(value.sum(), inputs, create_graph=self.which == "double")
                out["grad"] = grads
                if self.which == "double":
                    out["second"] = torch.autograd.grad(grads[0].square().sum(), inputs)
            return out

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(EAGER)(*inputs64)
