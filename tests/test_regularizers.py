"""gradient_penalty: oracles, every kind of it, any critic, products, autocast, torch.compile, DDP, faults of well-known code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
from gankern import backend as backends
from gankern import regularizers
from tests.support import DEVICE, CountProducts, ProfileProducts, need, randn


def eager(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    eps: Tensor,
    *more: Any,
    weight: float = 10.0,
    target: float = 1.0,
    sided: str = "two",
    create_graph: bool = True,
) -> Tensor:
    """The oracle: WGAN-GP as people write it, with the norm of each sample by itself."""
    e = eps.view(-1, *[1] * (real.dim() - 1))
    x = (e * real + (1 - e) * fake).detach().requires_grad_()
    out = critic(x, *more)
    (g,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)
    excess = g.reshape(g.shape[0], -1).norm(2, dim=1) - target
    return weight * (excess.clamp_min(0) if sided == "one" else excess).square().mean()


def mlp(sizes: Sequence[int] = (7, 13, 5, 1), dtype: torch.dtype = torch.float64, fused: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [gankern.nn.LinearLeakyReLU(a, b)] if fused else [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1])).to(DEVICE, dtype)


def conv(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 4, 3, 1, 1), nn.Tanh(), nn.Conv2d(4, 1, 2)]
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)


def epsilons(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(count, seed=3).sigmoid().to(dtype)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def gradients(value: Tensor, module: nn.Module) -> list[Tensor]:
    """Of every parameter; missing ones are zero."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_same(got: Tensor, want: Tensor, module: nn.Module, tolerance: float = 1e-11) -> None:
    """Value and every parameter gradient."""
    torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=tolerance, atol=tolerance)
    some = False
    for g, w in zip(gradients(got, module), gradients(want, module), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=0, atol=tolerance * max(w.abs().max().item(), 1e-3))
        some = some or bool(w.any())
    assert some, "the penalty contributes nothing: this comparison would see no cut graph"


# --- oracles ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["line", "real", "fake", "dragan"])
def test_penalty_of_a_linear_critic(backend: str, sample: str) -> None:
    """w x has the gradient w everywhere: (‖w‖ - target)², and ‖w‖² at target 0."""
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    real, fake = pair(6, 2)
    for target, sided, want, slope in (
        (1.0, "two", 16.0, 2 * 4 / 5),
        (1.0, "one", 16.0, 2 * 4 / 5),
        (6.0, "two", 1.0, -2 / 5),
        (6.0, "one", 0.0, 0.0),
        (0.0, "two", 25.0, 2.0),
    ):
        value, norm = gankern.gradient_penalty(
            lambda x: x @ w, real, fake, weight=0.5, target=target, sided=sided, sample=sample, return_norm=True
        )
        assert value.item() == pytest.approx(0.5 * want, rel=1e-14)
        assert norm.item() == pytest.approx(5.0, rel=1e-14)
        assert not norm.requires_grad
        torch.testing.assert_close(torch.autograd.grad(value, w)[0], 0.5 * slope * w.detach(), rtol=1e-14, atol=1e-14)


