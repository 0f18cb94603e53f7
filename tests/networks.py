"""What the tests of gankern.models share: a network fused against itself unfused, and two steps of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from tests.support import DEVICE, assert_equal_derivatives, assert_matches, randn


def made(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """The network in float64 on the test device, always the same one; BatchNorm's weights and biases are no longer 1 and 0."""
    torch.manual_seed(0)
    net = make(*args, **options).double().to(DEVICE)
    for name, p in net.named_parameters():
        if p.dim() == 1:
            p.data += randn(*p.shape, seed=len(name), scale=0.3)
    return net


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def documented(net: nn.Module) -> bool:
    """Whether the docstring of its class gives its number of parameters."""
    return f"{count(net):_}".replace("_", " ") in " ".join((type(net).__doc__ or "").split())


def on_parameters(net: nn.Module, *more: Tensor) -> Callable[..., Tensor]:
    """net as a function of its input and its parameters; `more` are further inputs."""
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    return lambda x, *values: torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x, *more))


def leaves(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters() if p.requires_grad]


def assert_fused_matches(net: nn.Module, x: Tensor, *more: Tensor, ops: list[str], order: int = 1) -> None:
    """gankern.fuse(net) runs exactly these ops, and has net's values, derivatives, state_dict and buffers after a pass."""
    fused, net = gankern.fuse(copy.deepcopy(net)), copy.deepcopy(net)
    assert [row.into for row in gankern.fusion_report(fused).fused] == ops
    assert list(fused.state_dict()) == list(net.state_dict())
    assert_matches(on_parameters(fused, *more), on_parameters(net, *more), [x, *leaves(net)], order)
    for ours, theirs in zip(fused.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def assert_penalty_matches(critic: nn.Module, real: Tensor, fake: Tensor, *cond: Tensor) -> None:
    """The gradient penalty of the fused critic has the value and the parameter gradients of eager PyTorch."""
    fused, critic = gankern.fuse(copy.deepcopy(critic)), copy.deepcopy(critic)
    eps = randn(len(real), seed=7).sigmoid()
    got = gankern.gradient_penalty(fused, real, fake, eps=eps, cond=cond)
    share = eps.view(-1, *[1] * (real.dim() - 1))
    x = (share * real + (1 - share) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x, *cond).sum(), x, create_graph=True)
    want = 10 * (grad.flatten(1).norm(dim=1) - 1).square().mean()
    assert_equal_derivatives(parameter_gradients(got, fused), parameter_gradients(want, critic))


def parameter_gradients(loss: Tensor, net: nn.Module) -> dict[str, Tensor]:
    """The loss, as "y", and its gradients that are not zero, by parameter."""
    names, parameters = zip(*((name, p) for name, p in net.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {name: g for name, g in zip(names, grads, strict=True) if g is not None and bool((g != 0).any())}
    return {"y": loss.detach(), **found}


def assert_trains(generator: nn.Module, critic: nn.Module, real: Tensor, z: Tensor, *labels: Tensor, bf16: bool = False) -> None:
    """Two steps of the fused pair: finite losses, a gradient other than zero in every parameter."""
    pair = generator, critic = gankern.fuse(generator.to(DEVICE)), gankern.fuse(critic.to(DEVICE))
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=1e-3) for net in pair)
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            fake = generator(z, *labels)
            scores = critic(real, *labels), critic(fake.detach(), *labels)
            # the weight keeps both halves from cancelling in bfloat16
            d_loss = F.softplus(-scores[0]).mean() + 0.5 * F.softplus(scores[1]).mean()
        step(opt_d, d_loss, critic)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            g_loss = F.softplus(-critic(fake, *labels)).mean()
        step(opt_g, g_loss, generator)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, net: nn.Module) -> None:
    assert loss.isfinite()
    optimizer.zero_grad()
    loss.backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert (p.grad != 0).any(), name
    optimizer.step()
