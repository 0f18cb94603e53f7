"""How the critic is asked: its loss with its penalty, and the generator's loss through it.

Each way has
    discriminator(real, fake, *labels)   the critic's objective; `.backward()` gives its parameters their gradients
    generator(fake, real, *labels)       the generator's; `.backward()` gives the graph of `fake` its gradient
    state()                              what a resumed run needs besides the network
and the first two return what has `backward`, `loss`, `value`, `d_real` and `d_fake`, the last three detached scalars. `labels`:
nothing, or the classes [B] of a conditional critic. d_real and d_fake are what the critic says of real and of fake samples: of
logits the mean sigmoid, else what the way documents. `choose` picks the way from the settings and the network, and takes the one
pass wherever it fits.
"""

from __future__ import annotations

import torch
from torch import nn

from gankern import checks
from gankern.losses import GANLoss
from gankern.ops._objectives import OBJECTIVES
from gankern.training import distributed
from gankern.training.config import TrainConfig
from gankern.training.critics import one_pass as _one_pass
from gankern.training.critics._common import Critic, Gathered, Loss, WithTerm, frozen, mixes
from gankern.training.critics.autograd import Autograd
from gankern.training.critics.auxiliary import Auxiliary
from gankern.training.critics.energy import BEGAN, EBGAN
from gankern.training.critics.matching import Matching
from gankern.training.critics.mmd import MMD, MMDGAN
from gankern.training.critics.one_pass import OnePass
from gankern.training.critics.unrolled import Unrolled
from gankern.training.networks import CONDITIONAL
from gankern.training.optimizers import InPlace

__all__ = [
    "BEGAN",
    "EBGAN",
    "MMD",
    "MMDGAN",
    "Autograd",
    "Auxiliary",
    "Critic",
    "Gathered",
    "Loss",
    "Matching",
    "OnePass",
    "Unrolled",
    "WithTerm",
    "choose",
    "frozen",
    "mixes",
]

OP = "train"


def choose(
    net: nn.Module, config: TrainConfig, rng: torch.Generator, one_pass: bool | None = None, optimizer: InPlace | None = None
) -> Critic:
    """The way to ask this critic for config.loss and config.penalty, and the generator's loss after config.unroll updates of it.

    Args:
        rng: source of the penalty's points.
        one_pass: whether real and fake may share a pass. None: yes, unless samples of a batch see each other in the critic.
        optimizer: of the critic's parameters, whose rule is unrolled; else it is not needed.

    Raises:
        ValueError: a network that the objective cannot ask.
    """
    critic = _plain(net, config, rng, one_pass)
    if config.generator_loss == "matching":
        return Matching(critic, net)
    if not config.unroll:
        return critic
    assert optimizer is not None
    inner, value = critic, None
    if isinstance(critic, OnePass):
        inner = Autograd(net, critic.loss, config.penalty, config.penalty_weight, rng)
    if type(inner) is Autograd and OBJECTIVES[config.objective].zero_sum:
        value = Autograd(net, GANLoss(config.objective), "none", 0.0, rng, one_pass)
    return Unrolled(critic, inner, net, optimizer, config.unroll, value, config.clip_weights)


def _plain(net: nn.Module, config: TrainConfig, rng: torch.Generator, one_pass: bool | None) -> Critic:
    reconstructs = hasattr(net, "decode")
    if config.loss == "mmd":
        if config.arch in CONDITIONAL:
            checks.fail(ValueError, OP, "arch", "be unconditional with --loss mmd, which does not see classes", config.arch)
        return MMD(config)
    if config.loss == "mmd-gan":
        if getattr(net, "classifies", False):
            checks.fail(ValueError, OP, "arch", "give features with --loss mmd-gan, and no classes", config.arch)
        return MMDGAN(net, config, rng, one_pass)
    if config.loss in ("ebgan", "began"):
        if not reconstructs:
            checks.fail(ValueError, OP, "arch", f"be autoencoder or conv-autoencoder with --loss {config.loss}", config.arch)
        return (EBGAN if config.loss == "ebgan" else BEGAN)(net, config, one_pass)
    if reconstructs:
        wanted = f"be ebgan, began, mmd or mmd-gan with --arch {config.arch}, which gives no logits"
        checks.fail(ValueError, OP, "loss", wanted, config.loss)
    gathers = distributed.joined() and OBJECTIVES[config.objective].relative == "average"
    loss = (Gathered if gathers else GANLoss)(config.objective, config.label_smoothing, config.fake_label)
    settings = config.penalty, config.penalty_weight, rng
    if getattr(net, "classifies", False):
        return Auxiliary(net, loss, *settings, one_pass, config.class_weight)
    if one_pass is not False and not gathers and _one_pass.fits(net, config.penalty):
        return OnePass(net, loss, *settings)
    return Autograd(net, loss, *settings, one_pass)
