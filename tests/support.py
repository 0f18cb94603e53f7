"""What the op tests share: one comparison of values and derivatives of all orders, and one of accuracy in 16 bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gankern import backend

DEVICE = os.environ.get("GANKERN_TEST_DEVICE", "cpu")
# Backends that must run here: what they cannot run is then a failure, not a skip ("compiled,triton" in `make test`).
REQUIRED = frozenset(filter(None, os.environ.get("GANKERN_REQUIRE", "").split(",")))
# Relative to the largest element of the tensor compared.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Fn = Callable[..., Tensor]


def need(name: str) -> None:
    """Skip the test, or fail it where GANKERN_REQUIRE names the backend, if this backend cannot run on the test device."""
    why = backend.problem(name, DEVICE)
    if why and name in REQUIRED:
        pytest.fail(f"GANKERN_REQUIRE names {name}, but {why}", pytrace=False)
    if why:
        pytest.skip(why)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device; rounded once from float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def cotangents(like: Sequence[Tensor | None], seed: int) -> list[Tensor | None]:
    """Random multiples of 1/8 in [-2, 2], exact in every dtype, so that runs in different dtypes are asked the same question.

    Each depends on the seed and its place in the list only, not on which others exist.
    """

    def draw(t: Tensor, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + i)
        return (torch.randint(-16, 17, t.shape, generator=generator) / 8).to(t.dtype).to(t.device)

    return [None if t is None else draw(t, i) for i, t in enumerate(like)]


def derivatives(fn: Fn, inputs: Sequence[Tensor], order: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The value of fn(*inputs) and its derivatives under fixed random cotangents, up to `order` (at most 3).

    Keys: "y"; "d[j]", the gradient of <y, c> in input j; "dd[i,j]", the gradient of <d[i], c_i> in input j, where "c" stands for
    the first cotangent (the double backward pass differentiates in it too); "ddd[j]", of all second derivatives together.
    Only gradients that exist have a key, and one that is zero everywhere counts as missing: PyTorch answers a vanishing
    derivative now with None, now with zeros (the curvature of LeakyReLU is a tensor of zeros in eager PyTorch).
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    names = [str(j) for j in range(len(leaves))]
    y = fn(*leaves)
    (c,) = cotangents([y], seed)
    assert c is not None
    c.requires_grad_(order > 1)
    found: dict[str, Tensor | None] = {"y": y.detach()}

    def grad(of: Tensor, cotangent: Tensor | None, wrt: list[Tensor], deeper: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(of, wrt, cotangent, create_graph=deeper, retain_graph=True, allow_unused=True)

    firsts = grad(y, c, leaves, order > 1)
    found |= {f"d[{j}]": g for j, g in zip(names, firsts, strict=True)}
    if order > 1:
        wrt, wrt_names = [*leaves, c], [*names, "c"]
        total = torch.zeros((), dtype=y.dtype, device=y.device)
        for i, first, first_c in zip(names, firsts, cotangents(firsts, 100 + seed), strict=True):
            if first is None or not first.requires_grad:
                continue
            seconds = grad(first, first_c, wrt, order > 2)
            found |= {f"dd[{i},{j}]": g for j, g in zip(wrt_names, seconds, strict=True)}
            for second, second_c in zip(seconds, cotangents(seconds, 200 + 10 * int(i) + seed), strict=True):
                if second is not None and second_c is not None:
                    total = total + (second * second_c).sum()
        if order > 2 and total.requires_grad:
            found |= {f"ddd[{j}]": g for j, g in zip(wrt_names, grad(total, None, wrt, False), strict=True)}
    return {name: t.detach() for name, t in found.items() if t is not None and (name == "y" or bool((t != 0).any()))}


def assert_equal_derivatives(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Same set of gradients, each with the same dtype and shape, and equal to TOLERANCE of its largest element (NaN equals NaN)."""
    assert got.keys() == want.keys(), f"graphs differ in {sorted(got.keys() ^ want.keys())}"
    for name, expected in want.items():
        finite = expected[expected.isfinite()].abs()
        atol = TOLERANCE[expected.dtype] * (finite.max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(
            got[name], expected, rtol=0.0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_matches(fn: Fn, reference: Fn, inputs: Sequence[Tensor], order: int = 2) -> None:
    assert_equal_derivatives(derivatives(fn, inputs, order), derivatives(reference, inputs, order))


def assert_accurate(fn: Fn, eager: Fn, cases: Sequence[Sequence[Tensor]], exact: Fn | None = None, order: int = 2) -> None:
    """In 16 bits: the error against float64 is at most twice the error that eager PyTorch makes on the same numbers.

    Two statistics for each derivative, each pooled over all cases, so that no single rounding decides: the root of the mean square
    error, and the largest error (which shows one wrong element among many good ones).
    """
    errors: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for seed, inputs in enumerate(cases):
        assert all(t.dtype in (torch.bfloat16, torch.float16) for t in inputs)
        want = derivatives(exact or eager, [t.double() for t in inputs], order, seed)
        ours, theirs = derivatives(fn, inputs, order, seed), derivatives(eager, inputs, order, seed)
        assert ours.keys() == want.keys(), f"graphs differ in {sorted(ours.keys() ^ want.keys())}"
        for name, value in want.items():
            mine, other = errors.setdefault(name, ([], []))
            mine.append((ours[name].double() - value).flatten())
            other.append((theirs[name].double() - value).flatten())
    for name, (mine, other) in errors.items():
        a, b = torch.cat(mine), torch.cat(other)
        for statistic, e, limit in (
            ("rms", a.square().mean().sqrt(), b.square().mean().sqrt()),
            ("largest", a.abs().max(), b.abs().max()),
        ):
            assert e <= 2 * limit, (
                f"{name}: {statistic} error {e.item():.3g} in {ours[name].dtype}, eager PyTorch makes {limit.item():.3g}"
            )


class CountProducts(TorchDispatchMode):
    """Counts the matrix products dispatched inside the `with` block."""

    NAMES = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "mv", "addmv", "dot"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


class ProfileProducts:
    """Counts the matrix products that run inside the `with` block, by the profiler: those inside operators too."""

    def __enter__(self) -> ProfileProducts:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._profile.__exit__(*details)

    @property
    def count(self) -> int:
        names = {f"aten::{n}" for n in CountProducts.NAMES - {"matmul", "linear"}}  # what these two end in
        return sum(e.count for e in self._profile.key_averages() if e.key in names)
