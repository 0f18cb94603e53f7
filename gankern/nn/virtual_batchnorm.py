"""Virtual batch norm: each sample normalised by a fixed reference batch and itself, so that no sample hangs on the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern import checks

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class VirtualBatchNorm(nn.Module):
    """A network whose BatchNorm layers are virtual: they take their statistics from a reference batch and the sample itself.

        critic = gankern.nn.VirtualBatchNorm(DCGANDiscriminator(), real[:64])
        generator = gankern.nn.VirtualBatchNorm(DCGANGenerator(), sample_latent(64))

    The reference batch goes through the network together with each batch, and is taken off the result. In a layer the statistics
    of a sample are those of the n reference samples and of itself together, n + 1 in all; those of the reference samples are their
    own. So a sample's result, and its gradient penalty, is the same in any batch and in training and evaluation mode, and real and
    fake samples may share a pass. There are no running averages. Derivatives of any order, also through the reference batch to the
    parameters.

    Args:
        network: its nn.BatchNorm1d, 2d and 3d layers become virtual, in place, with their own weight, bias and eps. It must give
            one row (of each of its results) for an input row; for a critic of packs, `Packed(VirtualBatchNorm(critic, packs), m)`.
            Before or after `gankern.fuse`, which leaves virtual layers to PyTorch.
        reference: its inputs for n samples, n >= 2 (for a conditional network labels too), chosen once: real samples for a critic,
            latent vectors for a generator. Buffers reference0, reference1 ..., so that a state_dict holds them.

    Shape: that of the network.

    Raises:
        ValueError, TypeError: no such layer in the network, a BatchNorm of another class, no reference batch of two samples or
            more; a call with another number of inputs, or of a network that does not give one row for an input row.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.4; weights of the two statistics: the
    authors' code.
    """

    def __init__(self, network: nn.Module, *reference: Tensor) -> None:
        super().__init__()
        op = "VirtualBatchNorm"
        if not reference:
            checks.fail(ValueError, op, "reference", "be one tensor or more", "none")
        for i, t in enumerate(reference):
            checks.tensor(op, f"reference{i}", t)
            if t.dim() == 0 or len(t) != len(reference[0]) or len(t) < 2:
                checks.fail(
                    ValueError, op, f"reference{i}", "have two rows or more, as many as the others", f"shape {list(t.shape)}"
                )
            self.register_buffer(f"reference{i}", t.detach().clone())
        others = [m for m in network.modules() if isinstance(m, _BatchNorm) and type(m) not in BATCH_NORMS]
        if others:
            checks.fail(ValueError, op, "network", "have plain nn.BatchNorm1d, 2d or 3d only", type(others[0]).__name__)
        norms = [(name, m) for name, m in network.named_modules(remove_duplicate=False) if name and isinstance(m, _BatchNorm)]
        if not norms:
            checks.fail(ValueError, op, "network", "have a BatchNorm layer in it", type(network).__name__)
        for name, norm in norms:
            network.set_submodule(name, VirtualBatchNormLayer(norm, len(reference[0])))
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        references = list(self.buffers(recurse=False))
        if len(inputs) != len(references):
            checks.fail(TypeError, "VirtualBatchNorm", "inputs", f"be {len(references)} tensors, as the reference", len(inputs))
        n = len(references[0])
        rows = n + inputs[0].shape[0]
        results = self.network(*(torch.cat([r.to(x.dtype), x]) for r, x in zip(references, inputs, strict=True)))
        for y in results if isinstance(results, tuple) else (results,):
            if y.shape[0] != rows:
                checks.fail(ValueError, "VirtualBatchNorm", "network", f"give {rows} rows for {rows} inputs", y.shape[0])
        return tuple(y[n:] for y in results) if isinstance(results, tuple) else results[n:]


class VirtualBatchNormLayer(nn.Module):
    """The layer of `VirtualBatchNorm`: the first n rows of what it gets are the reference batch, each of the others a sample.

    With reference mean m and variance v, a sample's own mean m_i and variance v_i over its positions, a = n / (n + 1), b = 1 - a,
    the sample is normalised by the mean a m + b m_i and the variance a v + b v_i + a b (m_i - m)², those of all n + 1 together.

    Args:
        norm: whose num_features, eps, weight and bias it takes over.
        n: rows of the reference batch.

    Shape: [n + B, C, *], unchanged; in 16 bits the statistics are computed in float32.
    """

    def __init__(self, norm: _BatchNorm, n: int) -> None:
        super().__init__()
        self.num_features, self.eps, self.n = norm.num_features, norm.eps, n
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        v = x.float() if x.dtype.itemsize == 2 else x
        positions = tuple(range(2, v.dim()))
        batch = (0, *positions)
        reference = v[: self.n]
        mean = reference.mean(batch, keepdim=True)
        variance = (reference - mean).square().mean(batch, keepdim=True)
        samples = v[self.n :]
        own = samples.mean(positions, keepdim=True) if positions else samples
        spread = (samples - own).square().mean(positions, keepdim=True) if positions else 0.0
        a, b = self.n / (self.n + 1), 1 / (self.n + 1)
        means = a * mean + b * own
        variances = a * variance + b * spread + a * b * (own - mean).square()
        centred = torch.cat([reference - mean, samples - means])
        scale = torch.rsqrt(torch.cat([variance.expand(len(reference), *variance.shape[1:]), variances]) + self.eps)
        y = centred * scale
        if self.weight is not None:
            shape = (1, -1, *(1,) * len(positions))
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, n={self.n}, eps={self.eps}"
