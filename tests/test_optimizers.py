"""The optimisers of a step: the numbers of torch.optim's, a rule that can be differentiated, and what a run saves of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern.training import TrainConfig
from gankern.training.optimizers import SGD, Adam, InPlace, RMSprop, make
from tests import small

CASES: dict[str, tuple[Any, Any]] = {
    "adam": (lambda p, **c: Adam(p, 1e-2, (0.5, 0.9), **c), lambda p: torch.optim.Adam(p, 1e-2, (0.5, 0.9), fused=True)),
    "sgd": (lambda p, **c: SGD(p, 1e-2, **c), lambda p: torch.optim.SGD(p, 1e-2, fused=True)),
    "momentum": (lambda p, **c: SGD(p, 1e-2, 0.9, **c), lambda p: torch.optim.SGD(p, 1e-2, 0.9, fused=True)),
    "rmsprop": (lambda p, **c: RMSprop(p, 1e-2, **c), lambda p: torch.optim.RMSprop(p, 1e-2, foreach=True)),
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if i == 2:
            next(iter(model.parameters())).grad = None  # one without a gradient stays as it is
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch_bit_for_bit(name: str) -> None:
    ours, theirs = CASES[name]
    a, b = net(), net()
    walk(a, ours(a.parameters()), 6), walk(b, theirs(b.parameters()), 6)
    if name == "adam":  # PyTorch counts each parameter's own steps
        assert all(torch.equal(p, q) for p, q in list(zip(a.parameters(), b.parameters(), strict=True))[1:])
    else:
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_capturable_rate_is_heeded(name: str) -> None:
    ours, _ = CASES[name]
    a, b = net(), net()
    plain, capturable = ours(a.parameters()), ours(b.parameters(), capturable=True)
    walk(a, plain, 2), walk(b, capturable, 2)
    rate = capturable.param_groups[0]["lr"]
    for optimizer in (plain, capturable):
        optimizer.set_lr(0.5)
    assert isinstance(rate, Tensor)
    assert capturable.param_groups[0]["lr"] is rate
    walk(a, plain, 2), walk(b, capturable, 2)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", CASES)
def test_state_is_loaded_in_place(name: str) -> None:
    ours, theirs = CASES[name]
    a, b, c = net(), net(), net(5)
    first, torchs, second = ours(a.parameters()), theirs(b.parameters()), ours(c.parameters())
    walk(a, first, 2), walk(b, torchs, 2)
    c.load_state_dict(a.state_dict())
    before = [t for slots in second.slots.values() for t in slots]
    second.load_state_dict(torchs.state_dict() if second.names else first.state_dict())
    walk(a, first, 2), walk(c, second, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert all(x is y for x, y in zip(before, (t for slots in second.slots.values() for t in slots), strict=True))
    if second.names:
        with pytest.raises(ValueError, match="state_dict must hold the state of 4 parameters"):
            second.load_state_dict(theirs(nn.Linear(2, 2).parameters()).state_dict())


@pytest.mark.parametrize("name", CASES)
def test_rule_ahead_is_the_update(name: str) -> None:
    """Three updates foretold from the state after two, which they do not change."""
    model = net().double()
    optimizer: InPlace = CASES[name][0](model.parameters())
    walk(model, optimizer, 2)
    gradients = [[torch.randn_like(p) for p in optimizer.parameters] for _ in range(3)]
    parameters, slots = [p.detach().clone() for p in optimizer.parameters], optimizer.slots
    kept = {k: [t.clone() for t in v] for k, v in slots.items()}
    for i, g in enumerate(gradients):
        parameters, slots = optimizer.ahead(parameters, g, slots, optimizer.count + i + 1)
    assert all(torch.equal(s, t) for k, v in kept.items() for s, t in zip(v, optimizer.slots[k], strict=True))
    for g in gradients:
        for p, value in zip(optimizer.parameters, g, strict=True):
            p.grad = value
        optimizer.update()
    for p, q in zip(parameters, optimizer.parameters, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_rule_ahead_can_be_differentiated(name: str) -> None:
    """Also where the gradients are 0 and have always been, at which the square root has no slope."""
    p = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))
    optimizer: InPlace = CASES[name][0]([p])

    def after(g: Tensor) -> Tensor:
        (moved,), slots = optimizer.ahead([p.detach()], [g], optimizer.slots, optimizer.count + 1)
        return optimizer.ahead([moved], [g * moved], slots, optimizer.count + 2)[0][0]

    g = torch.tensor([0.7, -1.1, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, g)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(after(zero).sum(), zero)[0].isfinite().all()


def test_settings_choose_the_optimiser() -> None:
    config = TrainConfig(optimizer_d="sgd", optimizer_g="rmsprop", momentum=0.8, ttur=4.0, lr_g=1e-3)
    t = small.trainer(small.config("gan", optimizer_d="sgd", optimizer_g="rmsprop", momentum=0.8, ttur=4.0, lr_g=1e-3))
    assert isinstance(t.opt_d, SGD)
    assert isinstance(t.opt_g, RMSprop)
    assert t.opt_d.param_groups[0]["momentum"] == 0.8
    assert (t.opt_d.lr, t.opt_g.lr) == (0.004, 1e-3)
    assert TrainConfig(lr_d=3e-4).rate_d == 3e-4
    assert isinstance(make("adam", net().parameters(), 1e-3, config), Adam)
    assert {"opt_d.0.momentum_buffer", "opt_g.0.square_avg"} <= t.state_dict().keys()
