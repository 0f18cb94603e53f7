"""Compiles every Triton kernel of gankern ahead of time, without a GPU, and prints what each needs; run by test_triton_aot.py.

The real launchers are called, on CPU tensors, with a driver that names an architecture instead of a device: Triton then
specialises and compiles as it would before a launch, and nothing is launched. So what is compiled is what a GPU would run.
sm_90 gets every case, other architectures one case of each kernel and of each kind of product, which fills their shared memory.
Prints a JSON list of all kernels, then an object for each compiled one: kernel, case, sm, reg, stack, local, shared (bytes), narrow
(lines of its IR that `narrow` finds).
Not to be run under TRITON_INTERPRET=1, which replaces the compiler.
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import gankern.triton
from gankern.triton import bias_lrelu as channels
from gankern.triton import bn_lrelu as norms
from gankern.triton import gan_loss as losses
from gankern.triton import gradient_norm_penalty as penalties
from gankern.triton import interpolate as mixtures
from gankern.triton import linear_lrelu as linear
from gankern.triton import mlp_critic as critics
from gankern.triton import pairwise as pairs
from gankern.triton import spectral_norm as spectral

Case = tuple[str, Callable[[], object]]


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the package: gankern.triton.<file>.<name>_kernel."""
    found = {}
    for info in pkgutil.iter_modules(gankern.triton.__path__):
        module = importlib.import_module(f"gankern.triton.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[f"{info.name}.{name}"] = value
    return found


class Architecture:
    """Stands where Triton's CUDA driver would: one "device" for each architecture."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def shapes_of(shapes: list[Any], *dtypes: torch.dtype, few: int = 1) -> Iterator[tuple[torch.dtype, Any]]:
    """Every shape in float32, the first `few` in each of the other dtypes: one changes the blocks, the other what is in them."""
    yield from itertools.product((torch.float32,), shapes)
    yield from itertools.product(dtypes, shapes[:few])


def gan_loss_cases() -> Iterator[Case]:
    sizes = (losses.ONE_PROGRAM, 4 * losses.ONE_PROGRAM, 256, 64)
    for dtype, n in zip((torch.float32, torch.bfloat16, torch.float32, torch.float64), sizes, strict=True):
        name, compute, half = f"{dtype} {n}", torch.float64 if dtype == torch.float64 else torch.float32, n // 2
        a, c, one = torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=compute), torch.ones((), dtype=compute)
        numbers = (0, 1.0, 0.9, None, 0, 1.0, 0.0, None, 1)
        tensors = (0, 1.0, 0.0, c[:half], 0, 1.0, 0.0, c[:half], 0)
        yield name, partial(losses.gan_loss, a, None, half, *numbers, 0)
        for relative in (1, 2):
            yield f"{name} relative {relative}", partial(losses.gan_loss, a, None, half, *numbers, relative)
        yield f"{name} grad2", partial(losses.gan_loss_grad2, a, None, half, *numbers, one, a, None)
        if dtype == torch.float32:
            halves = a[:half], a[half:]
            yield f"{name} two halves", partial(losses.gan_loss, *halves, half, *tensors, 0)
            yield f"{name} two halves grad2", partial(losses.gan_loss_grad2, *halves, half, *tensors, c, *halves)
    for code in range(1, 10):  # every other term, mixing what real and fake samples pay
        part = (code, 1.0, 0.9, None)
        a, one = torch.zeros(256), torch.ones(())
        yield f"term {code}", partial(losses.gan_loss, a, None, 128, *part, *part, 1, 0)
        yield f"term {code} grad2", partial(losses.gan_loss_grad2, a, None, 128, *part, *part, 1, one, a, None)


def act_cases() -> Iterator[Case]:
    sizes = [(64, 256), (2048, 784), (64, 300)]  # one launch, chunks of rows, a width that is not aligned
    for dtype, (rows, columns) in shapes_of(sizes, torch.bfloat16):
        z, bias, seed = (
            torch.zeros(rows, columns, dtype=dtype),
            torch.zeros(columns, dtype=dtype),
            torch.zeros(1, dtype=torch.int64),
        )
        bits, name = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8), f"{dtype} {rows}x{columns}"
        yield f"{name} dropout", partial(linear.linear_lrelu_act, z, bias, 0.2, 0.3, seed)
        yield f"{name} dropout", partial(linear.linear_lrelu_act_grad, z, z, bits, 0.2, 0.3, True)
        yield name, partial(linear.linear_lrelu_act, z, None, 0.2, 0.0, None)
        yield name, partial(linear.linear_lrelu_act_grad, z, z, bits, 0.2, 0.0, False)


def bias_lrelu_cases() -> Iterator[Case]:
    # large planes, channels innermost; small planes, planes that are not aligned, channels innermost in one launch
    shapes = [(64, 64, 16, 16), (4096, 64), (64, 512, 4, 4), (64, 64, 7, 7), (64, 256)]
    for dtype, shape in shapes_of(shapes, torch.bfloat16, torch.float64, few=2):
        x, bias, name = torch.zeros(shape, dtype=dtype), torch.zeros(shape[1], dtype=dtype), f"{dtype} {'x'.join(map(str, shape))}"
        yield name, partial(channels.bias_lrelu, x, bias, 0.2)
        yield name, partial(channels.bias_lrelu_grad, x, x, 0.2, True)
        if shape == shapes[0]:
            yield f"{name} no bias", partial(channels.bias_lrelu, x, None, 0.2)
            yield f"{name} no bias", partial(channels.bias_lrelu_grad, x, x, 0.2, False)


def mlp_critic_cases() -> Iterator[Case]:
    sizes = [(192, 256), (2048, 784), (64, 300)]  # one launch, chunks of rows, a width that is not aligned
    for dtype, (rows, columns) in shapes_of(sizes, torch.bfloat16):
        y, t = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows // 2, columns, dtype=dtype)
        bits, factor = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8), torch.zeros(rows // 2)
        for p, f in (0.3, factor), (0.0, None):
            name = f"{dtype} {rows}x{columns}{' dropout' * (p > 0)}"
            yield name, partial(critics.mlp_critic_adjoint, y, y, bits, 0.2, p, rows // 2, f)
            yield name, partial(critics.mlp_critic_tangent, t, y, bits, 0.2, p, rows // 2, f)
            yield name, partial(critics.mlp_critic_seed, t, y, rows // 2, f, 10.0, 1.0, p > 0)


def product_cases(sm: int) -> Iterator[Case]:
    """Each row of the table of block sizes on sm_90, the first of each kind (the largest) on the others."""
    choose = linear.blocks
    m, n, k = 256, 512, 784
    for kind, table in linear.BLOCKS.items():
        dtype, precision = (torch.bfloat16, "ieee") if kind == "16-bit" else (torch.float32, kind)
        x, w, b, y = (torch.zeros(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
        bits, seed = torch.zeros(m, n // 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        for row in table if sm == 90 else table[:1]:
            linear.blocks = lambda *_, row=row: row
            for p in (0.3, 0.0) if sm == 90 and row == linear.BLOCKS["16-bit"][0] else (0.3,):
                name, bias = f"{kind} {row.rows}x{row.columns}x{row.depth}{' dropout' * (p > 0)}", b if p else None
                yield name, partial(linear.linear_lrelu_forward, x, w, bias, 0.2, p, seed, precision)
                yield name, partial(linear.linear_lrelu_data_grad, y, w, y, bits, 0.2, p, precision)
                yield name, partial(linear.linear_lrelu_weight_grad, y, x, y, bits, 0.2, p, p > 0, precision)
                if row == table[0]:
                    yield f"{name} masked", partial(linear.linear_lrelu_masked, x, w, bias, y, bits, 0.2, p, precision)
    linear.blocks = choose


def penalty_cases() -> Iterator[Case]:
    sizes = [(64, 784), (256, 2), (16, 3 * 64 * 64), (2, 512 * 1024)]  # a flat image, points, a colour image, many shares
    for dtype, (rows, columns) in shapes_of(sizes, torch.bfloat16, few=2):
        x, name = torch.zeros(rows, columns, dtype=dtype), f"{dtype} {rows}x{columns}"
        one, each, seed = torch.zeros(()), torch.zeros(rows), torch.zeros(1, dtype=torch.int64)
        yield name, partial(mixtures.interpolate, x, x, None, seed)
        yield f"{name} eps", partial(mixtures.interpolate, x, x, each, None)
        yield name, partial(penalties.gradient_norm_penalty, x, 1.0, False, 10.0)
        for target, one_sided in ((1.0, False), (1.0, True), (0.0, False)):
            yield f"{name} {target:g}", partial(penalties.gradient_norm_penalty_grad, one, x, each, target, one_sided, 10.0)


def pairwise_cases() -> Iterator[Case]:
    for dtype, shape in shapes_of([(64, 50, 5), (64, 8, 3), (64, 10, 40)], torch.bfloat16, torch.float64):
        m, g, name = torch.zeros(shape, dtype=dtype), torch.zeros(shape[:2], dtype=dtype), f"{dtype} {shape}"
        yield name, partial(pairs.pairwise_features, m)
        yield name, partial(pairs.pairwise_features_grad, g, m)
        yield f"{name} second", partial(pairs.pairwise_features_grad2, m, g, m)
    for dtype, columns in shapes_of([4096, 64], torch.float64, few=2):
        gram, sq = torch.zeros(128, columns, dtype=dtype), torch.zeros(columns, dtype=dtype)
        for gammas in ([0.5, 0.125, 0.03125, 0.0078125, 0.001953125], [0.5]):
            name = f"{dtype} {columns} columns, {len(gammas)} widths"
            yield name, partial(pairs.pairwise_gram_, gram, sq.new_zeros(128), sq, gammas, len(gammas) == 1)


def spectral_norm_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weights, u, v = (
            [torch.zeros(*s, dtype=dtype) for s in ss] for ss in (((256, 784), (64, 32, 4, 4)), ((256,), (32,)), ((784,), (1024,)))
        )
        dims, offsets = [0, 1], [0, 1041]
        state = torch.zeros(offsets[1] + 32 + 1024 + 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for iterations in (0, 2):
            yield f"{dtype} {iterations}", partial(spectral.spectral_norm, weights, u, v, dims, iterations, 1e-12)
        yield f"{dtype}", partial(spectral.spectral_norm_grad, weights, weights, state, offsets, dims)


def bn_lrelu_cases() -> Iterator[Case]:
    # channels cut into shares, with and without space; channels whole, with and without; places that are not aligned
    shapes = [(64, 64, 32, 32), (65536, 64), (64, 128, 7, 7), (128, 256), (16, 3, 16, 16)]
    for dtype, shape in shapes_of(shapes, torch.bfloat16, torch.float64, few=2):
        x, name = torch.zeros(1, dtype=dtype).expand(shape), f"{dtype} {'x'.join(map(str, shape))}"
        c = torch.zeros(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for w in (c, None) if dtype == torch.float32 else (c,):
            yield name, partial(norms.bn_lrelu, x, w, w, w, w, 0.1, 1e-5, 0.2)
            yield name, partial(norms.bn_lrelu_eval, x, c, c, w, w, 1e-5, 0.2)
            yield name, partial(norms.bn_lrelu_grad, x, x, c, c, w, w, 1e-5, 0.2, w is not None)
            yield f"{name} second", partial(norms.bn_lrelu_grad2, x, w, w, x, x, c, c, w, w, 1e-5, 0.2, w is not None)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, from the compiled code itself. A spilled register lives on the stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def narrow(ttir: str) -> list[str]:
    """Lines of a kernel's IR at which an i32 product of two numbers that are no constants (a row times a width) moves a pointer, or
    becomes 64 bits wide: too late, beyond 2^31 elements. A column alone may have 32 bits."""
    spread = ("tt.splat", "tt.expand_dims", "tt.broadcast")
    used = r"tt\.addptr %[\w#]+, (%[\w#]+) : .*, \S*i32>?(?: |$)|arith\.extsi (%[\w#]+) : \S*i32"
    constants: set[str] = set()
    products: set[str] = set()
    found = []
    for line in ttir.splitlines():  # in their order: two loops may give the same name to different values
        if (use := re.search(used, line)) and (use[1] or use[2]) in products:
            found.append(line.strip())
        if made := re.match(r"\s*(%\w+) = ([\w.]+)(.*)", line):
            name, op, operands = made[1], made[2], set(re.findall(r"%[\w#]+", made[3]))
            constant = op == "arith.constant" or (op in spread and operands <= constants)
            fresh = op == "arith.muli" and not operands & constants
            product = fresh or (op in (*spread, "arith.addi", "arith.muli") and bool(operands & products))
            for names, member in ((constants, constant), (products, product)):
                names.add(name) if member else names.discard(name)
    return found


def main(architectures: list[int]) -> None:
    names = {kernel: name for name, kernel in kernels().items()}
    compiled: list[tuple[str, Any]] = []
    enough: set[str] = set()  # kernels that this architecture has compiled
    original = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if names[self] in enough:
            return None
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((names[self], kernel))
        return kernel

    JITFunction.run = compile_only
    print(json.dumps(sorted(names.values())))
    for sm in architectures:
        triton.runtime.driver.set_active(Architecture(sm))
        enough.clear()
        products = partial(product_cases, sm)
        makers = (products, gan_loss_cases, act_cases, penalty_cases, pairwise_cases, spectral_norm_cases, mlp_critic_cases)
        for make in (*makers, bias_lrelu_cases, bn_lrelu_cases):
            for case, launch in make():
                launch()
                for name, kernel in compiled:
                    row = {"kernel": name, "case": case, "sm": sm, **usage(kernel.asm["cubin"]), "shared": kernel.metadata.shared}
                    row["narrow"] = narrow(kernel.asm["ttir"])
                    print(json.dumps(row), flush=True)
                if sm != 90 and make is not products:
                    enough.update(name for name, _ in compiled)
                compiled.clear()


if __name__ == "__main__":
    main([int(sm) for sm in sys.argv[1:]])
