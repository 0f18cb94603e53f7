"""VAE: the generator is the decoder of a variational auto-encoder besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gankern.training import distributed
from gankern.training.critics import frozen
from gankern.training.critics.matching import Features
from gankern.training.networks import encoder
from gankern.training.optimizers import make
from gankern.training.techniques._technique import Technique

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer


class VAE(Technique):
    """reconstruction * mean |x - G(z)|² + kl * mean KL(N(mu, s²) | N(0, 1)), z ~ N(mu, s²), mu and s² an encoder's of real x.

    Both are sums over a sample's or a latent vector's entries. `reconstruct`: "features" has f(x) and f(G(z)) in place of x and
    G(z), f what the last linear layer of the critic takes. The encoder is trained by the same term, in the generator's step, by an
    optimiser like the generator's; clipping, historical averaging and the logged norms leave it out. Fakes of the critic stay those
    of drawn z; reconstructions are none of them.

    Source: Larsen, Sønderby, Larochelle, Winther, "Autoencoding beyond pixels using a learned similarity metric", ICML 2016,
    section 3. With reconstruction = 1/2 and kl = 1 the term is minus the evidence's lower bound at unit variance.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        shape = trainer.sample(torch.zeros(1, self.config.z_dim)).shape[1:]
        self.encoder = encoder(self.config, shape).to(self.device).train()
        rate, capturable = self.config.lr_g, trainer.clock is not None
        self.optimizer = make(self.config.optimizer_g, self.encoder.parameters(), rate, self.config, capturable)
        self.features = Features(trainer.discriminator) if self.config.reconstruct == "features" else None

    def term(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Tensor:
        self.optimizer.forget()
        mean, log_variance = self.encoder(real)
        noise = distributed.draw(lambda n: mean.new_empty(n, *mean.shape[1:]).normal_(generator=self.rng), len(mean))
        again = self.trainer.forward(mean + noise * torch.exp(0.5 * log_variance))
        if self.features is not None:
            with frozen(self.features.parameters):
                real, again = self.features.of(real)[0].detach(), self.features.of(again)[0]
        error = (real.float() - again.float()).square().flatten(1).sum(1).mean()
        mean, log_variance = mean.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return self.config.reconstruction * error + self.config.kl * divergence

    def after_step(self) -> None:
        distributed.average_([p.grad for p in self.optimizer.parameters if p.grad is not None])
        self.optimizer.update()

    def models(self) -> dict[str, Any]:
        return {"encoder": self.encoder}

    def optimizers(self) -> dict[str, Any]:
        return {"opt_e": self.optimizer}
