"""pairwise: what compares every sample of a batch with every other, without the tensor of all pairs in memory.

    minibatch_features   o_ib = sum over j != i of exp(-||m_ib - m_jb||_1); derivatives up to order 2, each a kernel of its own
    mmd2                 sums over Gram matrices, made and reduced one block of rows at a time. The forward pass also computes the
                         gradient, so that no block is made twice. Order 1; beyond it the plain formula runs, N x N in memory
    minibatch_distance   mean over j != i of ||x_i - x_j||²: a closed form in O(N D), in PyTorch calls; any order
    pulling_away         mean squared cosine: one product, the smaller of N x N and D x D, in PyTorch calls; any order

The products of mmd2 are the library's; what surrounds them is one kernel. Kernels, same names and tensors in `torch.ops.gankern`
(csrc/pairwise.*) and `gankern.triton.pairwise`:
    pairwise_features(m [N, B, C]) -> o [N, B]
    pairwise_features_grad(g [N, B], m [N, B, C]) -> dm [N, B, C]
    pairwise_features_grad2(h [N, B, C], g [N, B], m [N, B, C]) -> dg [N, B], dm [N, B, C]: the gradient of <h, dm(g, m)>
    pairwise_gram_(gram [R, M], sq_a [R], sq_b [M], gammas, upper) -> sums [R], weights [R]
All contiguous. The last is in place, float64 and float32 only: k = sum of exp(-gamma d), d = max(sq_a + sq_b - 2 gram, 0), of at
most 16 gammas; gram becomes W = dk / dgram; sums and weights are the row sums of k and of W. upper: only columns beyond the row's
own index count, the others become 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern import backend, checks
from gankern.ops._function import apply

SIGMAS = (1.0, 2.0, 4.0, 8.0, 16.0)
MOST_SIGMAS = 16
LEAST_SIGMA = 1e-18  # 1 / (2 sigma²) must be a number of float32
SMALL_MMD = 96  # samples in all, below which three autograd Functions cost more than they save on the CPU
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}  # of the Gram matrix, that are in memory at a time

# --- the definitions ------------------------------------------------------------------------------------------------------------


def reference_features(m: Tensor) -> Tensor:
    """`minibatch_features` in plain PyTorch."""
    x, itself = _upcast(m), _diagonal(m)[:, :, None]
    differences = (x.unsqueeze(1) - x).masked_fill(itself[..., None], 0.0)  # of infinity and itself: NaN, in the gradient too
    return torch.exp(-differences.abs().sum(-1)).masked_fill(itself, 0.0).sum(1).to(m.dtype)


def reference_mmd2(real: Tensor, fake: Tensor, sigmas: Sequence[float] = SIGMAS, unbiased: bool = False) -> Tensor:
    """`mmd2` in plain PyTorch."""
    xx, yy, xy = _means(real, fake, sigmas, unbiased, "reference")
    return (xx + yy - 2 * xy).to(_accumulation(real.dtype))


def _similarities(a: Tensor, b: Tensor | None, gammas: Sequence[float], slope: bool = False) -> Tensor:
    """k [N, M] of each pair, or its slope W = dk / dgram; b None: of a with itself, 0 for a row and itself."""
    other = a if b is None else b
    squares = a.square().sum(1)
    d = (squares.unsqueeze(1) + (squares if b is None else other.square().sum(1)) - 2 * (a @ other.mT)).clamp_min(0)
    k = torch.zeros_like(d)
    for gamma in gammas:
        k = k + (2 * gamma if slope else 1.0) * torch.exp(-gamma * d)
    return k.masked_fill(_diagonal(a), 0.0) if b is None else k


def _similarities_grad(a: Tensor, b: Tensor | None, gammas: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """The gradient of the sum of all k in a and b, in calls that autograd can differentiate."""
    w = _similarities(a, b, gammas, slope=True)
    if b is None:
        return 2 * (w @ a - w.sum(1, keepdim=True) * a), None
    return w @ b - w.sum(1, keepdim=True) * a, w.mT @ a - w.sum(0).unsqueeze(1) * b


# --- public functions -----------------------------------------------------------------------------------------------------------


def minibatch_features(m: Tensor) -> Tensor:
    """How close each sample of a batch is to the others, in each of B learned spaces of C dimensions.

    o_ib = sum over j != i of exp(-||m_ib - m_jb||_1). The paper's sum has the constant term j = i too, which is 1; its authors'
    code leaves it out, as this does. Differentiable twice (a gradient penalty passes through it); a third derivative raises.

    Args:
        m: [N, B, C]: the projections of N samples; float64, float32, bfloat16 or float16. Under autocast 16-bit m gives float32,
            as torch.exp does.

    Returns:
        [N, B], m's dtype; sums in float32 (float64 for float64). One sample has features 0.

    Raises:
        ValueError: m has not three dimensions.
        TypeError: a dtype that is not supported.
        RuntimeError: a backend was forced that cannot run here; a third derivative was asked for.

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 3.2.
    """
    op = "minibatch_features"
    checks.tensor(op, "m", m)
    checks.floating(op, "m", m)
    checks.dims(op, "m", m, 3)
    if m.dtype.itemsize == 2 and _autocast(m):
        m = m.float()
    name = backend.forced()
    name = _choose(m.device.type) if name is None else backend.require(op, name, m.device.type)
    return reference_features(m) if name == "reference" else apply(_Features, m, name)


def minibatch_distance(x: Tensor) -> Tensor:
    """How far each sample of a batch is from the others: d_i = mean over j != i of ||x_i - x_j||².

    With the x centred on their mean this is (N ||x_i||² + sum_j ||x_j||²) / (N - 1), which is never negative and loses no digits:
    two passes over x instead of N² distances. Plain PyTorch on every backend; any derivative order.

    Args:
        x: [N, *]; the dimensions after the first are one vector a sample. float64, float32, bfloat16 or float16.

    Returns:
        [N, 1], x's dtype; computed in float32 for 16 bits. One sample has distance 0.

    Raises:
        ValueError: x has no dimension.
        TypeError: a dtype that is not supported.

    Source: the L2 form of the features of Salimans et al. 2016, section 3.2, without the learned projection.
    """
    op = "minibatch_distance"
    _check_samples(op, "x", x, 0)
    rows = _rows(x)
    rows = rows - rows.mean(0)
    norms = rows.square().sum(1)
    n = len(rows)
    return ((n * norms + norms.sum()) / max(n - 1, 1)).unsqueeze(1).to(x.dtype)


def mmd2(real: Tensor, fake: Tensor, sigmas: Sequence[float] = SIGMAS, unbiased: bool = False) -> Tensor:
    """The squared maximum mean discrepancy between two samples, for a sum of Gaussian kernels.

    k(x, y) = sum over s of exp(-||x - y||² / (2 s²)); MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y). The biased estimate
    takes all pairs and is >= 0; the unbiased one leaves out x = x' and y = y' and may be negative.

    Made of blocks of 2^19 pairs on the CPU, 2^23 on CUDA: no N x N matrix in memory. Order 1; for derivatives beyond it (and
    under torch.func) the gradient is the plain formula, which has every order and the N x N matrices. Computed in float32 for
    16-bit samples, also under autocast. Sums of pairs are added up in float64. Distances come from products of the samples,
    centred on their common mean: in float32 a squared distance is right to about 1e-7 of the squared norms.

    Args:
        real: [N, *], N samples; the dimensions after the first are one vector. float64, float32, bfloat16 or float16.
        fake: [M, *], of the same dtype, device and size a sample.
        sigmas: the kernels' widths, 1 to 16 numbers in [1e-18, 1e18].
        unbiased: which estimate; needs two samples of each.

    Returns:
        Scalar, float64 for float64 samples, else float32.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that is not supported or differs.
        RuntimeError: a backend was forced that cannot run here.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012, eq. 3 and 5; Li et al., "MMD GAN", NeurIPS 2017 (the widths).
    """
    xx, yy, xy = _checked_means("mmd2", real, fake, sigmas, unbiased)
    return (xx + yy - 2 * xy).to(_accumulation(real.dtype))


def kernel_means(
    real: Tensor, fake: Tensor, sigmas: Sequence[float] = SIGMAS, unbiased: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What `mmd2` is made of: the means of k over pairs of real, of fake, and of one real and one fake sample.

    MMD² is the first plus the second minus twice the third. The first minus the third is the mean over real samples of the witness
    function mean k(x, .) - mean k(y, .), which is largest where the laws differ most; the third minus the second is its mean over
    fake ones. Arguments, errors and derivatives as `mmd2`.

    Returns:
        Three scalars: float64; of few samples on the CPU, and from the reference, in the dtype that `mmd2` has.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012, section 2.3 (the witness function).
    """
    return _checked_means("kernel_means", real, fake, sigmas, unbiased)


