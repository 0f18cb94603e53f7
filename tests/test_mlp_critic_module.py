"""MLPCritic and the recognition of plain nn.Sequential critics."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import gankern
from gankern.models.mlp import MLPDiscriminator
from gankern.nn import LinearLeakyReLU, MLPCritic, mlp_layers, mlp_problem
from tests.support import DEVICE, need, randn


def plain(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout(dropout),
        nn.Linear(8, 5),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Linear(5, 1, bias=False)).to(DEVICE, torch.float64)


def wgan_gp(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """What a user of plain PyTorch writes."""
    x = (eps * real.flatten(1) + (1 - eps) * fake.flatten(1)).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    adversarial = gankern.gan_loss(critic(real).flatten(), critic(fake).flatten()).loss
    return adversarial + 10 * (g.norm(2, dim=1) - 1).square().mean()


def test_a_plain_critic_has_the_gradients_of_autograd(backend: str) -> None:
    critic = plain()
    real, fake, eps = randn(6, 3, 4, seed=1), randn(6, 3, 4, seed=2), randn(6, 1, seed=3).sigmoid()
    want = wgan_gp(critic, real, fake, eps)
    grads = torch.autograd.grad(want, list(critic.parameters()))
    ours = MLPCritic(critic)
    assert list(ours.state_dict()) == list(critic.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), critic.parameters(), strict=True))
    out = ours.critic_loss(real, fake, penalty_weight=10.0, eps=eps)
    torch.testing.assert_close(out.loss, want)
    out.backward()
    for p, g in zip(critic.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours(real), critic(real))
    x = randn(4, 12, seed=5)
    assert torch.equal(ours.penalty(x).value, gankern.mlp_critic_penalty(x, *mlp_layers(critic)).value)


def test_a_module_that_occurs_twice_counts_twice() -> None:
    """Modules without a state are often shared; nn.Module.named_children names each but once."""
    torch.manual_seed(0)
    activation, square = nn.LeakyReLU(0.2), nn.Linear(12, 12)
    critic = nn.Sequential(square, activation, square, activation, nn.Linear(12, 1)).to(DEVICE, torch.float64)
    assert mlp_layers(critic).slopes == [0.2, 0.2]
    real, fake, eps = randn(6, 12, seed=1), randn(6, 12, seed=2), randn(6, 1, seed=3).sigmoid()
    want = wgan_gp(critic, real, fake, eps)
    grads = torch.autograd.grad(want, list(critic.parameters()))
    ours = MLPCritic(critic)
    assert len(ours) == 5
    out = ours.critic_loss(real, fake, penalty_weight=10.0, eps=eps)
    torch.testing.assert_close(out.loss, want)
    out.backward()
    for p, g in zip(critic.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)


def test_training_with_the_one_pass_is_training_with_autograd(backend: str) -> None:
    losses = []
    for one_pass in (False, True):
        critic = plain()
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
        for step in range(12):
            real, fake, eps = randn(8, 3, 4, seed=9 * step), randn(8, 3, 4, seed=9 * step + 1) + 1, randn(8, 1, seed=step).sigmoid()
            optimizer.zero_grad()
            out = MLPCritic(critic).critic_loss(real, fake, penalty_weight=10.0, eps=eps) if one_pass else None
            loss = wgan_gp(critic, real, fake, eps) if out is None else out.loss
            (loss if out is None else out).backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:12] == pytest.approx(losses[12:], rel=1e-9)


def test_layers_are_read() -> None:
    critic = nn.Sequential(
        OrderedDict(
            a=nn.Linear(7, 6), b=nn.Dropout(0.3), c=nn.LeakyReLU(0.1), d=LinearLeakyReLU(6, 5, negative_slope=0.3, dropout=0.4),
            e=nn.Linear(5, 4), f=nn.Identity(), g=nn.Linear(4, 3), h=nn.ReLU(), i=nn.Linear(3, 1),
        )
    )  # fmt: skip
    layers = mlp_layers(critic)
    assert layers.slopes == [0.1, 0.3, 1.0, 0.0]
    assert layers.dropout == [0.3, 0.4, 0.0, 0.0]
    assert layers.weights[2] is critic.e.weight
    assert mlp_layers(critic.eval()).dropout == [0.0] * 4
    assert mlp_problem(critic) == ""


UNFIT = {
    "Linear": nn.Linear(3, 1),
    "MLPDiscriminator, which has a forward of its own": MLPDiscriminator(),
    "no linear layer": nn.Sequential(),
    r"BatchNorm1d \(1\)": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    r"Tanh \(1\)": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    r"Sigmoid \(1\)": nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()),
    r"LeakyReLU \(0\)": nn.Sequential(nn.LeakyReLU(), nn.Linear(3, 1)),
    r"ReLU \(2\) after another activation": nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.ReLU(), nn.Linear(4, 1)),
    r"LeakyReLU \(1\) of negative slope -1": nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(-1), nn.Linear(4, 1)),
    r"Dropout \(0\) before the first layer": nn.Sequential(nn.Dropout(), nn.Linear(3, 1)),
    r"Dropout \(2\) after another dropout": nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Dropout(), nn.Linear(4, 1)),
    "an activation or dropout after the last layer": nn.Sequential(nn.Linear(3, 4), LinearLeakyReLU(4, 1)),
    "2 outputs, not one": nn.Sequential(nn.Linear(3, 2)),
    r"Linear \(0\) with hooks": nn.Sequential(weight_norm(nn.Linear(3, 1))),
    r"Flatten \(1\)": nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_said(what: str) -> None:
    sentence = "^mlp_critic: critic must be an nn.Sequential of linear, LeakyReLU, ReLU and dropout layers, got " + what + "$"
    with pytest.raises(ValueError, match=sentence):
        mlp_layers(UNFIT[what])
    if isinstance(UNFIT[what], nn.Sequential) and type(UNFIT[what]) is nn.Sequential:
        with pytest.raises(ValueError, match=sentence):
            MLPCritic(UNFIT[what])


def test_hooks_are_not_passed_over() -> None:
    critic = plain()
    handle = critic.register_forward_hook(lambda *_: None)
    assert mlp_problem(critic) == "one with hooks"
    handle.remove()
    assert mlp_problem(critic) == ""


def test_a_discriminator_of_this_package_fits_by_its_layers() -> None:
    discriminator = MLPDiscriminator(widths=(16, 8), dropout=0.3)
    critic = MLPCritic(discriminator)
    real, fake = torch.rand(4, 1, 28, 28), torch.rand(4, 1, 28, 28)
    critic.critic_loss(real, fake, penalty_weight=10.0).backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    copied = copy.deepcopy(critic.eval())
    torch.testing.assert_close(copied(real).squeeze(1), discriminator.eval()(real))


def test_spectral_norm_passes_the_gradient_through() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(parametrizations.spectral_norm(nn.Linear(7, 6)), nn.ReLU(), nn.Linear(6, 1)).double().eval()
    real, fake, eps = (t.cpu() for t in (randn(6, 7, seed=1), randn(6, 7, seed=2), randn(6, 1, seed=3).sigmoid()))
    parameters = list(critic.parameters())
    want = torch.autograd.grad(wgan_gp(critic, real, fake, eps), parameters)
    MLPCritic(critic).critic_loss(real, fake, penalty_weight=10.0, eps=eps).backward()
    for p, g in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)


def distributed_step(rank: int, folder: str, name: str) -> None:
    """One of two processes: half of the batch through DistributedDataParallel, two steps of SGD."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    critic = MLPCritic(plain())
    ddp, optimizer = nn.parallel.DistributedDataParallel(critic), torch.optim.SGD(critic.parameters(), 0.1)
    half = slice(4 * rank, 4 * rank + 4)
    with gankern.use_backend(name):
        for real, fake, eps in batches():
            optimizer.zero_grad()
            out = ddp(real[half], fake[half], "wgan", penalty_weight=10.0, eps=eps[half])
            out.backward()
            optimizer.step()
    torch.save([[p.grad for p in critic.parameters()], list(critic.parameters())], f"{folder}/{rank}")
    del ddp  # before the process group: its reducer must not be the last to let go of it
    dist.destroy_process_group()


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(randn(8, 3, 4, seed=i), randn(8, 3, 4, seed=i + 1) + 1, randn(8, 1, seed=i + 2).sigmoid()) for i in (0, 3)]


@pytest.mark.skipif(not torch.distributed.is_available() or DEVICE != "cpu", reason="two gloo processes on the CPU")
@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_two_processes_have_the_gradients_of_one_at_the_global_batch(name: str, tmp_path: Path) -> None:
    need(name)
    torch.multiprocessing.spawn(distributed_step, (str(tmp_path), name), nprocs=2)
    critic = MLPCritic(plain())
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    for real, fake, eps in batches():
        optimizer.zero_grad()
        critic(real, fake, "wgan", penalty_weight=10.0, eps=eps).backward()
        optimizer.step()
    for rank in range(2):
        grads, parameters = torch.load(tmp_path / str(rank))
        for got, value, p in zip(grads, parameters, critic.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(value.data, p.data, rtol=1e-11, atol=1e-13)
