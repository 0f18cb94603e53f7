"""GAN objectives: what the critic and the generator minimise."""

from gankern.losses.adversarial import GANLoss
from gankern.ops.pairwise import mmd2, pulling_away

__all__ = ["GANLoss", "mmd2", "pulling_away"]