def test_wgan_gp_value_of_two_shifted_gaussians_approaches_the_shift() -> None:
    """The Wasserstein distance of N(1, 1) and N(0, 1) is 1; the penalty's own bias, 1 / (2 weight) or so, is below 2 %."""
    shift, draws = 1.0, torch.Generator().manual_seed(0)
    critic = mlp((1, 32, 32, 1), torch.float32).cpu()
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.0, 0.9))

    def samples(n: int) -> tuple[Tensor, Tensor]:
        return shift + torch.randn(n, 1, generator=draws), torch.randn(n, 1, generator=draws)

    for step in range(400):
        if step == 300:
            optimizer.param_groups[0]["lr"] = 5e-4
        real, fake = samples(256)
        loss = critic(fake).mean() - critic(real).mean()
        loss = loss + gankern.gradient_penalty(critic, real, fake, weight=30.0, generator=draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, x = samples(50_000)
        value = (critic(x + shift) - critic(x)).mean().item()
    assert value == pytest.approx(shift, rel=0.05)


# --- every kind, any critic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sided", ["two", "one"])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sample", ["line", "real", "fake"])
def test_matches_eager(backend: str, sample: str, target: float, sided: str) -> None:
    critic, (real, fake), eps = mlp(), pair(16, 7), epsilons(16)
    for p in critic.parameters():
        p.data *= 2.5  # norms on both sides of 1
    options: dict[str, Any] = {"weight": 3.0, "target": target, "sided": sided}
    got = gankern.gradient_penalty(critic, real, fake, sample=sample, eps=eps if sample == "line" else None, **options)
    at = {"line": eps, "real": torch.ones_like(eps), "fake": torch.zeros_like(eps)}[sample]
    assert_same(got, eager(critic, real, fake, at, **options), critic)


def test_r1_and_r2(backend: str) -> None:
    """gamma / 2 * E ‖∇D(x)‖², Mescheder et al. 2018, eq. 9."""
    critic, (real, fake), gamma = mlp(), pair(16, 7), 10.0
    for sample, x in (("real", real), ("fake", fake)):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        want = gamma / 2 * g.square().sum(1).mean()
        given = (real, None) if sample == "real" else (None, fake)
        got = gankern.gradient_penalty(critic, *given, weight=gamma / 2, target=0.0, sample=sample)
        assert_same(got, want, critic)
    both = gankern.gradient_penalty(critic, real, fake, weight=gamma / 2, target=0.0, sample="both")
    alone = [gankern.gradient_penalty(critic, real, fake, weight=gamma / 2, target=0.0, sample=s) for s in ("real", "fake")]
    assert_same(both, alone[0] + alone[1], critic)


def test_dragan_perturbs_real_samples_by_half_their_deviation(backend: str) -> None:
    critic, (real, fake) = mlp(), pair(16, 7)
    noise = torch.rand(16, 7, dtype=torch.float64, device=DEVICE, generator=generator())
    at = real + 0.5 * real.std(correction=0) * noise
    got = gankern.gradient_penalty(critic, real, None, sample="dragan", generator=generator())
    assert_same(got, eager(critic, at, fake, torch.ones_like(at[:, 0])), critic)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3, 4), (5, 2, 3, 2, 2), (1, 6)], ids=str)
