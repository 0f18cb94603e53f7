"""Networks: generators and critics of the published systems, and the latent vectors that they start from."""

from gankern.models.latent import sample_latent
from gankern.models.mlp import MLPDiscriminator, MLPGenerator

__all__ = ["MLPDiscriminator", "MLPGenerator", "sample_latent"]
