"""One whole step (n_critic updates of the critic, then one of the generator) of every preset, at several batch sizes.

The same networks, weights, labels, latent law, Adam settings and batch for all; without the running average of the weights.

eager          the loop that people write: plain modules, separate passes for real and fake, Adam as created, critic gradients made
               in the generator's step and thrown away; with a gradient penalty as the popular programs do: a generator graph for
               each critic update, and G(z) anew for the generator's; no statistics for a log
eager-tuned    by one who knows PyTorch: one critic pass where that is exact (no BatchNorm), critic frozen in the generator's step,
               no graph for fakes of the critic alone, Adam(fused=True), labels made once
eager-tf32     CUDA, bf16 groups: "eager" in tf32 and in PyTorch's own memory format
eager-graph    CUDA: "eager-tuned" captured once by torch.cuda.graph and replayed
compile        "eager-tuned" through torch.compile; a gradient penalty by torch.func.grad, in one compiled function with the loss
compile-max    CUDA: the same with mode="max-autotune-no-cudagraphs"
gankern        gankern.training.Trainer.step, which also returns D(x) and D(G(z))
gankern-graph  CUDA: gankern.training.graph, which also gathers each batch from the data on the device

Compiling takes seconds to minutes: without --all-rivals it is done at one batch size a preset, and on a CPU not for convolutions.

The gate trains every rival for three steps (convolutions: two) without dropout from the same weights and noise: the losses must be
those of "eager" in float64. Spectral norm goes one power iteration at each pass, so rivals that pass real and fake together are
compared with "eager" doing that. Convolutions in float64 take a CPU twenty times as long: there "eager" is compared with itself in
float64 at batch 2, and the others with "eager" in float32 at the batch that is timed. bf16: autocast, channels-last.

Images are 1x28x28; 3x32x32 or 3x64x64 for convolutions; 100 columns for ctgan-like. images/s counts the real samples of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from bench import rivals
from bench.rivals import Setting, Step
from bench.support import AUTOMATIC, COMPILE, EAGER, Group, Outputs, Products, Settings, Work, assert_close
from gankern.training import PRESETS, TrainConfig, precision
from gankern.training.networks import CONDITIONAL

TUNED, TF32, GRAPH, MOST, OUR_GRAPH = "eager-tuned", "eager-tf32", "eager-graph", "compile-max", "gankern-graph"
MAKE: dict[str, Callable[[Setting], Step]] = {
    EAGER: rivals.eager,
    TF32: rivals.eager,
    TUNED: rivals.tuned,
    GRAPH: rivals.graphed,
    COMPILE: rivals.compiled,
    MOST: rivals.compiled_most,
    AUTOMATIC: rivals.gankern,
    OUR_GRAPH: rivals.gankern_graph,
}

# Batch sizes on the CPU, and on CUDA.
BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "gan": ((16, 64, 256, 1024), (16, 64, 256, 1024)),
    "wgan-gp": ((16, 64, 256), (16, 64, 256, 1024)),
    "cgan": ((16, 64, 256, 1024), (16, 64, 256, 1024)),
    "ctgan-like": ((100, 500), (100, 500)),
    "dcgan-32": ((16, 64), (16, 64)),
    "sngan": ((16, 32), (16, 64)),
    "dcgan-64": ((16,), (64, 128)),
}
# The first ones on CUDA, where the time may be limited.
FIRST = (("gan", 64, "fp32"), ("gan", 256, "fp32"), ("wgan-gp", 64, "fp32"), ("dcgan-64", 128, "bf16"))
# Those with a row "compile" by default: on CUDA, on the CPU.
COMPILED = (
    (("gan", 64, "fp32"), ("dcgan-64", 128, "bf16")),
    (("gan", 64, "fp32"), ("wgan-gp", 64, "fp32"), ("cgan", 64, "fp32"), ("ctgan-like", 500, "fp32")),
)
SHAPES = {"ctgan-like": (1, 10, 10), "sngan": (3, 32, 32), "dcgan-32": (3, 32, 32), "dcgan-64": (3, 64, 64)}
SHAPE = (1, 28, 28)
CONVOLUTIONS = ("dcgan", "sngan")

# Of the losses, relative, in float32. A product of K <= 8192 terms is right to about 6e-8 sqrt(K) = 5e-6, and Adam divides by the
# gradient's size, so that an update carries a gradient's relative error on: 1e-4 allows a factor of 20 for depth and steps. A
# penalty's gradient and one through BatchNorm jump where rounding turns a LeakyReLU's input round 0: one unit of N turned, of 1e5
# units and samples, is 1 / sqrt(N) = 3e-3 of the gradient, and the steps change a loss by less than a third of it. Convolutions sum
# over positions what largely cancels, and Adam's first updates go by the sign of the sum alone: each multiplies rounding by five or
# ten (float32 against float64, PyTorch's own), so their gate ends after two steps, four updates.
TOLERANCE, KINKED = 1e-4, 1e-3
BF16 = 2e-2  # bfloat16 keeps 8 bits: 4e-3 a rounding, over the steps five times that at most
EXACT_BATCH = 2  # of convolutions in float64 on a CPU; and of the gate under --benchmark-disable


def groups(settings: Settings, presets: Sequence[str] = tuple(BATCHES), sizes: Sequence[int] = ()) -> list[Group]:
    """All groups; or those of some presets, at these batch sizes instead of the usual ones."""
    wanted = [(preset, batch, "fp32") for preset in presets for batch in sizes or batches(settings, preset)]
    if settings.device.type == "cuda" and not sizes:
        wanted = list(dict.fromkeys([key for key in FIRST if key[0] in presets] + wanted))
    return [TrainStep(settings, *key) for key in wanted]


def batches(settings: Settings, preset: str) -> tuple[int, ...]:
    """Under --benchmark-disable on a CPU only what is quick; the gate is the same."""
    sizes = BATCHES[preset][settings.device.type == "cuda"]
    if not settings.smoke or settings.device.type == "cuda":
        return sizes
    return (EXACT_BATCH,) if convolutional(preset) else tuple(n for n in sizes if n <= 64) or sizes[:1]


def convolutional(preset: str) -> bool:
    return PRESETS[preset].config.arch in CONVOLUTIONS


def bench_train_step(row: Callable[[], None]) -> None:
    row()


class TrainStep(Group):
    """One preset at one batch size; `changes` are other settings of its TrainConfig."""

    memory = True

    def __init__(self, settings: Settings, preset: str, batch: int, dtype: str = "fp32", **changes: Any) -> None:
        on_gpu = settings.device.type == "cuda"
        usual = (preset, batch, dtype) in COMPILED[not on_gpu]
        names = [EAGER, *[TF32] * (dtype == "bf16"), TUNED, *[GRAPH] * on_gpu]
        names += [COMPILE] * (usual or settings.all_rivals) + [MOST] * (on_gpu and settings.all_rivals)
        super().__init__(f"{preset} {dtype} {batch}", [*names, AUTOMATIC, *[OUR_GRAPH] * on_gpu], Work(), dtype, settings.device)
        del self.work  # counted when it is first asked for
        self.preset, self.batch = preset, batch
        self.shape = SHAPES.get(preset, SHAPE)
        self.config = dataclasses.replace(PRESETS[preset].config, batch_size=batch, ema=0.0, precision=dtype, **changes)
        self.wanted: dict[tuple[int, bool], Outputs] = {}

    def context(self, rival: str) -> AbstractContextManager[Any]:
        return precision.products("tf32" if rival == TF32 else self.dtype, self.device)

    @functools.cached_property
    def work(self) -> Work:
        """Products: those that "eager-tuned" makes. Bytes: the real samples, and weights and Adam's averages, read and written once
        an update. Counted for a small batch, as products grow with it and no further."""
        few = 2 * self.config.pack
        setting = self.setting(TUNED, self.config, torch.float32, few)
        step = rivals.tuned(setting)
        step()
        with Products() as counted:
            step()
        updates = ((setting.generator, 1), (setting.critic, self.config.n_critic))
        state = sum(6 * p.numel() * p.element_size() * n for net, n in updates for p in net.parameters())
        samples = setting.real.numel() * setting.real.element_size() * self.batch // few
        return Work(state + samples, counted.flops * self.batch // few, self.config.n_critic * self.batch)

    # --- the gate

    def check(self, rival: str) -> None:
        # eager-tf32 and bf16 are held to float64 as well: a third number would hide what the format costs
        kinked = self.config.penalty != "none" or not all(map(rivals.one_pass_is_exact, self.networks(ours=False)))
        tolerance = BF16 if self.dtype == "bf16" else KINKED if kinked else TOLERANCE
        small = self.device.type == "cpu" and convolutional(self.preset)
        if small and rival == EAGER:
            self.compare(rival, self.exact(EXACT_BATCH, torch.float64, False), tolerance, EXACT_BATCH)
        else:
            one_pass = self.config.spectral_norm and rival not in (EAGER, TF32)
            dtype = torch.float32 if small else torch.float64
            self.compare(rival, self.exact(self.batch, dtype, one_pass), tolerance, self.batch)

    def compare(self, rival: str, wanted: Outputs, tolerance: float, batch: int) -> None:
        with self.context(rival):
            got = self.losses(self.make(rival, self.gate_config, torch.float32, batch))
        assert_close(got, wanted, tolerance)

    @property
    def gate_config(self) -> TrainConfig:
        return dataclasses.replace(self.config, g_dropout=0.0, d_dropout=0.0)

    def exact(self, batch: int, dtype: torch.dtype, one_pass: bool) -> Outputs:
        if (batch, one_pass) not in self.wanted:
            config = dataclasses.replace(self.gate_config, precision="fp32")
            step = rivals.eager(self.setting(EAGER, config, dtype, batch), one_pass)
            with precision.products("fp32", self.device):
                self.wanted[batch, one_pass] = self.losses(step)
        return self.wanted[batch, one_pass]

    def losses(self, step: Step) -> Outputs:
        """Of three steps (two of convolutions), critic's and generator's as one: either may be a small difference of scores."""
        history = [{key: value.clone() for key, value in step().items()} for _ in range(2 if convolutional(self.preset) else 3)]
        return {"losses": [torch.stack([h[key] for h in history]) for key in ("d_loss", "g_loss")]}

    # --- what is timed

    def build(self, rival: str) -> Step:
        return self.make(rival, self.config, torch.float32, self.batch)

    def make(self, rival: str, config: TrainConfig, dtype: torch.dtype, batch: int) -> Step:
        if rival == TF32:
            config = dataclasses.replace(config, precision="fp32")
        return MAKE[rival](self.setting(rival, config, dtype, batch))

    def networks(self, ours: bool) -> tuple[nn.Module, nn.Module]:
        return rivals.networks(self.preset, self.config, self.shape, ours)

    def setting(self, rival: str, config: TrainConfig, dtype: torch.dtype, batch: int) -> Setting:
        source, count = torch.Generator().manual_seed(config.seed), config.n_critic * batch
        real = torch.rand(count, *self.shape, generator=source) * 2 - 1
        labels = [torch.randint(rivals.CLASSES, (count,), generator=source)] * (config.arch in CONDITIONAL)
        pair = rivals.networks(self.preset, config, self.shape, rival in (AUTOMATIC, OUR_GRAPH))
        layout = torch.channels_last if config.precision == "bf16" else torch.contiguous_format
        generator, critic = (n.to(self.device, dtype).to(memory_format=layout).train() for n in pair)
        moved = real.to(self.device, dtype).contiguous(memory_format=layout)
        return Setting(generator, critic, config, moved, tuple(c.to(self.device) for c in labels))
