"""gradient_norm_penalty's CUDA kernels, their very source run on the CPU by the block simulator (see test_cuda_sim.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gankern.ops import gradient_norm_penalty as op
from tests.test_cuda_sim import CXX, DTYPES, accumulate, close, matrix, run

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")


class Settings(NamedTuple):
    target: float = 1.0
    one_sided: bool = False
    weight: float = 10.0


def penalty(g: Tensor, settings: Settings, shift: int = 0) -> tuple[op.NormPenalty, int]:
    rows, columns = g.shape
    dtype = accumulate(g.dtype)
    outputs = [((), dtype), ((rows,), dtype), ((), dtype)]
    words = ("penalty", g.dtype, rows, columns, shift, settings.target, int(settings.one_sided), settings.weight)
    (value, norms, mean), launches = run("gradient_norm_penalty", *words, inputs=(g,), outputs=outputs)
    return op.NormPenalty(value, norms, mean), launches


def gradient(c: Tensor, g: Tensor, norms: Tensor, settings: Settings, shift: int = 0) -> tuple[Tensor, int]:
    words = ("grad", g.dtype, *g.shape, shift, settings.target, int(settings.one_sided), settings.weight)
    (d,), launches = run("gradient_norm_penalty", *words, inputs=(c, g, norms), outputs=[(tuple(g.shape), g.dtype)])
    return d, launches


def compare(g: Tensor, settings: Settings, shift: int = 0) -> None:
    exact = g.double().requires_grad_()
    want = op.reference(exact, *settings)
    got, launches = penalty(g, settings, shift)
    assert launches == (2 if len(g) else 1)
    close(got.norms, want.norms, terms=g.shape[1])
    close(got.mean_norm, want.mean_norm, terms=g.numel())
    close(got.value, want.value.detach(), terms=g.numel())
    c = torch.tensor(-1.5, dtype=got.norms.dtype)
    d, launches = gradient(c, g, want.norms.to(c.dtype), settings, shift)
    assert launches == (g.numel() > 0)
    close(d, torch.autograd.grad(c.double() * want.value, exact)[0])


def scaled(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Norms on both sides of 1, and one zero."""
    g = matrix(rows, columns, torch.float64) * torch.linspace(0.3, 2, rows)[:, None] / max(columns, 1) ** 0.5
    g[1:2] = 0
    return g.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "shift"), [(1, 1, 0), (3, 7, 0), (5, 8, 0), (4, 9, 0), (17, 64, 1), (33, 392, 0), (3, 5003, 0), (600, 2, 0)]
)
def test_gradient_norm_penalty(rows: int, columns: int, shift: int, dtype: torch.dtype) -> None:
    compare(scaled(rows, columns, dtype), Settings(), shift)


@pytest.mark.parametrize("settings", [Settings(1.0, True), Settings(0.0), Settings(0.0, True), Settings(0.7, True, 0.0)], ids=str)
def test_gradient_norm_penalty_settings(settings: Settings) -> None:
    compare(scaled(13, 40, torch.float32), settings)


def test_gradient_norm_penalty_of_long_samples() -> None:
    """More elements than 64 shares of 2048: each warp takes more."""
    compare(scaled(2, 64 * 2048 + 13, torch.float32), Settings())


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (4, 0), (0, 0)])
def test_gradient_norm_penalty_empty(rows: int, columns: int) -> None:
    compare(torch.zeros(rows, columns), Settings())


@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [Settings(), Settings(1.0, True), Settings(0.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_norm_penalty_of_nan_and_infinity(dtype: torch.dtype, settings: Settings, special: float) -> None:
    g = scaled(4, 11, dtype)
    g[2, 5] = special
    compare(g, settings)
