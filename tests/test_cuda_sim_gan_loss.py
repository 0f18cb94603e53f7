"""gan_loss's CUDA kernels in the simulator: every term, and relative to partners and means."""

from __future__ import annotations

import pytest
import torch

from gankern.ops import gan_loss
from tests.test_cuda_sim import CXX, DTYPES, compare_loss, make_case

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ with AddressSanitizer")


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("term", gan_loss.TERMS)
def test_every_term(term: str, reduction: int) -> None:
    """What real and fake samples pay, mixtures by number and by sample, and a generator's side."""
    for dtype in (torch.float32, torch.float64):
        compare_loss(make_case(33, 20, dtype, reduction, one_vector=True, real=(term, 1.0, 1.0), fake=(term, 1.0, 0.0)))
        compare_loss(
            make_case(33, 20, dtype, reduction, one_vector=False, targets=True, real=(term, 1.0, 0.0), fake=(term, -2.0, 0.0))
        )
        compare_loss(make_case(0, 33, dtype, reduction, one_vector=True, real=("bce", 0.0, 0.0), fake=(term, -1.0, 0.25)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", gan_loss.TERMS)
def test_every_term_of_large_logits(term: str, dtype: torch.dtype) -> None:
    for label in (0.0, 1.0):
        part = (term, 1.0, label)
        compare_loss(make_case(40, 40, dtype, 0, one_vector=True, scale=1e4, real=part, fake=part))


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("relative", [1, 2], ids=["pairs", "averages"])
@pytest.mark.parametrize("term", ["bce", "square-sides", "hinge", "kl"])
def test_relative(term: str, relative: int, reduction: int) -> None:
    parts = {"real": (term, 1.0, 1.0), "fake": (term, 1.0, 0.0), "relative": relative}
    one_paid = {**parts, "fake": ("bce", 0.0, 0.0)}
    for dtype in DTYPES:
        compare_loss(make_case(33, 33, dtype, reduction, one_vector=dtype == torch.float32, scale=1.0, **parts))
    compare_loss(make_case(1, 1, torch.float32, reduction, one_vector=False, **parts))
    compare_loss(make_case(64, 64, torch.float32, reduction, one_vector=False, targets=True, scale=1.0, **one_paid))
    if relative == 2:
        compare_loss(make_case(7, 40, torch.float32, reduction, one_vector=True, **parts))


@pytest.mark.parametrize("reduction", range(3), ids=gan_loss.REDUCTIONS)
@pytest.mark.parametrize("relative", [1, 2], ids=["pairs", "averages"])
def test_relative_of_many_blocks(relative: int, reduction: int) -> None:
    launches = 2 if relative == 1 else 3 if reduction == 0 else 4
    for dtype in (torch.float32, torch.float64):
        parts = {"real": ("bce", 1.0, 1.0), "fake": ("bce", 1.0, 0.0), "relative": relative}
        compare_loss(make_case(3000, 3000, dtype, reduction, one_vector=True, targets=True, **parts), launches)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (3, 0)])
def test_averages_of_empty_halves(sizes: tuple[int, int]) -> None:
    for reduction in range(3):
        case = make_case(
            *sizes, torch.float32, reduction, one_vector=False, real=("bce", 1.0, 1.0), fake=("bce", 1.0, 0.0), relative=2
        )
        compare_loss(case)
