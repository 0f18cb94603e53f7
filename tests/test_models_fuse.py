"""Every network of gankern.models by its kernels: the values, first and second derivatives of the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern import models
from gankern.backend import use_backend
from tests.networks import leaves, made, on_parameters
from tests.support import DEVICE, assert_matches, need, randn

IMAGE = (1, 8, 8)
NETWORKS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...], int]] = {  # arguments, shape of an input, layers fused
    "ACGANDiscriminator": ((IMAGE, 3, (4,), 0.0), {}, IMAGE, 1),
    "CDCGANDiscriminator": (((1, 16, 16), 3, 1), {"embed": 1}, (1, 16, 16), 2),
    "CDCGANGenerator": ((3, 3, IMAGE, 2), {}, (3,), 1),
    "CGANDiscriminator": ((IMAGE, 3, (4,)), {"dropout": 0.0}, IMAGE, 1),
    "CGANGenerator": ((3, 3, (4,), IMAGE), {}, (3,), 1),
    "ConvACGANDiscriminator": (((1, 16, 16), 3, 1), {}, (1, 16, 16), 2),
    "ConvAutoencoder": ((IMAGE, 2, 3), {}, IMAGE, 1),
    "ConvEncoder": (((1, 16, 16), 3, 1), {}, (1, 16, 16), 2),
    "DCGANDiscriminator": (((1, 16, 16), 1), {}, (1, 16, 16), 2),
    "DCGANGenerator": ((3, IMAGE, 2), {}, (3,), 1),
    "MLPAutoencoder": ((IMAGE, (4,), 3), {}, IMAGE, 2),
    "MLPDiscriminator": ((IMAGE, (4,)), {}, IMAGE, 0),  # made of fused layers
    "MLPEncoder": ((IMAGE, 3, (4,)), {}, IMAGE, 1),
    "MLPGenerator": ((3, (4,), IMAGE), {}, (3,), 0),
    "MaxoutDiscriminator": (((2,), (4,), 2), {}, (2,), 0),
    "Packed": ((models.DCGANDiscriminator((2, 8, 8), 2), 2), {}, IMAGE, 1),
    "ResNetDiscriminator": ((IMAGE, 2), {}, IMAGE, 3),
    "ResNetGenerator": ((3, IMAGE, 2), {}, (3,), 3),
    "SNGANDiscriminator": ((IMAGE, (2, 3)), {}, IMAGE, 3),
    "SNGANGenerator": ((3, IMAGE, (3, 2)), {}, (3,), 1),
    "TabularDiscriminator": ((5, (4,), 0.0, 2), {}, (5,), 1),
    "TabularGenerator": ((5, 3, (4,)), {}, (3,), 1),
    "ToyGenerator": ((2, (4, 3)), {}, (2,), 2),
    "UnrolledDiscriminator": (((2,), 4), {}, (2,), 1),
}


def test_the_list_is_complete() -> None:
    public = {name: getattr(models, name) for name in models.__all__}
    assert set(NETWORKS) == {name for name, value in public.items() if isinstance(value, type) and issubclass(value, nn.Module)}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_is_plain_to_the_second_derivative(name: str) -> None:
    need("compiled")
    args, options, shape, count = NETWORKS[name]
    net = made(getattr(models, name), *args, **options)
    fused = gankern.fuse(net)
    assert len(gankern.fusion_report(fused).fused) == count
    labels = [torch.tensor([2, 0, 1, 2], device=DEVICE)] if hasattr(net, "embedding") else []

    def one_tensor(run: nn.Module) -> Callable[..., Tensor]:
        function = on_parameters(run, *labels)

        def joined(*inputs: Tensor) -> Tensor:
            out: Any = function(*inputs)
            return torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out

        return joined

    x = randn(4, *shape, seed=1)
    with use_backend("compiled"):
        assert_matches(one_tensor(fused), one_tensor(net), [x, *leaves(net)], 2)
