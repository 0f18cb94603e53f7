"""The batch normalisation modules against PyTorch's own followed by LeakyReLU, alone and in two processes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from tests.support import DEVICE, assert_matches, randn

KINDS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "1d": (gankern.nn.BatchNormLeakyReLU1d, nn.BatchNorm1d, (6, 3)),
    "1d of sequences": (gankern.nn.BatchNormLeakyReLU1d, nn.BatchNorm1d, (6, 3, 5)),
    "2d": (gankern.nn.BatchNormLeakyReLU2d, nn.BatchNorm2d, (4, 3, 2, 5)),
    "3d": (gankern.nn.BatchNormLeakyReLU3d, nn.BatchNorm3d, (4, 3, 2, 2, 3)),
    "sync": (gankern.nn.SyncBatchNormLeakyReLU, nn.SyncBatchNorm, (4, 3, 2, 5)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum, eps": {"momentum": 0.4, "eps": 0.1},
    "plain": {"affine": False},
    "not tracked": {"track_running_stats": False},
}


def pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs, _ = KINDS[kind]
    pair = ours(3, **options, dtype=torch.float64, device=DEVICE), theirs(3, **options, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(*(m.parameters() for m in pair), strict=True)):
            a.copy_(randn(3, seed=i))
            b.copy_(a)
    return pair


def same_state(a: nn.Module, b: nn.Module) -> None:
    assert [*a.state_dict()] == [*b.state_dict()]
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_pytorch_through_training_and_evaluation(backend: str, kind: str, options: str) -> None:
    ours, theirs = pair(kind, **OPTIONS[options])
    same_state(ours, theirs)
    for step in range(3):
        x = (randn(*KINDS[kind][2], seed=step) * (step + 1) + step).requires_grad_()
        y, want = ours(x), F.leaky_relu(theirs(x), 0.2)
        torch.testing.assert_close(y, want)
        wrt = [x, *ours.parameters()], [x, *theirs.parameters()]
        for g, expected in zip(
            torch.autograd.grad(y.square().sum(), wrt[0]), torch.autograd.grad(want.square().sum(), wrt[1]), strict=True
        ):
            torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-9)
        same_state(ours, theirs)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), 0.2))
    same_state(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_module_becomes_one_by_its_class(kind: str) -> None:
    ours, theirs = pair(kind)
    theirs.__class__ = type(ours)
    theirs.negative_slope = 0.2  # type: ignore[assignment]
    x = randn(*KINDS[kind][2], seed=0)
    assert torch.equal(ours(x), theirs(x))
    same_state(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copy_and_pickle(kind: str) -> None:
    ours, theirs = pair(kind)
    x = randn(*KINDS[kind][2], seed=0)
    ours(x)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.negative_slope = 0.1  # type: ignore[assignment]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(twin) is type(ours)
        assert torch.equal(twin.eval()(x), ours.eval()(x))


def test_repr_and_bad_settings() -> None:
    assert "eps=1e-05, momentum=0.1" in repr(gankern.nn.BatchNormLeakyReLU2d(3))
    assert "negative_slope=0.1" in repr(gankern.nn.BatchNormLeakyReLU2d(3, negative_slope=0.1))
    with pytest.raises(ValueError, match=r"^BatchNormLeakyReLU1d: negative_slope must be a finite number >= 0, got -1$"):
        gankern.nn.BatchNormLeakyReLU1d(3, negative_slope=-1)
    with pytest.raises(ValueError, match="expected 4D input"):
        gankern.nn.BatchNormLeakyReLU2d(3)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="x must have more than 1 value per channel when training"):
        gankern.nn.BatchNormLeakyReLU1d(3)(torch.zeros(1, 3))


def test_conversion_keeps_the_activation() -> None:
    net = nn.Sequential(gankern.nn.BatchNormLeakyReLU2d(3, negative_slope=0.3), nn.Sequential(nn.BatchNorm2d(3)), nn.Tanh())
    x, want = randn(4, 3, 2, 2, seed=0, dtype=torch.float32), copy.deepcopy(net)
    got = gankern.nn.SyncBatchNormLeakyReLU.convert_sync_batchnorm(net)
    assert [type(got[0]), type(got[1][0])] == [gankern.nn.SyncBatchNormLeakyReLU, nn.SyncBatchNorm]
    torch.testing.assert_close(got(x), want(x))
    shared = gankern.nn.BatchNormLeakyReLU2d(3)
    twice = gankern.nn.SyncBatchNormLeakyReLU.convert_sync_batchnorm(nn.Sequential(shared, shared))
    assert isinstance(twice[1], gankern.nn.SyncBatchNormLeakyReLU)
    assert twice[0] is twice[1]


# --- two processes --------------------------------------------------------------------------------------------------------------


def loss_and_gradients(module: nn.Module, x: Tensor, c: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """[y, dx, dweight, dbias], and the gradients in x and weight of what a penalty adds: sum of dx² with its graph."""
    x = x.clone().requires_grad_()
    y = module(x)
    wrt = [x, *module.parameters()]
    grads = torch.autograd.grad((y * c).sum(), wrt, create_graph=True)
    seconds = torch.autograd.grad(grads[0].square().sum(), wrt[:2])
    return [y.detach(), *(g.detach() for g in grads)], list(seconds)


def one_of_two(rank: int, folder: str, rows: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    module = pair("sync")[0]
    x, c = (randn(7, 3, 2, 2, seed=i) + i for i in (5, 6))
    own = slice(0, rows) if rank == 0 else slice(rows, 7)
    firsts, seconds = loss_and_gradients(module, x[own], c[own])
    torch.save((firsts, seconds, module.state_dict()), f"{folder}/{rank}")
    module.eval()
    torch.testing.assert_close(
        module(x), F.leaky_relu(F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias), 0.2)
    )
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or DEVICE != "cpu", reason="two gloo processes on the CPU")
@pytest.mark.parametrize("rows", [3, 7], ids=["uneven", "one has nothing"])
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, rows: int) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), rows), nprocs=2)
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    module = pair("sync")[0]
    x, c = (randn(7, 3, 2, 2, seed=i) + i for i in (5, 6))
    (y, dx, *parameters), (ddx, ddweight) = loss_and_gradients(module, x, c)
    for i, want in enumerate((y, dx)):
        torch.testing.assert_close(torch.cat([firsts[i] for firsts, _, _ in parts]), want)
    for i, want in enumerate(parameters):
        torch.testing.assert_close(sum(firsts[2 + i] for firsts, _, _ in parts), want)
    torch.testing.assert_close(torch.cat([seconds[0] for _, seconds, _ in parts]), ddx)
    torch.testing.assert_close(sum(seconds[1] for _, seconds, _ in parts), ddweight)
    for _, _, state in parts:
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name], value)


# --- a critic with batch normalisation ------------------------------------------------------------------------------------------


def test_gradient_penalty_through_a_critic_with_batch_normalisation(backend: str) -> None:
    """Every parameter gradient of adversarial loss + penalty, mean and variance being functions of the samples."""

    def parameters_of(critic: nn.Module) -> list[Tensor]:
        return [*critic.parameters()]

    def critic(ours: bool) -> nn.Module:
        torch.manual_seed(0)
        norms = [gankern.nn.BatchNormLeakyReLU2d(8)] if ours else [nn.BatchNorm2d(8), nn.LeakyReLU(0.2)]
        tail = [gankern.nn.BatchNormLeakyReLU1d(6)] if ours else [nn.BatchNorm1d(6), nn.LeakyReLU(0.2)]
        layers = [nn.Conv2d(2, 8, 3), *norms, nn.Flatten(), nn.Linear(8 * 4, 6), *tail, nn.Linear(6, 1)]
        return nn.Sequential(*layers).to(DEVICE, torch.float64)

    real, fake = randn(9, 2, 4, 4, seed=1), randn(9, 2, 4, 4, seed=2)
    results = []
    for ours in (True, False):
        net = critic(ours)
        x = (0.4 * real + 0.6 * fake).requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        loss = net(fake).mean() - net(real).mean() + 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()
        results.append(
            [
                torch.zeros_like(p) if d is None else d
                for p, d in zip(parameters_of(net), torch.autograd.grad(loss, parameters_of(net), allow_unused=True), strict=True)
            ]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_module_to_third_order(backend: str, mode: bool) -> None:
    """Against formulas in which mean and variance are functions of x; PyTorch's own third derivative in training is another."""
    module = pair("2d")[0].train(mode)

    def definition(x: Tensor) -> Tensor:
        dims, shape = (0, 2, 3), (1, 3, 1, 1)
        mean = x.mean(dims) if mode else torch.zeros(3, dtype=x.dtype, device=x.device)
        var = (x - mean.view(shape)).square().mean(dims) if mode else torch.ones_like(mean)
        z = (x - mean.view(shape)) / (var.view(shape) + module.eps).sqrt() * module.weight.view(shape) + module.bias.view(shape)
        return F.leaky_relu(z, 0.2)

    assert_matches(module, definition, (randn(4, 3, 2, 5, seed=0),), order=3)
