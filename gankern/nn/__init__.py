"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.linear import LinearLeakyReLU
from gankern.nn.spectral_norm import spectral_norm, spectral_norm_

__all__ = ["LinearLeakyReLU", "spectral_norm", "spectral_norm_"]
