"""spectral_norm: W / sigma(W) of many weights in one call, sigma by power iteration. Correct to any derivative order.

A weight is taken as the matrix [rows, columns] whose rows are its dimension `dim` and whose columns are all others in their order.
One iteration is u = W v / |W v|, v = Wᵀ u / |Wᵀ u|; then sigma = uᵀ W v, with u and v constants for the derivative. All weights go
through the same launches. The first derivative is a kernel, dW = (g - <g, W / sigma> u vᵀ) / sigma; where a graph of it is asked
for (create_graph, torch.func) the same formula runs in plain PyTorch, which differentiates further.

Kernels, same names and tensors in `torch.ops.gankern` (csrc/spectral_norm.*) and `gankern.triton.spectral_norm`:
    spectral_norm(weights, u, v, dims, iterations, eps) -> (W / sigma of each, state)
    spectral_norm_grad(grads, weights, state, offsets, dims) -> dW of each
All contiguous, of one dtype. state is 1-D in the accumulation dtype (float64 for float64, else float32) and holds for each weight,
one after another, u [rows], v [columns], sigma [1]; a weight's part begins at its offset. u and v are left as they are.

Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018, equations 8 and 12, algorithm 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._function import apply

OP = "spectral_norm"


def reference(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int], iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The definition, in plain PyTorch: W / sigma of each weight, and the new u and v."""
    ys, new_u, new_v = [], [], []
    for w, left, right, dim in zip(weights, u, v, dims, strict=True):
        constant = as_matrix(w.detach(), dim)
        for _ in range(iterations):
            left = F.normalize(constant @ right, dim=0, eps=eps)
            right = F.normalize(constant.mT @ left, dim=0, eps=eps)
        if not iterations:
            left, right = left.clone(), right.clone()  # the buffers may change before the backward pass
        ys.append(w / torch.dot(left, as_matrix(w, dim) @ right))
        new_u.append(left)
        new_v.append(right)
    return ys, new_u, new_v


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """[rows, columns], the rows being dimension `dim`."""
    return weight.movedim(dim, 0).flatten(1)


def spectral_norm(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    iterations: int = 1,
    eps: float = 1e-12,
) -> list[Tensor]:
    """W / sigma(W) of each weight; u and v are updated in place by the power iterations that sigma needs.

    Differentiable to any order in the weights, u and v being constants. Under autocast it computes in the weights' dtype. 16-bit
    weights are computed in float32 and rounded once. Forward-mode derivatives raise but for the reference backend.

    Args:
        weights: n tensors of two or more dimensions; float64, float32, bfloat16 or float16, all of one dtype and on one device.
        u: n tensors, the i-th [weights[i].shape[dims[i]]], of unit length, not requiring a gradient.
        v: n tensors, the i-th as long as all other dimensions of weights[i] together.
        dims: the dimension of each weight that counts its outputs, >= 0.
        iterations: of the power method before sigma is taken, >= 0; 0 leaves u and v as they are.
        eps: lower bound of the norms that u and v are divided by, >= 0, a number that their dtype has.

    Returns:
        n tensors of the weights' shapes.

    Raises:
        ValueError: lists of different lengths, a shape, device or range that does not fit.
        TypeError: a dtype that is not supported, or dtypes that differ.
        RuntimeError: a backend was forced that cannot run here.

    The automatic choice on the CPU is the C++ library, on CUDA the C++ library if built, else Triton (not measured on a GPU yet).
    """
    _check(weights, u, v, dims, iterations, eps)
    return unchecked(weights, u, v, dims, iterations, eps)


def unchecked(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int], iterations: int, eps: float
) -> list[Tensor]:
    """`spectral_norm` for callers whose arguments fit by construction: the checks take as long as small weights do."""
    device = weights[0].device.type
    name = backend.forced()
    name = _choose(device) if name is None else backend.require(OP, name, device)
    if name == "reference":
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            ys, new_u, new_v = reference(weights, u, v, dims, iterations, eps)
    else:
        contiguous = [w.contiguous() for w in weights]
        *ys, state = apply(_SpectralNorm, tuple(dims), iterations, float(eps), name, *contiguous, *u, *v)
        ys = [y if w.is_contiguous() else torch.empty_like(w).copy_(y) for w, y in zip(weights, ys, strict=True)]
        new_u, new_v = map(list, zip(*_parts(state, weights, dims), strict=True)) if iterations > 0 else ([], [])
    if iterations > 0:
        with torch.no_grad():
            torch._foreach_copy_([*u, *v], [*new_u, *new_v])
    return ys


def _choose(device: str) -> str:
    """The automatic choice.

    Twelve weights in one call on one CPU thread against PyTorch's norm on each (CPU time, alternating medians, busy machine;
    forward in training / with backward): 12 x 64² 2.2, 2.0; 12 x 256² 2.1, 2.0; 12 x 1024² 1.4, 2.3; convolutions of 64 to 512
    channels 1.4, 3.3; ten of 128 channels 1.8, 2.2; transposed ones 1.7, 2.1. One weight a call: 1.1 to 1.3, 1.1 to 2.7.
    """
    if torch.compiler.is_compiling():
        return "reference"
    names = ("compiled",) if device == "cpu" else ("compiled", "triton")
    return next((name for name in names if not backend.problem(name, device)), "reference")


