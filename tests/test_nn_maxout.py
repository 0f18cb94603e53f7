"""gankern.nn.Maxout against its formula."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.nn import Maxout
from tests.networks import assert_fused_matches, leaves, made, on_parameters
from tests.support import assert_matches, randn


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7, 4), (3, 2, 4), (4,)])
def test_is_the_largest_of_its_pieces(pieces: int, shape: tuple[int, ...]) -> None:
    """y_j = max over p of <x, W[p, j]> + b[p, j], one at a time; gradients go to the largest piece."""

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        w, b = weight.view(pieces, 3, 4), bias.view(pieces, 3)
        units = []
        for j in range(3):
            y = x @ w[0, j] + b[0, j]
            for p in range(1, pieces):
                other = x @ w[p, j] + b[p, j]
                y = torch.where(other > y, other, y)
            units.append(y)
        return torch.stack(units, -1)

    net = made(Maxout, 4, 3, pieces)
    assert net(randn(*shape, seed=1)).shape == (*shape[:-1], 3)
    assert_matches(on_parameters(net), formula, [randn(*shape, seed=1), *leaves(net)])


def test_units_can_be_the_absolute_value_and_relu() -> None:
    net = Maxout(1, 2, 2).double()
    with torch.no_grad():
        net.bias.zero_()
        net.weight.copy_(torch.tensor([[1.0], [1.0], [-1.0], [0.0]]))  # piece 0 of both units, piece 1 of both
    x = torch.tensor([[-2.0], [3.0]], dtype=torch.float64)
    assert torch.equal(net(x), torch.cat([x.abs(), x.relu()], 1))


def test_fuse_and_the_one_pass_critic_leave_it_alone() -> None:
    net = made(lambda: nn.Sequential(Maxout(4, 3, 2), nn.LeakyReLU(0.2), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)))
    assert_fused_matches(net, randn(5, 4, seed=1), ops=["linear_lrelu"], order=2)
    assert gankern.nn.mlp_problem(net) == "Maxout (0)"


def test_keys_and_words() -> None:
    assert {k: tuple(v.shape) for k, v in Maxout(4, 3, 5).state_dict().items()} == {"weight": (15, 4), "bias": (15,)}
    assert repr(Maxout(4, 3)) == "Maxout(in_features=4, out_features=3, bias=True, pieces=5)"


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: Maxout(0, 3), ValueError, "Maxout: in_features must be a finite number >= 1, got 0"),
        (lambda: Maxout(3, 0), ValueError, "Maxout: out_features must be a finite number >= 1, got 0"),
        (lambda: Maxout(3, 3, 2.0), TypeError, "Maxout: pieces must be an int, got float"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        make()
