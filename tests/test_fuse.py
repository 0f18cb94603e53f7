"""gankern.fuse: the same numbers, derivatives, keys and objects as the plain network, however that is written."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import linecache
import os
import pickle
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils import parametrizations, prune

import gankern
from gankern.nn import _chain, _rewrite
from gankern.nn.fuse import Fused
from tests.support import DEVICE, CountProducts, randn

# --- networks as people write them ------------------------------------------------------------------------------------------------


def mlp(dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in ((7, 9), (9, 5)):
        layers += [nn.Linear(i, o), nn.LeakyReLU(0.2, inplace=True), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1), nn.Tanh())


class Functional(nn.Module):
    """F.leaky_relu around each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.out = nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 3), nn.Linear(3, 1)
        self.slope = 0.2

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc1(x.flatten(1)), 0.2)
        x = F.leaky_relu(self.fc2(x), negative_slope=self.slope, inplace=True)
        x = leaky_relu(self.fc3(x), 0.1)
        return self.out(x)


class Statements(nn.Module):
    """One call a line, a shared activation, methods and tensor methods."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.out = nn.Linear(3, 1)
        self.act = nn.LeakyReLU(0.3)

    def __hidden(self, x: Tensor) -> Tensor:
        h = self.fc2(x)
        a = self.act(h)
        return a  # noqa: RET504

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.__hidden(x)
        x = self.fc3(x).relu()
        y = self.fc4(x)
        return self.out(torch.relu(y).view(len(x), -1))


class Loops(nn.Module):
    """Layers in lists, activations by condition."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 3)])
        self.mixed = nn.ModuleList([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1)])
        self.norm = None

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.body):
            x = layer(x)
            if self.norm is not None:
                x = self.norm(x)
            if i < len(self.body) - 1:
                x = F.relu(x)
        for layer in self.mixed:
            x = layer(x)
        return x


class Skips(nn.Module):
    """Results used twice, branches on data, nested blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 7), nn.Linear(7, 7)
        self.main = nn.Sequential(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), nn.Linear(5, 1))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.fc1(x)
        a = F.leaky_relu(h, 0.2)
        a = a + h  # h is used again
        if float(a.detach().sum()) > 0:
            a = a * scale
        with torch.no_grad():
            noise = torch.relu(self.fc2(x))
        try:
            a = self.fc2(a)
            a = F.relu(a)
        finally:
            a = a + noise
        return self.main(a)


class Named(nn.Sequential):
    """A Sequential with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 9), nn.LeakyReLU(0.2), nn.Linear(9, 1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(1)).squeeze(1)


class ConvCritic(nn.Module):
    """Convolutions in a free-form forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 4, 2, 1, padding_mode="reflect")
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, bias=False))
        self.fc = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2, True)
        x = F.leaky_relu(self.conv2(x), 0.2)
        return self.fc(torch.flatten(x, 1))


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (7, 1, 1)), nn.ConvTranspose2d(7, 5, 3), nn.ReLU(True), nn.ConvTranspose2d(5, 2, 4, 2, 1), nn.Tanh()
    )


class Block(nn.Module):
    """Convolution, BatchNorm, a shared activation, a skip connection."""

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels) if norm else None, nn.BatchNorm2d(channels, momentum=None)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.bn1 is not None:
            y = self.bn1(y)
        y = self.act(y)
        out = self.conv2(y)
        out = self.bn2(out)
        out = out + x
        return self.act(out)


class Residual(nn.Module):
    """Blocks in a free-form critic."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(2), Block(2, norm=False))
        self.down, self.norm, self.fc = nn.Conv2d(2, 3, 4, 2, 1), nn.BatchNorm2d(3, affine=False), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.down(self.blocks(x))), 0.2)
        return self.fc(x.flatten(1))


def batchnorm_mlp(channels: int = 9) -> nn.Sequential:
    """What an old generator looks like, with the momentum that was meant as such."""
    layers = [nn.Linear(7, channels), nn.BatchNorm1d(channels, 0.8), nn.LeakyReLU(0.2, inplace=True), nn.Dropout(0.0)]
    return nn.Sequential(*layers, nn.Linear(channels, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU(), nn.Linear(5, 1))


def batchnorm_generator() -> nn.Sequential:
    up = [nn.ConvTranspose2d(7, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(True)]
    return nn.Sequential(nn.Unflatten(1, (7, 1, 1)), *up, nn.ConvTranspose2d(5, 2, 4, 2, 1), nn.Tanh())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many chains are fused
    "sequential": (mlp, 3),
    "functional": (Functional, 3),
    "statements": (Statements, 4),
    "loops": (Loops, 4),
    "skips": (Skips, 2),
    "named": (Named, 1),
    "spectral norm of gankern": (lambda: nn.Sequential(gankern.nn.spectral_norm(nn.Linear(7, 9)), nn.ReLU(), nn.Linear(9, 1)), 1),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(7, 9)), nn.ReLU(), nn.Linear(9, 1)), 1),
    "spectral norm of all": (lambda: gankern.nn.spectral_norm_(mlp()), 3),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(7, 9)), nn.LeakyReLU(), nn.Linear(9, 1)), 1),
    "convolutions": (ConvCritic, 2),
    "transposed convolution": (generator, 1),
    "1d": (lambda: nn.Sequential(nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 3, 3), nn.LeakyReLU(0.2), nn.Conv1d(3, 2, 3), nn.ReLU()), 2),
    "3d": (lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 1, 7)), nn.Conv3d(1, 3, (1, 1, 3), groups=1), nn.LeakyReLU(0.2)), 1),
    "residual": (Residual, 3),
    "batchnorm": (batchnorm_mlp, 2),
    "batchnorm generator": (batchnorm_generator, 1),
    "our critic": (lambda: gankern.nn.MLPCritic(nn.Linear(7, 9), nn.LeakyReLU(0.2), nn.Linear(9, 1)), 1),
}


