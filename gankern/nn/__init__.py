"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.batchnorm import BatchNormLeakyReLU1d, BatchNormLeakyReLU2d, BatchNormLeakyReLU3d, SyncBatchNormLeakyReLU
from gankern.nn.conv import (
    ConvLeakyReLU1d,
    ConvLeakyReLU2d,
    ConvLeakyReLU3d,
    ConvTransposeLeakyReLU1d,
    ConvTransposeLeakyReLU2d,
    ConvTransposeLeakyReLU3d,
)
from gankern.nn.linear import LinearLeakyReLU
from gankern.nn.maxout import Maxout
from gankern.nn.minibatch import MinibatchDiscrimination, MinibatchDistance, MinibatchStdDev, add_minibatch_features
from gankern.nn.mlp_critic import MLPCritic, MLPLayers, mlp_layers, mlp_problem
from gankern.nn.spectral_norm import spectral_norm, spectral_norm_
from gankern.nn.virtual_batchnorm import VirtualBatchNorm

__all__ = [
    "BatchNormLeakyReLU1d",
    "BatchNormLeakyReLU2d",
    "BatchNormLeakyReLU3d",
    "ConvLeakyReLU1d",
    "ConvLeakyReLU2d",
    "ConvLeakyReLU3d",
    "ConvTransposeLeakyReLU1d",
    "ConvTransposeLeakyReLU2d",
    "ConvTransposeLeakyReLU3d",
    "LinearLeakyReLU",
    "MLPCritic",
    "MLPLayers",
    "Maxout",
    "MinibatchDiscrimination",
    "MinibatchDistance",
    "MinibatchStdDev",
    "SyncBatchNormLeakyReLU",
    "VirtualBatchNorm",
    "add_minibatch_features",
    "mlp_layers",
    "mlp_problem",
    "spectral_norm",
    "spectral_norm_",
]
