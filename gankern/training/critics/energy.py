"""EBGAN and BEGAN: the critic is an auto-encoder, and the error of its reconstruction is the energy of a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gankern.losses import pulling_away
from gankern.training import distributed
from gankern.training.config import TrainConfig
from gankern.training.critics._common import Computed, Critic, Loss, frozen, mixes


def error(x: Tensor, reconstruction: Tensor, power: int = 2) -> Tensor:
    """[B]: the mean over a sample's entries of |x - reconstruction|^power; of 16-bit samples in float32."""
    difference = (x.float() if x.dtype.itemsize == 2 else x) - reconstruction
    return (difference.abs() if power == 1 else difference.square()).flatten(1).mean(1)


class Energy(Critic):
    """What both have: the auto-encoder and the energies. d_real and d_fake are the mean energies of real and fake samples.

    Args:
        net: samples -> their reconstructions, of the same shape, with `encode` and `decode`, of which it is made.
        config: the objective's settings are read.
        one_pass: whether real and fake may share a pass. None: yes, unless samples of a batch see each other in the net.
    """

    power = 2

    def __init__(self, net: nn.Module, config: TrainConfig, one_pass: bool | None = None) -> None:
        self.net, self.config = net, config
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.one_pass = not mixes(net) if one_pass is None else one_pass

    def energies(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """[B] each."""
        if not self.one_pass:
            return self._energy(real), self._energy(fake)
        both = self._energy(torch.cat([real, fake]))
        return both[: len(real)], both[len(real) :]

    def _energy(self, x: Tensor) -> Tensor:
        return error(x, self.net(x), self.power)


class EBGAN(Energy):
    """Critic: mean E(x) + mean max(0, m - E(G(z))); generator: mean E(G(z)) + w PT(codes of G(z)).

    E is the mean squared error of the reconstruction's entries (the paper's is the norm of the error), m config.margin, PT
    `gankern.pulling_away` and w config.pulling_away_weight.

    Source: Zhao, Mathieu, LeCun, "Energy-based generative adversarial network", ICLR 2017, eq. 1, 2 and 4.
    """

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        of_real, of_fake = self.energies(real, fake)
        loss = of_real.mean() + (self.config.margin - of_fake).clamp_min(0).mean()
        return Computed(loss, of_real.detach().mean(), of_fake.detach().mean())

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        with frozen(self.parameters):
            codes = self.net.encode(fake)  # type: ignore[operator]
            energy = error(fake, self.net.decode(codes)).mean()  # type: ignore[operator]
        weight = self.config.pulling_away_weight
        loss = energy + weight * pulling_away(distributed.gather(codes)) if weight else energy
        return Computed(loss, torch.zeros_like(energy), energy.detach())


class BEGAN(Energy):
    """Critic: L(x) - k L(G(z)); generator: L(G(z)); k <- min(max(k + lambda (gamma L(x) - L(G(z))), 0), 1) after each step.

    L is the mean absolute error of the reconstruction's entries (the paper's pixel-wise loss with eta = 1), k starts at 0. L(x) is
    that of the step's last critic update, L(G(z)) that of the generator's update, as in the paper. The measure of convergence
    L(x) + |gamma L(x) - L(G(z))| is d_real + |gamma d_real - d_fake| of the log.

    Source: Berthelot, Schumm, Metz, "BEGAN: boundary equilibrium generative adversarial networks", 2017, section 3.4.
    """

    power = 1

    def __init__(self, net: nn.Module, config: TrainConfig, one_pass: bool | None = None) -> None:
        super().__init__(net, config, one_pass)
        self.k = torch.zeros((), device=self.parameters[0].device)
        self.of_real = torch.zeros_like(self.k)

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        of_real, of_fake = (e.mean() for e in self.energies(real, fake))
        self.of_real.copy_(distributed.mean(of_real.detach()))
        return Computed(of_real - self.k.clone() * of_fake, of_real.detach(), of_fake.detach())

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        with frozen(self.parameters):
            energy = self._energy(fake).mean()
        config, of_fake = self.config, distributed.mean(energy.detach())
        self.k.add_(config.began_lambda * (config.began_gamma * self.of_real - of_fake)).clamp_(0, 1)
        return Computed(energy, self.of_real, of_fake)

    def state(self) -> dict[str, Tensor]:
        return {"k": self.k}
