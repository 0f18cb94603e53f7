"""Drop-in modules: PyTorch's parameter names and initialisation, gankern's kernels."""

from gankern.nn.linear import LinearLeakyReLU
from gankern.nn.mlp_critic import MLPCritic, MLPLayers, mlp_layers, mlp_problem

__all__ = ["LinearLeakyReLU", "MLPCritic", "MLPLayers", "mlp_layers", "mlp_problem"]
