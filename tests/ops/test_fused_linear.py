"""linear_lrelu with the product in Triton: kernels on many blocks, every derivative order, and which products are computed."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import backend
from gankern.ops import _fused_linear
from gankern.ops import linear_lrelu as op
from tests import support
from tests.support import DEVICE, assert_accurate, assert_matches, randn

pytest.importorskip("triton")
SLOPE = 0.2
# float64 is for the interpreter only; on a GPU the tests compare float32 with the definition in float32
DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32


@pytest.fixture(autouse=True)
def _triton_runs() -> None:
    support.need("triton")


@pytest.fixture
def kernels() -> Any:
    from gankern.triton import linear_lrelu

    return linear_lrelu


@pytest.fixture
def small_blocks(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 x 16, so that small sizes take several programs and steps, as large sizes do on a GPU."""
    monkeypatch.setattr(kernels, "blocks", lambda *_: kernels.Blocks(16, 16, 16, 4, 1))


@pytest.fixture
def calls(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the products by name: launches of ours that multiply, and "native" ones."""
    count: Counter[str] = Counter()

    def counted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            count[name] += args[1].shape[-1] > 0  # against no columns: nothing is multiplied
            return launch(*args)

        return run

    for name in ("forward", "masked", "data_grad", "weight_grad"):
        full = f"linear_lrelu_{name}"
        monkeypatch.setattr(kernels, full, counted(name, getattr(kernels, full)))
    with support.CountProducts() as native:
        yield count
    count["native"] = native.count


def seed(p: float) -> Tensor | None:
    return torch.tensor([2**62 + 4711], device=DEVICE) if p else None


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, slope: float = SLOPE, p: float = 0.0) -> Tensor:
    assert _fused_linear.usable(x, weight)
    return _fused_linear.apply(x, weight, bias, slope, p, seed(p))


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, slope: float = SLOPE, p: float = 0.0) -> Tensor:
    return op.reference(x, weight, bias, slope, p, seed(p))


def inputs(m: int, n: int, k: int, bias: bool = True, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    tensors = [
        randn(m, k, seed=1, dtype=dtype),
        randn(n, k, seed=2, dtype=dtype, scale=max(k, 1) ** -0.5),
        randn(n, seed=3, dtype=dtype),
    ]
    return tensors[: 2 + bias]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 2.0])
def test_three_orders(slope, bias, p):
    args = inputs(6, 9, 5, bias)
    assert_matches(lambda *a: fused(*a, slope=slope, p=p), lambda *a: reference(*a, slope=slope, p=p), args, order=3)


def test_without_bias_argument():
    assert_matches(
        lambda x, w: fused(x, w, None, p=0.3), lambda x, w: reference(x, w, None, p=0.3), inputs(6, 9, 5, False), order=3
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_many_blocks(p, small_blocks, poisoned):
    assert_matches(lambda *a: fused(*a, p=p), lambda *a: reference(*a, p=p), inputs(37, 41, 50), order=2)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 5)])
def test_leading_dimensions(shape):
    x, w, b = randn(*shape, seed=1, dtype=DTYPE), *inputs(1, 9, 5)[1:]
    assert fused(x, w, b).shape == (*shape[:-1], 9)
    assert_matches(lambda *a: fused(*a, p=0.3), lambda *a: reference(*a, p=0.3), [x, w, b])


def test_no_input_features():
    assert_matches(fused, reference, inputs(4, 9, 0))


def test_any_strides():
    x, w, b = inputs(12, 10, 7)
    args = [x.T.contiguous(), w, b]
    assert_matches(lambda x, w, b: fused(x.T, w, b), lambda x, w, b: reference(x.T, w, b), args)
    assert_matches(
        lambda x, w, b: fused(x.T[::2, 1:6], w[1:, 1:6], b[1:]), lambda x, w, b: reference(x.T[::2, 1:6], w[1:, 1:6], b[1:]), args
    )
    assert_matches(lambda *a: fused(*a).sum(), lambda *a: reference(*a).sum(), [x, w, b])  # a cotangent of stride 0


def test_float32():
    assert_matches(lambda *a: fused(*a, p=0.3), lambda *a: reference(*a, p=0.3), inputs(33, 20, 24, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    cases = [
        [randn(*s, seed=10 * i + j, dtype=dtype, scale=0.3) for j, s in enumerate([(33, 24), (20, 24), (20,)])] for i in range(4)
    ]
    assert_accurate(fused, reference, cases)


def test_bits_are_those_of_the_definition(kernels, small_blocks):
    x, w, b = inputs(37, 41, 3)
    _, bits = kernels.linear_lrelu_forward(x, w, b, SLOPE, 0.3, seed(0.3), "ieee")
    kept = (bits[:, :, None] >> torch.arange(8, device=DEVICE)) & 1
    assert torch.equal(kept.reshape(37, 48)[:, :41].bool(), op.dropout_keep(seed(0.3), 37, 41, 0.3))
    assert torch.equal(bits, kernels.linear_lrelu_act(x @ w.T, b, SLOPE, 0.3, seed(0.3))[1])


def test_autocast_computes_as_linear_does():
    x, w, b = (t.requires_grad_() for t in inputs(6, 9, 5, dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = fused(x, w, b)
        assert y.dtype == F.linear(x, w, b).dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, w, b))


# --- which products are computed ------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Three layers, the last a native linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([randn(n, k, seed=n, dtype=DTYPE, scale=k**-0.5) for n, k in ((9, 5), (8, 9), (1, 8))])
        self.biases = nn.ParameterList([randn(n, seed=50 + n, dtype=DTYPE) for n in (9, 8, 1)])

    def forward(self, x: Tensor, layer: Callable[..., Tensor] = fused) -> Tensor:
        for w, b in list(zip(self.weights, self.biases, strict=True))[:-1]:
            x = layer(x, w, b)
        return F.linear(x, self.weights[-1], self.biases[-1])


def penalty(critic: Critic, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
    (g,) = torch.autograd.grad(critic(x, layer).sum(), x, create_graph=True)
    return ((g.norm(dim=1) - 1) ** 2).mean()


def test_gradient_penalty_is_right_and_takes_11_products(calls):
    critic, x = Critic(), randn(6, 5, seed=1, dtype=DTYPE).requires_grad_()
    with support.CountProducts() as native:
        loss = penalty(critic, x, fused)
        loss.backward(inputs=list(critic.weights))
    assert calls == {"forward": 2, "data_grad": 2, "masked": 2, "weight_grad": 2}
    assert sum(calls.values()) + native.count == 11  # 4 L - 1
    got = [loss, *(w.grad for w in critic.weights)]
    expected = penalty(critic, x, reference)
    want = [expected, *torch.autograd.grad(expected, list(critic.weights))]
    support.assert_equal_derivatives(dict(enumerate(got)), dict(enumerate(want)))


def test_data_gradient_runs_no_weight_gradient(calls):
    critic, x = Critic(), randn(6, 5, seed=1, dtype=DTYPE).requires_grad_()
    torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    assert calls == {"forward": 2, "data_grad": 2}


def test_backward_of_a_critic(calls):
    critic, x = Critic(), randn(6, 5, seed=1, dtype=DTYPE)
    critic(x).sum().backward()
    assert calls == {"forward": 2, "data_grad": 1, "weight_grad": 2}  # nothing for the data


def test_frozen_weights_cost_nothing(calls):
    critic, x = Critic().requires_grad_(False), randn(6, 5, seed=1, dtype=DTYPE).requires_grad_()
    critic(x).sum().backward()
    assert calls == {"forward": 2, "data_grad": 2}


def test_frozen_weight_with_a_trained_bias(calls):
    x, w, b = inputs(6, 9, 5)
    b.requires_grad_()
    fused(x, w, b).sum().backward()
    assert calls["forward"] == 1
    assert calls.total() == 1
    want = torch.autograd.grad(reference(x, w, b).sum(), b)[0]
    torch.testing.assert_close(b.grad, want)


def test_no_graph_without_gradients(calls):
    x, w, b = inputs(6, 9, 5)
    assert fused(x, w, b).grad_fn is None
    w.requires_grad_()
    with torch.no_grad():
        assert fused(x, w, b).grad_fn is None


def test_unwanted_second_derivatives_run_no_product(calls):
    """The penalty of a frozen critic, in x alone: no weight gradient of any order."""
    critic, x = Critic().requires_grad_(False), randn(6, 5, seed=1, dtype=DTYPE).requires_grad_()
    (g,) = torch.autograd.grad((critic(x) ** 2).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert calls["weight_grad"] == 0


# --- what autograd must notice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, "y"])
def test_a_changed_operand_is_refused(which):
    args = [t.requires_grad_() for t in inputs(6, 9, 5)]
    y = fused(*args)
    with torch.no_grad():
        (y if which == "y" else args[which]).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_keeps_the_graph_alive():
    x, w, b = (t.requires_grad_() for t in inputs(6, 5, 5))
    hidden = fused(x, w, b)
    y = fused(hidden, w, b)
    watched = [weakref.ref(y.grad_fn), weakref.ref(hidden.grad_fn)]
    gc.disable()
    try:
        del y, hidden
        assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


def test_usable_only_in_plain_autograd():
    x, w, _ = inputs(6, 9, 5, dtype=torch.float32)
    seen = []
    torch.func.grad(lambda x: (seen.append(_fused_linear.usable(x, w)), x.sum())[1])(x)
    torch.func.jvp(lambda x: (seen.append(_fused_linear.usable(x, w)), x)[1], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        seen.append(_fused_linear.usable(x, w))
    assert seen == [False, False, False]
    assert _fused_linear.usable(x, w)
    assert not _fused_linear.usable(x, w.bfloat16())
    assert not _fused_linear.usable(x.to("meta"), w.to("meta"))
    assert not _fused_linear.usable(x.int(), w.int())
    assert _fused_linear.usable(x.double(), w.double()) == (DEVICE == "cpu")


@pytest.mark.parametrize(("limit", "launched"), [(6, 1), (5, 0)])
def test_the_op_makes_its_own_product_up_to_fused_rows(
    limit: int, launched: int, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "FUSED_ROWS", limit)
    x, weight, bias = randn(6, 5, seed=1), randn(4, 5, seed=2), randn(4, seed=3)
    with backend.use_backend("triton"):
        y = op.linear_lrelu(x, weight, bias, SLOPE)
    torch.testing.assert_close(y, op.reference(x, weight, bias, SLOPE))
    assert calls["forward"] == launched
