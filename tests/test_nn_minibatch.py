"""gankern.nn: the deviation over a minibatch against its formula, and minibatch features in every critic of gankern.models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern import models
from gankern.nn import MinibatchStdDev, add_minibatch_features, spectral_norm_
from gankern.nn.minibatch import KINDS
from tests.networks import assert_fused_matches, assert_penalty_matches, leaves, made, on_parameters
from tests.support import DEVICE, assert_accurate, assert_matches, randn

CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of a sample
    "mlp": (lambda: models.MLPDiscriminator((1, 2, 4), (5,)), (1, 2, 4)),
    "dcgan": (lambda: models.DCGANDiscriminator((1, 8, 8), 2), (1, 8, 8)),
    "sngan": (lambda: models.SNGANDiscriminator((1, 8, 8), (2, 3)), (1, 8, 8)),
    "cgan": (lambda: models.CGANDiscriminator((1, 2, 4), 3, (5,), dropout=0.0), (1, 2, 4)),
    "cdcgan": (lambda: models.CDCGANDiscriminator((1, 8, 8), 3, 2), (1, 8, 8)),
    "acgan": (lambda: models.ACGANDiscriminator((1, 2, 4), 3, (5,), 0.0), (1, 2, 4)),
    "conv acgan": (lambda: models.ConvACGANDiscriminator((1, 8, 8), 3, 2), (1, 8, 8)),
    "tabular": (lambda: models.TabularDiscriminator(4, (5,), 0.0, 2), (4,)),
    "packed": (lambda: models.Packed(models.MLPDiscriminator((8,), (5,)), 2), (4,)),
    "maxout": (lambda: models.MaxoutDiscriminator((2,), (5,), 2), (2,)),
    "resnet": (lambda: models.ResNetDiscriminator((1, 8, 8), 2), (1, 8, 8)),
    "unrolled": (lambda: models.UnrolledDiscriminator((2,), 40), (2,)),
}


def scores(critic: nn.Module, x: Tensor) -> Tensor:
    """[B, 1] or, of an ACGAN, [B, 1 + classes]."""
    labels = [torch.arange(len(x), device=x.device) % 3] if hasattr(critic, "embedding") else []
    out = critic(x, *labels)
    return torch.column_stack(out if isinstance(out, tuple) else (out,))


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3), (3, 1)])
def test_deviation_is_its_formula(shape: tuple[int, ...]) -> None:
    def formula(x: Tensor) -> Tensor:
        s = (x.flatten(1).var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, s * torch.ones_like(x[:, :1])], 1)

    x = randn(*shape, seed=1)
    assert MinibatchStdDev()(x).shape == (shape[0], shape[1] + 1, *shape[2:])
    assert_matches(MinibatchStdDev(), formula, [x])


def test_deviation_of_equal_samples_has_a_gradient() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    y = MinibatchStdDev()(x)
    assert torch.equal(y[:, 4], torch.full((3,), 1e-4))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert MinibatchStdDev()(x[:1]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deviation_in_16_bits(dtype: torch.dtype) -> None:
    def eager(x: Tensor) -> Tensor:
        s = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, s.expand_as(x[:, :1])], 1)

    assert_accurate(MinibatchStdDev(), eager, [[randn(8, 5, seed=i, dtype=dtype)] for i in range(4)], order=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_takes_them(name: str, kind: str) -> None:
    """The scores change by the features' part alone, and a sample's score then hangs on the other samples."""
    make, shape = CRITICS[name]
    plain, x = made(make).eval(), randn(4, *shape, seed=1)
    critic = add_minibatch_features(copy.deepcopy(plain), kind, 6, 2)
    added = critic.get_submodule(next(n for n, m in critic.named_modules() if type(m).__name__.startswith("Minibatch")))
    wide = [m for m in critic.modules() if isinstance(m, nn.Linear)][-1]
    narrow = [m for m in plain.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[Tensor] = []
    added.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    got, want = scores(critic, x), scores(plain, x)
    old = narrow.in_features
    assert seen[0].shape[1] == wide.in_features == old + (6 if kind == "discrimination" else 1)
    torch.testing.assert_close(got, want + seen[0][:, old:] @ wide.weight[:, old:].T)
    other = torch.cat([x[:2], 2 * x[2:]])
    assert torch.equal(scores(plain, x)[0], scores(plain, other)[0])
    assert (scores(critic, x)[0] - scores(critic, other)[0]).abs().max() > 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "dcgan", "packed"])
def test_before_and_after_fuse(name: str, kind: str) -> None:
    make, shape = CRITICS[name]
    x, y = randn(4, *shape, seed=1), randn(4, *shape, seed=2)
    critic = add_minibatch_features(made(make), kind, 6, 2)
    assert_fused_matches(critic, x, ops={"mlp": [], "dcgan": ["bias_lrelu"], "packed": []}[name], order=2)
    if name == "mlp":
        assert_penalty_matches(critic, x, y)
    after = add_minibatch_features(gankern.fuse(made(make)), kind, 6, 2)
    after.load_state_dict(critic.state_dict())
    assert_matches(on_parameters(after), on_parameters(critic), [x, *leaves(critic)])


def test_new_columns_and_dtype() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 40, bias=False).to(DEVICE, torch.bfloat16))
    weight = critic[0].weight.detach().clone()
    assert add_minibatch_features(critic, "discrimination") is critic
    wide = critic[0][1]
    assert (wide.weight.shape, wide.weight.dtype, wide.bias) == ((40, 103), torch.bfloat16, None)
    assert torch.equal(wide.weight[:, :3], weight)
    assert 0 < wide.weight[:, 3:].abs().max() <= 103**-0.5
    assert critic[0][0].T.shape == (3, 100, 5)


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (
            lambda: MinibatchStdDev()(torch.zeros(3)),
            ValueError,
            "MinibatchStdDev: x must have two dimensions or more, got shape [3]",
        ),
        (
            lambda: MinibatchStdDev()(torch.zeros(3, 2, dtype=torch.int64)),
            TypeError,
            "MinibatchStdDev: x must be float64, float32, bfloat16 or float16, got int64",
        ),
        (
            lambda: add_minibatch_features(nn.Sequential(nn.Linear(2, 1)), "variance"),
            ValueError,
            "add_minibatch_features: kind must be one of discrimination, distance, stddev, got 'variance'",
        ),
        (
            lambda: add_minibatch_features(3, "stddev"),
            TypeError,
            "add_minibatch_features: critic must be a torch.nn.Module, got int",
        ),  # type: ignore[arg-type]
        (
            lambda: add_minibatch_features(models.MLPAutoencoder(), "stddev"),
            ValueError,
            "add_minibatch_features: critic must give a score, not a reconstruction, got MLPAutoencoder",
        ),
        (
            lambda: add_minibatch_features(nn.Sequential(nn.ReLU()), "stddev"),
            ValueError,
            "add_minibatch_features: critic must have a plain nn.Linear as its last linear layer, got Sequential",
        ),
        (
            lambda: add_minibatch_features(spectral_norm_(models.MLPDiscriminator()), "stddev"),
            ValueError,
            "add_minibatch_features: critic must have a plain nn.Linear as its last linear layer, got ParametrizedLinear",
        ),
        (
            lambda: add_minibatch_features(nn.Sequential(nn.Linear(2, 1)), "discrimination", 0),
            ValueError,
            "MinibatchDiscrimination: out_features must be a finite number >= 1, got 0",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