COPYABLE = [n for n in NETWORKS if "spectral" not in n and "weight" not in n and n != "convolutions"]  # parametrised: not by pickle


def sample(name: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = SHAPES.get(name, (7,))
    return randn(6, *shape, seed=seed, dtype=dtype)


SHAPES = {"convolutions": (2, 8, 8), "residual": (2, 8, 8)}


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A network, and a fused copy with parameters of its own."""
    torch.manual_seed(0)
    plain = NETWORKS[name][0]().to(DEVICE, dtype)
    return plain, gankern.fuse(copy.deepcopy(plain), inplace=True)


def everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Value, first derivatives, those of a gradient penalty, and the buffers after it."""
    x = x.detach().requires_grad_()
    y = model(x)
    parameters = dict(model.named_parameters())
    found = {"y": y}
    first = torch.autograd.grad(y.square().sum(), [x, *parameters.values()], create_graph=True, allow_unused=True)
    found |= {f"d[{k}]": g for k, g in zip(["x", *parameters], first, strict=True) if g is not None}
    assert first[0] is not None
    penalty = (first[0].flatten(1).norm(2, dim=1) - 1).square().mean()
    second = torch.autograd.grad(penalty, [x, *parameters.values()], allow_unused=True)
    found |= {f"dd[{k}]": g for k, g in zip(["x", *parameters], second, strict=True) if g is not None and (g != 0).any()}
    return found | {f"buffer {k}": b for k, b in model.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-11) -> None:
    """Equal to rtol of the largest number of their kind: before a BatchNorm, the gradient of a bias is a sum of rounding errors."""
    assert got.keys() == want.keys(), f"graphs differ in {sorted(got.keys() ^ want.keys())}"
    largest: dict[str, float] = {}
    for name, w in want.items():
        group = name.split("[")[0]
        largest[group] = max(largest.get(group, 0.0), w.abs().max().item())
    for name, w in want.items():
        atol = rtol * largest[name.split("[")[0]]
        torch.testing.assert_close(got[name], w, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def fused_count(model: nn.Module) -> int:
    return len(gankern.fusion_report(model).fused)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers(name: str, training: bool, backend: str) -> None:
    plain, fused = pair(name)
    assert fused_count(fused) == NETWORKS[name][1]
    assert isinstance(fused, type(plain)) or hasattr(plain, "parametrizations")
    x = sample(name)
    for _ in range(2):  # spectral norm and running averages move on
        assert_same(everything(fused.train(training), x), everything(plain.train(training), x))


@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers_by_default(name: str) -> None:
    plain, fused = pair(name, torch.float32)
    x = sample(name, dtype=torch.float32)
    assert_same(everything(fused, x), everything(plain, x), 2e-5)


def test_the_ops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the report says is what is called."""
    calls = []

    def spy(row: _chain.Layer) -> _chain.Layer:
        return row._replace(run=lambda *a: (calls.append(a[2:]), row.run(*a))[1])

    for cls, row in list(_chain.LAYERS.items()):
        monkeypatch.setitem(_chain.LAYERS, cls, spy(row))
    for name, (_, count) in NETWORKS.items():
        calls.clear()
        _, fused = pair(name)
        fused(sample(name))
        assert len(calls) == count, name
    fused = gankern.fuse(mlp(0.3))
    calls.clear()
    fused(torch.randn(2, 7))
    assert calls == [(0.2, 0.3, True), (0.2, 0.3, True), (0.0, 0.0, False)]
    fused[2].eval()
    fused[5].p = 0.4
    fused[1].negative_slope = 0.5
    calls.clear()
    fused(torch.randn(2, 7))
    assert calls == [(0.5, 0.3, False), (0.2, 0.4, True), (0.0, 0.0, False)]


def test_products_of_a_gradient_penalty() -> None:
    """A fused critic saves the products with zeros that eager PyTorch makes."""
    if gankern.backend.CPU_PROBLEM:
        pytest.skip(gankern.backend.CPU_PROBLEM)
    plain = nn.Sequential(nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))
    counts = []
    for model in (plain, gankern.fuse(plain)):
        with gankern.use_backend("compiled"), CountProducts() as products:
            critic = model.to(DEVICE).forward  # a function: not the closed form of an MLP
            gankern.gradient_penalty(critic, randn(2, 784, seed=0).float(), randn(2, 784, seed=1).float()).backward()
        counts.append(products.count)
    assert counts == [15, 11]


# --- nothing else changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPYABLE)
def test_keys_names_and_repr_stay(name: str) -> None:
    plain, _ = pair(name)
    fused = gankern.fuse(plain)
    assert fused is not plain
    assert not any(isinstance(m, Fused) for m in plain.modules())
    assert repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    assert all(a is b for a, b in zip(fused.buffers(), plain.buffers(), strict=True))
    assert [type(m).__name__ for m in fused.modules()] == [type(m).__name__ for m in plain.modules()]
    assert isinstance(fused, type(plain))
    assert gankern.fuse(fused, inplace=True) is fused
    assert gankern.unfuse(fused) is fused
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_inplace_and_an_optimiser_made_before() -> None:
    plain = mlp()
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = plain[0].weight.detach().clone()
    fused = gankern.fuse(plain)
    fused(torch.randn(4, 7)).sum().backward()
    optimiser.step()
    assert not torch.equal(fused[0].weight, before)
    assert fused[0].weight is plain[0].weight
    assert gankern.fuse(plain, inplace=True) is plain
    assert isinstance(plain, Fused)


@pytest.mark.parametrize("name", COPYABLE)
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save", "state_dict"])
def test_copies(name: str, way: str) -> None:
    plain, fused = pair(name)
    x = sample(name)
    if way == "state_dict":
        other = gankern.fuse(NETWORKS[name][0]().to(DEVICE, torch.float64))
        other.load_state_dict(plain.state_dict())
        plain.load_state_dict(fused.state_dict())
    elif way == "save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        makers: dict[str, Callable[[Any], Any]] = {
            "deepcopy": copy.deepcopy,
            "copy": copy.copy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }
        other = makers[way](fused)
    assert fused_count(other) == fused_count(fused)
    assert type(fused) is type(other)
    assert_same(everything(other, x), everything(plain, x))
    with torch.no_grad():
        next(fused.parameters()).add_(1)
    assert torch.equal(other(x), fused(x)) == (way == "copy")


def test_pickle_of_a_class_with_a_reduce_of_its_own() -> None:
    model = gankern.fuse(Reduced(3))
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, Fused)
    assert again.width == 3


class Reduced(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.fc = width, nn.Linear(2, width)

    def __reduce__(self) -> Any:
        return Reduced, (self.width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


def test_hooks_run() -> None:
    """On containers as ever; a layer or activation that has one is called as it stands, also when it is added later."""
    seen: list[str] = []
    plain = nn.Sequential(*(nn.LeakyReLU(0.2) if isinstance(m, nn.LeakyReLU) else m for m in mlp()))
    plain.register_forward_hook(lambda *a: seen.append("model"))
    fused = gankern.fuse(plain)
    fused.register_forward_pre_hook(lambda *a: seen.append("before"))
    x = torch.randn(3, 7)
    fused(x)
    assert seen == ["before", "model"]
    removable = fused[0].register_forward_hook(lambda m, a, y: seen.append(f"{float((y < 0).any())}"))  # sees the product
    fused[3].register_full_backward_hook(lambda *a: seen.append("act"))
    want = plain(x)
    seen.clear()
    fused(x).sum().backward()
    assert seen == ["before", "1.0", "model", "act"]
    torch.testing.assert_close(fused(x), want)
    assert fused_count(fused) == 1
    report = str(gankern.fusion_report(fused))
    assert "left: it has hooks" in report
    assert "left: the LeakyReLU after it has hooks" in report
    removable.remove()
    assert fused_count(fused) == 2
    counted: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: counted.append(type(m).__name__))
    try:
        fused(x)
    finally:
        handle.remove()
    assert len(counted) == 9


def test_old_norms_and_pruning_are_left_with_their_hooks() -> None:
    x = torch.randn(4, 7)
    for change in (
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3), nn.ReLU())
        change(plain[0])
        fused = gankern.fuse(plain).eval()
        plain.eval()
        assert fused_count(fused) == 1
        torch.testing.assert_close(fused(x), plain(x))
        prune.random_unstructured(fused[2], "weight", 0.5)
        assert fused_count(fused) == 0


# --- what is changed later counts -------------------------------------------------------------------------------------------------


def test_changes_after_fusing_count() -> None:
    plain, fused = pair("functional")
    x = randn(5, 7, seed=2)
    for change in (
        lambda m: setattr(m, "slope", 0.7),
        lambda m: setattr(m, "fc2", nn.Linear(9, 5, bias=False, dtype=torch.float64, device=DEVICE)),
        lambda m: setattr(m, "fc3", nn.Sequential(m.fc3, nn.Tanh())),
        lambda m: parametrizations.weight_norm(m.fc1),
        lambda m: setattr(m, "slope", torch.tensor(0.1)),
    ):
        torch.manual_seed(1)
        change(plain)
        torch.manual_seed(1)
        change(fused)
        assert_same(everything(fused, x), everything(plain, x))
    for slope in (-0.5, 0, True, 1.0):  # no op has the first
        plain.slope = fused.slope = slope
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x))


def test_containers_changed_after_fusing() -> None:
    fused = gankern.fuse(mlp())
    x = torch.randn(4, 7)
    head = fused[:1]
    assert torch.equal(head(x), F.linear(x, fused[0].weight, fused[0].bias))  # the layer is still a plain one
    assert torch.equal(nn.Sequential(*list(fused)[:1])(x), head(x))
    fused[1] = nn.Tanh()
    want = x
    for m in fused:
        want = m(want)
    torch.testing.assert_close(fused(x), want)
    fused.append(nn.Linear(1, 2)).append(nn.ReLU())
    assert fused_count(fused) == 3


class Impure(nn.Module):
    """What a tracer would bake in: random draws, counters, modes, branches, shapes, globals."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 9), nn.Linear(9, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + 0.1 * torch.randn(x.shape[0], 7, dtype=x.dtype, device=x.device)
        x = F.leaky_relu(self.fc1(x), SLOPE if self.training else 0.01 * self.calls)
        x = F.dropout(x, 0.5, training=self.training)
        if random.random() < 0.5:
            x = -x
        x = self.fc2(x)
        x = F.relu(x)
        return x * self.calls


SLOPE = 0.2


def test_nothing_is_baked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Impure().to(DEVICE)
    fused = gankern.fuse(copy.deepcopy(plain))
    x = randn(6, 7, seed=3, dtype=torch.float32)
    for i in range(8):
        plain.train(i % 2 == 0)
        fused.train(i % 2 == 0)
        if i == 6:
            monkeypatch.setattr("tests.test_fuse.SLOPE", 0.9)
        outputs = []
        for model in (plain, fused):
            random.seed(i)
            torch.manual_seed(i)
            outputs.append(model(x))
        torch.testing.assert_close(*outputs)
    assert plain.calls == fused.calls == 8


def test_a_forward_replaced_in_the_class_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = gankern.fuse(Functional())
    monkeypatch.setattr(Functional, "forward", lambda self, x: x + 1)
    assert torch.equal(fused(torch.zeros(2)), torch.ones(2))
    monkeypatch.undo()
    fused.forward = types.MethodType(lambda self, x: x + 2, fused)  # type: ignore[method-assign]
    assert torch.equal(fused(torch.zeros(2)), torch.full((2,), 2.0))


def test_dropout_is_drawn_and_scaled() -> None:
    for model in (
        nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Dropout(0.25)),
        type("Sub", (nn.Sequential,), {})(nn.Linear(4, 4000), nn.ReLU(), nn.Dropout(0.25)),
    ):
        fused, x = gankern.fuse(model).to(DEVICE), torch.ones(50, 4, device=DEVICE)
        want = fused.eval()(x)
        assert torch.equal(want, model.eval()(x))
        y = fused.train()(x)
        live = want > 0
        assert abs((y[live] == 0).float().mean().item() - 0.25) < 0.01
        kept = live & (y > 0)
        torch.testing.assert_close(y[kept], want[kept] / 0.75)
        torch.manual_seed(0)
        a = fused(x)
        torch.manual_seed(0)
        assert torch.equal(a, fused(x))
        assert not torch.equal(a, fused(x))


# --- what is left, and why --------------------------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def decorated(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: f(*args)


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 9)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class NotRead(Decorated):
    forward = decorated(lambda self, x: F.relu(self.fc(x)))


