"""Unrolled: the generator's loss as the critic will see it after K updates more, differentiated through all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gankern.training import distributed
from gankern.training.critics._common import Computed, Critic, Loss
from gankern.training.optimizers import InPlace


class Unrolled(Critic):
    """The critic's update is `critic`'s own; the generator minimises f(theta_G, theta_D^K(theta_G, theta_D)).

    theta_D^0 are the critic's parameters and theta_D^(k+1) is what one update by `optimizer` makes of theta_D^k, from the critic's
    objective on the same real samples and fakes, penalty and all; the fakes are attached, so that the gradient goes through all K
    updates. What the optimiser has averaged so far is where its rule begins. Parameters, optimiser and buffers (running means,
    vectors of spectral norm, which have no derivative here either) stay what they are. The targets are those of the critic's last
    update; the penalty's points are drawn for each of the K updates; dropout draws anew at each pass.

    In a zero-sum game f is minus the critic's whole objective, without its penalty and with the labels 1 and 0: what the real
    samples pay depends on theta_G here, through theta_D^K. Elsewhere, and where the critic tells classes too, f is the
    generator's own loss.

    Args:
        critic: asked for the critic's own update.
        inner: the same objective by autograd; may be `critic` itself.
        net: of both.
        optimizer: of its parameters.
        steps: K >= 1.
        value: of a zero-sum game: what gives its value as the critic's loss; None: the game is none.
        clip: limit of the weights after an update (`clip_weights`), 0: none.

    Source: Metz, Poole, Pfau, Sohl-Dickstein, "Unrolled generative adversarial networks", ICLR 2017, section 2 and the authors'
    notebook, where the K updates see the samples of the step too.
    """

    def __init__(
        self,
        critic: Critic,
        inner: Critic,
        net: nn.Module,
        optimizer: InPlace,
        steps: int,
        value: Critic | None = None,
        clip: float = 0.0,
    ) -> None:
        self.critic, self.inner, self.value = critic, inner, value
        self.optimizer, self.steps, self.clip = optimizer, steps, clip
        self.loss, self.within = critic.loss, _Within(net)
        self.names = [name for name, p in self.within.named_parameters() if p.requires_grad]

    def state(self) -> dict[str, Tensor]:
        return self.critic.state()

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        return self.critic.discriminator(real, fake, *labels)

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        optimizer, slots = self.optimizer, self.optimizer.slots
        parameters: list[Tensor] = [p.detach().requires_grad_() for p in optimizer.parameters]
        buffers = {name: b.clone() for name, b in self.within.named_buffers()}

        def ask(side: Callable[..., Loss], *samples: Tensor) -> Loss:
            return functional_call(self.within, buffers | dict(zip(self.names, parameters, strict=True)), (side, *samples, *labels))

        for step in range(1, self.steps + 1):
            loss = ask(self.inner.discriminator, real, fake).loss
            gradients = _averaged(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
            parameters, slots = optimizer.ahead(parameters, gradients, slots, optimizer.count + step)
            if self.clip:
                parameters = [p.clamp(-self.clip, self.clip) for p in parameters]
        if self.value is None:
            return ask(self.inner.generator, fake, real)
        out = ask(self.value.discriminator, real, fake)
        return Computed(-out.loss, out.d_real, out.d_fake)


def _averaged(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Their means over the processes, with their graphs."""
    if not distributed.joined():
        return gradients
    parts = distributed.mean(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]


class _Within(nn.Module):
    """A network as a module whose call runs any function, which `functional_call` gives other parameters to work with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
