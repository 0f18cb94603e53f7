"""What watches a run's health while it trains, and what brings it back after a divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gankern.training import distributed
from gankern.training.first_bad import first_bad
from gankern.training.health import Monitor, Sign, advice
from gankern.training.run_dir import VITALS
from gankern.training.vitals import Examiner, Vitals

if TYPE_CHECKING:
    from gankern.cli.fit import Ready, Reporter


class Health:
    """Looks at a run's vitals every `health_every` steps: vitals.jsonl has them all, health.jsonl the signs that begin."""

    def __init__(self, ready: Ready) -> None:
        self.every, self.ready = ready.config.health_every, ready
        self.monitor = Monitor(ready.config)
        self.examiner: Examiner | None = None
        self.before = [value for key, value in ready.watched.items() if key.startswith("samples.")]
        for row in ready.run.rows(VITALS) if self.every else ():
            if (vitals := Vitals.read(row)) is not None:
                self.monitor.look(vitals)

    def look(self, reporter: Reporter) -> str:
        ready, step = self.ready, self.ready.trainer.steps_done
        if step < self.every:
            return ""  # the first samples of every run are alike
        with reporter.off_the_clock():
            if self.examiner is None:
                self.examiner = Examiner(ready.trainer, ready.dataset, ready.classes)
                self.examiner.go_on(self.before)
            if not self.examiner.scale:
                return ""  # real samples that are all the same
            since = self.monitor.history[-1].step if self.monitor.history else 0
            vitals = self.examiner.look([row for row in reporter.recent if row["step"] > since])
            if vitals is None:
                reporter.bad = f"a generated sample is not finite at step {step}"
                return ""
            numbers = {name: value for name, value in vitals._asdict().items() if value is not None}
            ready.run.log(numbers, VITALS)
            for name, value in numbers.items():
                if isinstance(value, float):
                    reporter.board.add_scalar(f"health/{name}", value, step)
            for sign in self.monitor.look(vitals):
                reporter.warn(step, sign)
        return ""

    def state(self) -> dict[str, Tensor]:
        before = self.before if self.examiner is None else self.examiner.before
        return {f"samples.{i}": points for i, points in enumerate(before)}


class LastGood:
    """The state of a run when its losses were all finite, on the trainer's device, and the way back to it.

    Args:
        ready: of the run, as it is: the first state kept.
    """

    def __init__(self, ready: Ready) -> None:
        self.ready, self.used = ready, ready.watched.get("rollbacks", 0)
        self._remember(ready.seconds)

    def keep(self, seconds: float) -> str:
        """Keep the present state, after `seconds` of training. Returns which parameter is not finite, in words, or ""."""
        trainer = self.ready.trainer
        for role, net in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
            parameters = dict(net.named_parameters())
            sizes = torch._foreach_norm([p.detach() for p in parameters.values()], torch.inf)
            for name, size in zip(parameters, torch.stack(sizes).tolist() if sizes else (), strict=True):
                if not size < torch.inf:
                    return f"{role}.{name} is not finite after step {trainer.steps_done}"
        self._remember(seconds)
        return ""

    def state(self) -> dict[str, int]:
        return {"rollbacks": self.used}

    def _remember(self, seconds: float) -> None:
        if self.ready.config.rollbacks:
            state = self.ready.trainer.state_dict()
            self.good = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            self.position, self.seconds = self.ready.batches.state_dict(), seconds

    def back(self, reporter: Reporter) -> bool:
        """After `reporter.bad`: go back, forget what came since, and draw other random numbers from there.

        Returns:
            Whether the run may go on. If not, what was kept is saved as a checkpoint, and reporter.bad stays.
        """
        config, trainer, bad = self.ready.config, self.ready.trainer, reporter.bad
        if not config.rollbacks or distributed.world_size() > 1:  # the other processes would not go back
            return False
        cause = self._cause(min(int(self.ready.engine.losses.first_bad), trainer.steps_done))
        self._restore()
        step = trainer.steps_done
        reporter.rewind(step, self.seconds)
        saw = f"training diverged: {bad}; {cause}"
        if self.used >= config.rollbacks:
            reporter.warn(step, Sign("divergence", f"{saw}; it has gone back {self.used} times", advice("divergence", config)))
            self.used = 0  # whoever goes on from here has all of them again
            if step:
                reporter.save()
            reporter.bad = bad
            return False
        self.used += 1
        seed = int(torch.randint(2**62, (self.used,), generator=trainer.rng, device=trainer.device)[-1])
        trainer.rng.manual_seed(seed)
        torch.manual_seed(seed)
        words = f"{saw}; back to step {step} with other noise, {self.used} of {config.rollbacks} times"
        reporter.warn(step, Sign("divergence", words, advice("divergence", config)))
        return True

    def _restore(self) -> None:
        self.ready.trainer.load_state_dict(self.good)
        self.ready.batches.load_state_dict(self.position)

    def _cause(self, bad: int) -> str:
        """Make the steps since the state kept once more, and look at every tensor of step `bad` and the one before."""
        self._restore()
        trainer, engine, batches = self.ready.trainer, self.ready.engine, self.ready.batches
        parameters, found = [*trainer.generator.parameters(), *trainer.discriminator.parameters()], ""
        gradients = [p.grad for p in parameters]  # into which a graph writes
        while trainer.steps_done < bad and not found:
            batch = engine.gather(batches.indices())
            if trainer.steps_done < bad - 2:
                trainer.step(*batch)
            else:
                found = first_bad(trainer, *batch)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        if found:
            return f"first of all {found}, at step {trainer.steps_done}"
        return "made once more, these steps were all finite"