class InPlace(Decorated):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = F.relu(y)
        y += 1
        return y


class InPlaceLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        y += 1
        return y


namespace: dict[str, Any] = {"F": F, "nn": nn}
exec(
    "class NoSource(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(7, 9)\n"
    "    def forward(self, x):\n        return F.relu(self.fc(x))\n",
    namespace,
)

LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no activation": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh()), "no LeakyReLU or ReLU follows it, but Tanh"),
    "PReLU": (lambda: nn.Sequential(nn.Linear(7, 9), nn.PReLU()), "no LeakyReLU or ReLU follows it, but PReLU"),
    "ELU": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ELU()), "no LeakyReLU or ReLU follows it, but ELU"),
    "negative slope": (lambda: nn.Sequential(nn.Linear(7, 9), nn.LeakyReLU(-0.1)), "follows it, but LeakyReLU(-0.1)"),
    "tensor slope": (lambda: nn.Sequential(nn.Linear(7, 9), nn.LeakyReLU(torch.tensor(0.1))), "follows it, but LeakyReLU"),  # type: ignore[arg-type]
    "last": (lambda: nn.Sequential(nn.Linear(7, 9)), "no LeakyReLU or ReLU follows it"),
    "own class": (lambda: nn.Sequential(OwnLinear(7, 9), nn.ReLU()), "OwnLinear is a class of its own"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(9), nn.ReLU()), "it has not seen its first input yet"),
    "decorated": (Decorated, "Decorated.forward was not read: it is decorated"),
    "wrapped": (NotRead, "NotRead.forward was not read: "),
    "in place": (InPlace, "InPlace.forward keeps its result in y, which it changes in place"),
    "in place, loop": (InPlaceLoop, "InPlaceLoop.forward keeps its result in y, which it changes in place"),
    "no source": (namespace["NoSource"], "NoSource.forward was not read: its source cannot be read"),
    "alone": (lambda: nn.Linear(7, 9), "nothing calls it but you"),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), "TransformerEncoderLayer.forward calls no LeakyReLU or ReLU on"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name: str) -> None:
    plain = LEFT[name][0]()
    fused = gankern.fuse(plain)
    assert not any(isinstance(m, Fused) for m in fused.modules())
    report = gankern.fusion_report(fused)
    assert report.left
    assert not report.fused
    assert LEFT[name][1] in report.left[-1].why, report
    if name not in ("transformer", "tensor slope"):
        x = torch.randn(3, 7)
        want = plain(x)
        torch.testing.assert_close(fused(x), want)