def pulling_away(features: Tensor) -> Tensor:
    """The pulling-away term: the mean squared cosine between different samples of a batch; it keeps them from being alike.

    PT = 1 / (N (N - 1)) sum over i, j != i of (s_iᵀ s_j / (||s_i|| ||s_j||))². A sample and itself, whose cosine is 1, is no pair.
    A vector of zeros has cosine 0 with all. Of more samples than features, with u_i = s_i / ||s_i||, the sum is
    ||Uᵀ U||² - sum ||u_i||⁴, so that nothing larger than the features is made. Plain PyTorch on every backend, any
    derivative order.
    Computed in float32 for 16 bits, also under autocast.

    Args:
        features: [N, *], N >= 2; the dimensions after the first are one vector. float64, float32, bfloat16 or float16.

    Returns:
        Scalar in [0, 1], float64 for float64 features, else float32.

    Raises:
        ValueError: fewer than two samples.
        TypeError: a dtype that is not supported.

    Source: Zhao, Mathieu, LeCun, "Energy-based generative adversarial networks", ICLR 2017, eq. 4.
    """
    op = "pulling_away"
    _check_samples(op, "features", features, 2)
    with _no_autocast(features):
        rows = F.normalize(_rows(features), dim=1)
        n, d = rows.shape
        if n <= max(d, 64):
            pairs = (rows @ rows.mT).triu(1).flatten()
            return pairs.dot(pairs) * (2 / (n * (n - 1)))
        product = rows.mT @ rows
        return (product.square().sum() - rows.square().sum(1).square().sum()) / (n * (n - 1))


