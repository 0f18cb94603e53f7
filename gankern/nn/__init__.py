"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.conv import (
    ConvLeakyReLU1d,
    ConvLeakyReLU2d,
    ConvLeakyReLU3d,
    ConvTransposeLeakyReLU1d,
    ConvTransposeLeakyReLU2d,
    ConvTransposeLeakyReLU3d,
)
from gankern.nn.linear import LinearLeakyReLU
from gankern.nn.minibatch import MinibatchDiscrimination, MinibatchDistance
from gankern.nn.mlp_critic import MLPCritic, MLPLayers, mlp_layers, mlp_problem
from gankern.nn.spectral_norm import spectral_norm, spectral_norm_

__all__ = [
    "ConvLeakyReLU1d",
    "ConvLeakyReLU2d",
    "ConvLeakyReLU3d",
    "ConvTransposeLeakyReLU1d",
    "ConvTransposeLeakyReLU2d",
    "ConvTransposeLeakyReLU3d",
    "LinearLeakyReLU",
    "MLPCritic",
    "MLPLayers",
    "MinibatchDiscrimination",
    "MinibatchDistance",
    "mlp_layers",
    "mlp_problem",
    "spectral_norm",
    "spectral_norm_",
]