def test_lazy_layers_are_fused_once_they_are_layers() -> None:
    plain = nn.Sequential(nn.LazyLinear(9), nn.ReLU(), nn.Linear(9, 1), nn.ReLU())
    fused = gankern.fuse(plain, inplace=True)
    assert fused_count(fused) == 1
    fused(torch.randn(2, 5))
    assert fused_count(fused) == 2


def test_source_that_is_not_what_runs(tmp_path: Any) -> None:
    """A file edited after it was imported."""
    text = "import torch.nn.functional as F\nfrom torch import nn\n\nclass Net(nn.Module):\n"
    text += "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(3, 3)\n"
    text += "    def forward(self, x):\n        return F.relu(self.fc(x))\n"
    path = tmp_path / "edited.py"
    path.write_text(text)
    scope: dict[str, Any] = {"__name__": "edited"}
    exec(compile(text, str(path), "exec"), scope)
    assert isinstance(gankern.fuse(scope["Net"]()), Fused)
    exec(compile(text, str(path), "exec"), scope)
    path.write_text(text.replace("F.relu(self.fc(x))", "-F.relu(self.fc(x))"))
    model = gankern.fuse(scope["Net"]())
    assert not isinstance(model, Fused)
    assert "its source is not what runs" in str(gankern.fusion_report(model))


