"""gankern.nn.spectral_norm and spectral_norm_ against PyTorch's own spectral norm, layer by layer and in training."""

from __future__ import annotations

import copy
import math
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import gankern
from tests.support import DEVICE

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(5, 7),
    "LinearLeakyReLU": lambda: gankern.nn.LinearLeakyReLU(5, 7),
    "Conv1d": lambda: nn.Conv1d(3, 4, 3),
    "Conv2d": lambda: nn.Conv2d(3, 4, 3),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(3, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "Embedding": lambda: nn.Embedding(6, 4),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
}


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations["weight"].original


def pair(make: Callable[[], nn.Module], **options: object) -> tuple[nn.Module, nn.Module]:
    """The same float64 layer under ours and under PyTorch's, from the same seed."""
    layers = []
    for wrap in (gankern.nn.spectral_norm, torch_spectral_norm):
        torch.manual_seed(3)
        layers.append(wrap(make().to(DEVICE).double(), **options))
    return layers[0], layers[1]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert [*got] == [*want]
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# --- one layer ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-4}, {"dim": 1}, {"dim": -1}], ids=str)
def test_layer_is_torchs(backend: str, name: str, options: dict[str, object]) -> None:
    ours, theirs = pair(LAYERS[name], **options)
    assert_same_state(ours, theirs)
    for step in range(4):
        ours.train(step != 2)
        theirs.train(step != 2)
        a, b = ours.weight, theirs.weight
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        got, want = (torch.autograd.grad(w.pow(3).sum(), original(m))[0] for w, m in ((a, ours), (b, theirs)))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert_same_state(ours, theirs)


def test_vector_is_divided_by_its_length(backend: str) -> None:
    ours, theirs = pair(lambda: nn.Linear(5, 7), name="bias")
    torch.testing.assert_close(ours.bias, theirs.bias)
    torch.testing.assert_close(ours.bias, F.normalize(ours.parametrizations["bias"].original, dim=0))
    assert_same_state(ours, theirs)


def test_checkpoints_fit_both_ways(backend: str, tmp_path: Path) -> None:
    ours, theirs = pair(LAYERS["Conv2d"])
    for source, target in ((ours, pair(LAYERS["Conv2d"])[1]), (theirs, pair(LAYERS["Conv2d"])[0])):
        for _ in range(3):
            source.weight  # noqa: B018  the access iterates
        torch.save(source.state_dict(), tmp_path / "layer.pt")
        target.load_state_dict(torch.load(tmp_path / "layer.pt"))
        assert_same_state(source, target)
        torch.testing.assert_close(source.weight, target.weight)


def test_deepcopy_removal_and_caching(backend: str) -> None:
    ours, theirs = pair(LAYERS["Linear"])
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin.weight, ours.weight)
    assert original(twin) is not original(ours)
    with parametrize.cached():
        assert ours.weight is ours.weight
    theirs.weight  # noqa: B018
    for layer in (ours, theirs):
        layer.eval()
        parametrize.remove_parametrizations(layer, "weight")
    assert type(ours) is nn.Linear
    torch.testing.assert_close(ours.weight, theirs.weight)
    fresh = pair(LAYERS["Linear"])[0]
    kept = original(fresh)
    assert parametrize.remove_parametrizations(fresh, "weight", leave_parametrized=False).weight is kept


def test_pickling_is_refused_as_by_torch() -> None:
    for layer in pair(LAYERS["Linear"]):
        with pytest.raises(RuntimeError, match="state_dict"):
            pickle.dumps(layer)


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: gankern.nn.spectral_norm(nn.ReLU()), ValueError, "name must be a parameter or buffer of ReLU, got 'weight'"),
    (lambda: gankern.nn.spectral_norm(nn.Linear(2, 3), dim=2), ValueError, r"dim must be in \[-2, 1\], got 2"),
    (
        lambda: gankern.nn.spectral_norm(nn.Linear(2, 3), n_power_iterations=0),
        ValueError,
        "n_power_iterations must be a finite number >= 1, got 0",
    ),
    (lambda: gankern.nn.spectral_norm(nn.Linear(2, 3), eps=-1), ValueError, "eps must be a finite number >= 0, got -1"),
    (
        lambda: gankern.nn.spectral_norm(nn.Linear(2, 3).to(torch.complex64)),
        TypeError,
        "weight must be float64, float32, bfloat16 or float16, got complex64",
    ),
    (
        lambda: gankern.nn.spectral_norm_(nn.ReLU()),
        ValueError,
        "network must have a layer with a 'weight' of two dimensions or more, not yet parametrised, got none",
    ),
    (lambda: gankern.nn.spectral_norm_("critic"), TypeError, "network must be a torch.nn.Module, got str"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message.split(" ")[0] for _, _, message in REFUSED])
