"""How the critic is asked: its loss with its penalty, and the generator's loss through it.

Each of the two ways, `Autograd` and `OnePass`, has
    discriminator(real, fake, *labels)   the critic's objective; `.backward()` gives its parameters their gradients
    generator(fake, real, *labels)       the generator's; `.backward()` gives the graph of `fake` its gradient
and both return what has `backward`, `value`, `d_real` and `d_fake`, detached scalars. `labels`: nothing, or the classes [B] of a
conditional critic. `choose` takes the one pass wherever it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.losses import GANLoss
from gankern.nn.mlp_critic import MLPLayers, mlp_layers, mlp_problem
from gankern.ops.gan_loss import GanLoss
from gankern.ops.mlp_critic import mlp_critic, mlp_critic_generator
from gankern.regularizers import gradient_penalty

# The settings of gankern.gradient_penalty for each name of --penalty.
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "gp": {"sample": "line", "target": 1.0},
    "lp": {"sample": "line", "target": 1.0, "sided": "one"},
    "0gp": {"sample": "line", "target": 0.0},
    "dragan": {"sample": "dragan", "target": 1.0},
    "r1": {"sample": "real", "target": 0.0},
    "r2": {"sample": "fake", "target": 0.0},
}


_SETTINGS = ("p", "dropout", "negative_slope")  # of a module, that `mlp_layers` reads besides its mode and parameters


class Loss(Protocol):
    @property
    def value(self) -> Tensor: ...
    @property
    def d_real(self) -> Tensor: ...
    @property
    def d_fake(self) -> Tensor: ...
    def backward(self) -> None: ...


class Critic(Protocol):
    loss: GANLoss

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss: ...
    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss: ...


def choose(
    net: nn.Module, loss: GANLoss, penalty: str, penalty_weight: float, rng: torch.Generator, one_pass: bool | None = None
) -> Critic:
    """The one pass if the critic is an MLP all of whose parameters are its `layers`, and the penalty is one that it knows."""
    layers = getattr(net, "layers", None)
    if (
        isinstance(layers, nn.Sequential)
        and hasattr(net, "inputs")
        and not mlp_problem(layers)
        and len(list(layers.parameters())) == len(list(net.parameters()))
        and penalty != "dragan"
        and one_pass is not False
    ):
        return OnePass(net, loss, penalty, penalty_weight, rng)
    return Autograd(net, loss, penalty, penalty_weight, rng, one_pass)


def batched(net: nn.Module) -> bool:
    """Whether the samples of a batch see each other, by a BatchNorm."""
    return any(isinstance(m, _BatchNorm) for m in net.modules())


class Autograd:
    """By autograd, for any network. Real and fake go through it in one pass where that changes nothing."""

    def __init__(
        self, net: nn.Module, loss: GANLoss, penalty: str, penalty_weight: float, rng: torch.Generator, one_pass: bool | None = None
    ) -> None:
        self.net, self.loss, self.rng = net, loss, rng
        self.penalty: dict[str, Any] = PENALTIES[penalty] and {**PENALTIES[penalty], "weight": penalty_weight}
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.one_pass = not batched(net) if one_pass is None else one_pass

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        if self.one_pass:
            logits = self.net(torch.cat([real, fake]), *(torch.cat([c, c]) for c in labels))
            out = self.loss.discriminator_from(logits, logits.numel() * len(real) // (len(real) + len(fake)))
        else:
            out = self.loss.discriminator(self.net(real, *labels), self.net(fake, *labels))
        if not self.penalty:
            return out
        net: nn.Module = self.net
        if not labels and hasattr(net, "inputs"):  # a critic of packs has an input gradient for each pack
            net, real, fake = net.layers, net.inputs(real), net.inputs(fake)  # type: ignore[assignment,operator]
        eps = draw_eps(real, self.rng) if self.penalty["sample"] == "line" else None
        penalty = gradient_penalty(net, real, fake, cond=labels or None, eps=eps, generator=self.rng, **self.penalty)
        return Penalised(out, penalty)

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        with frozen(self.parameters):
            reference = self.net(real, *labels) if self.loss.relativistic else None
            return self.loss.generator(self.net(fake, *labels), reference)


class Penalised:
    """A critic's loss and its penalty, in one backward pass."""

    def __init__(self, out: GanLoss, penalty: Tensor) -> None:
        self.out, self.penalty = out, penalty

    @property
    def value(self) -> Tensor:
        return self.out.value + self.penalty.detach()

    @property
    def d_real(self) -> Tensor:
        return self.out.d_real

    @property
    def d_fake(self) -> Tensor:
        return self.out.d_fake

    def backward(self) -> None:
        (self.out.loss + self.penalty).backward()


class OnePass:
    """By `gankern.mlp_critic`: value, penalty and every gradient without a graph, in 4 L - 1 products for L layers."""

    def __init__(self, net: nn.Module, loss: GANLoss, penalty: str, penalty_weight: float, rng: torch.Generator) -> None:
        self.net, self.loss, self.rng = net, loss, rng
        self.penalty: dict[str, Any] = PENALTIES[penalty] and {**PENALTIES[penalty], "penalty_weight": penalty_weight}
        self._modules = list(net.layers.modules())  # type: ignore[union-attr]
        self._known: tuple[Any, MLPLayers] | None = None

    def layers(self) -> MLPLayers:
        """Read once, and again when a module has changed; at each call where a weight is made anew (spectral norm).

        The look at the modules costs a sixth of the reading.
        """
        now = [
            (m.training, [m.__dict__.get(name) for name in _SETTINGS], list(map(id, m._parameters.values()))) for m in self._modules
        ]
        if self._known is None or self._known[0] != now:
            layers = mlp_layers(self.net.layers)  # type: ignore[arg-type]
            if not all(isinstance(w, nn.Parameter) for w in layers.weights):
                return layers
            self._known = now, layers
        return self._known[1]

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        loss, rows = self.loss, self.net.inputs(real, *labels)  # type: ignore[operator]
        return mlp_critic(
            rows,
            self.net.inputs(fake, *labels).to(rows.dtype),  # type: ignore[operator]
            *self.layers(),
            objective=loss.objective,
            real_label=loss.real_label,
            fake_label=loss.fake_label,
            eps=draw_eps(rows, self.rng) if self.penalty.get("sample") == "line" else None,
            **self.penalty,
        )

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        loss, rows = self.loss, self.net.inputs(fake, *labels)  # type: ignore[operator]
        reference = self.net.inputs(real, *labels).to(rows.dtype) if loss.relativistic else None  # type: ignore[operator]
        return mlp_critic_generator(rows, *self.layers(), objective=loss.objective, real=reference, real_label=loss.generator_label)


def draw_eps(real: Tensor, rng: torch.Generator) -> Tensor:
    """Where between real and fake each sample is penalised: [B], uniform in [0, 1)."""
    return torch.rand(len(real), device=real.device, dtype=real.dtype, generator=rng)


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
