"""Trainer: one adversarial step. It computes; it prints nothing, writes nothing and never waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankern import checks
from gankern.losses import GANLoss
from gankern.models import sample_latent
from gankern.ops.gan_loss import GanLoss
from gankern.training import precision
from gankern.training.config import TrainConfig

OP = "Trainer"


class Trainer:
    """The GAN loop of Goodfellow et al. (2014, algorithm 1, one critic step), without the work that it does not need.

    One batch of fakes a step: the critic learns from it detached, then the generator learns from the very same batch through the
    updated critic. The critic's step builds no generator graph, the generator's step computes no critic weight gradient, and real
    and fake go through the critic in one pass where that changes nothing.

    Args:
        generator: z [B, z_dim] -> samples [B, ...].
        discriminator: samples -> logits, one a sample.
        config: rates, labels, latent law, EMA, precision and seed are read.
        device: where both networks are moved.
        one_pass: whether real and fake may share one pass through the critic. None: yes, unless it has a BatchNorm. A critic whose
            samples see each other in another way needs False.

    Random numbers: z comes from `self.rng`, seeded with config.seed + 1; dropout from PyTorch's default generator. Both are in
    `state_dict`, so that a resumed run repeats an uninterrupted one, on the CPU bit for bit.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        one_pass: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        precision.check(config.precision, self.device)
        self.config = config
        self.generator = generator.to(self.device).train()
        self.discriminator = discriminator.to(self.device).train()
        self.loss = GANLoss(config.objective, config.real_label, config.fake_label)
        betas = (config.beta1, config.beta2)
        self.opt_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=betas, fused=True)
        self.opt_d = torch.optim.Adam(discriminator.parameters(), lr=config.lr_d, betas=betas, fused=True)
        self.ema = Ema(generator, config.ema, config.ema_warmup) if config.ema > 0.0 else None
        self.rng = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.one_pass = not any(isinstance(m, _BatchNorm) for m in discriminator.modules()) if one_pass is None else one_pass
        self.critic_parameters = [p for p in discriminator.parameters() if p.requires_grad]
        self.steps_done = 0

    def step(self, real: Tensor) -> dict[str, Tensor]:
        """One step of the critic, one of the generator.

        Args:
            real: training samples, float32 [B, ...] on the trainer's device.

        Returns:
            Detached scalars on the device: d_loss, d_real = D(x), d_fake = D(G(z)) of the critic before its update, and g_loss
            after it.
        """
        with precision.products(self.config.precision, self.device):
            with self.autocast():
                fake = self.generator(self.noise(len(real)))
            d = self.discriminator_step(real, fake.detach())
            g = self.generator_step(fake)
        if self.ema is not None:
            self.ema.update(self.generator, self.steps_done)
        self.steps_done += 1
        return {"d_loss": d.value, "g_loss": g.value, "d_real": d.d_real, "d_fake": d.d_fake}

    def discriminator_step(self, real: Tensor, fake: Tensor) -> GanLoss:
        with self.autocast():
            if self.one_pass:
                out = self.loss.discriminator_from(self.discriminator(torch.cat([real, fake])), len(real))
            else:
                out = self.loss.discriminator(self.discriminator(real), self.discriminator(fake))
        self.opt_d.zero_grad(set_to_none=True)
        out.backward()
        self.opt_d.step()
        return out

    def generator_step(self, fake: Tensor) -> GanLoss:
        with frozen(self.critic_parameters), self.autocast():
            out = self.loss.generator(self.discriminator(fake))
        self.opt_g.zero_grad(set_to_none=True)
        out.backward()
        self.opt_g.step()
        return out

    def noise(self, n: int) -> Tensor:
        return sample_latent(n, self.config.z_dim, self.config.latent, self.rng, self.device)

    def autocast(self) -> Any:
        return precision.autocast(self.config.precision, self.device)

    def sample(self, z: Tensor) -> Tensor:
        """G(z) in evaluation mode and float32, of the EMA weights if there are any; z is [N, z_dim] on any device."""
        return generate(self.generator if self.ema is None else self.ema.model, z.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: a flat dict of tensors and ints."""
        state: dict[str, Any] = {"step": self.steps_done, "rng.noise": self.rng.get_state(), "rng.default": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, model in self._models().items():
            state |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            for index, slots in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{slot}": value for slot, value in slots.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for a trainer of the same settings and device type.

        Raises:
            ValueError: an entry is missing, left over, or of another shape or dtype; nothing has been loaded then.
        """
        models, optimizers = self._models(), self._optimizers()
        want = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
        if state.get("step"):
            for name, optimizer in optimizers.items():
                for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                    want |= {f"{name}.{index}.step": torch.zeros(()), f"{name}.{index}.exp_avg": p, f"{name}.{index}.exp_avg_sq": p}
        want |= {key: value for key, value in self.state_dict().items() if key == "step" or key.startswith("rng.")}
        _check_entries(state, want)
        self.steps_done = state["step"]
        self.rng.set_state(state["rng.noise"])
        torch.set_rng_state(state["rng.default"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng.cuda"], self.device)
        for name, model in models.items():
            model.load_state_dict(_below(state, name))
        for name, optimizer in optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(state, name).items():
                number, slot = key.split(".")
                slots.setdefault(int(number), {})[slot] = value
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})

    def _models(self) -> dict[str, nn.Module]:
        ema = {} if self.ema is None else {"ema": self.ema.model}
        return {"generator": self.generator, "discriminator": self.discriminator, **ema}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"opt_g": self.opt_g, "opt_d": self.opt_d}


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
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, graphs are built as if these parameters were constants: no gradient is computed for them.

    `backward(inputs=...)` asks native layers for no more, and was measured as fast, but an autograd Function in Python still
    computes its bias gradient then.
    """
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@torch.no_grad()
def generate(generator: nn.Module, z: Tensor, chunk: int = 512) -> Tensor:
    """G(z) in evaluation mode, in chunks; the mode is put back."""
    training = generator.training
    generator.eval()
    try:
        return torch.cat([generator(part) for part in z.split(chunk)])
    finally:
        generator.train(training)


def _below(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _check_entries(state: dict[str, Any], want: dict[str, Any]) -> None:
    """Refuse a state that does not have exactly the entries of `want`, with their types, shapes and dtypes."""
    for key in sorted(want.keys() ^ state.keys()):
        checks.fail(ValueError, OP, "state", f"{'have' if key in want else 'not have'} the entry {key}", "another model's state")
    for key, expected in want.items():
        value = state[key]
        if isinstance(expected, int):
            if type(value) is not int or value < 0:
                checks.fail(ValueError, OP, key, "be an int >= 0", repr(value))
        elif not isinstance(value, Tensor) or (value.shape, value.dtype) != (expected.shape, expected.dtype):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            checks.fail(ValueError, OP, key, f"be {expected.dtype} {list(expected.shape)}", got)
