"""Trainer: one adversarial step. It computes; it prints nothing, writes nothing and never waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gankern import checks
from gankern.models import sample_latent
from gankern.nn import LinearLeakyReLU
from gankern.training import critics, distributed, precision, techniques
from gankern.training.config import TrainConfig
from gankern.training.critics import Loss
from gankern.training.optimizers import InPlace, make

OP = "Trainer"
DROPPING = (_DropoutNd, LinearLeakyReLU)


class Trainer:
    """The GAN loop of Goodfellow et al. (2014, algorithm 1), without the work that it does not need.

    A step updates the critic n_critic times, each time with its own real samples and fakes, then the generator from the last fakes
    through the updated critic. The critic's updates build no generator graph, the generator's update computes no critic weight
    gradient, and an MLP critic is driven by the one-pass critic, with its penalty, instead of by autograd.

        preset, data = PRESETS["wgan-gp"], gankern.data.load("mnist")
        config = dataclasses.replace(preset.config, lr_d=2e-4)
        trainer = Trainer(*preset.build(config, data.shape, len(data.classes)), config)
        batches = gankern.data.Batches(data, config.n_critic * config.batch_size)
        for _ in range(1000):
            losses = trainer.step(next(batches))              # of a conditional preset: trainer.step(*batches.with_labels())
        images = trainer.sample(trainer.noise(64))            # float32 [64, 1, 28, 28] in [-1, 1]

    Args:
        generator: z [B, z_dim] (and classes [B]) -> samples [B, ...].
        discriminator: samples (and classes) -> logits, one a sample or a pack. With `layers`, an nn.Sequential that
            `gankern.nn.mlp_layers` reads, and `inputs(samples, *classes)`, the rows [N, K] that these take, it gets the one pass.
        config: objective, rates, labels, penalty, clipping, latent law, EMA, precision and seed are read.
        device: where both networks are moved.
        one_pass: whether real and fake may share one pass through the critic, and the fakes of several critic updates one through
            the generator. None: yes, unless it has a BatchNorm or a layer of minibatch features (a generator: any buffer). Networks
            whose samples see each other in another way need False.
        capturable: whether all that changes from step to step is kept in tensors, as a CUDA graph needs it. None: on CUDA.

    Where torch.distributed is initialised, the trainers of all processes make each step together, as one would with the batches of
    all: see `gankern.training.distributed`. They must be made alike; they begin with the weights of the first.

    Random numbers: z and the penalty's points come from `self.rng`, seeded with config.seed + 1; dropout from PyTorch's default
    generator. Both are in `state_dict`, so that a resumed run repeats an uninterrupted one, on the CPU bit for bit.

    Raises:
        TypeError: a network that is no module, settings that are no TrainConfig.
        ValueError: a precision that the device does not have, a discriminator that does not give what the objective needs.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        one_pass: bool | None = None,
        capturable: bool | None = None,
    ) -> None:
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(network, nn.Module):
                checks.fail(TypeError, OP, name, "be a torch.nn.Module", type(network).__name__)
        if not isinstance(config, TrainConfig):
            checks.fail(TypeError, OP, "config", "be a TrainConfig, as PRESETS[name].config is", type(config).__name__)
        self.device = torch.device(device)
        precision.check(config.precision, self.device)
        self.config = config
        self.generator = generator.to(self.device).train()
        self.discriminator = discriminator.to(self.device).train()
        self.rng = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.together = not (critics.mixes(generator) or any(True for _ in generator.buffers())) if one_pass is None else one_pass
        self.forward: Any = self.generator  # what a step calls; torch.compile may stand in for it
        capturable = self.device.type == "cuda" if capturable is None else capturable
        self.opt_g = make(config.optimizer_g, self.generator.parameters(), config.lr_g, config, capturable)
        self.opt_d = make(config.optimizer_d, self.discriminator.parameters(), config.rate_d, config, capturable)
        self.critic = critics.choose(discriminator, config, self.rng, one_pass, self.opt_d)
        self.ema = Ema(generator, config.ema, config.ema_warmup) if config.ema > 0.0 else None
        self.steps_done = 0
        self.clock = torch.zeros((), device=self.device) if capturable else None  # steps_done, for what a graph replays
        self.techniques = techniques.wanted(self)
        self._used = tuple(self.techniques.values())
        begun = [value for model in self._models().values() for value in model.state_dict().values()]
        distributed.broadcast_([*begun, *self._lasting().values()])

    def step(self, real: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        """n_critic updates of the critic, one of the generator.

        Args:
            real: training samples, float32 [n_critic * B, ...] on the trainer's device: B for each update of the critic. Of several
                processes each has its part of the B, in the order of ranks.
            labels: nothing, or their classes, int64 [n_critic * B], which the fakes get too.

        Returns:
            Detached scalars on the device: d_loss, d_real and d_fake of the critic before its last update, and g_loss after it.
            d_real and d_fake are D(x) and D(G(z)), or the energies or features' statistics that gankern.training.critics has.

        Raises:
            ValueError: real is no multiple of n_critic samples, or on another device.
            TypeError: real is no tensor, or of another dtype.
        """
        n = self.config.n_critic
        checks.tensor(OP, "real", real)
        weight = self.opt_g.parameters[0]
        if real.dtype != torch.float32:  # unless the networks are of another dtype
            checks.same_dtype(OP, "real", real, weight.dtype)
        checks.same_device(OP, "real", real, weight.device)
        if not len(real) or len(real) % n:
            checks.fail(ValueError, OP, "real", f"have a multiple of n_critic ({n}) samples", len(real))
        noise = distributed.draw(self.noise, len(real), n)
        *early, (z, *last) = zip(*(t.chunk(n) for t in (noise, real, *labels)), strict=True)
        with precision.products(self.config.precision, self.device):
            for fake, (_, x, *c) in zip(self.early_fakes(noise, *labels), early, strict=True):
                self.discriminator_step(x, fake, *c)
            x, *c = last
            fake = self.fake(z, *c)
            d = self.discriminator_step(x, fake.detach(), *c)
            g = self.generator_step(fake, x, *c)
        if self.ema is not None:
            self.ema.update(self.generator, self.steps_done if self.clock is None else self.clock)
        self.steps_done += 1
        if self.clock is not None:
            self.clock += 1
        for technique in self._used:
            technique.after_step()
        out = {"d_loss": d.value, "g_loss": g.value, "d_real": d.d_real, "d_fake": d.d_fake}
        for technique in self._used:
            out |= technique.columns()
        return out

    def fake(self, noise: Tensor, *labels: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(noise, *labels)

    @torch.no_grad()
    def early_fakes(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The fakes of all critic updates but the last, in one pass where that is exact: the generator stays as it is till then."""
        n = self.config.n_critic - 1
        inputs = tuple(t[: len(t) // (n + 1) * n] for t in inputs)
        if n and self.together:
            return self.fake(*inputs).chunk(n)
        return [self.fake(*part) for part in zip(*(t.chunk(n) for t in inputs), strict=True)] if n else ()

    def discriminator_step(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        if not self.critic.learns:
            return self.critic.discriminator(real, fake, *labels)
        self.opt_d.forget()
        with self.autocast():
            for technique in self._used:
                fake = technique.fakes(fake)
                technique.before_critic(real, fake)
            out = self.critic.discriminator(self.seen(real), self.seen(fake), *labels)
        out.backward()
        self.update(self.opt_d)
        if self.config.clip_weights:
            clip_(self.opt_d.parameters, self.config.clip_weights)
        return out

    def generator_step(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        self.opt_g.forget()
        with self.autocast():
            out = self.critic.generator(self.seen(fake), self.seen(real), *labels)
            for technique in self._used:
                term = technique.term(fake, real, *labels)
                out = out if term is None else critics.WithTerm(out, term)
        out.backward()
        self.update(self.opt_g)
        return out

    def seen(self, samples: Tensor) -> Tensor:
        """What the critic is shown in place of samples."""
        for technique in self._used:
            samples = technique.seen(samples)
        return samples

    def update(self, optimizer: InPlace) -> None:
        distributed.average_([p.grad for p in optimizer.parameters if p.grad is not None])
        for technique in self._used:
            technique.gradients(optimizer)
        if self.config.clip_gradients:
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, self.config.clip_gradients)
        optimizer.update()

    def noise(self, n: int) -> Tensor:
        return sample_latent(n, self.config.z_dim, self.config.latent, self.rng, self.device)

    def autocast(self) -> Any:
        return precision.autocast(self.config.precision, self.device)

    def sample(self, z: Tensor, *labels: Tensor) -> Tensor:
        """G(z) in evaluation mode and float32, of the EMA weights if there are any; z is [N, z_dim] (labels [N]) on any device.

        With config.sample_dropout its dropout draws from PyTorch's default generator, which is put back.
        """
        generator = self.generator if self.ema is None else self.ema.model
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else [], self.config.sample_dropout):
            return generate(generator, *(t.to(self.device) for t in (z, *labels)), dropout=self.config.sample_dropout)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: a flat dict of tensors and ints."""
        state: dict[str, Any] = {"step": self.steps_done, "rng.noise": self.rng.get_state(), "rng.default": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, model in self._models().items():
            state |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            for index, slots in optimizer.state_dict()["state"].items():
                # the step count is one tensor for all: a file holds each by itself
                state |= {f"{name}.{index}.{slot}": v.clone() if slot == "step" else v for slot, v in slots.items()}
        return state | self._lasting()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for a trainer of the same settings and device type.

        Raises:
            ValueError: an entry is missing, left over, or of another shape or dtype; nothing has been loaded then.
        """
        check_entries(state, self.state_dict())
        self.steps_done = state["step"]
        if self.clock is not None:
            self.clock.fill_(self.steps_done)
        self.rng.set_state(state["rng.noise"])
        torch.set_rng_state(state["rng.default"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng.cuda"], self.device)
        for key, value in self._lasting().items():
            value.copy_(state[key])
        for name, model in self._models().items():
            model.load_state_dict(_below(state, name))
        for name, optimizer in self._optimizers().items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(state, name).items():
                number, slot = key.split(".")
                slots.setdefault(int(number), {})[slot] = value
            optimizer.load_slots(slots)

    def _models(self) -> dict[str, nn.Module]:
        more = {} if self.ema is None else {"ema": self.ema.model}
        for technique in self._used:
            more |= technique.models()
        return {"generator": self.generator, "discriminator": self.discriminator, **more}

    def _optimizers(self) -> dict[str, InPlace]:
        more: dict[str, InPlace] = {}
        for technique in self._used:
            more |= technique.optimizers()
        return {"opt_g": self.opt_g, "opt_d": self.opt_d, **more}

    def _lasting(self) -> dict[str, Tensor]:
        """The tensors that the critic's objective and the techniques keep from step to step."""
        keepers: dict[str, critics.Critic | techniques.Technique] = {"critic": self.critic, **self.techniques}
        return {f"{name}.{key}": value for name, keeper in keepers.items() for key, value in keeper.state().items()}


class Ema:
    """Exponential moving average of a network: weights averaged, buffers copied. `model` is the average, in evaluation mode.

    Args:
        model: the network to follow.
        decay: in [0, 1); the share of the old average kept at an update.
        warmup: keep less over the first steps, min(decay, (1 + n) / (10 + n)) after step n, so that the random first weights are
            soon forgotten.

    Source: Yazici et al., "The unusual effectiveness of averaging in GAN training", ICLR 2019, eq. 4.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | Tensor) -> None:
        """After step number `step`; a tensor [] is read by the device when it gets there."""
        averages: list[Any] = list(self.model.parameters())
        parameters: list[Any] = list(model.parameters())
        if not self.warmup:
            torch._foreach_lerp_(averages, parameters, 1.0 - self.decay)
        elif isinstance(step, Tensor):
            gaps = torch._foreach_sub(parameters, averages)  # _foreach_lerp_ with a tensor is a launch for each parameter
            torch._foreach_mul_(gaps, (9.0 / (10.0 + step)).clamp_min(1.0 - self.decay))  # 1 - (1 + n) / (10 + n) = 9 / (10 + n)
            torch._foreach_add_(averages, gaps)
        else:
            torch._foreach_lerp_(averages, parameters, 1.0 - min(self.decay, (1 + step) / (10 + step)))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


@torch.no_grad()
def clip_(parameters: list[Tensor], limit: float) -> None:
    """Clip every entry to [-limit, limit] (Arjovsky et al., "Wasserstein GAN", 2017, algorithm 1)."""
    torch._foreach_clamp_min_(parameters, -limit)
    torch._foreach_clamp_max_(parameters, limit)


@torch.no_grad()
def generate(generator: nn.Module, z: Tensor, *labels: Tensor, chunk: int = 512, dropout: bool = False) -> Tensor:
    """G(z) or G(z, labels) in evaluation mode, in chunks; the mode is put back. `dropout`: that stays as in training."""
    training = generator.training
    for m in generator.modules():
        m.training = dropout and isinstance(m, DROPPING)
    try:
        return torch.cat([generator(*parts) for parts in zip(*(t.split(chunk) for t in (z, *labels)), strict=True)])
    finally:
        generator.train(training)


def _below(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def check_entries(state: dict[str, Any], want: dict[str, Any], op: str = OP) -> None:
    """Refuse a state that does not have exactly the entries of `want`, with their types, shapes and dtypes."""
    for key in sorted(want.keys() ^ state.keys()):
        checks.fail(ValueError, op, "state", f"{'have' if key in want else 'not have'} the entry {key}", "another model's state")
    for key, expected in want.items():
        value = state[key]
        if isinstance(expected, int):
            if type(value) is not int or value < 0:
                checks.fail(ValueError, op, key, "be an int >= 0", repr(value))
        elif not isinstance(value, Tensor) or (value.shape, value.dtype) != (expected.shape, expected.dtype):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            checks.fail(ValueError, op, key, f"be {expected.dtype} {list(expected.shape)}", got)
