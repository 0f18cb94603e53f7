"""The generator's side of an objective by name, where there are several."""

from __future__ import annotations

from gankern import checks
from gankern.ops._objectives import OBJECTIVES

LOGISTIC = {"saturating": "minimax", "non-saturating": "non-saturating", "max-likelihood": "maximum-likelihood"}
DIVERGENCE = {"saturating": "", "non-saturating": "-alternative"}


def variant(loss: str, generator_loss: str = "default") -> str:
    """The row of `gankern.gan_loss`'s table with the critic's side of `loss` and this generator's side.

    Args:
        loss: a row itself.
        generator_loss: "default" is the row's own; "matching" leaves that side to the critic's features. For the losses of
            Goodfellow et al. (2014; 2016, section 3.2): "saturating", "non-saturating" or "max-likelihood". For f-divergences
            (Nowozin et al. 2016, section 3.2): "saturating", what the critic's bound leaves to the generator, -mean f*(g(a)), or
            "non-saturating", -mean g(a).

    Raises:
        ValueError: the loss has no such side.
    """
    if generator_loss in ("default", "matching"):
        return loss
    if loss in LOGISTIC.values():
        names = LOGISTIC
    elif loss.startswith("fgan-"):
        base = loss.removesuffix(DIVERGENCE["non-saturating"])
        names = {side: base + ending for side, ending in DIVERGENCE.items()}
    else:
        names = {}
    if generator_loss not in names:
        wanted = f"be {', '.join(['default', *names])} with --loss {loss}"
        checks.fail(ValueError, "train", "generator_loss", wanted, repr(generator_loss))
    assert names[generator_loss] in OBJECTIVES
    return names[generator_loss]