def test_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(math.prod(shape[1:]), 4).to(DEVICE, torch.float64)
    (real, fake), eps = pair(*shape), epsilons(shape[0])

    def critic(x: Tensor) -> Tensor:
        return torch.tanh(layer(x.reshape(len(x), -1))).sum(1)

    assert_same(gankern.gradient_penalty(critic, real, fake, eps=eps), eager(critic, real, fake, eps), layer)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_and_not_three(backend: str, channels: int, channels_last: bool) -> None:
    """A fault of well-known code: eps.expand(B, 3, H, W). The critic gives a map of scores, which are added."""
    critic, (real, fake), eps = conv(channels), pair(4, channels, 6, 5), epsilons(4)
    want = eager(critic, real, fake, eps)
    if channels_last:
        real, fake = (t.contiguous(memory_format=torch.channels_last) for t in (real, fake))
    assert_same(gankern.gradient_penalty(critic, real, fake, eps=eps), want, critic)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(3, 2), nn.Linear(9, 1)

    def forward(self, x: Tensor, label: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(torch.cat([x, self.embed(label)], 1).square()) * scale


def test_a_condition_is_passed_on(backend: str) -> None:
    critic = Conditional().to(DEVICE, torch.float64)
    (real, fake), eps, label = pair(6, 7), epsilons(6), torch.arange(6, device=DEVICE) % 3
    assert_same(gankern.gradient_penalty(critic, real, fake, cond=label, eps=eps), eager(critic, real, fake, eps, label), critic)
    got = gankern.gradient_penalty(critic, real, fake, cond=(label, 2.0), eps=eps)
    assert_same(got, eager(critic, real, fake, eps, label, 2.0), critic)


def test_packed_samples_have_one_eps_and_one_norm_a_pack(backend: str) -> None:
    """PacGAN: the critic's input is the pack."""
    critic, (real, fake) = mlp((14, 5, 1)), (t.reshape(8, 14) for t in pair(16, 7))
    eps = epsilons(8)
    got, norm = gankern.gradient_penalty(critic, real, fake, eps=eps, return_norm=True)
    assert_same(got, eager(critic, real, fake, eps), critic)
    x = (eps[:, None] * real + (1 - eps[:, None]) * fake).requires_grad_()
    torch.testing.assert_close(norm, torch.autograd.grad(critic(x).sum(), x)[0].norm(2, dim=1).mean())


def test_real_and_fake_get_no_gradient_and_are_not_changed(backend: str) -> None:
    critic, (real, fake) = mlp(), pair(16, 7)
    before = real.clone(), fake.clone()
    real.requires_grad_()
    fake.requires_grad_()
    value = gankern.gradient_penalty(critic, real, fake)
    assert torch.autograd.grad(value, [real, fake], allow_unused=True) == (None, None)
    assert torch.equal(real, before[0])
    assert torch.equal(fake, before[1])
    for sample in ("real", "fake"):
        gankern.gradient_penalty(critic, real, fake, sample=sample).backward()
    assert real.grad is None
    assert fake.grad is None


def test_generator_and_default_generator(backend: str) -> None:
    critic, (real, fake) = mlp(), pair(16, 7)
    for sample in ("line", "dragan"):
        a, b, c = (gankern.gradient_penalty(critic, real, fake, sample=sample, generator=generator(s)).item() for s in (1, 1, 2))
        assert a == b != c
        torch.manual_seed(1)
        first = gankern.gradient_penalty(critic, real, fake, sample=sample).item()
        second = gankern.gradient_penalty(critic, real, fake, sample=sample).item()
        assert first != second


def test_without_grad_it_is_the_same_number(backend: str) -> None:
    critic, (real, fake), eps = mlp(), pair(16, 7), epsilons(16)
    with torch.no_grad():
        value = gankern.gradient_penalty(critic, real, fake, eps=eps)
    assert not value.requires_grad
    torch.testing.assert_close(value, gankern.gradient_penalty(critic, real, fake, eps=eps).detach())


def test_a_frozen_critic_has_a_value(backend: str) -> None:
    critic, (real, fake), eps = mlp().requires_grad_(False), pair(16, 7), epsilons(16)
    torch.testing.assert_close(gankern.gradient_penalty(critic, real, fake, eps=eps), eager(critic, real, fake, eps))


def test_unrolled_critic_step_with_a_penalty(backend: str) -> None:
    """Order 2 of the penalty itself: the generator is trained through a critic update that has one (Metz et al. 2017)."""

    def generator_gradient(penalty: Callable[..., Tensor]) -> Tensor:
        shift = torch.tensor([0.3, -0.2], dtype=torch.float64, device=DEVICE, requires_grad=True)
        weights = [randn(2, 6, seed=5).requires_grad_(), randn(6, 1, seed=6).requires_grad_()]
        (real, noise), eps = pair(8, 2), epsilons(8)

        def critic(x: Tensor) -> Tensor:
            return torch.tanh(x @ weights[0]) @ weights[1]

        fake = noise + shift
        for _ in range(2):
            loss = critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake.detach(), eps)
            steps = torch.autograd.grad(loss, weights, create_graph=True)
            weights = [w - 0.1 * g for w, g in zip(weights, steps, strict=True)]
        return torch.autograd.grad(-critic(fake).mean(), shift)[0]

    got = generator_gradient(lambda critic, real, fake, eps: gankern.gradient_penalty(critic, real, fake, eps=eps))
    want, blind = generator_gradient(eager), generator_gradient(lambda *_: torch.zeros((), dtype=torch.float64, device=DEVICE))
    assert (want - blind).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# --- faults of well-known code ------------------------------------------------------------------------------------------------


def record(critic: nn.Module) -> list[Tensor]:
    """Where the critic is asked."""
    seen: list[Tensor] = []
    critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    return seen


def test_one_eps_for_each_sample_and_not_one_for_the_batch(backend: str) -> None:
    critic, real = mlp(), torch.ones(64, 7, dtype=torch.float64, device=DEVICE)
    seen = record(critic)
    gankern.gradient_penalty(critic, real, torch.zeros_like(real))
    assert torch.equal(seen[0], seen[0][:, :1].expand(64, 7))
    assert len(seen[0][:, 0].unique()) > 60
    assert len(seen) == 1, "the critic runs once"