def test_refuses(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^spectral_norm_?: {message}$"):
        call()


# --- a network ------------------------------------------------------------------------------------------------------------------


def critic() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.ConvTranspose2d(4, 3, 2), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(),
            gankern.nn.LinearLeakyReLU(147, 16), nn.Sequential(nn.Linear(16, 8), nn.Tanh()), nn.Linear(8, 1),
        )
        .to(DEVICE)
        .double()
    )  # fmt: skip


def networks() -> tuple[nn.Module, nn.Module]:
    """The critic under spectral_norm_, and with PyTorch's on each layer."""
    ours, theirs = critic(), critic()
    torch.manual_seed(5)
    gankern.nn.spectral_norm_(ours)
    torch.manual_seed(5)
    for m in [*theirs.modules()]:
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            torch_spectral_norm(m)
    return ours, theirs


def images(seed: int, n: int = 6) -> Tensor:
    return torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)[..., :8, :8]


def wgan_gp(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    mixed = ((real + fake) / 2).requires_grad_()
    (g,) = torch.autograd.grad(net(mixed).sum(), mixed, create_graph=True)
    return net(fake).mean() - net(real).mean() + 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()


def test_network_trains_as_under_torchs_norm(backend: str) -> None:
    """WGAN-GP with its double backward: three forward passes before each backward pass, an evaluation in between."""
    ours, theirs = networks()
    assert_same_state(ours, theirs)
    optimisers = [torch.optim.SGD(n.parameters(), 1e-2) for n in (ours, theirs)]
    for step in range(3):
        losses = []
        for net, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            loss = wgan_gp(net, images(2 * step), images(2 * step + 1))
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
        assert_same_state(ours, theirs)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(images(9)), theirs(images(9)), rtol=1e-9, atol=1e-12)
        ours.train(), theirs.train()
        assert_same_state(ours, theirs)


def test_derivative_through_a_critic_update(backend: str) -> None:
    """Unrolled: the gradient of a loss after one differentiable step, which needs the second derivative of W / sigma."""
    grads = []
    for net in networks():
        params = dict(net.named_parameters())
        real, fake = images(0), images(1).requires_grad_()
        loss = net(fake).tanh().mean() - net(real).tanh().mean()
        steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {k: p - 0.1 * g for (k, p), g in zip(params.items(), steps, strict=True)}
        grads.append(torch.autograd.grad(torch.func.functional_call(net, moved, (fake,)).tanh().mean(), fake)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-12)


def test_group_iterates_once_a_pass_in_one_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gankern.ops import spectral_norm as op

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert self.layer.weight is self.layer.weight
            return self.layer(self.layer(self.frozen(x)))

    torch.manual_seed(0)
    net = gankern.nn.spectral_norm_(Twice().to(DEVICE))
    norm, weight = net.layer.parametrizations["weight"][0], original(net.layer)
    calls, real = [], op.unchecked
    monkeypatch.setattr(op, "unchecked", lambda *args: calls.append(len(args[0])) or real(*args))
    u, v = norm._u.clone(), norm._v.clone()
    net(torch.randn(3, 4, device=DEVICE)).sum().backward()
    assert calls == [2]
    _, (want,), _ = op.reference([weight], [u], [v], [0], 1, 1e-12)
    torch.testing.assert_close(norm._u, want)
    assert weight.grad is not None
    assert norm.ready is None
    net.frozen.eval()
    before = net.frozen.parametrizations["weight"][0]._u.clone()
    net(torch.randn(3, 4, device=DEVICE))
    assert calls == [2, 1, 1]  # a part of it in evaluation does not iterate
    torch.testing.assert_close(net.frozen.parametrizations["weight"][0]._u, before)
    net.layer(torch.randn(3, 4, device=DEVICE))  # outside a pass: as spectral_norm
    assert calls == [2, 1, 1, 1]


