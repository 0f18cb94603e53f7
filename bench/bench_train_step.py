"""One whole step (critic, then generator) of the default preset. Same networks, labels, latent law, Adam settings and real batch.

eager        the loop that people write: plain nn.Sequential networks, nn.BCEWithLogitsLoss, separate passes for real and fake, Adam
             as created, critic gradients computed in the generator's step and thrown away; no statistics for a log
eager-tuned  plain PyTorch by one who knows it: one critic pass, critic frozen in the generator's step, Adam(fused=True), labels
             made once
eager-graph  CUDA only: "eager-tuned" captured once by torch.cuda.graph and replayed
compile      "eager-tuned" with both networks through torch.compile; with --all-rivals
gankern      gankern.training.Trainer.step, which also returns D(x) and D(G(z))

The gate trains every rival for three steps without dropout from the same weights and noise: the losses must be those of "eager" in
float64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.support import AUTOMATIC, COMPILE, EAGER, Group, Outputs, Settings, Work, assert_close
from gankern.models import sample_latent
from gankern.training import PRESETS, TrainConfig, Trainer

PRESET = "gan"
BATCHES = (16, 64, 256, 1024)
SHAPE = (1, 28, 28)
TUNED, GRAPH = "eager-tuned", "eager-graph"
TOLERANCE = 1e-4  # of three steps' losses; Adam divides by the gradient's size, so rounding counts for more than in one op

Step = Callable[[], dict[str, Tensor]]


def groups(settings: Settings) -> list[Group]:
    return [TrainStep(settings, batch) for batch in BATCHES]


def bench_train_step(row: Callable[[], None]) -> None:
    row()


class Setting(NamedTuple):
    """What a rival starts from."""

    generator: nn.Module
    critic: nn.Module
    config: TrainConfig
    real: Tensor


class TrainStep(Group):
    def __init__(self, settings: Settings, batch: int) -> None:
        graph = [GRAPH] * (settings.device.type == "cuda")
        rivals = [EAGER, TUNED, *graph, *[COMPILE] * settings.all_rivals, AUTOMATIC]
        super().__init__(f"{PRESET} fp32 {batch}", rivals, Work(images=batch), "fp32", settings.device)
        self.batch = batch
        self.wanted: Outputs = {}

    def check(self, rival: str) -> None:
        self.wanted = self.wanted or self.losses(EAGER, torch.float64)
        with self.context(rival):
            got = self.losses(rival, torch.float32)
        assert_close(got, self.wanted, TOLERANCE)

    def losses(self, rival: str, dtype: torch.dtype) -> Outputs:
        """Of three steps, [3] each; without dropout."""
        step = self.make(rival, dropout=False, dtype=dtype)
        history = [{key: value.clone() for key, value in step().items()} for _ in range(3)]
        return {key: torch.stack([h[key] for h in history]) for key in ("d_loss", "g_loss")}

    def build(self, rival: str) -> Step:
        return self.make(rival, dropout=True, dtype=torch.float32)

    def make(self, rival: str, dropout: bool, dtype: torch.dtype) -> Step:
        config = dataclasses.replace(PRESETS[PRESET].config, batch_size=self.batch, ema=0.0)
        if not dropout:
            config = dataclasses.replace(config, g_dropout=0.0, d_dropout=0.0)
        torch.manual_seed(config.seed)
        ours = PRESETS[PRESET].build(config, SHAPE)
        networks = ours if rival == AUTOMATIC else plain_networks(config, ours)
        real = torch.rand(self.batch, *SHAPE, generator=torch.Generator().manual_seed(config.seed)) * 2 - 1
        generator, critic = (n.to(self.device, dtype).train() for n in networks)
        setting = Setting(generator, critic, config, real.to(self.device, dtype))
        return {EAGER: eager, TUNED: tuned, GRAPH: graphed, COMPILE: compiled_tuned, AUTOMATIC: gankern}[rival](setting)


def plain_networks(config: TrainConfig, ours: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same networks from torch.nn alone, with the same initial weights."""

    def hidden(inputs: int, widths: tuple[int, ...], norm: str, dropout: float) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for before, width in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, width), *[nn.BatchNorm1d(width)] * (norm == "batch"), nn.LeakyReLU(config.negative_slope)]
            layers += [nn.Dropout(dropout)] * (dropout > 0)
        return layers

    pixels = SHAPE[0] * SHAPE[1] * SHAPE[2]
    generator = nn.Sequential(
        *hidden(config.z_dim, config.g_widths, config.g_norm, config.g_dropout),
        nn.Linear(config.g_widths[-1], pixels),
        nn.Tanh(),
        nn.Unflatten(1, SHAPE),
    )
    critic = nn.Sequential(
        nn.Flatten(), *hidden(pixels, config.d_widths, "none", config.d_dropout), nn.Linear(config.d_widths[-1], 1)
    )
    for plain, model in zip((generator, critic), ours, strict=True):
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.data.copy_(q.data)
    return generator, critic


