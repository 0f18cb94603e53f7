"""BatchNormLeakyReLU1d, 2d, 3d and SyncBatchNormLeakyReLU: PyTorch's batch normalisation and nn.LeakyReLU as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern import checks
from gankern.ops._activation import leaky_relu
from gankern.ops._all_reduce import AllReduce, joined
from gankern.ops._layout import accumulate
from gankern.ops.bn_lrelu import bn_lrelu


class _LeakyReLU:
    """The activation, before a batch normalisation in the order of inheritance. It needs no more than the attribute
    `negative_slope`, so that an existing module can be made one of these by setting its class."""

    def __init__(self, *args: Any, negative_slope: float = 0.2, **kwargs: Any) -> None:
        checks.number(type(self).__name__, "negative_slope", negative_slope, 0.0)
        super().__init__(*args, **kwargs)
        self.negative_slope = negative_slope

    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        running_mean, running_var = self._averages()
        weight, bias, of_batch, momentum, eps = self._settings()
        return bn_lrelu(input, running_mean, running_var, weight, bias, of_batch, momentum, eps, self.negative_slope)

    def _averages(self: Any) -> tuple[Tensor | None, Tensor | None]:
        """The running averages, if they are used or moved."""
        used = not self.training or self.track_running_stats
        return (self.running_mean, self.running_var) if used else (None, None)

    def _settings(self: Any) -> tuple[Tensor | None, Tensor | None, bool, float, float]:
        """Weight, bias, whether the statistics are those of the batch, momentum and eps; counts a batch that is tracked."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        return self.weight, self.bias, of_batch, momentum, self.eps

    def extra_repr(self: Any) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"  # type: ignore[misc]


class BatchNormLeakyReLU1d(_LeakyReLU, nn.BatchNorm1d):
    """y = LeakyReLU(BatchNorm1d(x)), with nn.BatchNorm1d's parameters and buffers: a state_dict fits both ways.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm1d.
        negative_slope: factor for negative values, >= 0 (0 is ReLU); by keyword.

    Shape: [B, C] or [B, C, L], unchanged.

    Raises:
        ValueError, TypeError: as nn.BatchNorm1d and `gankern.bn_lrelu`.
    """


class BatchNormLeakyReLU2d(_LeakyReLU, nn.BatchNorm2d):
    """y = LeakyReLU(BatchNorm2d(x)), with nn.BatchNorm2d's parameters and buffers: a state_dict fits both ways.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm2d.
        negative_slope: factor for negative values, >= 0 (0 is ReLU); by keyword.

    Shape: [B, C, H, W], unchanged; channels-last stays channels-last.

    Raises:
        ValueError, TypeError: as nn.BatchNorm2d and `gankern.bn_lrelu`.
    """


class BatchNormLeakyReLU3d(_LeakyReLU, nn.BatchNorm3d):
    """y = LeakyReLU(BatchNorm3d(x)), with nn.BatchNorm3d's parameters and buffers: a state_dict fits both ways.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm3d.
        negative_slope: factor for negative values, >= 0 (0 is ReLU); by keyword.

    Shape: [B, C, D, H, W], unchanged; channels-last stays channels-last.

    Raises:
        ValueError, TypeError: as nn.BatchNorm3d and `gankern.bn_lrelu`.
    """


class SyncBatchNormLeakyReLU(_LeakyReLU, nn.SyncBatchNorm):
    """y = LeakyReLU(SyncBatchNorm(x)): in training mode the statistics are those of the batches of all processes together.

    Without torch.distributed, in one process and in evaluation mode it is BatchNormLeakyReLU. On a GPU the statistics are the
    library's, whose double backward raises. On the CPU, where the library has none, they come from two all-reduces that are
    differentiable to any order; every process must then run the same backward passes.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as nn.SyncBatchNorm.
        negative_slope: factor for negative values, >= 0 (0 is ReLU); by keyword.

    Shape: [B, C, *], unchanged.

    Raises:
        ValueError, TypeError: as nn.SyncBatchNorm and `gankern.bn_lrelu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group is None:
            return super().forward(input)
        if input.device.type != "cpu":
            return leaky_relu(nn.SyncBatchNorm.forward(self, input), self.negative_slope)
        self._check_input_dim(input)
        return self._synchronised(input, group)

    def _group(self) -> Any:
        """The processes whose batches count together; None if there is no other one."""
        if not (self.training and joined()):
            return None
        group = self.process_group or torch.distributed.group.WORLD
        return group if torch.distributed.get_world_size(group) > 1 else None

    def _synchronised(self, x: Tensor, group: Any) -> Tensor:
        running, (weight, bias, _, momentum, eps) = self._averages(), self._settings()
        v = x.to(accumulate(x.dtype))
        dims, shape = [d for d in range(x.dim()) if d != 1], (1, -1, *(1,) * (x.dim() - 2))
        own = v.new_full((1,), x.numel() // max(x.shape[1], 1))
        *_, count = totals = AllReduce.apply(torch.cat([v.sum(dims), own]), group)
        mean = totals[:-1] / count
        c = v - mean.reshape(shape)
        var = AllReduce.apply(c.square().sum(dims), group) / count
        with torch.no_grad():
            for average, value in zip(running, (mean, var * (count / (count - 1))), strict=True):
                if average is not None:
                    average.lerp_(value.to(average.dtype), momentum)
        scale = torch.rsqrt(var + eps)
        z = c * (scale if weight is None else scale * weight).reshape(shape)
        return leaky_relu(z if bias is None else z + bias.reshape(shape), self.negative_slope).to(x.dtype)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As nn.SyncBatchNorm's, which would drop the activations of BatchNormLeakyReLU: those become SyncBatchNormLeakyReLU."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
            if isinstance(module, _LeakyReLU):
                converted.__class__ = cls
                converted.negative_slope = module.negative_slope
            return converted
        made: dict[nn.Module, nn.Module] = {}  # a module in two places stays one
        for name, child in module._modules.items():
            if child is not None:
                made[child] = made.get(child) or cls.convert_sync_batchnorm(child, process_group)
                module._modules[name] = made[child]
        return module
