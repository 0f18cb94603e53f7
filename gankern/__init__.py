"""gankern: a GAN engine for PyTorch whose hot path is custom kernels. Importing it compiles nothing and touches no GPU."""

from gankern import nn
from gankern.backend import use_backend
from gankern.ops.gan_loss import GanLoss, gan_loss
from gankern.ops.linear_lrelu import linear_lrelu
from gankern.ops.mlp_critic import MLPCriticLoss, mlp_critic, mlp_critic_penalty

__version__ = "0.1.0"
__all__ = [
    "GanLoss",
    "MLPCriticLoss",
    "__version__",
    "gan_loss",
    "linear_lrelu",
    "mlp_critic",
    "mlp_critic_penalty",
    "nn",
    "use_backend",
]
