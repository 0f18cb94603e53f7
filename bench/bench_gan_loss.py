"""gan_loss, the binary cross entropy pair of a critic, against eager PyTorch and torch.compile.

"forward" runs under no_grad. "backward" is the loss and its backward(), down to the logits' .grad. "double" differentiates once
more through the gradient, as an unrolled GAN does. Sizes are logits a half; 65536 is 64 images of a PatchGAN critic with 32 x 32
outputs. Rivals:

eager           two calls of nn.BCEWithLogitsLoss with fresh ones and zeros, as people write it
eager-stats     the same and D(x), D(G(z)) and accuracy for the log (gankern computes these in every row)
compile         torch.compile of "eager"; not in "double", which AOTAutograd cannot do; at two sizes, --all-rivals: at all
gankern, ...    gan_loss(real, fake), .backward() of what it returns
gankern-loss    the same, but .loss.backward(), as one must when something is added to the loss; in "backward" only
gankern-vector  gan_loss of one vector with both halves, as one pass through the critic makes it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern import gan_loss

BATCHES = (16, 64, 256, 1024, 65536)
COMPILED = (64, 1024)
PASSES = ("forward", "backward", "double")
STATS, VECTOR, LOSS = "eager-stats", "gankern-vector", "gankern-loss"


def groups(settings: Settings) -> list[Group]:
    return [Pair(settings, which, batch) for batch in BATCHES for which in PASSES]


def bench_gan_loss(row: Callable[[], None]) -> None:
    row()


class Pair(OpGroup):
    optional = ("stats",)

    def __init__(self, settings: Settings, which: str, batch: int) -> None:
        rivals = [EAGER, STATS, *gankern_rivals(settings.device), VECTOR, *([LOSS] if which == "backward" else [])]
        if which != "double" and (settings.all_rivals or batch in COMPILED):
            rivals.insert(2, COMPILE)
        # of 2 * batch logits: forward reads them; backward also writes the gradient; double also reads c and writes once more
        work = Work(4 * 2 * batch * {"forward": 1, "backward": 2, "double": 4}[which])
        super().__init__(f"{which} {batch}", rivals, work, "fp32", settings.device)
        self.which, self.batch = which, batch
        self.grad = which != "forward"

    def inputs(self, exact: bool) -> list[Tensor]:
        """real and fake logits [batch, 1], both in one vector [2 * batch, 1], and a cotangent of the gradient [2 * batch, 1]."""
        real, fake = (3 * torch.randn(self.batch, 1, device=self.device) for _ in range(2))
        both, c = torch.cat([real, fake]), torch.randn(2 * self.batch, 1, device=self.device)
        return [*(t.requires_grad_(self.grad) for t in (real, fake, both)), c]

    def function(self, rival: str) -> Function:
        criterion = nn.BCEWithLogitsLoss()

        def eager(real: Tensor, fake: Tensor) -> Tensor:
            return criterion(real, torch.ones_like(real)) + criterion(fake, torch.zeros_like(fake))

        if rival == COMPILE:
            eager = compiled(eager)

        def with_stats(real: Tensor, fake: Tensor) -> Outputs:
            loss = eager(real, fake)
            with torch.no_grad():
                d_real, d_fake = torch.sigmoid(real).mean(), torch.sigmoid(fake).mean()
                accuracy = torch.cat([real > 0, fake <= 0]).float().mean()
            return {"loss": loss, "stats": (d_real, d_fake, accuracy)}

        def plain(real: Tensor, fake: Tensor) -> Outputs:
            return {"loss": eager(real, fake)}

        ours, loss = rival.startswith("gankern"), with_stats if rival == STATS else plain

        def run(real: Tensor, fake: Tensor, both: Tensor, c: Tensor) -> Outputs:
            logits = (both,) if rival == VECTOR else (real, fake)
            if ours:
                result = gan_loss(both, n_real=self.batch) if rival == VECTOR else gan_loss(real, fake)
                if self.which == "backward" and rival != LOSS:
                    result.backward()
                    return {"loss": result.value, "stats": result.stats, "grad": _taken(logits)}
                out: Outputs = {"loss": result.loss, "stats": result.stats}
            else:
                out = loss(real, fake)
            value = out["loss"]
            assert isinstance(value, Tensor)
            if self.which == "backward":
                value.backward()
                out["grad"] = _taken(logits)
            elif self.which == "double":
                grads = torch.autograd.grad(value, logits, create_graph=True)
                out["grad"] = grads
                parts = zip(grads, c.split([g.shape[0] for g in grads]), strict=True)
                total = functools.reduce(torch.add, [(g * part).sum() for g, part in parts])
                out["second"] = torch.autograd.grad(total, logits)
            return out

        return run

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(STATS)(*inputs64)

    def context(self, rival: str) -> AbstractContextManager[Any]:
        return super().context(EAGER if rival in (VECTOR, LOSS) else rival)


def _taken(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Their .grad, which is None again afterwards."""
    grads = []
    for leaf in leaves:
        assert leaf.grad is not None
        grads.append(leaf.grad)
        leaf.grad = None
    return tuple(grads)