def test_the_report_prints_a_table() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(9, 1), nn.Tanh())
    assert str(gankern.fusion_report(gankern.fuse(model))) == (
        "layer  calls                              runs as\n"
        "0      Linear + LeakyReLU(0.2) + Dropout  linear_lrelu\n"
        "3      Linear                             left: no LeakyReLU or ReLU follows it, but Tanh\n"
        "1 fused, 1 left"
    )
    assert gankern.fusion_report(model).rows[0].why == "fuse was not called"
    assert [row.path for row in gankern.fusion_report(gankern.fuse(Statements())).fused] == ["fc1", "fc2", "fc3", "fc4"]
    loops = gankern.fusion_report(gankern.fuse(Loops()))
    assert [row.path for row in loops.fused] == ["body.0", "body.1", "mixed.0", "mixed.2"]


class Chosen(nn.Module):
    """Layers that only the call shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(7, 9), "b": nn.Linear(7, 9)})

    def forward(self, x: Tensor, which: str = "a") -> Tensor:
        layer = self.layers[which]
        return F.relu(layer(x))


class Keywords(nn.Module):
    """Keywords that have the names of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(3, 3), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(self.fc(x), x=2.0, f=self.fc.in_features))


class Scaled(nn.Module):
    def forward(self, value: Tensor, /, x: float, f: int) -> Tensor:
        return value * x + f


def test_keywords() -> None:
    plain, x = Keywords(), torch.randn(2, 3)
    torch.testing.assert_close(gankern.fuse(plain)(x), plain(x))
    assert isinstance(gankern.fuse(Mixed()), Fused)
    torch.testing.assert_close(gankern.fuse(Mixed())(x, x=1.0, f=2), Mixed()(x, x=1.0, f=2))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(3, 3), Scaled()

    def forward(self, value: Tensor, x: float, f: int) -> Tensor:
        value = F.relu(self.fc(value))
        return self.block(self.fc(value), x=x, f=f)


