"""GAN objectives as modules: what the critic and the generator minimise."""

from gankern.losses.adversarial import GANLoss

__all__ = ["GANLoss"]
