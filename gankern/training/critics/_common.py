"""What the critics share: the names of the penalties, the sum of a loss and a term, the points on the line, frozen parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.losses import GANLoss
from gankern.nn.minibatch import MinibatchDiscrimination, MinibatchDistance, MinibatchStdDev
from gankern.ops.gan_loss import GanLoss
from gankern.training import distributed

# layers in which the samples of a batch see each other
MINIBATCH = (MinibatchDiscrimination, MinibatchDistance, MinibatchStdDev)
_MIXING = (_BatchNorm, *MINIBATCH)

# The settings of gankern.gradient_penalty for each name of --penalty.
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "gp": {"sample": "line", "target": 1.0},
    "lp": {"sample": "line", "target": 1.0, "sided": "one"},
    "0gp": {"sample": "line", "target": 0.0},
    "dragan": {"sample": "dragan", "target": 1.0},
    "r1": {"sample": "real", "target": 0.0},
    "r2": {"sample": "fake", "target": 0.0},
    "r1r2": {"sample": "both", "target": 0.0},
}


class Loss(Protocol):
    @property
    def value(self) -> Tensor: ...
    @property
    def d_real(self) -> Tensor: ...
    @property
    def d_fake(self) -> Tensor: ...
    @property
    def loss(self) -> Tensor: ...
    def backward(self) -> None: ...


class Critic(ABC):
    """A way to ask the critic; the module's docstring in `__init__.py` says what the two methods are.

    learns: whether the objective trains the critic; False: no update of it is made at all.
    loss: the GANLoss of an objective of logits.
    """

    learns = True
    loss: Any = None

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss: ...

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss: ...

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the network, the tensors themselves: they are changed and loaded in place."""
        return {}


class Gathered(GANLoss):
    """GANLoss of the logits of all processes, for objectives that are no mean over samples."""

    def discriminator(self, real: Tensor, fake: Tensor) -> GanLoss:
        return super().discriminator(distributed.gather(real), distributed.gather(fake))

    def discriminator_from(self, logits: Tensor, n_real: int) -> GanLoss:
        return self.discriminator(logits[:n_real], logits[n_real:])

    def generator(self, fake: Tensor, real: Tensor | None = None) -> GanLoss:
        return super().generator(distributed.gather(fake), None if real is None else distributed.gather(real))


class Computed(NamedTuple):
    """A loss [] with its graph, and two detached statistics []."""

    loss: Tensor
    d_real: Tensor
    d_fake: Tensor

    @property
    def value(self) -> Tensor:
        return self.loss.detach()

    def backward(self) -> None:
        self.loss.backward()


class WithTerm:
    """A loss and a term more, in one backward pass: a critic's penalty, or what a technique adds to the generator's loss."""

    def __init__(self, out: Loss, term: Tensor) -> None:
        self.out, self.term = out, term

    @property
    def value(self) -> Tensor:
        return self.out.value + self.term.detach()

    @property
    def d_real(self) -> Tensor:
        return self.out.d_real

    @property
    def d_fake(self) -> Tensor:
        return self.out.d_fake

    @property
    def loss(self) -> Tensor:
        return self.out.loss + self.term

    def backward(self) -> None:
        self.loss.backward()


def mixes(net: nn.Module) -> bool:
    """Whether the samples of a batch see each other in this network, so that real and fake may not share a pass."""
    return any(isinstance(m, _MIXING) for m in net.modules())


def draw_eps(real: Tensor, rng: torch.Generator) -> Tensor:
    """Where between real and fake each sample is penalised: [B], uniform in [0, 1)."""
    return distributed.draw(lambda n: torch.rand(n, device=real.device, dtype=real.dtype, generator=rng), len(real))


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, graphs are built as if these parameters were constants: no gradient is computed for them.

    `backward(inputs=...)` asks native layers for no more, and was measured as fast, but an autograd Function in Python still
    computes its bias gradient then.
    """
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
