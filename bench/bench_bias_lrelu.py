"""Convolution, bias and LeakyReLU against eager PyTorch and torch.compile: forward, forward + backward, and double backward.

"layer": ConvLeakyReLU2d or ConvTransposeLeakyReLU2d (kernel 4, stride 2, padding 1) against nn.Conv2d or nn.ConvTranspose2d and
nn.LeakyReLU, as a critic's and a generator's layers. "op": `gankern.bias_lrelu` against F.leaky_relu(x + bias).
"forward" runs under no_grad. "backward" is forward and the gradients of x, weight and bias. "double" is what a gradient penalty
costs one layer: forward, dx with create_graph=True, and the weight gradient of sum(dx²). torch.compile has no row in "double": what
AOTAutograd compiles cannot be differentiated twice. It takes ten seconds a group: on the CPU it has rows of two layers only;
--all-rivals: everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from bench.support import COMPILE, EAGER, Function, Group, OpGroup, Outputs, Settings, Work, compiled, gankern_rivals
from gankern.nn import ConvLeakyReLU2d, ConvTransposeLeakyReLU2d


class Shape(NamedTuple):
    """Input channels and side, output channels; "up": a transposed convolution."""

    channels: int
    side: int
    out: int
    up: bool = False

    def __str__(self) -> str:
        return f"{self.channels}x{self.side}{'up' if self.up else 'to'}{self.out}"


BATCHES = (16, 64)
LAYERS = (
    Shape(8, 8, 16),
    Shape(1, 28, 64),
    Shape(3, 32, 64),
    Shape(64, 14, 128),
    Shape(128, 8, 256),
    Shape(128, 7, 64, up=True),
    Shape(32, 8, 16, up=True),
)
LAST = (LAYERS[3], LAYERS[5])  # also channels-last
COMPILED = {(16, LAYERS[0]), (16, LAYERS[3])}
MAPS = ((64, 16), (128, 8), (512, 4))  # channels and side of what the op alone is given
PASSES = ("forward", "backward", "double")
SLOPE = 0.2


def groups(settings: Settings) -> list[Group]:
    dtypes = ("fp32", "bf16") if settings.device.type == "cuda" else ("fp32",)
    made: list[Group] = []
    for dtype in dtypes:
        for batch in BATCHES:
            for last in (False, True):
                made += [
                    Layer(settings, which, shape, batch, last, dtype) for shape in (LAST if last else LAYERS) for which in PASSES
                ]
                made += [Op(settings, which, *sizes, batch, last, dtype) for sizes in MAPS for which in PASSES[:2]]
    return made


def bench_bias_lrelu(row: Callable[[], None]) -> None:
    row()


class Epilogue(OpGroup):
    """A function of (x, weight, bias) or (x, bias), and its cotangent."""

    compile = False

    def __init__(self, settings: Settings, kind: str, which: str, size: str, last: bool, dtype: str, work: Work) -> None:
        rivals = [EAGER, *gankern_rivals(settings.device)]
        if which != "double" and (settings.all_rivals or self.compile):
            rivals.insert(1, COMPILE)
        super().__init__(f"{kind} {which} {dtype} {size}{' nhwc' * last}", rivals, work, dtype, settings.device)
        self.which, self.last, self.grad = which, last, which != "forward"

    def layer(self, rival: str) -> Callable[..., Tensor]:
        raise NotImplementedError

    def function(self, rival: str) -> Function:
        layer = self.layer(rival)
        return PASS[self.which](compiled(layer) if rival == COMPILE else layer)

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return self.function(EAGER)(*inputs64)

    def placed(self, *tensors: Tensor) -> list[Tensor]:
        """On the device, in the dtype and memory format; all but the last, the cotangent, want gradients."""
        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        moved = [t.to(self.device, dtype) for t in tensors]
        if self.last:
            moved = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in moved]
        for t in moved[:-1]:
            t.requires_grad_(self.grad)
        return moved


class Layer(Epilogue):
    def __init__(self, settings: Settings, which: str, shape: Shape, batch: int, last: bool, dtype: str) -> None:
        self.shape, self.batch, self.compile = shape, batch, not last and (batch, shape) in COMPILED
        self.side = 2 * shape.side if shape.up else shape.side // 2
        x, y, w = (
            batch * shape.channels * shape.side**2,
            batch * shape.out * self.side**2,
            16 * shape.channels * shape.out + shape.out,
        )
        # forward: x, W, b in, y out. backward: also dy in, dx, dW, db out. double: x, W, b, dy in, dx and dW out.
        elements = {"forward": x + y + w, "backward": 2 * (x + y + w), "double": 2 * (x + w) + y}[which]
        products = {"forward": 1, "backward": 3, "double": 3}[which]
        flops = 2 * products * (x * 16 * shape.out if shape.up else y * 16 * shape.channels)
        work = Work((2 if dtype == "bf16" else 4) * elements, flops)
        super().__init__(settings, "layer", which, f"{batch}x{shape}", last, dtype, work)

    def inputs(self, exact: bool) -> list[Tensor]:
        """Exact ones are small multiples of powers of two: sums are exact and, their last bit being that of the bias, never 0."""
        s = self.shape
        x, dy = torch.randn(self.batch, s.channels, s.side, s.side), torch.randn(self.batch, s.out, self.side, self.side)
        bound = (16 * s.channels) ** -0.5
        weight = torch.empty(*((s.channels, s.out) if s.up else (s.out, s.channels)), 4, 4).uniform_(-bound, bound)
        bias = torch.empty(s.out).uniform_(-bound, bound)
        if exact:
            x, weight = (x.clamp(-4, 4) * 8).round() / 8, (weight * 2**10).round() / 2**10
            bias = (2 * torch.randint(-127, 127, (s.out,)) + 1) / 2**14
        return self.placed(x, weight, bias, dy)

    def layer(self, rival: str) -> Callable[..., Tensor]:
        s, ours = self.shape, rival.startswith("gankern")
        make: Any = (ConvTransposeLeakyReLU2d if s.up else ConvLeakyReLU2d) if ours else (nn.ConvTranspose2d if s.up else nn.Conv2d)
        convolution = make(s.channels, s.out, 4, 2, 1, device="meta", **({"negative_slope": SLOPE} if ours else {}))
        network = convolution if ours else nn.Sequential(convolution, nn.LeakyReLU(SLOPE))
        parameters = convolution._parameters

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            parameters["weight"], parameters["bias"] = weight, bias
            return network(x)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            convolve = F.conv_transpose2d if s.up else F.conv2d
            return F.leaky_relu(convolve(x, weight, bias, 2, 1), SLOPE)

        return plain if rival == COMPILE else run


class Op(Epilogue):
    def __init__(self, settings: Settings, which: str, channels: int, side: int, batch: int, last: bool, dtype: str) -> None:
        self.sizes = batch, channels, side, side
        elements = batch * channels * side**2
        work = Work((2 if dtype == "bf16" else 4) * elements * {"forward": 2, "backward": 4}[which])
        super().__init__(settings, "op", which, "x".join(map(str, self.sizes)), last, dtype, work)

    def inputs(self, exact: bool) -> list[Tensor]:
        x, bias, dy = torch.randn(self.sizes), torch.randn(self.sizes[1]), torch.randn(self.sizes)
        if exact:
            x, bias = (x.clamp(-4, 4) * 8).round() / 8, torch.randint(-8, 8, bias.shape) / 8 + 1 / 16
        return self.placed(x, bias, dy)

    def layer(self, rival: str) -> Callable[..., Tensor]:
        if rival.startswith("gankern"):
            return lambda x, bias: gankern.bias_lrelu(x, bias, SLOPE)
        return lambda x, bias: F.leaky_relu(x + bias.view(1, -1, 1, 1), SLOPE)


def forward(layer: Callable[..., Tensor]) -> Function:
    return lambda *inputs: {"y": layer(*inputs[:-1])}


def backward(layer: Callable[..., Tensor]) -> Function:
    def run(*inputs: Tensor) -> Outputs:
        *leaves, dy = inputs
        y = layer(*leaves)
        return {"y": y} | {f"d{i}": g for i, g in enumerate(torch.autograd.grad(y, leaves, dy))}

    return run


def double(layer: Callable[..., Tensor]) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Outputs:
        y = layer(x, weight, bias)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (dweight,) = torch.autograd.grad(dx.square().sum(), weight)
        return {"y": y, "dx": dx, "dweight": dweight}

    return run


PASS: dict[str, Callable[[Callable[..., Tensor]], Function]] = {"forward": forward, "backward": backward, "double": double}
