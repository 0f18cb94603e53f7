"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.linear import LinearLeakyReLU

__all__ = ["LinearLeakyReLU"]
