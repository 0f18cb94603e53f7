"""Small programs for gpu.sh: `kernels` (each of them), `ops` (public functions, two derivatives, all backends), `train`."""

from __future__ import annotations

import importlib
import sys
import time
from types import ModuleType
from typing import Any

import torch

from gankern import backend, data, gan_loss, linear_lrelu, use_backend
from gankern.cli import doctor
from gankern.cli.probes import PROBES
from gankern.training import PRESETS, Trainer
from gankern.training.graph import make

DEVICE = torch.device("cuda")
BACKENDS = ("compiled", "triton")


def kernels() -> None:
    """The kernels of each op and backend, no library's product among them: what a race checker should look at."""
    for name in BACKENDS:
        for rows, columns in ((3, 5), (64, 256), (300, 1000)):
            z, bias = torch.randn(rows, columns, device=DEVICE), torch.randn(columns, device=DEVICE)
            seed = torch.full((1,), 7, device=DEVICE)
            for p in (0.0, 0.3):
                y, bits = namespace(name, "linear_lrelu").linear_lrelu_act(z, bias, 0.2, p, seed if p else None)
                namespace(name, "linear_lrelu").linear_lrelu_act_grad(z, y, bits, 0.2, p, True)
        for n in (2, 1000, 70000):
            logits, c, g = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE), torch.ones((), device=DEVICE)
            for reduction in (0, 1):
                arguments = (logits, None, n // 2, 0, 1.0, 1.0, None, 0, 1.0, 0.0, None, reduction)
                for relative in range(3):
                    namespace(name, "gan_loss").gan_loss(*arguments, relative)
                namespace(name, "gan_loss").gan_loss_grad2(*arguments, g if reduction else c, c, None)
        with use_backend(name):
            for op, probe in PROBES.items():
                if probe.run is not None and op not in ("linear_lrelu", "mlp_critic", "mmd2"):
                    probe.run(DEVICE)
        torch.cuda.synchronize()
        print(f"{name}: all kernels ran")


def namespace(name: str, op: str) -> ModuleType | Any:
    return torch.ops.gankern if name == "compiled" else importlib.import_module(f"gankern.triton.{op}")


def ops() -> None:
    """Every op with its gradients; and linear_lrelu into gan_loss, through the gradient once more, as a gradient penalty does."""
    wrong = doctor.check(DEVICE)
    assert not wrong, "; ".join(wrong)
    for name in BACKENDS:
        with use_backend(name):
            for dtype in (torch.float32, torch.bfloat16):
                x, w = (torch.randn(40, 72, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
                logits = linear_lrelu(x, w, torch.randn(40, device=DEVICE, dtype=dtype), dropout=0.3).sum(1)
                (dx,) = torch.autograd.grad(gan_loss(logits, n_real=20).loss, x, create_graph=True)
                (dw,) = torch.autograd.grad(dx.float().square().sum(), w)
                assert dw.isfinite().all(), f"{name} {dtype}: the second derivative is not finite"
        torch.cuda.synchronize()
        print(f"{name}: all ops ran")


def train(steps: int = 2000, warm_up: int = 50) -> None:
    """The preset "gan" on MNIST by each engine, as the command trains it, without its pictures and files."""
    config = PRESETS["gan"].config
    images = data.load("mnist")
    for name in ("eager", "graph"):
        torch.manual_seed(config.seed)
        trainer = Trainer(*PRESETS["gan"].build(config, images.shape), config, DEVICE)
        batches = data.Batches(images, config.batch_size, seed=config.seed, device=DEVICE)
        engine = make(name, trainer, batches)
        assert engine.name == name, engine.why
        for step in range(steps):
            if step == warm_up:
                torch.cuda.synchronize()
                start = time.perf_counter()
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        last = engine.losses.request().read()
        assert not last.bad, f"training diverged: {last.bad}"
        rate, values = (steps - warm_up) * config.batch_size / seconds, {k: round(v, 4) for k, v in last.values.items()}
        print(
            f"{name}: {rate:,.0f} images/s, {1e6 * config.batch_size / rate:.0f} us a step at batch {config.batch_size}; {values}"
        )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_smoke: a CUDA device must be there, got none")
    missing = [why for name in BACKENDS if (why := backend.problem(name, "cuda"))]
    if missing:
        sys.exit(f"gpu_smoke: {'; '.join(missing)}")
    for word in sys.argv[1:]:
        {"kernels": kernels, "ops": ops, "train": train}[word]()