def _check(weights: Any, u: Any, v: Any, dims: Any, iterations: Any, eps: Any) -> None:
    for argument, values in (("weights", weights), ("u", u), ("v", v), ("dims", dims)):
        checks.sequence(OP, argument, values)
        if len(values) != len(weights):
            checks.fail(ValueError, OP, argument, f"have one entry for each of {len(weights)} weights", len(values))
    if not weights:
        checks.fail(ValueError, OP, "weights", "have at least one tensor", "none")
    checks.integer(OP, "iterations", iterations, 0)
    checks.number(OP, "eps", eps, 0.0)
    for i, (w, left, right, dim) in enumerate(zip(weights, u, v, dims, strict=True)):
        checks.tensor(OP, f"weights[{i}]", w)
        checks.floating(OP, f"weights[{i}]", w)
        checks.same_dtype(OP, f"weights[{i}]", w, weights[0].dtype)
        checks.same_device(OP, f"weights[{i}]", w, weights[0].device)
        if w.dim() < 2:
            checks.fail(ValueError, OP, f"weights[{i}]", "have two dimensions or more", f"shape {list(w.shape)}")
        checks.integer(OP, f"dims[{i}]", dim, 0)
        if dim >= w.dim():
            checks.fail(ValueError, OP, f"dims[{i}]", f"be in [0, {w.dim() - 1}]", dim)
        rows = w.shape[dim]
        columns = w.shape[:dim].numel() * w.shape[dim + 1 :].numel()
        for argument, vector, length in ((f"u[{i}]", left, rows), (f"v[{i}]", right, columns)):
            checks.tensor(OP, argument, vector)
            checks.shape(OP, argument, vector, (length,))
            checks.same_dtype(OP, argument, vector, w.dtype)
            checks.same_device(OP, argument, vector, w.device)
            if vector.requires_grad:
                checks.fail(ValueError, OP, argument, "not require a gradient", "a tensor that does")
    if eps > torch.finfo(weights[0].dtype).max:
        checks.fail(ValueError, OP, "eps", f"be a number that {weights[0].dtype} has", eps)


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.spectral_norm")


def _lengths(weight: Tensor, dim: int) -> tuple[int, int]:
    """Rows and columns."""
    return weight.shape[dim], weight.shape[:dim].numel() * weight.shape[dim + 1 :].numel()


def _parts(state: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """u and v of each weight."""
    parts = state.split([n for w, dim in zip(weights, dims, strict=True) for n in (*_lengths(w, dim), 1)])
    return zip(parts[::3], parts[1::3], strict=True)


def _grad_reference(g: Tensor, weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """(g - <g, W / sigma> u vᵀ) / sigma in plain PyTorch, with sigma = uᵀ W v: differentiable in g and W."""
    g_matrix, matrix = as_matrix(g, dim).to(u.dtype), as_matrix(weight, dim).to(u.dtype)
    sigma = torch.dot(u, matrix @ v)
    dw = (g_matrix - (g_matrix * matrix).sum() / sigma * torch.outer(u, v)) / sigma
    moved = weight.movedim(dim, 0).shape
    return dw.reshape(moved).movedim(0, dim).to(weight.dtype)


class _SpectralNorm(Function):
    """(dims, iterations, eps, backend, *weights, *u, *v) -> (*ys, state)."""

    @staticmethod
    def forward(dims: tuple[int, ...], iterations: int, eps: float, name: str, *tensors: Tensor) -> Any:
        n = len(dims)
        weights, u, v = tensors[:n], [t.contiguous() for t in tensors[n : 2 * n]], [t.contiguous() for t in tensors[2 * n :]]
        ys, state = _kernels(name).spectral_norm(weights, u, v, dims, iterations, eps)
        return (*ys, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dims, _, _, ctx.name, *tensors = inputs
        *_, state = output
        ctx.save_for_backward(*tensors[: len(ctx.dims)], state)
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *weights, state = ctx.saved_tensors
        n = len(weights)
        wanted = [i for i in range(n) if ctx.needs_input_grad[4 + i] and grads[i] is not None]
        found: list[Tensor | None] = [None] * n
        if not wanted:
            pass
        elif torch.is_grad_enabled():
            parts = list(_parts(state, weights, ctx.dims))
            with torch.autocast(state.device.type, enabled=False):
                for i in wanted:
                    found[i] = _grad_reference(grads[i], weights[i], *parts[i], ctx.dims[i])  # type: ignore[arg-type]
        else:
            offsets, offset = [], 0
            for w, dim in zip(weights, ctx.dims, strict=True):
                offsets.append(offset)
                offset += sum(_lengths(w, dim)) + 1
            lists = ([grads[i].contiguous() for i in wanted], [weights[i] for i in wanted])  # type: ignore[union-attr]
            picked = [offsets[i] for i in wanted], [ctx.dims[i] for i in wanted]
            for i, dw in zip(wanted, _kernels(ctx.name).spectral_norm_grad(*lists, state, *picked), strict=True):
                found[i] = dw
        return (None,) * 4 + (*found, *[None] * (2 * n))

    @staticmethod
    def vmap(info: Any, in_dims: Any, dims: tuple[int, ...], iterations: int, eps: float, name: str, *tensors: Tensor) -> Any:
        rows = [
            apply(
                _SpectralNorm,
                dims,
                iterations,
                eps,
                name,
                *(t if d is None else t.select(d, i).contiguous() for t, d in zip(tensors, in_dims[4:], strict=True)),
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return outputs, (0,) * len(outputs)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::spectral_norm")
    def _(
        weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int], iterations: int, eps: float
    ) -> tuple[list[Tensor], Tensor]:
        size = sum(sum(_lengths(w, dim)) + 1 for w, dim in zip(weights, dims, strict=True))
        dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        return [torch.empty_like(w) for w in weights], weights[0].new_empty(size, dtype=dtype)

    @torch.library.register_fake("gankern::spectral_norm_grad")
    def _(
        grads: Sequence[Tensor], weights: Sequence[Tensor], state: Tensor, offsets: Sequence[int], dims: Sequence[int]
    ) -> list[Tensor]:
        return [torch.empty_like(w) for w in weights]
