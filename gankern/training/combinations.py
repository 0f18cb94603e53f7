"""Settings that do not go together: each pair is refused in one sentence that names both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gankern import checks

if TYPE_CHECKING:
    from gankern.training.config import TrainConfig

OP = "train"


def check(c: TrainConfig) -> None:
    """Refuse the first impossible pair of settings.

    Raises:
        ValueError: there is one.
    """
    _ = c.objective  # loss and generator_loss
    if c.g_norm == "batch" and c.batch_size == 1:
        _refuse("batch_size", "be >= 2 with BatchNorm", 1)
    if c.loss == "wgan" and c.penalty == "none" and not c.spectral_norm and not c.clip_weights:
        _refuse("loss", "have a bounded critic: --penalty, --spectral-norm or --clip-weights", "wgan alone")
    _check_labels(c)
    if c.penalty != "none" and c.d_norm == "batch":
        _refuse("d_norm", "be none with --penalty, whose norm is of each sample by itself", "batch")
    if c.pack > 1 and c.arch != "tabular":
        _refuse("pack", "be 1 but for --arch tabular", c.pack)
    if c.batch_size % c.pack:
        _refuse("batch_size", f"be a multiple of pack ({c.pack})", c.batch_size)


def _check_labels(c: TrainConfig) -> None:
    """Every term is linear in its target, but for the squares, quadratic in it: in the mean a drawn target acts as its mean."""
    means = []
    for field, fixed in (("real_label_range", c.label_smoothing), ("fake_label_range", c.fake_label)):
        ends = getattr(c, field)
        means.append(sum(ends) / 2 if ends else fixed)
        if "lsgan" not in c.loss and not 0.0 <= means[-1] <= 1.0:
            _refuse(field, f"have its middle in [0, 1] with --loss {c.loss}, which falls without bound else", ends)
    if c.loss == "wgan" and abs(sum(means) - 1.0) > 1e-6:
        names = "label_smoothing and fake_label, or the middles of their ranges,"
        _refuse(names, "add up to 1 with --loss wgan: a constant added to the critic lowers it without bound else", means)


def _refuse(field: str, wanted: str, got: object) -> None:
    checks.fail(ValueError, OP, field, wanted, got)
