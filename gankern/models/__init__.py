"""Networks: generators and critics of the published systems, and the latent vectors that they start from."""

from gankern.models.acgan import ACGANDiscriminator, ConvACGANDiscriminator
from gankern.models.autoencoder import ConvAutoencoder, MLPAutoencoder
from gankern.models.conditional import CDCGANDiscriminator, CDCGANGenerator, CGANDiscriminator, CGANGenerator
from gankern.models.dcgan import DCGANDiscriminator, DCGANGenerator
from gankern.models.latent import sample_latent
from gankern.models.mlp import MLPDiscriminator, MLPGenerator
from gankern.models.packed import Packed
from gankern.models.resnet import ResNetDiscriminator, ResNetGenerator
from gankern.models.sngan import SNGANDiscriminator, SNGANGenerator
from gankern.models.tabular import TabularDiscriminator, TabularGenerator
from gankern.models.toy import MaxoutDiscriminator, ToyGenerator, UnrolledDiscriminator, pacgan_toy, unrolled_toy, wgan_gp_toy
from gankern.models.vae import ConvEncoder, MLPEncoder, rsample

__all__ = [
    "ACGANDiscriminator",
    "CDCGANDiscriminator",
    "CDCGANGenerator",
    "CGANDiscriminator",
    "CGANGenerator",
    "ConvACGANDiscriminator",
    "ConvAutoencoder",
    "ConvEncoder",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "MLPAutoencoder",
    "MLPDiscriminator",
    "MLPEncoder",
    "MLPGenerator",
    "MaxoutDiscriminator",
    "Packed",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "TabularDiscriminator",
    "TabularGenerator",
    "ToyGenerator",
    "UnrolledDiscriminator",
    "pacgan_toy",
    "rsample",
    "sample_latent",
    "unrolled_toy",
    "wgan_gp_toy",
]
