"""gankern.models: the MLP GAN is the plain PyTorch network of the same layers, in values, gradients, keys and size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern.models import MLPDiscriminator, MLPGenerator, sample_latent
from gankern.nn import LinearLeakyReLU
from tests.support import DEVICE, assert_matches, randn


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def plain_hidden(sizes: list[int], slope: float, norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(sizes):
        layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if norm else []), nn.LeakyReLU(slope)]
    return layers


def copied(plain: nn.Module, net: nn.Module) -> nn.Module:
    """`plain` with the parameters of `net`, in order."""
    with torch.no_grad():
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    return plain.to(DEVICE)


def functional(net: nn.Module) -> Callable[..., Tensor]:
    """net as a function of its input and its parameters, so that derivatives in all of them are compared."""
    names = [name for name, _ in net.named_parameters()]
    return lambda x, *values: torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("output", ["tanh", "none"])
def test_generator_is_the_plain_network(norm: str, output: str) -> None:
    torch.manual_seed(0)
    net = MLPGenerator(6, (7, 9), (1, 2, 4), norm=norm, output=output, negative_slope=0.1).double().to(DEVICE)
    tail: list[nn.Module] = [nn.Linear(9, 8), *([nn.Tanh()] if output == "tanh" else []), nn.Unflatten(1, (1, 2, 4))]
    plain = copied(nn.Sequential(*plain_hidden([6, 7, 9], 0.1, norm == "batch"), *tail).double(), net)
    inputs = [randn(5, 6, seed=1), *(p.detach() for p in net.parameters())]
    assert net(inputs[0]).shape == (5, 1, 2, 4)
    assert_matches(functional(net), functional(plain), inputs)


@pytest.mark.parametrize("widths", [(), (5,), (9, 7)])
def test_discriminator_is_the_plain_network(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = MLPDiscriminator((1, 2, 4), widths).double().to(DEVICE)
    sizes = [8, *widths]
    plain = nn.Sequential(nn.Flatten(), *plain_hidden(sizes, 0.2, False), nn.Linear(sizes[-1], 1), nn.Flatten(0)).double()
    inputs = [randn(5, 1, 2, 4, seed=1), *(p.detach() for p in net.parameters())]
    assert net(inputs[0]).shape == (5,)
    assert_matches(functional(net), functional(copied(plain, net)), inputs)


def test_state_has_the_keys_of_a_sequential_of_linears() -> None:
    net, plain = MLPGenerator(), nn.Sequential(nn.Linear(100, 256), nn.Linear(256, 512), nn.Linear(512, 1024), nn.Linear(1024, 784))
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    critic = nn.Sequential(nn.Linear(784, 1024), nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, 1))
    critic.load_state_dict(MLPDiscriminator(dropout=0.3).state_dict())
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.LeakyReLU(0.2), nn.Linear(3, 2), nn.Tanh())
    normed.load_state_dict(MLPGenerator(4, (3,), (2,), norm="batch").state_dict())


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        (MLPGenerator(), 1_486_352),
        (MLPGenerator(norm="batch"), 1_489_936),
        (MLPGenerator(dropout=0.3), 1_486_352),
        (MLPDiscriminator(), 1_460_225),
        (MLPDiscriminator(widths=(512, 256)), 533_505),
        (MLPGenerator.from_hidden(), 114_800),
        (MLPDiscriminator.from_hidden(), 110_849),
        (MLPGenerator(2, (128, 128), (2,)), 2 * 128 + 128 + 128 * 129 + 2 * 129),
    ],
)
def test_parameter_counts(net: nn.Module, parameters: int) -> None:
    assert count(net) == parameters
    written = f"{parameters:_}".replace("_", " ")
    documented = (type(net).__doc__ or "") + (type(net).from_hidden.__doc__ or "")  # type: ignore[attr-defined]
    assert written in documented or parameters < 100_000


def test_hidden_form_is_32_64_128() -> None:
    def widths(net: nn.Module) -> list[int]:
        return [layer.out_features for layer in net.children() if isinstance(layer, nn.Linear)]

    assert widths(MLPGenerator.from_hidden(32)) == [32, 64, 128, 784]
    assert widths(MLPDiscriminator.from_hidden(32, dropout=0.3)) == [128, 64, 32, 1]
    assert MLPGenerator.from_hidden(8, z_dim=5, out_shape=(2,))(torch.zeros(3, 5)).shape == (3, 2)


def test_hidden_layers_are_fused_and_normed_ones_are_pytorch() -> None:
    assert [type(m) for m in MLPDiscriminator(dropout=0.3)] == [LinearLeakyReLU] * 3 + [nn.Linear]
    assert all(m.dropout == 0.3 for m in MLPGenerator(dropout=0.3) if isinstance(m, LinearLeakyReLU))
    normed = list(MLPGenerator(4, (3,), (2,), norm="batch", dropout=0.5))
    assert [type(m) for m in normed] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout, nn.Linear, nn.Tanh]


def test_batch_norm_has_its_own_epsilon() -> None:
    """Well-known code writes BatchNorm1d(n, 0.8), meaning the momentum and setting the epsilon."""
    norms = [m for m in MLPGenerator(norm="batch") if isinstance(m, nn.BatchNorm1d)]
    assert [(m.num_features, m.eps, m.momentum) for m in norms] == [(n, 1e-5, 0.1) for n in (256, 512, 1024)]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_dropout_only_while_training(norm: str) -> None:
    torch.manual_seed(0)
    net = MLPGenerator(dropout=0.3, norm=norm).to(DEVICE)
    z = sample_latent(8, device=DEVICE)
    assert not torch.equal(net(z), net(z))
    net.eval()
    assert torch.equal(net(z), net(z))


def test_images_lie_in_range_and_logits_do_not() -> None:
    torch.manual_seed(0)
    generator, critic = MLPGenerator().to(DEVICE), MLPDiscriminator().to(DEVICE)
    fake = generator(100 * sample_latent(16, device=DEVICE))
    assert fake.abs().max() <= 1
    with torch.no_grad():
        critic[-1].bias.fill_(-7.0)
    assert (critic(fake) < -5).all()


def test_a_batch_of_none() -> None:
    assert MLPGenerator()(torch.zeros(0, 100)).shape == (0, 1, 28, 28)
    assert MLPDiscriminator()(torch.zeros(0, 1, 28, 28)).shape == (0,)


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: MLPGenerator(z_dim=0), ValueError, "MLPGenerator: z_dim must be a finite number >= 1, got 0"),
        (lambda: MLPGenerator(norm="layer"), ValueError, "MLPGenerator: norm must be one of none, batch, got 'layer'"),
        (lambda: MLPGenerator(output="sigmoid"), ValueError, "MLPGenerator: output must be one of tanh, none, got 'sigmoid'"),
        (lambda: MLPGenerator(widths=(5, 0)), ValueError, "MLPGenerator: each of widths must be a finite number >= 1, got 0"),
        (lambda: MLPGenerator(widths=(5.0,)), TypeError, "MLPGenerator: each of widths must be an int, got float"),
        (lambda: MLPGenerator(out_shape=()), ValueError, "MLPGenerator: out_shape must have at least one dimension, got ()"),
        (lambda: MLPGenerator(dropout=1.5), ValueError, "MLPGenerator: dropout must be in [0, 1], got 1.5"),
        (lambda: MLPGenerator.from_hidden(0), ValueError, "MLPGenerator: hidden must be a finite number >= 1, got 0"),
        (lambda: MLPGenerator()(torch.zeros(3, 99)), ValueError, "MLPGenerator: z must have shape [B, 100], got [3, 99]"),
        (
            lambda: MLPDiscriminator(in_shape=(1, 0)),
            ValueError,
            "MLPDiscriminator: each of in_shape must be a finite number >= 1, got 0",
        ),
        (
            lambda: MLPDiscriminator(negative_slope=-0.1),
            ValueError,
            "MLPDiscriminator: negative_slope must be a finite number >= 0, got -0.1",
        ),
        (
            lambda: MLPDiscriminator()(torch.zeros(3, 1, 32, 32)),
            ValueError,
            "MLPDiscriminator: x must have shape [B, 1, 28, 28], got [3, 1, 32, 32]",
        ),
    ],
)
def test_model_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()


@pytest.mark.parametrize(("kind", "mean_square"), [("normal", 1.0), ("uniform", 1 / 3)])
def test_latent_moments(kind: str, mean_square: float) -> None:
    """200 000 draws: the mean within 4 standard errors, the mean square within 1 %."""
    z = sample_latent(2000, 100, kind, torch.Generator(DEVICE).manual_seed(0), DEVICE)
    assert (z.shape, z.dtype, z.device.type) == ((2000, 100), torch.float32, DEVICE)
    assert abs(z.mean().item()) < 4 * (mean_square / z.numel()) ** 0.5
    assert abs(z.square().mean().item() / mean_square - 1) < 0.01
    assert (z.abs().max().item() <= 1) == (kind == "uniform")
    assert (z < -0.5).any()


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_latent_is_reproducible_and_takes_its_own_generator(kind: str) -> None:
    def draw(seed: int) -> Tensor:
        return sample_latent(3, 4, kind, torch.Generator(DEVICE).manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(1).device.type == DEVICE
    assert sample_latent(0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ((-1,), ValueError, "n must be a finite number >= 0, got -1"),
        ((1.5,), TypeError, "n must be an int, got float"),
        ((1, 0), ValueError, "z_dim must be a finite number >= 1, got 0"),
        ((1, 2, "gauss"), ValueError, "kind must be one of normal, uniform, got 'gauss'"),
    ],
)
def test_latent_refusals(arguments: tuple[Any, ...], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(f"sample_latent: {sentence}") + "$"):
        sample_latent(*arguments)
