"""Distances of every point to every other, one block of rows at a time, and the nearest neighbours they give.

A block is ||a||² - 2 a·b + ||b||² in float64, as one product of rows (a, ||a||², 1) and (-2 b, 1, ||b||²), around a centre: in
float32 the difference would lose the distances within a narrow mode. Memory: ELEMENTS numbers for a block and TILE points in
float64, whatever the size of the sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.metrics import _inputs

ELEMENTS = 1 << 24  # of one block: 128 MiB
TILE = 4096  # points converted to float64 at once
ROUNDING = 1e-13  # squared distances are right to this share of the squared norms: closer than that is equal


class Neighbours(NamedTuple):
    """The nearest neighbours of N points, nearest first.

    distance: float64 [N, k], Euclidean, >= 0; below 3e-7 of the distance from the centre of the points it may be rounding.
    indices: int64 [N, k], rows of `points`.
    """

    distance: Tensor
    indices: Tensor


def blocks(a: Tensor, b: Tensor, centre: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of a [N, D] to b [M, D]: (rows of a, float64 [rows, M]); rounding may make them less than 0."""
    height = max(1, ELEMENTS // len(b))
    for top in range(0, len(a), height):
        mine = a[top : top + height].double() - centre
        mine = torch.cat([mine, _squares(mine), mine.new_ones(len(mine), 1)], 1)
        block = mine.new_empty(len(mine), len(b))
        for left in range(0, len(b), TILE):
            other = b[left : left + TILE].double() - centre
            other = torch.cat([-2 * other, other.new_ones(len(other), 1), _squares(other)], 1)
            torch.mm(mine, other.mT, out=block[:, left : left + TILE])
        yield slice(top, top + len(mine)), block


def _squares(points: Tensor) -> Tensor:
    """The squared norms, [N, 1]."""
    return points.square().sum(1, keepdim=True)


def nearest_squared(a: Tensor, b: Tensor | None, k: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances float64 [N, k] of a to its k nearest of b, ascending, and their indices; b None: of a but itself."""
    squared, index = [], []
    for rows, block in blocks(a, a if b is None else b, centre):
        if b is None:
            block.diagonal(rows.start).fill_(torch.inf)
        found = block.min(1, keepdim=True) if k == 1 else block.topk(k, largest=False)
        squared.append(found[0])
        index.append(found[1])
    return torch.cat(squared), torch.cat(index)


def centre_of(points: Tensor) -> Tensor:
    """The mean, float64 [D]."""
    return torch.stack([part.double().sum(0) for part in points.split(TILE)]).sum(0) / len(points)


def rounding(points: Tensor, centre: Tensor) -> Tensor:
    """How much the squared distances of each point may be wrong, float64 [N]."""
    return torch.cat([(part.double() - centre).square_().sum(1) for part in points.split(TILE)]).mul_(ROUNDING)


@torch.no_grad()
def nearest_neighbours(queries: Tensor, points: Tensor | None = None, k: int = 1) -> Neighbours:
    """The k nearest points of each query by Euclidean distance.

    Args:
        queries: [N, D], floating, finite, N >= 1.
        points: [M, D], floating, finite, M >= k. None: the queries themselves, each but itself (leave-one-out).
        k: neighbours, >= 1.

    Returns:
        Neighbours, computed in float64 on the device of the queries in O(N + M) memory.

    Raises:
        ValueError, TypeError: an argument of another shape, range or dtype.
    """
    op = "nearest_neighbours"
    checks.integer(op, "k", k, 1)
    if points is None:
        _inputs.points(op, k + 1, queries=queries)
    else:
        _inputs.points(op, 1, queries=queries)
        _inputs.points(op, k, points=points)
        checks.shape(op, "points", points, (len(points), queries.shape[1]))
        checks.same_device(op, "points", points, queries.device)
    squared, index = nearest_squared(queries, points, k, centre_of(queries if points is None else points))
    return Neighbours(squared.clamp_(min=0).sqrt_(), index)
