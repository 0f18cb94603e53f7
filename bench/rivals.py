"""The training steps that gankern is compared with, in plain PyTorch: for every preset, at equal weights, noise and batch.

Each rival is a function (Setting) -> step; a step returns the losses of its last critic update and of the generator. All draw as
`Trainer.step` does: z of all updates, then, for a penalty, one number a sample or pack in each; from a generator of seed
config.seed + 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern.data import Batches, Dataset
from gankern.models import sample_latent
from gankern.training import PRESETS, TrainConfig, Trainer, graph, precision

CLASSES = 10
CALL = Callable[..., Any]
Step = Callable[[], dict[str, Tensor]]
Optimizers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


class Setting(NamedTuple):
    """What a rival starts from: networks, settings, the samples [n_critic * B, ...] of every step and their classes, if any."""

    generator: nn.Module
    critic: nn.Module
    config: TrainConfig
    real: Tensor
    labels: tuple[Tensor, ...] = ()

    def batches(self) -> list[tuple[Tensor, ...]]:
        """(samples, *classes) of each critic update."""
        return list(zip(*(t.chunk(self.config.n_critic) for t in (self.real, *self.labels)), strict=True))

    def autocast(self) -> Any:
        return precision.autocast(self.config.precision, self.real.device)


# --- the networks ----------------------------------------------------------------------------------------------------------


def networks(preset: str, config: TrainConfig, shape: tuple[int, int, int], ours: bool) -> tuple[nn.Module, nn.Module]:
    """(generator, critic): gankern's, or the same from torch.nn alone with the same initial weights."""
    torch.manual_seed(config.seed)
    pair = PRESETS[preset].build(config, shape, classes=CLASSES)
    return pair if ours else plain_networks(preset, config, shape, pair)


def plain_networks(
    preset: str, config: TrainConfig, shape: tuple[int, int, int], ours: tuple[nn.Module, nn.Module]
) -> tuple[nn.Module, nn.Module]:
    if config.arch == "mlp":
        pair = mlps(config, shape)
        for plain, model in zip(pair, ours, strict=True):
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.data.copy_(q.data)
        return pair
    generator, critic = PRESETS[preset].build(_replace(config, spectral_norm=False), shape, classes=CLASSES, fused=False)
    if config.spectral_norm:
        for layer in critic.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.utils.parametrizations.spectral_norm(layer)
    generator.load_state_dict(ours[0].state_dict())
    critic.load_state_dict(ours[1].state_dict())
    return generator, critic


def mlps(config: TrainConfig, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    def hidden(inputs: int, widths: Sequence[int], norm: str, dropout: float) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for before, width in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, width), *[nn.BatchNorm1d(width)] * (norm == "batch"), nn.LeakyReLU(config.negative_slope)]
            layers += [nn.Dropout(dropout)] * (dropout > 0)
        return layers

    pixels = shape[0] * shape[1] * shape[2]
    generator = nn.Sequential(
        *hidden(config.z_dim, config.g_widths, config.g_norm, config.g_dropout),
        nn.Linear(config.g_widths[-1], pixels),
        nn.Tanh(),
        nn.Unflatten(1, shape),
    )
    critic = nn.Sequential(
        nn.Flatten(), *hidden(pixels, config.d_widths, "none", config.d_dropout), nn.Linear(config.d_widths[-1], 1)
    )
    return generator, critic


def _replace(config: TrainConfig, **values: Any) -> TrainConfig:
    return TrainConfig(**{**vars(config), **values})


# --- random numbers, objectives, penalty -------------------------------------------------------------------------------------


def noise_source(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.real.device).manual_seed(setting.config.seed + 1)


def latents(setting: Setting, source: torch.Generator) -> Sequence[Tensor]:
    """z [B, z_dim] of each update of a step; drawn in float32 for every dtype."""
    config, real = setting.config, setting.real
    z = sample_latent(len(real), config.z_dim, config.latent, source, real.device)
    return z.to(real.dtype).chunk(config.n_critic)


def line_points(setting: Setting, source: torch.Generator) -> Tensor:
    """eps [B / pack] of one update, where between a real and a fake the penalty is taken; drawn in float32 for every dtype."""
    config, real = setting.config, setting.real
    count = len(real) // config.n_critic // config.pack
    return torch.rand(count, device=real.device, generator=source).to(real.dtype)


