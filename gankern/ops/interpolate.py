"""interpolate: x̂ = eps x + (1 - eps) x̃ with one eps a sample, the points at which WGAN-GP takes its penalty.

eps[b] is word 0 of the Philox call with counter b, its upper 24 bits times 2^-24: uniform in [0, 1), the same bits on every
backend, drawn from a seed in device memory, so that each replay of a CUDA graph draws anew.

Kernel, same name and tensors in `torch.ops.gankern` (csrc/interpolate.*) and `gankern.triton.interpolate`:
    interpolate(real [B, ...], fake [B, ...], eps [B] | None, seed int64 [1] | None) -> x_hat [B, ...], eps [B]
All contiguous; either eps or seed; eps in float64 for float64 samples, else in float32.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._function import apply
from gankern.ops._layout import accumulate, dense, is_channels_last, restored
from gankern.ops._philox import draw_seed, philox

OP = "interpolate"


def reference(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """The definition, in plain PyTorch: eps [B], computed in eps's dtype and rounded once."""
    e = eps.reshape(-1, *[1] * (real.dim() - 1))
    return (e * real.to(eps.dtype) + (1 - e) * fake.to(eps.dtype)).to(real.dtype)


def draw_eps(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The eps of `count` samples, [count], as every kernel draws them."""
    return (philox(seed, torch.arange(count, device=seed.device))[:, 0] >> 8).to(dtype) * 2.0**-24


def interpolate(real: Tensor, fake: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """A random point between each real and each fake sample: x̂ = eps real + (1 - eps) fake, one eps a sample.

    Differentiable to any order in real and fake, by a kernel forward and PyTorch's own products backward. Not in eps.

    Args:
        real: [B, ...], float64, float32, bfloat16 or float16; channels-last stays channels-last.
        fake: the same shape and device; where the dtypes differ both are promoted, as PyTorch promotes.
        eps: [B], or None: drawn uniformly from [0, 1). 16-bit samples are mixed in float32 and rounded once.
        generator: source of eps; None is PyTorch's default generator on real's device.

    Returns:
        [B, ...].

    Raises:
        ValueError: a shape or device that does not fit, an eps that requires a gradient.
        TypeError: a dtype that is not supported.
        RuntimeError: a backend was forced that cannot run here.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, algorithm 1, line 6.
    """
    _check(real, fake, eps)
    if real.dtype != fake.dtype:
        both = torch.promote_types(real.dtype, fake.dtype)
        real, fake = real.to(both), fake.to(both)
    dtype = accumulate(real.dtype)
    eps = None if eps is None else eps.to(dtype)
    name = backend.forced()
    if name is None:
        name = _choose(real)
        if name == "reference" and eps is None:
            eps = torch.rand(real.shape[0], dtype=dtype, device=real.device, generator=generator)
    else:
        backend.require(OP, name, real.device.type)
    seed = draw_seed(real.device, generator) if eps is None else None
    if name == "reference":
        return reference(real, fake, draw_eps(seed, real.shape[0], dtype) if eps is None else eps)  # type: ignore[arg-type]
    plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if plain and not (torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad)):
        return _run(real, fake, eps, seed, name)[0]
    return apply(_Interpolate, real, fake, eps, seed, name)[0]


def _check(real: Any, fake: Any, eps: Any) -> None:
    for argument, value in (("real", real), ("fake", fake)):
        checks.tensor(OP, argument, value)
        checks.floating(OP, argument, value)
    if real.dim() == 0:
        checks.fail(ValueError, OP, "real", "have at least one dimension", "shape []")
    checks.shape(OP, "fake", fake, real.shape)
    checks.same_device(OP, "fake", fake, real.device)
    if eps is not None:
        checks.tensor(OP, "eps", eps)
        checks.floating(OP, "eps", eps)
        checks.shape(OP, "eps", eps, real.shape[:1])
        checks.same_device(OP, "eps", eps, real.device)
        if eps.requires_grad:
            checks.fail(ValueError, OP, "eps", "not require a gradient", "a tensor that does")


def _choose(real: Tensor) -> str:
    """The automatic choice: a kernel wherever there is one. One CPU thread, eager's three products and its draw against ours,
    alternating medians: 16x784 1.05, 64x784 1.8, 256x784 2.2, 64x3x32x32 1.7, 16x3x128x128 2.5 times as fast.
    On CUDA not yet measured."""
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses it
    return backend.preferred(real.device.type)


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.interpolate")


def _run(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    last = is_channels_last(real)
    x_hat, used = _kernels(name).interpolate(dense(real, last), dense(fake, last), None if eps is None else eps.contiguous(), seed)
    return restored(x_hat, last), used


class _Interpolate(Function):
    """x̂ and the eps that it was made with; linear in real and fake, so its backward is two products."""

    @staticmethod
    def forward(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None, name: str) -> Any:
        return _run(real, fake, eps, seed, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        if g is None:
            return (None,) * 5
        (eps,) = ctx.saved_tensors
        e, wide = eps.reshape(-1, *[1] * (g.dim() - 1)), g.to(eps.dtype)
        d_real = (e * wide).to(g.dtype) if ctx.needs_input_grad[0] else None
        d_fake = ((1 - e) * wide).to(g.dtype) if ctx.needs_input_grad[1] else None
        return d_real, d_fake, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        calls = [
            apply(
                _Interpolate,
                *(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0, 0)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::interpolate")
    def _(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.empty_like(real), real.new_empty(real.shape[0], dtype=accumulate(real.dtype))