def _checked_means(op: str, real: Tensor, fake: Tensor, sigmas: Sequence[float], unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    least = 2 if unbiased else 1
    _check_samples(op, "real", real, least)
    _check_samples(op, "fake", fake, least)
    checks.same_dtype(op, "fake", fake, real.dtype)
    checks.same_device(op, "fake", fake, real.device)
    if fake.shape[1:].numel() != real.shape[1:].numel():
        checks.fail(ValueError, op, "fake", f"have {real.shape[1:].numel()} numbers a sample", f"shape {list(fake.shape)}")
    checks.sequence(op, "sigmas", sigmas)
    if not 1 <= len(sigmas) <= MOST_SIGMAS:
        checks.fail(ValueError, op, "sigmas", f"be 1 to {MOST_SIGMAS} numbers", len(sigmas))
    for sigma in sigmas:
        checks.number(op, "sigmas", sigma, LEAST_SIGMA, 1 / LEAST_SIGMA)
    name = backend.forced()
    if name is None:
        small = real.device.type == "cpu" and len(real) + len(fake) < SMALL_MMD
        name = "reference" if small else _choose(real.device.type)
    else:
        backend.require(op, name, real.device.type)
    return _means(real, fake, sigmas, unbiased, name)


def _means(real: Tensor, fake: Tensor, sigmas: Sequence[float], unbiased: bool, name: str) -> tuple[Tensor, Tensor, Tensor]:
    gammas = [0.5 / float(s) ** 2 for s in sigmas]
    with _no_autocast(real):
        x, y = _rows(real), _rows(fake)
        n, m = len(x), len(y)
        with torch.no_grad():  # the result does not depend on the origin, nor does its gradient
            centre = (x.sum(0) + y.sum(0)) / (n + m)
        x, y = x - centre, y - centre
        if name == "reference":
            k = _similarities(torch.cat([x, y]), None, gammas)
            xx, yy, xy = k[:n, :n].sum(), k[n:, n:].sum(), k[:n, n:].sum()
        else:
            xx, yy, xy = _pair_sum(x, None, gammas, name), _pair_sum(y, None, gammas, name), _pair_sum(x, y, gammas, name)
        xy = xy / (n * m)
        if unbiased:
            return xx / (n * (n - 1)), yy / (m * (m - 1)), xy
        itself = len(gammas)  # of a sample and itself: every kernel is 1
        return (xx + n * itself) / n**2, (yy + m * itself) / m**2, xy


def _pair_sum(a: Tensor, b: Tensor | None, gammas: list[float], name: str) -> Tensor:
    """The sum of k over all pairs of a row of a with one of b (None: with another row of a, in either order); float64 scalar."""
    unknown = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    wants = [unknown or (torch.is_grad_enabled() and t is not None and t.requires_grad) for t in (a, b)]
    return apply(_PairSum, a, b, gammas, wants[0], wants[1] and b is not None, name)[0]


def _choose(device: str) -> str:
    """The automatic choice: a kernel wherever there is one (`mmd2` of few samples on the CPU: SMALL_MMD). Not measured on a GPU.

    Features, one thread, 64x50x5: forward 0.43 ms, eager 8.6; with backward 6.1, eager 19.7; double backward 12.7, eager 62.4.
    mmd2, one thread, 256 + 256 samples of 128, one gradient: 7.1 ms, eager 55. On two busy cores, 4096 + 4096 of 128 with both
    gradients: 1.8 s and 69 MB beyond the samples, eager (the three Gram matrices at once) 14.3 s and 1357 MB.
    """
    if torch.compiler.is_compiling():
        return "reference"
    return backend.preferred(device)


def _check_samples(op: str, argument: str, value: Any, least: int) -> None:
    checks.tensor(op, argument, value)
    checks.floating(op, argument, value)
    if value.dim() == 0 or len(value) < least:
        wanted = f"have at least {least} sample{'s' * (least != 1)}" if least else "have samples as its first dimension"
        checks.fail(ValueError, op, argument, wanted, f"shape {list(value.shape)}")


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def _upcast(t: Tensor) -> Tensor:
    return t.to(_accumulation(t.dtype))


def _rows(t: Tensor) -> Tensor:
    """[N, D] of the accumulation dtype."""
    t = _upcast(t)
    return t if t.dim() == 2 else t.reshape(len(t), t.shape[1:].numel())


def _diagonal(t: Tensor) -> Tensor:
    return torch.eye(len(t), dtype=torch.bool, device=t.device)


def _no_autocast(t: Tensor) -> AbstractContextManager:
    return torch.autocast(t.device.type, enabled=False) if _autocast(t) else nullcontext()


def _autocast(t: Tensor) -> bool:
    kind = t.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none


def _kernels(name: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module("gankern.triton.pairwise")


# --- the autograd Functions of the features -------------------------------------------------------------------------------------


class _Features(Function):
    @staticmethod
    def forward(m: Tensor, name: str) -> Tensor:
        return _kernels(name).pairwise_features(m.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        m, ctx.name = inputs
        ctx.save_for_backward(m)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (m,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return apply(_FeaturesGrad, g, m, ctx.name), None
        return _FeaturesGrad.forward(g, m, ctx.name), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, m: Tensor, name: str) -> Any:
        return _unfold(apply(_Features, _fold(m, in_dims[0], info.batch_size), name), info.batch_size), 1


class _FeaturesGrad(Function):
    """dm = -sum over j of (g_i + g_j) e_ij sign(m_i - m_j): linear in g."""

    @staticmethod
    def forward(g: Tensor, m: Tensor, name: str) -> Tensor:
        return _kernels(name).pairwise_features_grad(g.contiguous(), m.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, m, ctx.name = inputs
        ctx.save_for_backward(g, m)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, m = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *apply(_FeaturesGrad2, h, g, m, ctx.name), None
        return *_FeaturesGrad2.forward(h, g, m, ctx.name), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, m: Tensor, name: str) -> Any:
        size = info.batch_size
        return _unfold(apply(_FeaturesGrad, _fold(g, in_dims[0], size), _fold(m, in_dims[1], size), name), size), 1


class _FeaturesGrad2(Function):
    @staticmethod
    def forward(h: Tensor, g: Tensor, m: Tensor, name: str) -> Any:
        return tuple(_kernels(name).pairwise_features_grad2(h.contiguous(), g.contiguous(), m.contiguous()))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"minibatch_features: derivatives must be of order 1 or 2 on the backend {ctx.name}, got order 3 "
            "(gankern.use_backend('reference') has every order)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, h: Tensor, g: Tensor, m: Tensor, name: str) -> Any:
        size = info.batch_size
        folded = (_fold(t, d, size) for t, d in zip((h, g, m), in_dims, strict=False))
        return tuple(_unfold(t, size) for t in apply(_FeaturesGrad2, *folded, name)), (1, 1)


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """[N, V B, ...]: the B spaces do not see each other, so a batch of V calls is one call with V B of them."""
    t = t.unsqueeze(1).expand(len(t), size, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
    return t.flatten(1, 2)


def _unfold(t: Tensor, size: int) -> Tensor:
    return t.unflatten(1, (size, t.shape[1] // size))


# --- the autograd Function of the sums over a Gram matrix -----------------------------------------------------------------------


class _PairSum(Function):
    """The sum of k, and its gradients in a and b where they are wanted ([0] elsewhere)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, gammas: list[float], want_a: bool, want_b: bool, name: str) -> Any:
        upper, right = b is None, a if b is None else b
        sq_a = a.square().sum(1)
        sq_b = sq_a if upper else right.square().sum(1)
        da = torch.zeros_like(a) if want_a else a.new_empty(0)
        db = da if upper else torch.zeros_like(right) if want_b else a.new_empty(0)
        height = max(1, BLOCK_ELEMENTS.get(a.device.type, 1 << 23) // len(right))
        sums = []
        for top in range(0, len(a), height):
            mine, other = a[top : top + height], right[top:] if upper else right
            gram = mine @ other.mT
            squares = sq_a[top : top + height], sq_b[top:] if upper else sq_b
            total, weights = _kernels(name).pairwise_gram_(gram, *squares, gammas, upper)
            sums.append(total)
            if want_a:
                target = da[top : top + height].addmm_(gram, other)
                target.addcmul_(weights.unsqueeze(1), mine, value=-1)
            if want_b or (upper and want_a):
                target = (db[top:] if upper else db).addmm_(gram.mT, mine)
                target.addcmul_(gram.sum(0).unsqueeze(1), other, value=-1)
        value = torch.cat(sums).sum(dtype=torch.float64)
        if upper:
            value, da = value * 2, da.mul_(2)
            db = a.new_empty(0)
        return value, da, db

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, b, ctx.gammas, ctx.want_a, ctx.want_b, _ = inputs
        ctx.save_for_backward(a, b, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        if g is None:
            return (None,) * 6
        a, b, da, db = ctx.saved_tensors
        if torch.is_grad_enabled():
            with _no_autocast(a):
                da, db = _similarities_grad(a, b, ctx.gammas)
        g = g.to(a.dtype)
        return g * da if ctx.want_a else None, g * db if ctx.want_b else None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, a: Tensor, b: Tensor | None, gammas: list[float], want_a: bool, want_b: bool, name: str
    ) -> Any:
        def one(t: Tensor | None, dim: int | None, i: int) -> Tensor | None:
            return t if t is None or dim is None else t.select(dim, i)

        outputs = [
            apply(_PairSum, one(a, in_dims[0], i), one(b, in_dims[1], i), gammas, want_a, want_b, name)
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)


if not backend.CPU_PROBLEM:

    @torch.library.register_fake("gankern::pairwise_features")
    def _(m: Tensor) -> Tensor:
        return m.new_empty(m.shape[:2])

    @torch.library.register_fake("gankern::pairwise_features_grad")
    def _(g: Tensor, m: Tensor) -> Tensor:
        return torch.empty_like(m)

    @torch.library.register_fake("gankern::pairwise_features_grad2")
    def _(h: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(g), torch.empty_like(m)

    @torch.library.register_fake("gankern::pairwise_gram_")
    def _(gram: Tensor, sq_a: Tensor, sq_b: Tensor, gammas: list[float], upper: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(sq_a), torch.empty_like(sq_a)
