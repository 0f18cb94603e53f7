"""linear_lrelu against eager PyTorch and torch.compile: forward, forward + backward, and double backward.

"forward" runs under no_grad. "backward" is forward and the gradients of x, weight and bias. "double" is what a gradient penalty
costs one layer: forward, dx with create_graph=True, and the weight gradient of sum(dx²). torch.compile has no row in "double": what
AOTAutograd compiles cannot be differentiated twice.

On CUDA "gankern-product" is the triton backend with bias, LeakyReLU and dropout inside its own matrix product: where it wins is
what FUSED_ROWS in gankern/ops/linear_lrelu.py should say.

On the CPU torch.compile takes about ten seconds a group, so it has rows at the corners of the table only; --all-rivals: everywhere.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern import linear_lrelu

op = importlib.import_module("gankern.ops.linear_lrelu")
BATCHES = (16, 64, 256, 1024)
WIDTHS = (128, 256, 512, 1024)
TENSOR_CORE_WIDTHS = (256, 1024)  # tf32 and bf16, on CUDA
CORNERS = {(16, 128), (16, 1024), (1024, 128), (1024, 1024)}
PASSES = ("forward", "backward", "double")
DROPOUT = 0.3
DROPOUT_SIZES = ((16, 256), (64, 512), (1024, 1024))
SLOPE = 0.2
PRODUCT = "gankern-product"


def groups(settings: Settings) -> list[Group]:
    cases = [(0.0, b, w, "fp32") for b in BATCHES for w in WIDTHS] + [(DROPOUT, b, w, "fp32") for b, w in DROPOUT_SIZES]
    if settings.device.type == "cuda":
        cases += [(0.0, b, w, dtype) for b in BATCHES for w in TENSOR_CORE_WIDTHS for dtype in ("tf32", "bf16")]
    return [Layer(settings, which, *case) for case in cases for which in PASSES]


def bench_linear_lrelu(row: Callable[[], None]) -> None:
    row()


class Layer(OpGroup):
    def __init__(self, settings: Settings, which: str, p: float, batch: int, width: int, dtype: str) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device), *([PRODUCT] if settings.device.type == "cuda" else [])]
        corner = p == 0.0 and dtype == "fp32" and (batch, width) in CORNERS
        if which != "double" and (settings.all_rivals or corner):
            rivals.insert(1, COMPILE)
        matrix, activation = width * width + width, batch * width
        # forward: x, W, b in, y out. backward: also dy in, dx, dW, db out. double: x, W, b, dy in, dx and dW out.
        matrices, activations = {"forward": (1, 2), "backward": (2, 4), "double": (2, 3)}[which]
        products = {"forward": 1, "backward": 3, "double": 3}[which]
        elements = matrices * matrix + activations * activation
        work = Work((2 if dtype == "bf16" else 4) * elements, 2 * products * batch * width * width)
        name = f"{which}{' dropout' * (p > 0)} {dtype} {batch}x{width}"
        super().__init__(name, rivals, work, dtype, settings.device)
        self.which, self.p, self.batch, self.width = which, p, batch, width
        self.grad = which != "forward"

    def inputs(self, exact: bool) -> list[Tensor]:
        """x, weight, bias and the cotangent of y.

        Exact ones are small multiples of powers of two: each product sum is then exact in float32, tf32 and bfloat16 products
        with float32 sums, and, its last bit being that of the bias, never 0. So every rival must find the same signs.
        """
        b, w = self.batch, self.width
        x, dy = torch.randn(b, w), torch.randn(b, w)
        weight, bias = (torch.empty(*shape).uniform_(-(w**-0.5), w**-0.5) for shape in ((w, w), (w,)))
        if exact:
            x = (x.clamp(-4, 4) * 8).round() / 8
            weight = (weight * 2**10).round() / 2**10
            bias = (2 * torch.randint(-127, 127, (w,)) + 1) / 2**14
        tensors = [t.to(self.device, torch.bfloat16 if self.dtype == "bf16" else torch.float32) for t in (x, weight, bias, dy)]
        for t in tensors[:3]:
            t.requires_grad_(self.grad)
        return tensors

    def function(self, rival: str) -> Function:
        p = self.p
        if rival.startswith("gankern"):

            def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return linear_lrelu(x, weight, bias, SLOPE, p)

        elif p:

            def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return F.dropout(F.leaky_relu(F.linear(x, weight, bias), SLOPE), p)

        else:

            def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return F.leaky_relu(F.linear(x, weight, bias), SLOPE)

        return PASS[self.which](compiled(layer) if rival == COMPILE else layer)

    def context(self, rival: str) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(super().context("gankern-triton" if rival == PRODUCT else rival))
        stack.enter_context(patch.object(op, "FUSED_ROWS", sys.maxsize if rival == PRODUCT else op.FUSED_ROWS))
        return stack

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        if not self.p:
            return self.function(EAGER)(*inputs64)
        # The mask is random: it is read off the rival's output, and all else must follow from it.
        y = got["y"]
        assert isinstance(y, Tensor)
        mask = (y != 0).double()
        n, kept = mask.numel(), mask.mean().item()
        assert abs(kept - (1 - self.p)) < 6 * (self.p * (1 - self.p) / n) ** 0.5, f"kept {kept:.4f} of {n}, dropout {self.p}"

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.leaky_relu(F.linear(x, weight, bias), SLOPE) * mask / (1 - self.p)

        return PASS[self.which](layer)(*inputs64)


Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(layer: Op) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Outputs:
        return {"y": layer(x, weight, bias)}

    return run


def backward(layer: Op) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Outputs:
        y = layer(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}

    return run


def double(layer: Op) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Outputs:
        y = layer(x, weight, bias)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (dweight,) = torch.autograd.grad(dx.square().sum(), weight)
        return {"y": y, "dx": dx, "dweight": dweight}

    return run


PASS = {"forward": forward, "backward": backward, "double": double}
