"""OnePass: the critic that is an MLP, without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern.losses import GANLoss
from gankern.nn.mlp_critic import MLPLayers, mlp_layers, mlp_problem
from gankern.ops.mlp_critic import mlp_critic, mlp_critic_generator
from gankern.training.critics._common import PENALTIES, Critic, Loss, draw_eps

_SETTINGS = ("p", "dropout", "negative_slope")  # of a module, that `mlp_layers` reads besides its mode and parameters


def fits(net: nn.Module, penalty: str) -> bool:
    """Whether the critic is an MLP all of whose parameters are its `layers`, and the penalty is one that the pass knows."""
    layers = getattr(net, "layers", None)
    return (
        isinstance(layers, nn.Sequential)
        and hasattr(net, "inputs")
        and not mlp_problem(layers)
        and len(list(layers.parameters())) == len(list(net.parameters()))
        and penalty != "dragan"
    )


class OnePass(Critic):
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
