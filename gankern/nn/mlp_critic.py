"""The one-pass critic for modules: which nn.Sequential it fits, the loss of such a critic, and MLPCritic."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gankern import checks
from gankern.nn._chain import FusedSequential
from gankern.nn.linear import LinearLeakyReLU
from gankern.ops._critic_loss import MLPCriticLoss
from gankern.ops.mlp_critic import mlp_critic, mlp_critic_generator, mlp_critic_penalty

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class MLPLayers(NamedTuple):
    """A critic's layers, as `gankern.mlp_critic` takes them: `mlp_critic(real, fake, *mlp_layers(critic))`."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    slopes: list[float]
    dropout: list[float]


def mlp_problem(critic: nn.Module) -> str:
    """Why the one-pass critic does not fit this module, in words, or "" if it does."""
    return _read(critic)[1]


def mlp_layers(critic: nn.Module) -> MLPLayers:
    """The layers of a critic that is an nn.Sequential of nn.Linear (or gankern.nn.LinearLeakyReLU), nn.LeakyReLU or nn.ReLU, and
    nn.Dropout, ending with an nn.Linear of one output; nn.Flatten may begin it, nn.Identity is nothing. Dropout has the
    probability of the module, and 0 where that is in eval mode. Parametrised layers (spectral norm) are taken as they are.

    Raises:
        ValueError: anything else; the sentence says what.
    """
    layers, problem = _read(critic)
    if problem:
        checks.fail(
            ValueError, "mlp_critic", "critic", "be an nn.Sequential of linear, LeakyReLU, ReLU and dropout layers", problem
        )
    return layers


def plain_layers(critic: nn.Sequential, x: Tensor) -> MLPLayers | None:
    """The layers of a critic if they are all that it does with x, else None: for a function that runs them in the critic's place.

    Dropout and parametrised layers are then none of it: a mask drawn, or a weight read, twice would not be the same.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    layers, problem = _read(critic, plain=True)
    if problem or any(layers.dropout) or not any(w.requires_grad for w in layers.weights):
        return None
    flat = x.dim() == 2 or isinstance(critic, MLPCritic) or any(type(module) is nn.Flatten for module in critic)
    if x.dim() < 2 or not flat or math.prod(x.shape[1:]) != layers.weights[0].shape[1]:
        return None
    tensors = (*layers.weights, *layers.biases)
    return layers if all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in tensors) else None


def _read(critic: nn.Module, plain: bool = False) -> tuple[MLPLayers, str]:
    layers, open_layer = MLPLayers([], [], [], []), False  # open: no activation yet
    if not isinstance(critic, nn.Sequential):
        return layers, type(critic).__name__
    if type(critic).forward not in (nn.Sequential.forward, FusedSequential.forward, MLPCritic.forward):
        return layers, f"{type(critic).__name__}, which has a forward of its own"
    if _has_hooks(critic):
        return layers, "one with hooks"
    dropped = False
    name: str
    module: Any
    for name, module in critic._modules.items():  # named_children leaves out a module that is used a second time
        kind, what = _kind(module), f"{type(module).__name__} ({name})"
        if kind is nn.Identity:
            continue
        if _has_hooks(module):
            return layers, f"{what} with hooks"
        if plain and kind is not type(module):
            return layers, f"{what}, parametrised"
        if kind is nn.Flatten and not layers.weights and (module.start_dim, module.end_dim) == (1, -1):
            continue
        if kind in (nn.Linear, LinearLeakyReLU):
            layers.weights.append(module.weight)
            layers.biases.append(module.bias)
            fused = kind is LinearLeakyReLU
            layers.slopes.append(float(module.negative_slope) if fused else 1.0)
            layers.dropout.append(float(module.dropout) if fused and module.training else 0.0)
            open_layer, dropped = not fused, fused and module.dropout > 0.0
        elif kind in (nn.LeakyReLU, nn.ReLU) and layers.weights:
            slope = float(module.negative_slope) if kind is nn.LeakyReLU else 0.0
            if not open_layer or slope < 0.0:
                return layers, f"{what} " + ("after another activation" if not open_layer else f"of negative slope {slope:g}")
            layers.slopes[-1], open_layer = slope, False
        elif kind is nn.Dropout and layers.weights and not dropped:
            layers.dropout[-1], dropped = float(module.p) if module.training else 0.0, True
        else:
            where = "" if kind is not nn.Dropout else " after another dropout" if layers.weights else " before the first layer"
            return layers, f"{what}{where}"
    if not layers.weights:
        return layers, "no linear layer"
    if not open_layer or dropped:
        return layers, "an activation or dropout after the last layer"
    if layers.weights[-1].shape[0] != 1:
        return layers, f"{layers.weights[-1].shape[0]} outputs, not one"
    layers.slopes.pop()
    layers.dropout.pop()
    return layers, ""


def _kind(module: nn.Module) -> Any:
    """Its class, or of a parametrised module the class that it had before."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module)


class MLPCritic(nn.Sequential):
    """An MLP critic whose whole objective is one pass: `critic.critic_loss(real, fake).backward()` in place of forward passes,
    penalty and `loss.backward()`. In all else the nn.Sequential of its layers: same forward, parameters and state_dict.

        critic = MLPCritic(nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1))
        out = critic.critic_loss(real, fake, "wgan", penalty_weight=10.0)
        out.backward()

    Under DistributedDataParallel call the wrapped critic with both halves, which is `critic_loss`: `ddp(real, fake, "wgan",
    penalty_weight=10.0).backward()`. Equal batches on all ranks give the gradients of one process at the global batch (but for an
    objective that takes averages over the batch inside its terms, relativistic-average).

    Args:
        layers: as `gankern.nn.mlp_layers` reads them, or one nn.Sequential, whose modules and keys are taken over (and shared).

    Shape: [B, *] -> [B, 1]; * is flattened. With a second tensor, real [B, *] and fake [B, *] -> MLPCriticLoss.

    Raises:
        ValueError: layers that the one pass does not fit.
    """

    def __init__(self, *layers: nn.Module) -> None:
        if len(layers) == 1 and isinstance(layers[0], nn.Sequential):
            super().__init__(OrderedDict(layers[0]._modules))
        else:
            super().__init__(*layers)
        mlp_layers(self)

    def forward(self, input: Tensor, fake: Tensor | None = None, *settings: Any, **options: Any) -> Any:
        if fake is not None:
            return self.critic_loss(input, fake, *settings, **options)
        return super().forward(input.flatten(1), *settings, **options)

    def critic_loss(self, real: Tensor, fake: Tensor, objective: str = "non-saturating", **options: Any) -> MLPCriticLoss:
        """`gankern.mlp_critic` with this critic's layers; `options` are its keyword arguments from `real_label` on."""
        return mlp_critic(real, fake, *mlp_layers(self), objective=objective, **options)

    def generator_loss(
        self, fake: Tensor, objective: str = "non-saturating", real: Tensor | None = None, **options: Any
    ) -> MLPCriticLoss:
        """`gankern.mlp_critic_generator` with this critic's layers: only `fake` gets a gradient, the critic none.

        `options` are its keyword arguments `real_label` and `generator`.
        """
        return mlp_critic_generator(fake, *mlp_layers(self), objective=objective, real=real, **options)

    def penalty(self, x_hat: Tensor, **options: Any) -> MLPCriticLoss:
        """`gankern.mlp_critic_penalty` with this critic's layers; `options` are its keyword arguments from `weight` on."""
        return mlp_critic_penalty(x_hat, *mlp_layers(self), **options)