def test_layers_that_only_the_call_shows() -> None:
    plain = Chosen()
    fused = gankern.fuse(plain)
    assert gankern.fusion_report(fused).fused[0].into == "decided at each call"
    x = torch.randn(3, 7)
    for which in "ab":
        torch.testing.assert_close(fused(x, which), plain(x, which))


def test_errors() -> None:
    for function in (gankern.fuse, gankern.unfuse, gankern.fusion_report):
        with pytest.raises(TypeError, match=rf"^{function.__name__}: model must be a torch.nn.Module, got int$"):
            function(3)  # type: ignore[type-var, arg-type]


# --- shared modules, tied weights, other kinds of tensors -------------------------------------------------------------------------


def test_shared_modules_and_tied_weights() -> None:
    shared, act = nn.Linear(7, 7), nn.LeakyReLU(0.2)
    tied = nn.Linear(7, 7)
    tied.weight = shared.weight
    plain = nn.Sequential(shared, act, shared, nn.Tanh(), shared, act, tied, act, nn.Linear(7, 1)).to(DEVICE, torch.float64)
    fused = gankern.fuse(plain)
    assert fused[0] is fused[2]
    assert fused[6].weight is fused[0].weight
    assert [row.path for row in gankern.fusion_report(fused).fused] == ["0", "0", "6"]
    x = randn(4, 7, seed=0)
    assert_same(everything(fused, x), everything(plain, x))


def test_relu_in_float16_is_eager() -> None:
    """There sums overflow, and ReLU of -inf is 0."""
    plain = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    plain[0].weight.data.fill_(-300)
    x = torch.full((1, 2), 300.0)
    fused = gankern.fuse(plain)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fused(x), torch.zeros(1, 2, dtype=torch.float16))
    assert torch.equal(gankern.fuse(plain.half())(x.half()), torch.zeros(1, 2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    for name in ("sequential", "convolutions", "batchnorm", "batchnorm generator"):
        plain, fused = pair(name, torch.float32)
        x = sample(name, dtype=torch.float32)
        with torch.autocast(DEVICE, dtype):
            got, want = fused(x), plain(x)
        assert got.dtype == want.dtype == dtype
        exact = plain.double()(x.double())
        assert (got.double() - exact).abs().max() <= 2 * (want.double() - exact).abs().max() + 1e-3


def test_inputs_that_the_ops_do_not_take() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    fused = gankern.fuse(plain)
    with torch.device("meta"):
        assert gankern.fuse(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))(torch.empty(2, 3)).shape == (2, 4)
    for x in (torch.randn(3), torch.randn(0, 3), torch.randn(2, 1, 5, 3), torch.randn(3, 2).T, torch.full((1, 3), torch.nan)):
        torch.testing.assert_close(fused(x), plain(x), equal_nan=True)
    for bad in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4)):
        for model in (plain, fused):
            with pytest.raises((RuntimeError, ValueError)):
                model(bad)
    z = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.LeakyReLU())
    x = torch.randn(2, 3, dtype=torch.complex64)
    for model in (z, gankern.fuse(z)):
        with pytest.raises(RuntimeError):
            model(x)


def test_channels_last() -> None:
    for name in ("convolutions", "residual"):
        plain, fused = (m.to(memory_format=torch.channels_last) for m in pair(name))
        x = sample(name).contiguous(memory_format=torch.channels_last)
        assert_same(everything(fused, x), everything(plain, x))
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 2, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert gankern.fuse(plain)(x).is_contiguous(memory_format=torch.channels_last)


def test_batchnorm_updates_once_and_converts_to_sync_batchnorm() -> None:
    plain, fused = pair("batchnorm generator", torch.float32)
    x = sample("batchnorm generator", dtype=torch.float32)
    for _ in range(3):
        plain(x)
        fused(x)
    assert fused[2].num_batches_tracked == 3
    torch.testing.assert_close(fused[2].running_var, plain[2].running_var)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(synchronised[2], nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised(x), plain(x))


def test_functional_call_grad_and_vmap() -> None:
    plain, fused = pair("functional")
    parameters = dict(plain.named_parameters())
    x = randn(5, 7, seed=4)

    def loss(model: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x[None],)).sum()

    for model in (plain, fused):
        model.requires_grad_(False)
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda p, x, m=m: loss(m, p, x)), (None, 0))(parameters, x) for m in (fused, plain)
    ]
    assert_same(*per_sample)


def test_symbolic_trace_and_compile() -> None:
    plain, fused = pair("functional")
    x = randn(5, 7, seed=5)
    traced = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(traced(x), plain(x))
    assert "fc1" in traced.code
    for name in ("functional", "statements", "loops", "sequential", "convolutions", "batchnorm generator"):
        plain, fused = pair(name)
        x = sample(name)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        assert_same(everything_first(compiled, x), everything_first(plain, x))
        fused.eval()
        torch.testing.assert_close(compiled(x), plain.eval()(x))
    torch.compiler.reset()