def test_group_after_an_exception(backend: str) -> None:
    net = gankern.nn.spectral_norm_(nn.Sequential(nn.Linear(4, 4)).to(DEVICE))
    with pytest.raises(RuntimeError):
        net(torch.zeros(3, 5, device=DEVICE))
    assert net[0].parametrizations["weight"][0].ready is None
    a, b = net[0].weight, net[0].weight
    assert a is not b


def test_group_leaves_what_is_parametrised_and_follows_removal_and_copies(backend: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(2)).to(DEVICE)
    torch_spectral_norm(net[0])
    gankern.nn.spectral_norm_(net)
    assert len(net[0].parametrizations["weight"]) == 1
    assert parametrize.is_parametrized(net[1])
    assert not parametrize.is_parametrized(net[3])
    parametrize.remove_parametrizations(net[1], "weight")
    twin = copy.deepcopy(net)
    for n in (net, twin):
        n.eval()
        want = copy.deepcopy(n)
        x = torch.randn(3, 4, device=DEVICE)
        torch.testing.assert_close(n(x), want(x))
    with torch.no_grad():
        original(twin[2]).mul_(3).add_(torch.eye(2, 4, device=DEVICE))
    h = twin[1](twin[0](x))
    torch.testing.assert_close(twin[2](h), F.linear(h, twin[2].weight, twin[2].bias))
    torch.testing.assert_close(twin(x), twin[3](twin[2](h)))  # the copy's hooks see the copy's layers


def test_group_in_half_precision_and_on_two_dtypes(backend: str) -> None:
    net = gankern.nn.spectral_norm_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(DEVICE))
    net[1].double()
    net.begin = next(iter(net._forward_pre_hooks.values()))
    net.begin(net, ())
    assert [m.weight.dtype for m in (net[0], net[1])] == [torch.float32, torch.float64]
    for m in (net[0], net[1]):
        assert torch.linalg.matrix_norm(m.weight, 2).item() == pytest.approx(1, rel=0.2)


def test_compiled_network(backend: str) -> None:
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("dynamo cannot trace Triton's interpreter")
    torch.compiler.reset()
    ours, twin = networks()[0], networks()[0]
    fn = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for step in range(2):
        torch.testing.assert_close(fn(images(step)), twin(images(step)), rtol=1e-9, atol=1e-12)
        assert_same_state(ours, twin)


def _replica(rank: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = gankern.nn.spectral_norm_(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double())
    parallel = nn.parallel.DistributedDataParallel(net)
    optimiser = torch.optim.SGD(parallel.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        real, fake = torch.randn(2, 8, 6, dtype=torch.float64, generator=generator)
        mine = slice(4 * rank, 4 * rank + 4)
        optimiser.zero_grad()
        (parallel(torch.cat([real[mine], fake[mine]])) * torch.tensor([[-1.0]] * 4 + [[1.0]] * 4)).mean().backward()
        optimiser.step()
    torch.save(net.state_dict(), f"{out}/{rank}.pt")
    del parallel  # before the process group: its reducer must not be the last to let go of it
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of the batch each train as one with all of it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_replica, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    net = gankern.nn.spectral_norm_(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double())
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        real, fake = torch.randn(2, 8, 6, dtype=torch.float64, generator=generator)
        optimiser.zero_grad()
        (net(torch.cat([real, fake])) * torch.tensor([[-1.0]] * 8 + [[1.0]] * 8)).mean().backward()
        optimiser.step()
    for name, want in net.state_dict().items():
        torch.testing.assert_close(first[name], want, rtol=1e-9, atol=1e-12)
        assert torch.equal(first[name], second[name])


def test_normalised_critic_has_a_norm_of_about_one(backend: str) -> None:
    """After enough iterations no weight stretches anything."""
    net = networks()[0]
    for i in range(30):
        net(images(i))
    net.eval()
    for m in net.modules():
        if parametrize.is_parametrized(m):
            matrix = m.weight.transpose(0, 1).flatten(1) if isinstance(m, nn.ConvTranspose2d) else m.weight.flatten(1)
            assert math.isclose(torch.linalg.matrix_norm(matrix, 2).item(), 1.0, rel_tol=1e-2)
