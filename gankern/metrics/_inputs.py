"""What the metrics refuse, each in one sentence."""

from __future__ import annotations

from torch import Tensor

from gankern import checks


def points(op: str, least: int = 2, **sets: Tensor) -> None:
    """Sets of finite points [N, D] of one D on one device, each of at least so many."""
    first = next(iter(sets.values()))
    for name, values in sets.items():
        _enough(op, name, values, 2, least, "sample")
        if values.shape[1] == 0:
            checks.fail(ValueError, op, name, "have at least one feature", "none")
        checks.shape(op, name, values, (len(values), first.shape[1]))
        checks.same_device(op, name, values, first.device)
        _finite(op, name, values)


def not_constant(op: str, name: str, values: Tensor) -> None:
    """Real samples that are all the same are a fault of the caller's; fake ones are a result."""
    if bool((values[-1] == values[0]).all()) and bool((values == values[0]).all()):
        checks.fail(ValueError, op, name, "hold samples that differ", f"{len(values)} copies of one")


def probabilities(op: str, **sets: Tensor) -> None:
    """Class probabilities [N, K] that sum to 1."""
    points(op, 1, **sets)
    for name, values in sets.items():
        if (low := values.min().item()) < 0:
            checks.fail(ValueError, op, name, "be probabilities >= 0", f"{low:.4g}")
        sums = values.sum(1)
        worst = sums[(sums - 1).abs().argmax()].item()
        if abs(worst - 1) > 1e-2:
            checks.fail(ValueError, op, name, "be probabilities that sum to 1 in each row", f"a sum of {worst:.4g}")


def images(op: str, least: int, side: int, **sets: Tensor) -> None:
    """Finite images [N, C, H, W] of one size on one device, each side at least so many pixels."""
    first = next(iter(sets.values()))
    for name, values in sets.items():
        _enough(op, name, values, 4, least, "image")
        if min(values.shape[2:]) < side or values.shape[1] == 0:
            checks.fail(ValueError, op, name, f"have a channel and {side} pixels a side", f"shape {list(values.shape)}")
        checks.shape(op, name, values, first.shape)
        checks.same_device(op, name, values, first.device)
        _finite(op, name, values)


def _enough(op: str, name: str, values: Tensor, dims: int, least: int, what: str) -> None:
    checks.tensor(op, name, values)
    checks.floating(op, name, values)
    checks.dims(op, name, values, dims)
    if len(values) < least:
        checks.fail(ValueError, op, name, f"hold at least {least} {what}{'s' * (least != 1)}", len(values))


def _finite(op: str, name: str, values: Tensor) -> None:
    if not values.sum().isfinite() and not values.isfinite().all():  # the sum takes a twentieth of the time
        checks.fail(ValueError, op, name, "be finite", "NaN or infinity")