def everything_first(model: Any, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return {"y": y, **{str(i): g for i, g in enumerate(grads)}}


def test_distributed_data_parallel(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, fused = pair("functional")
        x = randn(5, 7, seed=6).cpu()
        plain, fused = plain.cpu(), fused.cpu()
        wrapped = nn.parallel.DistributedDataParallel(fused)
        wrapped(x).sum().backward()
        plain(x).sum().backward()
        for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert gankern.fuse(wrapped, inplace=True) is wrapped
        del wrapped  # if its reducer lets go of the process group last, it waits for gloo's thread, and that for the GIL
    finally:
        torch.distributed.destroy_process_group()


# --- the rewriting ----------------------------------------------------------------------------------------------------------------


def test_user_classes_hear_nothing_and_are_set_free() -> None:
    heard: list[type] = []

    class Registering(nn.Module):
        def __init_subclass__(cls, *, must: int, **kwargs: Any) -> None:
            heard.append(cls)

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    first, second = gankern.fuse(Registering()), gankern.fuse(Registering())
    assert isinstance(first, Fused)
    assert type(first) is type(second)
    assert heard == []
    made = weakref.ref(type(first))
    del first, second
    gc.collect()
    assert made() is None


def test_closures_globals_and_super() -> None:
    factor = 3.0

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(7, 9), nn.Linear(9, 2)

        def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
            """Doc."""
            return F.relu(self.fc(x)) * scale

    class Derived(Base):
        def forward(self, x: Tensor, *, scale: float = 1.5) -> Tensor:
            h = super().forward(x, scale=scale)
            parts = [self.out(row) for row in h]  # makes self a variable of two functions
            y = torch.relu(self.out(h)) * factor
            return y + torch.stack(parts)

    plain = Derived().to(DEVICE)
    fused = gankern.fuse(plain)
    assert fused_count(fused) == 1
    x = randn(4, 7, seed=0, dtype=torch.float32)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused(x, scale=4.0), plain(x, scale=4.0))
    factor = 5.0
    torch.testing.assert_close(fused(x), plain(x))
    assert gankern.fuse(Base()).forward.__doc__ == "Doc."


def test_a_traceback_names_the_line_of_the_original() -> None:
    fused = gankern.fuse(Functional())
    with pytest.raises(ValueError, match="last dimension") as caught:
        fused(torch.randn(2, 6))
    entry = next(e for e in reversed(caught.traceback) if os.path.basename(str(e.path)) == "test_fuse.py")
    assert "self.fc1" in str(entry.statement)


def rewritten(function: Callable[..., Any]) -> int:
    return len(_rewrite.rewrite(function)[1])


def test_results_that_are_changed_in_place(kernel_backend: str) -> None:
    """Allowed after LeakyReLU, whose derivative needs its input alone."""
    if DEVICE == "cpu":
        x = randn(3, 2, 5, seed=0)
        for layer in (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(2), nn.Linear(5, 4)):
            plain = nn.Sequential(layer.double(), nn.LeakyReLU(0.2), nn.ELU(inplace=True))
            fused = gankern.fuse(copy.deepcopy(plain))
            assert_same(everything_first(fused, x), everything_first(plain, x))


def test_what_is_not_touched() -> None:
    """Calls whose order or visibility a rewriting could change stay as they are."""
    calls: list[str] = []

    def log(name: str, value: Any = None) -> Any:
        calls.append(name)
        return value

    def loud(self: Any, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc(x), log("slope", 0.2))

    def twice(self: Any, x: Tensor) -> Any:
        h = self.fc(x)
        return F.relu(h), h

    def in_a_try(self: Any, x: Tensor) -> Tensor:
        try:
            x = self.fc(x)
            x = F.relu(x)
        except ValueError:
            x = x + 1
        return x

    def suppressed(self: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            x = self.fc(x)
            x = F.relu(x)
        return x

    def captured(self: Any, x: Tensor) -> Any:
        y = self.fc(x)
        y = F.relu(y)
        return lambda: y

    def added(self: Any, x: Tensor) -> Tensor:
        h = self.fc(x)
        a = F.relu(h)
        h += 1
        return a

    def between(self: Any, x: Tensor) -> Tensor:
        x = self.fc(x)
        log("between")
        x = F.relu(x)
        return x  # noqa: RET504

    def changed(self: Any, x: Tensor, skip: Tensor) -> Tensor:
        y = F.leaky_relu(self.fc(x), 0.2)
        z = self.fc(x)
        w = F.relu(z)
        w[0] = 1
        y.mul_(2)
        return y + w

    for function in (loud, twice, in_a_try, suppressed, captured, added, between, changed):
        assert rewritten(function) == 0, function.__name__


class Programs:
    """Random forwards: layers, activations and other calls in statements, branches, loops, with and try."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = ["x"]

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def name(self) -> str:
        return self.pick(*self.names)

    def value(self, on: str, depth: int) -> str:
        """An expression of the tensor `on`, calls on calls."""
        if depth == 0:
            return on
        inner = self.value(on, depth - 1)
        layer, act = f"self.l{self.random.randrange(3)}", self.pick("self.act", "F.relu", "torch.relu", "torch.tanh", "self.log")
        return self.pick(
            f"{layer}({inner})",
            f"{layer}({inner})",
            f"{act}({inner})",
            f"F.leaky_relu({inner}, {self.pick('0.2', 'self.slope', 'negative_slope=0.1', 'self.draw()', '0.1, True')})",
            f"{layer}({inner}).relu()",
            f"torch.add({inner}, {self.name()})",
        )

    def block(self, depth: int, indent: str, known: list[str]) -> list[str]:
        lines = []
        for _ in range(self.random.randint(1, 4)):
            self.names = known
            what = self.random.random()
            target, on = self.pick("x", "h", "a", self.name()), self.name()
            if what < 0.6 or depth == 0:
                lines.append(f"{indent}{target} = {self.value(on, self.random.randint(1, 3))}")
                known = [*known, target]
            elif what < 0.68:
                lines.append(
                    f"{indent}if {self.pick('self.slope > 0.1', 'self.draw() > 0.1', f'{on}.sum() > 0', 'len(self.layers)')}:"
                )
                lines += self.pick([f"{indent}    {on} = self.l1({on})"], self.block(depth - 1, indent + "    ", known))
            elif what < 0.76:
                lines.append(f"{indent}for layer in {self.pick('self.layers', 'self.layers[:2]', 'self.items()')}:")
                lines += self.pick([f"{indent}    {on} = layer({on})"], self.block(depth - 1, indent + "    ", known))
            elif what < 0.82:
                lines += [f"{indent}with torch.enable_grad():", *self.block(depth - 1, indent + "    ", known)]
            elif what < 0.9:
                lines += [f"{indent}try:", *self.block(depth - 1, indent + "    ", known)]
                lines += [f"{indent}    self.fail()", f"{indent}except ValueError:", f"{indent}    {on} = {on} * 2"]
            elif what < 0.95:
                lines.append(f"{indent}{on} += {self.name()}")
            else:
                lines.append(f"{indent}return {self.value(on, 2)}")
                break
        return lines

    def source(self) -> str:
        body = [
            *self.block(2, "        ", ["x"]),
            f"        return {self.value(self.pick('x', *self.names[:1]), self.random.randint(0, 3))}",
        ]
        return "\n".join(
            ["import torch", "import torch.nn.functional as F", "class Net(Base):", "    def forward(self, x):", *body, ""]
        )


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1, self.l2 = (nn.Linear(4, 4) for _ in range(3))
        self.act, self.slope = nn.LeakyReLU(0.3), 0.2
        self.layers = nn.ModuleList([self.l0, self.act, self.l2, nn.Tanh()])
        self.seen: list[float] = []

    def log(self, x: Tensor) -> Tensor:
        self.seen.append(float(x.sum()))
        return x + 1

    def draw(self) -> float:
        self.seen.append(len(self.seen))
        self.slope = 0.05 + 0.01 * (len(self.seen) % 30)
        return self.slope

    def items(self) -> Any:
        for layer in self.layers:
            self.draw()
            yield layer

    def fail(self) -> None:
        if self.draw() > 0.2:
            raise ValueError


def test_random_programs_do_the_same() -> None:
    """What is returned, and every side effect in its order, of 400 random forwards."""
    changed = 0
    for seed in range(400):
        source, file = Programs(seed).source(), f"<program {seed}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope: dict[str, Any] = {"Base": Base, "__name__": "programs"}
        exec(compile(source, file, "exec"), scope)
        torch.manual_seed(seed)
        plain = scope["Net"]().double()
        fused = gankern.fuse(copy.deepcopy(plain), inplace=True)
        x, outcomes = torch.randn(3, 4, dtype=torch.float64), []
        for model in (plain, fused):
            try:
                y = model(x.clone())
            except NameError:  # the program reads a variable before it has one
                outcomes.append((torch.zeros(()), ()))
                continue
            try:
                grads = torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True)
            except RuntimeError:  # the program changes in place what autograd needs
                grads = None
            outcomes.append((y, grads))
        (y, grads), (y2, grads2) = outcomes
        torch.testing.assert_close(y2, y, msg=lambda m, s=source: f"{s}\n{m}")
        if grads is not None:
            assert grads2 is not None, source
            for a, b in zip(grads, grads2, strict=True):
                assert (a is None) == (b is None), source
                if a is not None:
                    torch.testing.assert_close(b, a, msg=lambda m, s=source: f"{s}\n{m}")
        assert len(plain.seen) == len(fused.seen), source
        assert all(abs(a - b) < 1e-9 for a, b in zip(plain.seen, fused.seen, strict=True)), source
        del linecache.cache[file]
        changed += isinstance(fused, Fused)
    assert changed > 200