def test_the_norm_is_of_each_sample_and_not_of_the_batch(backend: str) -> None:
    """Were it over the batch, the penalty would depend on the batch size; over dim=1 of images, on the layout."""
    w = randn(2, 3, 3, seed=1)
    for batch in (1, 4, 64):
        real, fake = pair(batch, 2, 3, 3)
        value = gankern.gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), real, fake, weight=1.0)
        assert value.item() == pytest.approx((w.norm().item() - 1) ** 2)


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("sided", ["two", "one"])
def test_sqrt_at_a_zero_gradient_is_not_nan(backend: str, sided: str, target: float) -> None:
    """A critic of dead ReLUs, flat everywhere: its penalty is target², its gradient 0 and not NaN, in a step of any order."""
    critic = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1)).to(DEVICE, torch.float64)
    nn.init.constant_(critic[0].bias, -100.0)
    value, norm = gankern.gradient_penalty(critic, *pair(6, 7), weight=1.0, target=target, sided=sided, return_norm=True)
    assert norm.item() == 0.0
    assert value.item() == (target**2 if sided == "two" else 0.0)
    first = torch.autograd.grad(value, list(critic.parameters()), create_graph=True, allow_unused=True)
    for g in first:
        assert g is None or not g.isnan().any()
    total = sum(g.sum() for g in first if g is not None and g.requires_grad)
    if isinstance(total, Tensor):
        for g in torch.autograd.grad(total, list(critic.parameters()), allow_unused=True):
            assert g is None or not g.isnan().any()


class Cut(torch.autograd.Function):
    """The input gradient is right, its graph is cut: a raw kernel in a backward pass."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w.detach())
        return x @ w

    @staticmethod
    def backward(ctx, dy):
        return dy.detach()[:, None] * ctx.saved_tensors[0], None


class CutCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, dtype=torch.float64, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return Cut.apply(x, self.weight)


def test_a_penalty_that_would_contribute_nothing_is_refused(backend: str) -> None:
    real, fake = pair(6, 7)
    cut = CutCritic()
    with pytest.raises(
        RuntimeError, match=r"^gradient_penalty: critic must be twice differentiable, got an input gradient that no p"
    ):
        gankern.gradient_penalty(cut, real, fake)
    with torch.no_grad():
        gankern.gradient_penalty(cut, real, fake)
    gankern.gradient_penalty(cut.requires_grad_(False), real, fake)
    layer = nn.Linear(7, 1).to(DEVICE, torch.float64)
    for blind in (lambda x: layer(torch.ones_like(x)), lambda x: torch.ones(6, device=DEVICE), lambda x: layer(x.detach())):
        with pytest.raises(RuntimeError) as caught:
            gankern.gradient_penalty(blind, real, fake)
        assert str(caught.value) == "gradient_penalty: critic must depend on its input, got an output that does not"


# --- products -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "eager_count", "ours"),
    [((784, 512, 256, 1), 15, 11), ((784, 1024, 512, 256, 1), 21, 15)],
    ids=["3 layers", "4 layers"],
)
def test_products_of_the_penalty_with_its_backward(sizes: tuple[int, ...], eager_count: int, ours: int) -> None:
    """4L - 1 from drop-in modules; a plain PyTorch critic needs 6L - 3, of which 2L - 2 multiply zeros."""
    need("compiled")
    real, fake = pair(2, 784, dtype=torch.float32)
    with gankern.use_backend("compiled"):
        for fused, most in ((True, ours), (False, eager_count)):
            critic = mlp(sizes, torch.float32, fused).forward  # a function: not the closed form
            with CountProducts() as products:
                gankern.gradient_penalty(critic, real, fake).backward()
            assert 0 < products.count <= most


@pytest.mark.parametrize("fused", [True, False], ids=["drop-in", "plain"])
@pytest.mark.parametrize(
    ("sizes", "closed"), [((784, 512, 256, 1), 8), ((784, 1024, 512, 256, 1), 12)], ids=["3 layers", "4 layers"]
)
def test_products_of_the_closed_form(sizes: tuple[int, ...], closed: int, fused: bool) -> None:
    """4 (L - 1), chosen automatically."""
    need("compiled")
    critic, (real, fake) = mlp(sizes, torch.float32, fused).cpu(), pair(16, 784, dtype=torch.float32)
    with ProfileProducts() as products:
        gankern.gradient_penalty(critic, real.cpu(), fake.cpu()).backward()
    assert products.count == closed
    assert all(m.weight.grad.any() for m in critic if isinstance(m, nn.Linear))


@pytest.mark.parametrize("fused", [True, False])
def test_the_inner_pass_computes_no_weight_gradient(fused: bool) -> None:
    """One product a layer forward, one backward."""
    critic, (real, fake) = mlp(fused=fused), pair(4, 7)
    with CountProducts() as products:
        value = gankern.gradient_penalty(critic, real, fake)
    assert products.count == 2 * 3
    assert all(p.grad is None for p in critic.parameters())
    value.backward()


# --- the closed form of an MLP critic -----------------------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The closed form at any size; the list says of each call whether it was taken."""
    need("compiled")
    if DEVICE != "cpu":
        pytest.skip("taken on the CPU alone")
    calls: list[bool] = []
    original = regularizers._closed_form

    def spy(*arguments: Any) -> Any:
        found = original(*arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(regularizers, "_closed_form", spy)
    monkeypatch.setattr(regularizers, "CLOSED_FORM", 0)
    return calls


def raw_gradients(value: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(module.parameters()), allow_unused=True))


