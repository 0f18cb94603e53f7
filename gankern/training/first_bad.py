"""first_bad: a training step in which every tensor on the way is looked at, for the first that is not finite."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gankern.training.critics import Critic, Loss
from gankern.training.optimizers import InPlace
from gankern.training.techniques import Technique
from gankern.training.trainer import Trainer


def first_bad(trainer: Trainer, real: Tensor, *labels: Tensor) -> str:
    """Make a step as `trainer.step` does. Returns the name and state of the first tensor that is not finite, or "".

    Looked at, in this order, for each network that is updated: the samples, the terms of its loss, the gradients and the parameters
    after the update. Each look waits for the device.
    """
    plain, look = trainer.critic, _Look()
    names = {p: f"{model}.{name}" for model, net in trainer._models().items() for name, p in net.named_parameters()}

    def update(optimizer: InPlace) -> None:
        parameters: list[Any] = optimizer.parameters
        for p in parameters:
            look(f"the gradient of {names[p]}", p.grad)
        Trainer.update(trainer, optimizer)
        for p in parameters:
            look(f"{names[p]} after its update", p)

    used: Any = tuple(_Shown(technique, name, look) for name, technique in trainer.techniques.items())
    trainer.critic, trainer._used, trainer.update = _Asked(plain, look), used, update  # type: ignore[method-assign]
    try:
        trainer.step(real, *labels)
    finally:
        trainer.critic, trainer._used = plain, tuple(trainer.techniques.values())
        del trainer.update
    return look.found


class _Look:
    """Keeps what it was shown first of all that is not finite."""

    def __init__(self) -> None:
        self.found = ""

    def __call__(self, what: str, tensor: Tensor | None) -> None:
        if self.found or tensor is None or tensor.isfinite().all():
            return
        bad = int((~tensor.isfinite()).sum())
        state = f"is {tensor.item()}" if tensor.numel() == 1 else f"has {bad} of {tensor.numel()} entries that are not finite"
        self.found = f"{what} {state}"


class _Shown:
    """A technique, with a look at what it adds to the generator's loss."""

    def __init__(self, technique: Technique, name: str, look: _Look) -> None:
        self.technique, self.name, self.look = technique, name, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self.technique, name)

    def term(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Tensor | None:
        term = self.technique.term(fake, real, *labels)
        self.look(f"the {self.name} term of the generator's loss", term)
        return term


class _Asked(Critic):
    """The way to ask a critic, with a look at what goes in and comes out."""

    def __init__(self, critic: Critic, look: _Look) -> None:
        self.critic, self.look, self.learns, self.loss = critic, look, critic.learns, critic.loss

    def discriminator(self, real: Tensor, fake: Tensor, *labels: Tensor) -> Loss:
        self.look("the batch of real samples", real)
        self.look("the batch of generated samples", fake)
        return self.terms("the discriminator's loss", self.critic.discriminator(real, fake, *labels))

    def generator(self, fake: Tensor, real: Tensor, *labels: Tensor) -> Loss:
        return self.terms("the generator's loss", self.critic.generator(fake, real, *labels))

    def terms(self, name: str, loss: Any) -> Loss:
        """Its own parts if it tells them, else the sums that it is made of, the innermost first."""
        sums = [loss]
        while hasattr(sums[-1], "term"):
            sums.append(sums[-1].out)
        for part in ("adversarial", "penalty"):
            self.look(f"the {part} term of {name}", getattr(sums[-1], part, None))
        for one in reversed(sums[1:]):
            self.look(f"the adversarial term of {name}", one.value)
        for one in reversed(sums[:-1]):
            self.look(f"a term added to {name}", one.term)
        self.look(name, loss.value)
        return loss
