"""Maximum mean discrepancy: between the samples themselves, without a critic, and between features that a critic learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern.losses import mmd2
from gankern.ops.pairwise import kernel_means
from gankern.training import distributed
from gankern.training.config import TrainConfig
from gankern.training.critics._common import Computed, Critic, Loss, WithTerm, frozen
from gankern.training.critics.autograd import Autograd
from gankern.training.critics.energy import error


class MMD(Critic):
    """The generator minimises MMD² (or MMD) between a batch of its samples and the real one; there is no critic.

    The biased estimate, which is never negative. What the log has of a critic is 0.

    Args:
        config: mmd_bandwidths and mmd_root are read.

    Source: Li, Swersky, Zemel, "Generative moment matching networks", ICML 2015, eq. 3 and section 3 (the square root: its gradient
    does not fade as the samples come close); Dziugaite, Roy, Ghahramani, UAI 2015.
    """

    learns = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        return Computed(*real.new_zeros(3, dtype=torch.float32).unbind())

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        real, fake = distributed.gather(real), distributed.gather(fake.to(real.dtype))
        value = mmd2(real, fake, self.config.mmd_bandwidths)
        if self.config.mmd_root:
            value = value.clamp_min(torch.finfo(value.dtype).eps).sqrt()  # the slope at 0 is infinite
        zero = torch.zeros_like(value)
        return Computed(value, zero, zero)


class MMDGAN(Autograd):
    """Critic: -MMD² of the features of real and fake samples; generator: MMD².

    The features of a sample are what the critic gives for it: its logit, or the code of an auto-encoder. An auto-encoder's critic
    has w (mean |x - x'|² + mean |G(z) - G(z)'|²) besides, x' the reconstruction and w config.mmd_reconstruction, by which the
    features tell samples apart, as the kernel's theory asks; the term of the authors' code that orders the features' means is left
    out. A gradient penalty is that of the witness function, t -> mean k(f(x), f(t)) - mean k(f(G(z)), f(t)).

    d_real and d_fake are the means of the witness function over real and fake samples; they differ by MMD².

    Args:
        net: samples (and classes) -> features [B, ...].
        config: the objective's settings and those of the penalty are read.
        rng: source of the penalty's points.
        one_pass: whether real and fake may share a pass. None: yes, unless samples of a batch see each other in the net.

    Source: Li et al., "MMD GAN: towards deeper understanding of moment matching network", NeurIPS 2017, eq. 3 and algorithm 1;
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, section 3 (the penalty).
    """

    def __init__(self, net: nn.Module, config: TrainConfig, rng: torch.Generator, one_pass: bool | None = None) -> None:
        super().__init__(net, None, config.penalty, config.penalty_weight, rng, one_pass)
        self.config = config
        self.encode: Any = getattr(net, "encode", net)

    def features(self, real: Tensor, fake: Tensor, labels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """[B, K] of both; of several processes those of all."""
        if self.one_pass:
            both = rows(self.encode(torch.cat([real, fake]), *(torch.cat([c, c]) for c in labels)))
            count = len(both) * len(real) // (len(real) + len(fake))
            of_real, of_fake = both[:count], both[count:]
        else:
            of_real, of_fake = rows(self.encode(real, *labels)), rows(self.encode(fake, *labels))
        return distributed.gather(of_real), distributed.gather(of_fake)

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        of_real, of_fake = self.features(real, fake, labels)
        out: Loss = compared(of_real, of_fake, self.config.mmd_bandwidths, -1)
        weight = self.config.mmd_reconstruction
        if weight and hasattr(self.net, "decode"):
            for x, h in ((real, of_real), (fake, of_fake)):
                out = WithTerm(out, weight * error(x, self.net.decode(distributed.shard(h))).mean())  # type: ignore[operator]
        judge, real, fake = self.judged(self.encode, real, fake, *labels)

        def witness(t: Tensor, *c: Tensor) -> Tensor:
            at = rows(judge(t, *c))
            return self._similarity(at, of_real) - self._similarity(at, of_fake)

        return self.penalised(out, witness, real, fake, *labels)

    def _similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean k(a, b) over b, for each row of a."""
        distance = (a.unsqueeze(1) - b).square().sum(2)
        return torch.stack([torch.exp(distance / (-2 * s * s)) for s in self.config.mmd_bandwidths]).sum(0).mean(1)

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        with frozen(self.parameters):
            return compared(*self.features(real, fake, labels), self.config.mmd_bandwidths, 1)


def rows(features: Tensor) -> Tensor:
    """[B, K] of features [B] or [B, ...]; 16-bit ones in float32."""
    features = features.float() if features.dtype.itemsize == 2 else features
    return features.unsqueeze(1) if features.dim() == 1 else features.flatten(1)


def compared(real: Tensor, fake: Tensor, bandwidths: tuple[float, ...], sign: int) -> Computed:
    """sign * MMD² of features, and the witness function's means over both halves."""
    xx, yy, xy = kernel_means(real, fake, bandwidths)
    values = sign * (xx + yy - 2 * xy), xx.detach() - xy.detach(), xy.detach() - yy.detach()
    return Computed(*(v.to(real.dtype) for v in values))
