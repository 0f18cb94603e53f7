"""The sentences of bad input: `op: argument must expectation, got value`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gankern import checks

ZEROS = torch.zeros(2, 3)
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: checks.fail(KeyError, "op", "x", "be here", 3), KeyError, "'op: x must be here, got 3'"),
    (lambda: checks.tensor("op", "x", [1]), TypeError, "op: x must be a torch.Tensor, got list"),
    (lambda: checks.tensor("op", "x", None), TypeError, "op: x must be a torch.Tensor, got NoneType"),
    (lambda: checks.tensor("op", "x", ZEROS.to_sparse()), TypeError, "op: x must be a dense tensor, got torch.sparse_coo"),
    (lambda: checks.sequence("op", "x", 3), TypeError, "op: x must be a list or tuple, got int"),
    (lambda: checks.number("op", "x", 10**309, 0), ValueError, f"op: x must be a finite number >= 0, got {10**309}"),
    (lambda: checks.one_of("op", "x", ZEROS, ["a"]), ValueError, f"op: x must be one of a, got {ZEROS!r}"),
    (lambda: checks.floating("op", "x", ZEROS.int()), TypeError, "op: x must be float64, float32, bfloat16 or float16, got int32"),
    (lambda: checks.same_dtype("op", "x", ZEROS, torch.float16), TypeError, "op: x must have dtype float16, got float32"),
    (lambda: checks.same_device("op", "x", ZEROS, torch.device("cuda:0")), ValueError, "op: x must be on cuda:0, got cpu"),
    (lambda: checks.shape("op", "x", ZEROS, (3, 2)), ValueError, "op: x must have shape [3, 2], got [2, 3]"),
    (lambda: checks.dims("op", "x", ZEROS, 1), ValueError, "op: x must have 1 dimension, got shape [2, 3]"),
    (lambda: checks.dims("op", "x", ZEROS, 4), ValueError, "op: x must have 4 dimensions, got shape [2, 3]"),
    (lambda: checks.number("op", "x", "1", 0), TypeError, "op: x must be a number, got str"),
    (lambda: checks.number("op", "x", True, 0), TypeError, "op: x must be a number, got bool"),
    (lambda: checks.number("op", "x", -1, 0), ValueError, "op: x must be a finite number >= 0, got -1"),
    (lambda: checks.number("op", "x", math.inf, 0), ValueError, "op: x must be a finite number >= 0, got inf"),
    (lambda: checks.number("op", "x", math.nan, -math.inf), ValueError, "op: x must be a finite number, got nan"),
    (lambda: checks.number("op", "x", math.nan, 0, 1), ValueError, "op: x must be in [0, 1], got nan"),
    (lambda: checks.number("op", "x", 2.5, 0.5, 1), ValueError, "op: x must be in [0.5, 1], got 2.5"),
    (lambda: checks.one_of("op", "x", "c", ["a", "b"]), ValueError, "op: x must be one of a, b, got 'c'"),
    (lambda: checks.one_of("op", "x", None, (1, 2)), ValueError, "op: x must be one of 1, 2, got None"),
]


@pytest.mark.parametrize(("call", "kind", "sentence"), REFUSED, ids=[sentence for _, _, sentence in REFUSED])
def test_sentence(call: Callable[[], object], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == sentence


def test_good_input_passes() -> None:
    checks.tensor("op", "x", ZEROS)
    for dtype in checks.FLOATING:
        checks.floating("op", "x", ZEROS.to(dtype))
    checks.same_dtype("op", "x", ZEROS, torch.float32)
    checks.same_device("op", "x", ZEROS, torch.device("cpu"))
    checks.shape("op", "x", ZEROS, [2, 3])
    checks.shape("op", "x", ZEROS, ZEROS.shape)
    checks.dims("op", "x", torch.tensor(1.0), 0)
    for value in (0, 1, 0.5, 0.0):
        checks.number("op", "x", value, 0, 1)
    checks.number("op", "x", 1e300, 0)
    checks.one_of("op", "x", "a", {"a": 1})