def noise_source(setting: Setting) -> torch.Generator:
    """As Trainer's: the gate needs the same latents."""
    return torch.Generator(setting.real.device).manual_seed(setting.config.seed + 1)


def latents(setting: Setting, source: torch.Generator) -> Tensor:
    """z [B, z_dim]; drawn in float32 for every dtype."""
    real, config = setting.real, setting.config
    return sample_latent(len(real), config.z_dim, config.latent, source, real.device).to(real.dtype)


def eager(setting: Setting) -> Step:
    generator, critic, config, real = setting
    betas = (config.beta1, config.beta2)
    opt_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=betas)
    opt_d = torch.optim.Adam(critic.parameters(), lr=config.lr_d, betas=betas)
    criterion, source = nn.BCEWithLogitsLoss(), noise_source(setting)

    def step() -> dict[str, Tensor]:
        fake = generator(latents(setting, source))

        opt_d.zero_grad()
        real_logits = critic(real)
        fake_logits = critic(fake.detach())
        d_loss = criterion(real_logits, torch.full_like(real_logits, config.real_label))
        d_loss = d_loss + criterion(fake_logits, torch.full_like(fake_logits, config.fake_label))
        d_loss.backward()
        opt_d.step()

        opt_g.zero_grad()
        logits = critic(fake)
        g_loss = criterion(logits, torch.ones_like(logits))
        g_loss.backward()
        opt_g.step()
        return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}

    return step


def adams(setting: Setting, capturable: bool = False) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    generator, critic, config, _ = setting
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "fused": True, "capturable": capturable}
    return (
        torch.optim.Adam(generator.parameters(), lr=config.lr_g, **options),
        torch.optim.Adam(critic.parameters(), lr=config.lr_d, **options),
    )


def tuned_step(setting: Setting, opt_g: torch.optim.Optimizer, opt_d: torch.optim.Optimizer, source: torch.Generator) -> Step:
    generator, critic, config, real = setting
    criterion, parameters = nn.BCEWithLogitsLoss(), list(critic.parameters())
    n = len(real)
    targets = [torch.full((n, 1), v, dtype=real.dtype, device=real.device) for v in (config.real_label, config.fake_label, 1.0)]

    def step() -> dict[str, Tensor]:
        fake = generator(latents(setting, source))
        logits = critic(torch.cat([real, fake.detach()]))
        d_loss = criterion(logits[:n], targets[0]) + criterion(logits[n:], targets[1])
        opt_d.zero_grad(set_to_none=True)
        d_loss.backward()
        opt_d.step()
        for p in parameters:
            p.requires_grad_(False)
        g_loss = criterion(critic(fake), targets[2])
        opt_g.zero_grad(set_to_none=True)
        g_loss.backward()
        opt_g.step()
        for p in parameters:
            p.requires_grad_(True)
        return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}

    return step


def tuned(setting: Setting) -> Step:
    return tuned_step(setting, *adams(setting), noise_source(setting))


def compiled_tuned(setting: Setting) -> Step:
    torch._dynamo.reset()
    setting.generator.compile(dynamic=False)
    setting.critic.compile(dynamic=False)
    return tuned(setting)


def graphed(setting: Setting) -> Step:
    """tuned_step in one CUDA graph; what the warm-up steps changed is put back."""
    start = [copy.deepcopy(m.state_dict()) for m in setting[:2]]
    optimizers, source = adams(setting, capturable=True), noise_source(setting)
    step = tuned_step(setting, *optimizers, source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(source)
    with torch.cuda.graph(graph):
        out = step()
    for model, state in zip(setting[:2], start, strict=True):
        model.load_state_dict(state)
    for optimizer in optimizers:
        for slots in optimizer.state.values():
            for value in slots.values():
                value.zero_()
    source.manual_seed(setting.config.seed + 1)

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return out

    return replay


def gankern(setting: Setting) -> Step:
    trainer = Trainer(setting.generator, setting.critic, setting.config, setting.real.device)
    return lambda: trainer.step(setting.real)