def objective(config: TrainConfig, target: Callable[[Tensor, float], Tensor]) -> tuple[CALL, CALL]:
    """(loss of the critic from its logits of real and fake, loss of the generator from those of fake); target: (logits, value)."""
    if config.objective == "hinge":
        return lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()
    if config.objective == "wgan":
        return lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()
    bce = nn.BCEWithLogitsLoss()
    return (
        lambda real, fake: bce(real, target(real, config.label_smoothing)) + bce(fake, target(fake, config.fake_label)),
        lambda fake: bce(fake, target(fake, 1.0)),
    )


def made_once() -> Callable[[Tensor, float], Tensor]:
    """Targets that are filled at their first use."""
    made: dict[float, Tensor] = {}

    def target(logits: Tensor, value: float) -> Tensor:
        if value not in made:
            made[value] = torch.full_like(logits.detach(), value)
        return made[value]

    return target


def points(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """eps real + (1 - eps) fake, one eps [B / pack] for all samples of a pack."""
    share = eps.repeat_interleave(len(real) // len(eps)).view(-1, *[1] * (real.dim() - 1))
    return share * real + (1 - share) * fake


def distance(config: TrainConfig, gradient: Tensor, packs: int) -> Tensor:
    """The penalty from the gradient at the points: one norm a pack."""
    return config.penalty_weight * ((gradient.reshape(packs, -1).norm(2, dim=1) - 1) ** 2).mean()


def penalty(setting: Setting, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    x = points(real, fake, eps).requires_grad_()
    logits = setting.critic(x)
    (gradient,) = torch.autograd.grad(logits, x, torch.ones_like(logits), create_graph=True, retain_graph=True)
    return distance(setting.config, gradient, len(eps))


# --- the rivals --------------------------------------------------------------------------------------------------------------


def eager(setting: Setting, one_pass: bool = False) -> Step:
    """As people write it. `one_pass` is for the gate: real and fake through the critic together."""
    generator, critic, config = setting.generator, setting.critic, setting.config
    betas = (config.beta1, config.beta2)
    opt_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=betas)
    opt_d = torch.optim.Adam(critic.parameters(), lr=config.lr_d, betas=betas)
    of_critic, of_generator = objective(config, torch.full_like)
    source = noise_source(setting)

    def step() -> dict[str, Tensor]:
        for z, (real, *labels) in zip(latents(setting, source), setting.batches(), strict=True):
            with setting.autocast():
                fake = generator(z, *labels)
                if one_pass:
                    real_logits, fake_logits = together(critic, real, fake.detach(), labels)
                else:
                    real_logits, fake_logits = critic(real, *labels), critic(fake.detach(), *labels)
                d_loss = of_critic(real_logits, fake_logits)
                if config.penalty != "none":
                    d_loss = d_loss + penalty(setting, real, fake.detach(), line_points(setting, source))
            opt_d.zero_grad()
            d_loss.backward()
            opt_d.step()

        opt_g.zero_grad()
        with setting.autocast():
            if config.penalty != "none":  # as the popular programs do
                fake = generator(z, *labels)
            g_loss = of_generator(critic(fake, *labels))
        g_loss.backward()
        opt_g.step()
        return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}

    return step


def together(critic: CALL, real: Tensor, fake: Tensor, labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of real and fake from one pass."""
    logits = critic(torch.cat([real, fake]), *(torch.cat([c, c]) for c in labels))
    return logits[: len(logits) // 2], logits[len(logits) // 2 :]


def one_pass_is_exact(critic: nn.Module) -> bool:
    return not any(isinstance(m, _BatchNorm) for m in critic.modules())


def adams(setting: Setting, capturable: bool = False) -> Optimizers:
    config = setting.config
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "fused": True, "capturable": capturable}
    return (
        torch.optim.Adam(setting.generator.parameters(), lr=config.lr_g, **options),
        torch.optim.Adam(setting.critic.parameters(), lr=config.lr_d, **options),
    )


def critic_loss(setting: Setting, penalty: CALL) -> CALL:
    """(real, fake, eps or None, *labels) -> the loss, by one who knows PyTorch."""
    critic, config = setting.critic, setting.config
    of_critic, _ = objective(config, made_once())
    one_pass = one_pass_is_exact(critic)

    def loss(real: Tensor, fake: Tensor, eps: Tensor | None, *labels: Tensor) -> Tensor:
        if one_pass:
            value = of_critic(*together(critic, real, fake, labels))
        else:
            value = of_critic(critic(real, *labels), critic(fake, *labels))
        return value if eps is None else value + penalty(setting, real, fake, eps)

    return loss


def tuned_step(setting: Setting, optimizers: Optimizers, source: torch.Generator, loss: CALL) -> Step:
    generator, critic, config = setting.generator, setting.critic, setting.config
    opt_g, opt_d = optimizers
    _, of_generator = objective(config, made_once())
    parameters, batches = list(critic.parameters()), setting.batches()

    def step() -> dict[str, Tensor]:
        for update, (z, (real, *labels)) in enumerate(zip(latents(setting, source), batches, strict=True)):
            with setting.autocast():
                with torch.set_grad_enabled(update == len(batches) - 1):
                    fake = generator(z, *labels)
                eps = None if config.penalty == "none" else line_points(setting, source)
                d_loss = loss(real, fake.detach(), eps, *labels)
            opt_d.zero_grad(set_to_none=True)
            d_loss.backward()
            opt_d.step()
        for p in parameters:
            p.requires_grad_(False)
        with setting.autocast():
            g_loss = of_generator(critic(fake, *labels))
        opt_g.zero_grad(set_to_none=True)
        g_loss.backward()
        opt_g.step()
        for p in parameters:
            p.requires_grad_(True)
        return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}

    return step


def tuned(setting: Setting) -> Step:
    return tuned_step(setting, adams(setting), noise_source(setting), critic_loss(setting, penalty))


def compiled(setting: Setting, mode: str = "default") -> Step:
    """`tuned` with compiled networks; with a penalty the critic's whole loss is one compiled function, differentiated by
    torch.func.grad, as create_graph does not pass through a compiled network."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"dynamic": False, "mode": mode}
    if setting.config.penalty == "none":
        loss = critic_loss(setting, penalty)
        setting.critic.compile(**options)
    else:
        loss = torch.compile(critic_loss(setting, functional_penalty), **options)
        setting = setting._replace(critic=torch.compile(setting.critic, **options))  # the generator's way through it
    setting.generator.compile(**options)
    return tuned_step(setting, adams(setting), noise_source(setting), loss)


def functional_penalty(setting: Setting, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x: setting.critic(x).sum())(points(real, fake, eps))
    return distance(setting.config, gradient, len(eps))


def compiled_most(setting: Setting) -> Step:
    return compiled(setting, "max-autotune-no-cudagraphs")


def graphed(setting: Setting) -> Step:
    """`tuned` in one CUDA graph; what the warm-up steps changed is put back."""
    start = [copy.deepcopy(m.state_dict()) for m in setting[:2]]
    optimizers, source = adams(setting, capturable=True), noise_source(setting)
    step = tuned_step(setting, optimizers, source, critic_loss(setting, penalty))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    captured.register_generator_state(source)
    with torch.cuda.graph(captured):
        out = step()
    for model, state in zip(setting[:2], start, strict=True):
        model.load_state_dict(state)
    for optimizer in optimizers:
        for slots in optimizer.state.values():
            for value in slots.values():
                value.zero_()
    source.manual_seed(setting.config.seed + 1)

    def replay() -> dict[str, Tensor]:
        captured.replay()
        return out

    return replay


def gankern(setting: Setting) -> Step:
    trainer = Trainer(setting.generator, setting.critic, setting.config, setting.real.device)
    return lambda: trainer.step(setting.real, *setting.labels)


class InOrder(Batches):
    """Every epoch in the order of the data: of one batch many times over, so that each step has the rivals' batch."""

    def _start_epoch(self, epoch: int) -> None:
        super()._start_epoch(epoch)
        self._order = torch.arange(len(self._order), device=self._order.device)


def gankern_graph(setting: Setting) -> Step:
    """The whole step of the trainer as one CUDA graph, which also gathers the batch from the data on the device."""
    real, device = setting.real, setting.real.device
    trainer = Trainer(setting.generator, setting.critic, setting.config, device, capturable=True)
    times = max(1, min(256, 2**27 // real.numel()))  # a new epoch costs the host a copy of its order: as rare as in a real run
    labels = setting.labels[0].cpu().repeat(times) if setting.labels else None
    data = Dataset(real.cpu().repeat(times, *(1,) * (real.dim() - 1)), labels, "bench")
    return graph.Graph(trainer, InOrder(data, len(real), device=device)).step