@pytest.mark.parametrize("sizes", [(7, 1), (7, 13, 1), (7, 13, 5, 1), (7, 9, 4, 6, 1)], ids=str)
@pytest.mark.parametrize(("sided", "target"), [("two", 1.0), ("two", 0.0), ("one", 0.3)])
@pytest.mark.parametrize("sample", ["line", "real", "fake"])
def test_closed_form_matches_eager(closed: list[bool], sample: str, sided: str, target: float, sizes: tuple[int, ...]) -> None:
    """Value, norm, every gradient and the set of gradients that exist."""
    critic, (real, fake), eps = mlp(sizes, fused=False), pair(16, 7), epsilons(16)
    for p in critic.parameters():
        p.data *= 2.5
    options: dict[str, Any] = {"weight": 3.0, "target": target, "sided": sided}
    got, norm = gankern.gradient_penalty(
        critic, real, fake, sample=sample, eps=eps if sample == "line" else None, return_norm=True, **options
    )
    assert closed == [True]
    at = {"line": eps, "real": torch.ones_like(eps), "fake": torch.zeros_like(eps)}[sample]
    want = eager(critic, real, fake, at, **options)
    x = at[:, None] * real + (1 - at[:, None]) * fake
    general = gankern.gradient_penalty(critic.forward, x, None, sample="real", return_norm=True, **options)
    torch.testing.assert_close((got, norm), general)
    expected = raw_gradients(want, critic)
    for g, w in zip(raw_gradients(2 * got, critic), expected, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, 2 * w, rtol=0, atol=1e-11 * max(w.abs().max().item(), 1e-3))


def test_closed_form_in_a_training_step(closed: list[bool]) -> None:
    """In float32, on images, with the adversarial loss in one backward pass; hooks of parameters run, frozen ones stay frozen."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(0.2, inplace=True), nn.Identity(), nn.Linear(8, 8), nn.ReLU()]
    critic = nn.Sequential(*layers, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    critic[6].weight = critic[4].weight  # tied
    critic[1].weight.requires_grad_(False)
    seen: list[str] = []
    critic[4].weight.register_post_accumulate_grad_hook(lambda p: seen.append("hook"))
    (real, fake), eps = pair(16, 3, 2, 2, dtype=torch.float32), epsilons(16, torch.float32)
    grads = []
    for penalty in (gankern.gradient_penalty, lambda c, r, f, eps: eager(c, r, f, eps)):
        critic.zero_grad()
        (critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake, eps=eps)).backward()
        grads.append([p.grad for p in critic.parameters()])
    assert closed == [True]
    assert seen == ["hook"] * 2
    assert grads[0][0] is None
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_closed_form_has_every_order(closed: list[bool]) -> None:
    """Gradients that are differentiated themselves (unrolled critics) are autograd's."""
    critic, (real, fake), eps = mlp(fused=False), pair(16, 7), epsilons(16)
    weights, found = [m.weight for m in critic if isinstance(m, nn.Linear)], []
    for penalty in (gankern.gradient_penalty, lambda c, r, f, eps: eager(c, r, f, eps)):
        firsts = torch.autograd.grad(penalty(critic, real, fake, eps=eps).square(), weights, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in firsts), weights, create_graph=True)
        thirds = torch.autograd.grad(sum(g.square().sum() for g in seconds), weights)
        found.append([*firsts, *seconds, *thirds])
    assert closed == [True]
    for g, w in zip(*found, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12 * w.abs().max().item())


