"""gankern: a GAN engine for PyTorch whose hot path is custom kernels. Importing it compiles nothing and touches no GPU."""

import importlib
from typing import TYPE_CHECKING, Any

from gankern import nn
from gankern.backend import use_backend
from gankern.nn.fuse import FusionReport, fuse, fusion_report, unfuse
from gankern.ops._critic_loss import MLPCriticLoss
from gankern.ops.bias_lrelu import bias_lrelu
from gankern.ops.bn_lrelu import bn_lrelu
from gankern.ops.gan_loss import GanLoss, gan_loss
from gankern.ops.gradient_norm_penalty import NormPenalty, gradient_norm_penalty
from gankern.ops.interpolate import interpolate
from gankern.ops.linear_lrelu import linear_lrelu
from gankern.ops.mlp_critic import mlp_critic, mlp_critic_generator, mlp_critic_penalty
from gankern.ops.pairwise import minibatch_distance, minibatch_features, mmd2, pulling_away
from gankern.regularizers import gradient_penalty

if TYPE_CHECKING:
    from gankern import data, losses, metrics, models, training
    from gankern.training.export import load_generator

__version__ = "0.1.0"
__all__ = [
    "FusionReport",
    "GanLoss",
    "MLPCriticLoss",
    "NormPenalty",
    "__version__",
    "bias_lrelu",
    "bn_lrelu",
    "data",
    "fuse",
    "fusion_report",
    "gan_loss",
    "gradient_norm_penalty",
    "gradient_penalty",
    "interpolate",
    "linear_lrelu",
    "load_generator",
    "losses",
    "metrics",
    "minibatch_distance",
    "minibatch_features",
    "mlp_critic",
    "mlp_critic_generator",
    "mlp_critic_penalty",
    "mmd2",
    "models",
    "nn",
    "pulling_away",
    "training",
    "unfuse",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """What `import gankern` leaves out is imported when it is first asked for; load_generator brings the trainer along."""
    if name in ("data", "losses", "metrics", "models", "training"):
        return importlib.import_module(f"gankern.{name}")
    if name == "load_generator":
        from gankern.training.export import load_generator

        return load_generator
    raise AttributeError(f"module 'gankern' has no attribute {name!r}")
