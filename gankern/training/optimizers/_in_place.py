"""InPlace: what the optimisers of a step have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gankern import checks

Slots = dict[str, list[Tensor]]
Ahead = tuple[list[Tensor], Slots]


class InPlace(torch.optim.Optimizer, ABC):
    """An optimiser of torch.optim whose state exists from the start and stays where it is, updated by a few native calls.

    A subclass names its state (`names`, and `counted` if it counts steps) and its further settings (`rule`), and gives the update
    twice: `apply`, in place, and `ahead`, the same rule as a differentiable function.

    Attributes:
        parameters: those of the network that require a gradient.
        slots: name -> one tensor for each parameter.
        count: steps made, float32 [], one tensor for all parameters.
    """

    names: tuple[str, ...] = ()
    counted = False
    rule: tuple[str, ...] = ()
    parameters: list[Tensor]
    slots: Slots
    count: Tensor

    def begin(self, parameters: Iterable[nn.Parameter], lr: float, capturable: bool) -> tuple[list[Tensor], Any]:
        """What the class of torch.optim is made with: the parameters, all on one device, and the rate, a tensor if capturable."""
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.count = torch.zeros((), device=device)
        self.slots = {name: [torch.zeros_like(p) for p in self.parameters] for name in self.names}
        return self.parameters, torch.tensor(float(lr), device=device) if capturable else float(lr)

    def fill(self) -> None:
        """Let torch.optim know the state."""
        for i, p in enumerate(self.parameters):
            if self.counted or self.names:
                self.state[p] = ({"step": self.count} if self.counted else {}) | {n: v[i] for n, v in self.slots.items()}

    @abstractmethod
    def apply(self, parameters: list[Tensor], gradients: list[Any], slots: Sequence[list[Tensor]]) -> None:
        """One step, in place, of the parameters given."""

    @abstractmethod
    def ahead(self, parameters: list[Tensor], gradients: Sequence[Tensor], slots: Slots, count: Tensor) -> Ahead:
        """The parameters and the state after step number `count`, as differentiable functions; nothing is changed."""

    @torch.no_grad()
    def update(self) -> None:
        """One step from the gradients that are there. A parameter without one stays as it is."""
        parameters, slots = self.parameters, list(self.slots.values())
        gradients: list[Any] = [p.grad for p in parameters]
        if any(g is None for g in gradients):
            kept = [i for i, g in enumerate(gradients) if g is not None]
            parameters, gradients, *slots = ([values[i] for i in kept] for values in (parameters, gradients, *slots))
        self.count.add_(1)
        self.apply(parameters, gradients, slots)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """`update`; a closure is not called (TypeError if one is given)."""
        if closure is not None:
            checks.fail(TypeError, type(self).__name__, "closure", "be None", "one")
        self.update()

    def forget(self) -> None:
        """zero_grad: every gradient is None afterwards, so that the next backward pass writes instead of adding."""
        for p in self.parameters:
            p.grad = None

    @property
    def lr(self) -> Any:
        return self.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """The learning rate of the updates to come, of replayed ones too."""
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            self.param_groups[0]["lr"] = float(lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's while it is made; one group is all that there is (ValueError for another)."""
        if self.param_groups:
            checks.fail(ValueError, type(self).__name__, "param_group", "be the only one", "a second")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, into the tensors that are there; of any such optimiser that has made a step of every parameter.

        Raises:
            ValueError: a state of other parameters, or without a step.
        """
        slots, (group,) = state_dict["state"], state_dict["param_groups"]
        wanted = [[tuple(p.shape)] * len(self.names) for p in self.parameters] if self.names else []
        found = [[tuple(s.get(name, torch.empty(0)).shape) for name in self.names] for s in slots.values()] if self.names else []
        if wanted != found:
            words = f"hold the state of {len(wanted)} parameters of these shapes"
            checks.fail(ValueError, type(self).__name__, "state_dict", words, "another one's")
        self.load_slots(slots)
        self.set_lr(float(group["lr"]))
        self.param_groups[0].update({name: group[name] for name in self.rule})

    @torch.no_grad()
    def load_slots(self, slots: dict[int, dict[str, Tensor]]) -> None:
        """Copy saved state (slots of parameter 0, 1, ... by name) into the tensors that are there."""
        for index, p in enumerate(self.parameters):
            for name, value in self.state[p].items():
                value.copy_(slots[index][name])


def root(squares: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0: there the average that is divided by it is 0 too."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
