"""The generator's side of the one-pass critic: loss and gradient at the fake samples against autograd through the same critic."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.nn import MLPCritic
from gankern.ops import gan_loss
from gankern.ops import mlp_critic as op
from gankern.ops._critic_loss import MLPCriticLoss
from gankern.ops._objectives import OBJECTIVES
from gankern.ops._philox import draw_seed, dropout_keep
from tests.support import DEVICE, ProfileProducts, need, randn

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = {1: (7, 1), 2: (9, 16, 1), 3: (7, 13, 5, 1), 5: (3, 11, 4, 9, 6, 1)}
RELATIVE = [name for name, row in OBJECTIVES.items() if row.relative != "no"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(sizes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Weights and biases that require a gradient, as those of a critic that nobody froze."""
    weights, biases = [], []
    for i, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        weights.append(randn(out, fan_in, seed=seed + 2 * i, dtype=dtype, scale=1.5 / math.sqrt(fan_in)).requires_grad_())
        biases.append(randn(out, seed=seed + 2 * i + 1, dtype=dtype).requires_grad_())
    return weights, biases


def fakes(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 50) -> Tensor:
    """As a generator makes them: no leaf."""
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_() * 1


def eager(
    fake: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    objective: str = "non-saturating",
    real: Tensor | None = None,
    masks: Sequence[Tensor] | None = None,
    real_label: Any = 1.0,
) -> dict[str, Tensor]:
    """The oracle: [real; fake] through the critic, and PyTorch's autograd back to the fakes."""
    n_real, x = (0, fake) if real is None else (len(real), torch.cat([real, fake]))
    x = x.flatten(1)
    for i, (w, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        x = F.leaky_relu(F.linear(x, w, b), slopes[i])
        x = x if masks is None else x * masks[i].to(x.dtype)
    logits = F.linear(x, weights[-1], biases[-1])
    a_real = None if real is None else logits[:n_real]
    out = gan_loss.reference(a_real, logits[n_real:], objective, "generator", real_label=real_label)
    (grad,) = torch.autograd.grad(out.loss, fake)
    return {"loss": out.loss.detach(), "stats": out.stats, "grad": grad}


def results(out: MLPCriticLoss) -> dict[str, Tensor]:
    (grad,) = out.grads
    assert grad is not None
    assert out.penalty == 0
    assert out.norms.numel() == 0
    torch.testing.assert_close(out.adversarial, out.value, rtol=0, atol=0, equal_nan=True)
    return {"loss": out.value, "stats": out.stats, "grad": grad}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        finite = expected[expected.isfinite()].abs()
        atol = TOLERANCE[expected.dtype] * (finite.max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(got[name], expected, rtol=0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def compare(layers: int, dtype: torch.dtype = torch.float64, batch: int = 6, slopes: Any = 0.2, **settings: Any) -> MLPCriticLoss:
    weights, biases = make(SIZES[layers], dtype)
    fake = fakes(batch, SIZES[layers][0], dtype=dtype)
    each = [slopes] * (layers - 1) if isinstance(slopes, (int, float)) else slopes
    out = gankern.mlp_critic_generator(fake, weights, biases, slopes, **settings)
    assert_same(results(out), eager(fake, weights, biases, each, **settings))
    return out


# --- values and gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layers", SIZES)
def test_equals_autograd(backend: str, layers: int, dtype: torch.dtype) -> None:
    out = compare(layers, dtype)
    assert out.d_real.isnan()
    assert out.d_fake.isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(backend: str, objective: str) -> None:
    real = randn(6, 7, seed=60)
    if objective not in RELATIVE:
        compare(3, objective=objective)
    out = compare(3, objective=objective, real=real)
    assert out.d_real.isfinite()  # given real samples enter the statistics


@pytest.mark.parametrize("slopes", [0, 1, (0.0, 0.01, 3.0, 0.5)], ids=str)
def test_slopes(backend: str, slopes: Any) -> None:
    compare(5, slopes=slopes)


def test_labels(backend: str) -> None:
    compare(3, real_label=0.9)
    compare(3, objective="lsgan", real_label=0.0)
    compare(3, real_label=randn(6, seed=3).sigmoid())


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is built the pass runs in plain PyTorch calls."""
    monkeypatch.setattr(op, "_choose", lambda device: "torch")
    compare(1)
    compare(5)
    compare(3, real=randn(4, 7, seed=60), objective="relativistic-average")
    generators = (torch.Generator(DEVICE).manual_seed(1) for _ in range(2))
    found = []
    for name in ("torch", "reference"):
        monkeypatch.setattr(op, "_choose", lambda device, name=name: name)
        fake, real = fakes(6, 7), randn(4, 7, seed=60)
        out = gankern.mlp_critic_generator(fake, *make(SIZES[3]), dropout=0.4, real=real, generator=next(generators))
        found.append(results(out))
    assert_same(*found)


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real+fake"])
@pytest.mark.parametrize("dropout", [0.3, (0.0, 0.9)], ids=str)
def test_dropout(backend: str, dropout: Any, real: bool) -> None:
    """The masks are those that linear_lrelu draws, layer after layer, for the rows [real; fake]."""
    weights, biases = make(SIZES[3])
    fake, given = fakes(8, 7), randn(5, 7, seed=60) if real else None
    rows = 13 if real else 8
    generator = torch.Generator(DEVICE).manual_seed(5)
    masks = []
    for p, w in zip((dropout,) * 2 if isinstance(dropout, float) else dropout, weights, strict=False):
        keep = torch.ones(rows, len(w), device=DEVICE)
        if p:
            keep = dropout_keep(draw_seed(torch.device(DEVICE), generator), rows, len(w), p).double() / (1 - p)
        masks.append(keep)
    generator.manual_seed(5)
    out = gankern.mlp_critic_generator(fake, weights, biases, dropout=dropout, real=given, generator=generator)
    assert_same(results(out), eager(fake, weights, biases, (0.2, 0.2), real=given, masks=masks))
    off = gankern.mlp_critic_generator(fake, weights, biases, dropout=dropout, training=False)
    assert_same(results(off), eager(fake, weights, biases, (0.2, 0.2)))


def test_any_shape_and_strides(backend: str) -> None:
    weights, biases = make((12, 8, 1))
    want = eager(fakes(4, 3, 2, 2), weights, biases, [0.2])
    strided = [w.detach().mT.contiguous().mT for w in weights]
    fake = fakes(4, 3, 2, 2)
    for given in (fake.contiguous(memory_format=torch.channels_last), torch.stack([fake, fake], -1)[..., 1], fake):
        got = gankern.mlp_critic_generator(given, strided, biases)
        assert_same(results(got), want)


@pytest.mark.parametrize("batch", [0, 1, 300])
def test_batches(backend: str, batch: int) -> None:
    out = compare(3, batch=batch)
    assert out.value.isnan() == (batch == 0)


@pytest.mark.parametrize("batch", [1, 16, 63, 64, 65])
def test_large_weights(backend: str, batch: int) -> None:
    """On the CPU few rows go through large weights in another order."""
    weights, biases = make((200, 205, 170, 1))
    fake = fakes(batch, 200)
    assert_same(results(gankern.mlp_critic_generator(fake, weights, biases)), eager(fake, weights, biases, (0.2, 0.2)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_show(backend: str, value: float) -> None:
    weights, biases = make(SIZES[3])
    leaf = randn(6, 7, seed=50)
    leaf[2, 3] = value
    got = results(gankern.mlp_critic_generator(leaf.requires_grad_(), weights, biases))
    want = eager(leaf, weights, biases, (0.2, 0.2))
    for name, expected in want.items():
        assert torch.equal(got[name].isfinite(), expected.isfinite()), name
    assert not want["loss"].isfinite() or not want["grad"].isfinite().all() or value == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_at_most_twice_eager(backend: str, dtype: torch.dtype) -> None:
    errors: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for seed in range(8):
        weights, biases = make((48, 64, 33, 1), dtype, seed=10 * seed)
        fake = fakes(24, 48, dtype=dtype, seed=100 + seed)
        ours = results(gankern.mlp_critic_generator(fake, weights, biases))
        theirs = eager(fake, weights, biases, (0.2, 0.2))
        exact = fake.detach().double().requires_grad_()
        want = eager(exact, [w.double() for w in weights], [b.double() for b in biases], (0.2, 0.2))
        for name in ("loss", "grad"):
            assert ours[name].dtype == theirs[name].dtype
            mine, other = errors.setdefault(name, ([], []))
            mine.append((ours[name].double() - want[name]).flatten())
            other.append((theirs[name].double() - want[name]).flatten())
    for name, (mine, other) in errors.items():
        a, b = torch.cat(mine).square().mean().sqrt(), torch.cat(other).square().mean().sqrt()
        assert a <= 2 * b, f"{name}: error {a.item():.3g} in {dtype}, eager PyTorch makes {b.item():.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    weights, biases = make(SIZES[3], torch.float32)
    fake = fakes(6, 7, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = gankern.mlp_critic_generator(fake, weights, biases)
    got, exact = results(out), eager(fake, weights, biases, (0.2, 0.2))
    for name in ("loss", "grad"):
        assert got[name].dtype == torch.float32
        assert (got[name] - exact[name]).norm() <= 0.05 * exact[name].norm(), name
    assert (got["grad"] - exact["grad"]).abs().max() > 0  # it did run in 16 bits


# --- products, and who gets what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", SIZES)
def test_products(kernel_backend: str, layers: int) -> None:
    weights, biases = make(SIZES[layers])
    fake = fakes(6, SIZES[layers][0])
    for given, products in ((fake, 2 * layers), (fake.detach(), layers)):
        with ProfileProducts() as counted:
            gankern.mlp_critic_generator(given, weights, biases)
        assert counted.count == products


def test_the_gradient_goes_on_into_the_generator(backend: str) -> None:
    weights, biases = make(SIZES[3])
    z, w = randn(6, 4, seed=1), randn(7, 4, seed=2).requires_grad_()
    bce = nn.BCEWithLogitsLoss()

    def fake() -> Tensor:
        return torch.tanh(z @ w.mT)

    x = fake()
    for i in range(2):
        x = F.leaky_relu(F.linear(x, weights[i], biases[i]), 0.2)
    scores = F.linear(x, weights[2], biases[2])
    (want,) = torch.autograd.grad(bce(scores, torch.ones_like(scores)), w)
    for run, times in ((lambda o: o.backward(), 1), (lambda o: o.loss.backward(), 1), (lambda o: (3 * o.loss).backward(), 3)):
        w.grad = None
        run(gankern.mlp_critic_generator(fake(), weights, biases))
        run(gankern.mlp_critic_generator(fake(), weights, biases))
        torch.testing.assert_close(w.grad, 2 * times * want, rtol=1e-11, atol=1e-13)
    assert all(p.grad is None for p in (*weights, *biases))


def test_a_leaf_gets_its_grad(backend: str) -> None:
    weights, biases = make(SIZES[3])
    fake = randn(6, 7, seed=50).requires_grad_()
    out = gankern.mlp_critic_generator(fake, weights, biases)
    out.backward()
    torch.testing.assert_close(fake.grad, out.grads[0], rtol=0, atol=0)


def test_without_a_graph_it_is_the_loss_alone(backend: str) -> None:
    weights, biases = make(SIZES[3])
    fake = fakes(6, 7)
    want = eager(fake, weights, biases, (0.2, 0.2))
    out = gankern.mlp_critic_generator(fake.detach(), weights, biases)
    assert out.grads == (None,)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.value, want["loss"])
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.backward()
    with torch.no_grad():
        assert not gankern.mlp_critic_generator(fake, weights, biases).loss.requires_grad


def test_changed_samples_are_noticed_and_changed_weights_do_not_matter(backend: str) -> None:
    """The gradient is known when the pass ends: the critic may be updated before it is handed over."""
    weights, biases = make(SIZES[3])
    fake = fakes(6, 7)
    out = gankern.mlp_critic_generator(fake, weights, biases)
    with torch.no_grad():
        weights[0].add_(1)
    out.backward()
    for use in (lambda o: o.backward(), lambda o: o.loss):
        out = gankern.mlp_critic_generator(fake, weights, biases)
        with torch.no_grad():
            fake.add_(1)
        with pytest.raises(RuntimeError, match="mlp_critic: what gets a gradient must not be changed in place before"):
            use(out)


def test_second_order_raises(backend: str) -> None:
    fake = fakes(6, 7)
    (grad,) = torch.autograd.grad(gankern.mlp_critic_generator(fake, *make(SIZES[3])).loss, fake, create_graph=True)
    with pytest.raises(RuntimeError, match="one of second order"):
        torch.autograd.grad(grad.square().sum(), fake, allow_unused=True)


def test_func_grad(backend: str) -> None:
    weights, biases = make(SIZES[3])
    fake = fakes(6, 7)
    want = eager(fake, weights, biases, (0.2, 0.2))
    grad, value = torch.func.grad_and_value(lambda x: gankern.mlp_critic_generator(x, weights, biases).loss)(fake.detach())
    assert_same({"loss": value, "grad": grad}, {k: want[k] for k in ("loss", "grad")})
    with pytest.raises(RuntimeError, match="the critic must not require a gradient: only the fake samples get one"):
        torch.func.grad(lambda w: gankern.mlp_critic_generator(fake.detach(), [w, *weights[1:]], biases).loss)(weights[0])
    batches = torch.stack([fake.detach(), fake.detach() + 1])
    grads = torch.func.vmap(torch.func.grad(lambda x: gankern.mlp_critic_generator(x, weights, biases).loss))(batches)
    torch.testing.assert_close(grads[0], want["grad"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["reference", "compiled"] + ["triton"] * (DEVICE != "cpu"))
def test_compile(name: str) -> None:
    need(name)
    weights, biases = make(SIZES[3])
    leaf = randn(6, 7, seed=50).requires_grad_()

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        out = gankern.mlp_critic_generator(torch.tanh(x).view(6, 7, 1), weights, biases)
        return out.loss, out.d_fake

    with gankern.use_backend(name):
        torch._dynamo.reset()
        value, d_fake = torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf)
        want, want_d_fake = loss(leaf)
        torch.testing.assert_close((value, d_fake), (want, want_d_fake))
        torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(want, leaf), rtol=1e-11, atol=1e-13)


def test_a_module_trains_its_generator_as_a_plain_critic_does(backend: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1, bias=False)]
    plain = nn.Sequential(*layers).to(DEVICE, torch.float64)
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Unflatten(1, (3, 4))).to(DEVICE, torch.float64)
    losses = []
    for one_pass in (False, True):
        generator = copy.deepcopy(net)
        optimizer = torch.optim.Adam(generator.parameters(), 1e-2)
        for step in range(8):
            fake, real = generator(randn(6, 4, seed=step)), randn(6, 3, 4, seed=99 + step)
            optimizer.zero_grad()
            if one_pass:
                out: Any = MLPCritic(plain).generator_loss(fake, "relativistic-average", real, real_label=0.9)
            else:
                out = gankern.gan_loss(plain(real), plain(fake), "relativistic-average", "generator", real_label=0.9)
            out.backward()
            optimizer.step()
            losses.append(out.value.item())
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-10)
    assert losses[0] != losses[7]


# --- bad input -------------------------------------------------------------------------------------------------------------------

BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "fake must be a torch.Tensor, got int", {"fake": 3}),
    (ValueError, r"fake must have shape \[B, \*\], got shape \[7\]", {"fake": torch.zeros(7)}),
    (ValueError, r"weights\[0\] must have 8 columns, got shape \[13, 7\]", {"fake": torch.zeros(6, 8, device=DEVICE)}),
    (TypeError, r"weights\[0\] must have dtype float32, got float64", {"fake": torch.zeros(6, 7, device=DEVICE)}),
    (TypeError, "real must have dtype float64, got float32", {"real": torch.zeros(6, 7, device=DEVICE)}),
    (ValueError, r"real must have 7 elements a sample, as fake, got shape \[6, 8\]", {"real": randn(6, 8, seed=0)}),
    (ValueError, "real must be given for a relativistic objective, got None", {"objective": "relativistic"}),
    (ValueError, "real must not require a gradient: only the fake samples get one, got a tensor that does", {
        "real": randn(6, 7, seed=0).requires_grad_()}),
    (ValueError, "objective must be one of .*, got 'x'", {"objective": "x"}),
    (ValueError, r"dropout must be in \[0, 1\], got 1.5", {"dropout": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sentence", "changes"), BAD, ids=[b[1][:40] for b in BAD])
def test_bad_input(kind: type[Exception], sentence: str, changes: dict[str, Any]) -> None:
    weights, biases = make(SIZES[3])
    with pytest.raises(kind, match=f"^mlp_critic_generator: {sentence}$"):
        gankern.mlp_critic_generator(**{"fake": fakes(6, 7), "weights": weights, "biases": biases} | changes)


def test_labels_and_pairs_are_checked_as_gan_loss_does(backend: str) -> None:
    weights, biases = make(SIZES[3])
    with pytest.raises(ValueError, match=r"^gan_loss: fake must have as many logits as real, 5, to pair with, got 6$"):
        gankern.mlp_critic_generator(fakes(6, 7), weights, biases, objective="relativistic", real=randn(5, 7, seed=0))
    with pytest.raises(ValueError, match=r"^gan_loss: real_label must have one value for each of 6 logits, got 4$"):
        gankern.mlp_critic_generator(fakes(6, 7), weights, biases, real_label=torch.ones(4, device=DEVICE))