def test_closed_form_backward_twice_and_after_a_change(closed: list[bool]) -> None:
    critic, (real, fake), eps = mlp(fused=False), pair(16, 7), epsilons(16)
    value = gankern.gradient_penalty(critic, real, fake, eps=eps)
    first = torch.autograd.grad(value, critic[0].weight, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(value, critic[0].weight, retain_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(-2 * value, critic[0].weight)[0], -2 * first)
    value = gankern.gradient_penalty(critic, real, fake, eps=eps)
    factors = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (several,) = torch.autograd.grad(value, critic[0].weight, factors, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(several, torch.stack([first, -3 * first]))
    with torch.no_grad():
        critic[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    assert closed == [True] * 2


def spectral() -> nn.Sequential:
    critic = mlp(fused=False)
    nn.utils.parametrizations.spectral_norm(critic[2])
    return critic


def hooked() -> nn.Sequential:
    critic = mlp(fused=False)
    critic[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    return critic


NOT_CLOSED: dict[str, Callable[[], Any]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5), nn.Linear(5, 1)).to(DEVICE, torch.float64),
    "parametrised": spectral,
    "hooks": hooked,
    "tanh": lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).to(DEVICE, torch.float64),
    "a function": lambda: mlp().forward,
    "frozen": lambda: mlp(fused=False).requires_grad_(False),
    "a module of its own": lambda: Own().to(DEVICE),
}


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("which", NOT_CLOSED)
def test_what_is_not_taken_in_closed_form(closed: list[bool], which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does the look at the critic change it: the same number with and without (parametrised: a power iteration a read)."""
    values, (real, fake), eps = [], pair(16, 7), epsilons(16)
    for _ in range(2):
        torch.manual_seed(0)
        critic = NOT_CLOSED[which]()
        torch.manual_seed(1)
        values.append(gankern.gradient_penalty(critic, real, fake, eps=eps).item())
        monkeypatch.setattr(regularizers, "_closed_form", lambda *_: None)
    assert closed == [False]
    assert values[0] == values[1]


def test_where_the_closed_form_is_not_taken(closed: list[bool]) -> None:
    critic, (real, fake), eps = mlp(fused=False), pair(16, 7), epsilons(16)
    with torch.no_grad():
        gankern.gradient_penalty(critic, real, fake, eps=eps)
    with torch.autocast("cpu", torch.bfloat16):
        gankern.gradient_penalty(mlp(dtype=torch.float32, fused=False), real.float(), fake.float(), eps=eps.float())
    gankern.gradient_penalty(critic.bfloat16(), real.bfloat16(), fake.bfloat16(), eps=eps.bfloat16())
    with gankern.use_backend("reference"):
        gankern.gradient_penalty(mlp(fused=False), real, fake, eps=eps)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    gankern.gradient_penalty(mlp(fused=False), real, fake, eps=eps)
    handle.remove()
    assert closed == [False] * 5
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the critic's own words
        gankern.gradient_penalty(mlp(fused=False), real[:, 1:], fake[:, 1:], eps=eps)
    rows = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()  # of each row of an image: no flattening
    got = gankern.gradient_penalty(rows, real[:, :6].reshape(16, 3, 2), fake[:, :6].reshape(16, 3, 2), eps=eps)
    assert_same(got, eager(rows, real[:, :6].reshape(16, 3, 2), fake[:, :6].reshape(16, 3, 2), eps), rows)
    gankern.gradient_penalty(lambda x, y: rows(x), real[:, :2], fake[:, :2], eps=eps, cond=eps)
    assert closed == [False] * 7
    with pytest.raises(ValueError, match=r"^gradient_norm_penalty: weight must be a finite number >= 0, got -1$"):
        gankern.gradient_penalty(mlp(fused=False), real, fake, weight=-1)


@pytest.mark.parametrize("fused", [True, False], ids=["drop-in", "plain"])
def test_closed_form_gives_way_to_torch_compile(closed: list[bool], fused: bool) -> None:
    critic, (real, fake), eps = mlp(dtype=torch.float32, fused=fused), pair(16, 7, dtype=torch.float32), epsilons(16, torch.float32)
    got = compiled_loss(critic)(real, fake, eps)
    want = critic(fake).mean() - critic(real).mean() + eager(critic, real, fake, eps)
    assert_same(got, want, critic, 1e-5)


# --- where it must work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(backend: str, fake_dtype: torch.dtype) -> None:
    """The penalty is float32, and off by no more than eager's is."""
    critic, exact = mlp((50, 64, 32, 1), torch.float32), mlp((50, 64, 32, 1), torch.float64)
    real, fake, eps = randn(32, 50, seed=1, dtype=torch.float32), randn(32, 50, seed=2, dtype=fake_dtype), epsilons(32)
    want = eager(exact, real.double(), fake.double(), eps)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = gankern.gradient_penalty(critic, real, fake, eps=eps.float())
        other = eager(critic, real, fake, eps.float())
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) <= 2 * abs(other.item() - want.item()) + 0.01 * want.item()
    for g, o, w in zip(*(gradients(v, m) for v, m in ((got, critic), (other, critic), (want, exact))), strict=True):
        assert g.dtype == torch.float32
        limit = 2 * (o.double() - w).norm() + 0.01 * w.norm()
        assert (g.double() - w).norm() <= limit


def compiled_loss(critic: nn.Module) -> Callable[..., Tensor]:
    torch.compiler.reset()

    def loss(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
        return critic(fake).mean() - critic(real).mean() + gankern.gradient_penalty(critic, real, fake, eps=eps)

    return torch.compile(loss, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("fused", [True, False], ids=["drop-in", "plain"])
@pytest.mark.parametrize("name", ["reference", None])
def test_compile(name: str | None, fused: bool) -> None:
    """The whole critic loss in one graph, forward and backward."""
    critic, (real, fake), eps = mlp(dtype=torch.float32, fused=fused), pair(16, 7, dtype=torch.float32), epsilons(16, torch.float32)
    with gankern.use_backend(name) if name else nullcontext():
        got = compiled_loss(critic)(real, fake, eps)
        got_gradients = gradients(got, critic)
    want = critic(fake).mean() - critic(real).mean() + eager(critic, real, fake, eps)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for g, w in zip(got_gradients, gradients(want, critic), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_compile_with_a_forced_kernel_backend_is_right_or_refused() -> None:
    """A drop-in module would lose its second-order graph inside torch.func inside torch.compile, without a word (torch 2.13)."""
    need("compiled")
    (real, fake), eps = pair(16, 7), epsilons(16)
    with gankern.use_backend("compiled"):
        plain = mlp(fused=False)
        got = compiled_loss(plain)(real, fake, eps)
        want = plain(fake).mean() - plain(real).mean() + eager(plain, real, fake, eps)
        assert_same(got, want, plain)
        with pytest.raises(Exception, match=r"backend must be chosen automatically or be 'reference' for torch\.func inside"):
            compiled_loss(mlp())(real, fake, eps)


def test_torch_func(backend: str) -> None:
    """Inside torch.func.grad over the parameters."""
    critic, (real, fake), eps = mlp(), pair(16, 7), epsilons(16)
    parameters = {k: v.detach() for k, v in critic.named_parameters()}

    def penalty(parameters: dict[str, Tensor]) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(critic, parameters, x)

        return gankern.gradient_penalty(call, real, fake, eps=eps)

    got = torch.func.grad(penalty)(parameters)
    for g, w in zip(got.values(), gradients(eager(critic, real, fake, eps), critic), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


class Syncs(TorchDispatchMode):
    """Ops that make the host wait for the device, which a CUDA graph cannot capture."""

    NAMES = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", ["line", "real", "fake", "dragan"])
def test_nothing_waits_for_the_device(backend: str, sample: str) -> None:
    critic, (real, fake) = mlp(), pair(4, 7)
    with Syncs() as syncs:
        gankern.gradient_penalty(critic, real, fake, sample=sample, return_norm=True)[0].backward()
    assert syncs.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("sample", ["line", "dragan"])
def test_cuda_graph_capture_draws_anew_at_each_replay(sample: str) -> None:
    critic = mlp(dtype=torch.float32).cuda()
    real, fake = (t.cuda() for t in pair(16, 7, dtype=torch.float32))

    def step() -> Tensor:
        value = gankern.gradient_penalty(critic, real, fake, sample=sample)
        critic.zero_grad(set_to_none=False)
        value.backward()
        return value.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(value.item())
    assert len(set(seen)) == 3
    real.copy_(fake)  # on the line between equal samples there is nothing to draw
    if sample == "line":
        graph.replay()
        assert value.item() == pytest.approx(gankern.gradient_penalty(critic, real, fake).item(), rel=1e-5)


def distributed_steps(rank: int, folder: str, names: list[str]) -> None:
    """One of two processes: half of the batch through DistributedDataParallel, two steps on each backend."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    half = slice(8 * rank, 8 * rank + 8)
    (real, fake), eps = pair(16, 7), epsilons(16)
    for name in names:
        critic = nn.parallel.DistributedDataParallel(mlp())
        with gankern.use_backend(name):
            for _ in range(2):  # a parameter that was left without a gradient shows in the second step
                critic.zero_grad()
                penalty = gankern.gradient_penalty(critic, real[half], fake[half], eps=eps[half])
                (critic(fake[half]).mean() - critic(real[half]).mean() + penalty).backward()
        if rank == 0:
            torch.save([p.grad for p in critic.parameters()], f"{folder}/{name}")
        del critic  # before the process group: its reducer must not be the last to let go of it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rank 0's gradients on each backend that runs here, a file each."""
    folder = tmp_path_factory.mktemp("two")
    names = [name for name in ("reference", "compiled") if not backends.problem(name, "cpu")]
    torch.multiprocessing.spawn(distributed_steps, (str(folder), names), nprocs=2)
    return folder


@pytest.mark.skipif(not torch.distributed.is_available() or DEVICE != "cpu", reason="two gloo processes on the CPU")
@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_two_processes_have_the_gradients_of_one_at_the_global_batch(name: str, two_processes: Path) -> None:
    need(name)
    critic, (real, fake), eps = mlp(), pair(16, 7), epsilons(16)
    loss = critic(fake).mean() - critic(real).mean() + eager(critic, real, fake, eps)
    for got, want in zip(torch.load(two_processes / name), gradients(loss, critic), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# --- bad input ----------------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 3)
OP = "gradient_penalty"


def score(x: Tensor) -> Tensor:
    return x.sum(1)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "critic is a tensor": ((X, X, X), {}, TypeError, f"{OP}: critic must be callable, got Tensor"),
    "sample": (
        (score, X, X),
        {"sample": "all"},
        ValueError,
        f"{OP}: sample must be one of line, real, fake, both, dragan, got 'all'",
    ),
    "sided": ((score, X, X), {"sided": "both"}, ValueError, f"{OP}: sided must be one of two, one, got 'both'"),
    "no fake": ((score, X, None), {}, TypeError, f"{OP}: fake must be a torch.Tensor, got NoneType"),
    "no real": ((score, None, X), {"sample": "dragan"}, TypeError, f"{OP}: real must be a torch.Tensor, got NoneType"),
    "integers": ((score, X.int(), X), {}, TypeError, f"{OP}: real must be float64, float32, bfloat16 or float16, got int32"),
    "scalars": ((score, X[0, 0], X), {"sample": "real"}, ValueError, f"{OP}: real must have at least one dimension, got shape []"),
    "batches differ": ((score, X, X[:3]), {}, ValueError, f"{OP}: fake must have shape [4, 3], got [3, 3]"),
    "eps": ((score, X, X), {"eps": torch.zeros(1)}, ValueError, "interpolate: eps must have shape [4], got [1]"),
    "eps elsewhere": (
        (score, X, X),
        {"eps": torch.zeros(4), "sample": "real"},
        ValueError,
        f"{OP}: eps must be None unless sample is \"line\", got sample='real'",
    ),
    "weight": ((score, X, X), {"weight": -1}, ValueError, "gradient_norm_penalty: weight must be a finite number >= 0, got -1"),
    "the critic gives the mean": (
        (lambda x: x.mean(), X, X),
        {},
        ValueError,
        f"{OP}: critic must return one row of scores for each of 4 samples, got shape []",
    ),
    "the critic packs by itself": (
        (lambda x: x.reshape(2, 6).sum(1), X, X),
        {},
        ValueError,
        f"{OP}: critic must return one row of scores for each of 4 samples, got shape [2]",
    ),
    "the critic gives a pair": ((lambda x: (x, x), X, X), {}, TypeError, f"{OP}: critic must return a torch.Tensor, got tuple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(backend: str, case: str) -> None:
    arguments, options, kind, sentence = REFUSED[case]
    with pytest.raises(kind) as caught:
        gankern.gradient_penalty(*arguments, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name: str) -> None:
    with gankern.use_backend(name), pytest.raises(RuntimeError, match=f"backend must be able to run on meta tensors, got '{name}'"):
        gankern.gradient_penalty(score, X.to("meta"), X.to("meta"))


def test_an_empty_batch_is_nan_as_in_eager(backend: str) -> None:
    critic = mlp()
    value = gankern.gradient_penalty(critic, *pair(0, 7))
    assert value.isnan()
