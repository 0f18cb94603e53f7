"""One small run of each op: what `gankern doctor` tells, and compares with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gankern
from gankern.ops import (
    bias_lrelu,
    bn_lrelu,
    gan_loss,
    gradient_norm_penalty,
    interpolate,
    linear_lrelu,
    mlp_critic,
    pairwise,
    spectral_norm,
)


class Probe(NamedTuple):
    """chosen: what the op runs on without being forced. run: outputs and gradients; None for a second row of one op."""

    chosen: Callable[[torch.device], str]
    run: Callable[[torch.device], list[Tensor]] | None


def _ramp(*shape: int, device: torch.device) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1.0, 1.0, count, device=device).reshape(shape).requires_grad_()


def _with_gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def _linear_lrelu(device: torch.device) -> list[Tensor]:
    x, weight = _ramp(16, 32, device=device), _ramp(32, 32, device=device)
    return _with_gradients(gankern.linear_lrelu(x, weight, weight[:, 0]), x, weight)


def _bias_lrelu(device: torch.device) -> list[Tensor]:
    x, bias = _ramp(4, 6, 5, 5, device=device), _ramp(6, device=device)
    return _with_gradients(gankern.bias_lrelu(x, bias), x, bias)


def _bn_lrelu(device: torch.device) -> list[Tensor]:
    x, weight, bias = _ramp(4, 6, 5, 5, device=device), _ramp(6, device=device), _ramp(6, device=device)
    return _with_gradients(gankern.bn_lrelu(x, None, None, weight, bias, training=True), x, weight, bias)


def _gan_loss(device: torch.device) -> list[Tensor]:
    a = _ramp(32, device=device)
    return _with_gradients(gankern.gan_loss(a, n_real=8).loss, a)


def _interpolate(device: torch.device) -> list[Tensor]:
    real, fake = _ramp(8, 12, device=device), _ramp(8, 3, 4, device=device).sin().reshape(8, 12)
    return _with_gradients(gankern.interpolate(real, fake, torch.linspace(0.0, 1.0, 8, device=device)), real, fake)


def _gradient_norm_penalty(device: torch.device) -> list[Tensor]:
    grad = _ramp(8, 3, 4, device=device)
    return _with_gradients(gankern.gradient_norm_penalty(grad).value, grad)


def _critic(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    weights = [_ramp(16, 12, device=device), _ramp(1, 16, device=device)]
    return weights, [_ramp(16, device=device), _ramp(1, device=device)]


def _mlp_critic(device: torch.device) -> list[Tensor]:
    weights, biases = _critic(device)
    real, eps = _ramp(8, 12, device=device).detach(), torch.linspace(0.0, 1.0, 8, device=device)
    out = gankern.mlp_critic(real, real.sin(), weights, biases, penalty_weight=10.0, eps=eps)
    side = gankern.mlp_critic_generator(real.sin().requires_grad_(), weights, biases)
    return [out.value, side.value, *(g for g in (*out.grads, *side.grads) if g is not None)]


def _spectral_norm(device: torch.device) -> list[Tensor]:
    weights = [(_ramp(n, 12, device=device) + 1.5).detach().requires_grad_() for n in (16, 1)]  # far from u W = 0
    u, v = ([torch.ones(w.shape[i], device=device) / w.shape[i] ** 0.5 for w in weights] for i in (0, 1))
    return _with_gradients(torch.cat([y.flatten() for y in spectral_norm.spectral_norm(weights, u, v, [0, 0])]), *weights)


def _minibatch_features(device: torch.device) -> list[Tensor]:
    m = _ramp(8, 4, 3, device=device)
    return _with_gradients(gankern.minibatch_features(m), m)


def _mmd2(device: torch.device) -> list[Tensor]:
    real, fake = _ramp(300, 4, device=device), _ramp(200, 4, device=device)
    return _with_gradients(gankern.mmd2(real, fake), real, fake)


PROBES = {
    "linear_lrelu": Probe(lambda device: linear_lrelu._choose(device.type, 0.0, 2**16), _linear_lrelu),
    "  with dropout": Probe(lambda device: linear_lrelu._choose(device.type, 0.5, 2**16), None),
    "bias_lrelu": Probe(lambda device: bias_lrelu._choose(_ramp(16, 64, 16, 16, device=device), None), _bias_lrelu),
    "bn_lrelu": Probe(lambda device: bn_lrelu._choose(_ramp(16, 64, 16, 16, device=device)), _bn_lrelu),
    "gan_loss": Probe(lambda device: gan_loss._choose(_ramp(32, device=device)), _gan_loss),
    "interpolate": Probe(lambda device: interpolate._choose(_ramp(8, 12, device=device)), _interpolate),
    "gradient_norm_penalty": Probe(
        lambda device: gradient_norm_penalty._choose(_ramp(8, 12, device=device)), _gradient_norm_penalty
    ),
    "mlp_critic": Probe(lambda device: mlp_critic._choose(device.type), _mlp_critic),
    "spectral_norm": Probe(lambda device: spectral_norm._choose(device.type), _spectral_norm),
    "minibatch_features": Probe(lambda device: pairwise._choose(device.type), _minibatch_features),
    "mmd2": Probe(lambda device: pairwise._choose(device.type), _mmd2),
}
