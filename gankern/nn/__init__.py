"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.linear import LinearLeakyReLU
from gankern.nn.minibatch import MinibatchDiscrimination, MinibatchDistance

__all__ = ["LinearLeakyReLU", "MinibatchDiscrimination", "MinibatchDistance"]
