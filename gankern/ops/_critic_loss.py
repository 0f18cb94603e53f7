"""What `mlp_critic` and its kin return, and the graph nodes through which it hands its gradients over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import _engine_run_backward

from gankern.ops._outcome import Outcome

OP = "mlp_critic"


class MLPCriticLoss(Outcome):
    """What `mlp_critic` returns: the loss with its parts and statistics, detached, and the gradient of every parameter (of the
    fake samples, from `mlp_critic_generator`).

    `out.backward()` hands the gradients over, as `out.loss.backward()` does, without a pass over them. Nothing else has a
    gradient; a derivative of a higher order raises RuntimeError.
    """

    __slots__ = ("_parameters", "_versions", "adversarial", "grads", "norms", "penalty")

    def __init__(
        self, outputs: Sequence[Tensor], parameters: Sequence[Tensor | None], wanted: Sequence[bool], pending: bool
    ) -> None:
        self._loss, self.adversarial, self.penalty, self.norms, self.stats, *grads = outputs
        found = iter(grads)
        self.grads: tuple[Tensor | None, ...] = tuple(next(found) if w else None for w in wanted)
        self._parameters = tuple(parameters) if pending else None
        self._versions = self._current()

    def _current(self) -> list[int]:
        return [] if self._parameters is None else [p._version for p in self._parameters if p is not None]

    def _take(self) -> tuple[Tensor | None, ...]:
        assert self._parameters is not None
        if self._versions != self._current():
            raise RuntimeError(
                f"{OP}: what gets a gradient must not be changed in place before the backward pass, got changed tensors"
            )
        return self._parameters

    @property
    def loss(self) -> Tensor:
        """adversarial + penalty, scalar, attached to the graph of the parameters (of the fake samples)."""
        if self._parameters is not None:
            pairs = [(p, g) for p, g in zip(self._take(), self.grads, strict=True) if p is not None and g is not None]
            self._parameters = None
            with torch.enable_grad():
                self._loss = _Known.apply(self._loss, len(pairs), *(g for _, g in pairs), *(p for p, _ in pairs))
        return self._loss

    def backward(self) -> None:
        """Add the gradients to the parameters' `.grad`, or send them on into the graph behind them, as `loss.backward()` does.

        Raises:
            RuntimeError: no parameter requires a gradient, or one was changed in place since.
        """
        if self._parameters is None:
            self.loss.backward()
            return
        pairs = [(p, g) for p, g in zip(self._take(), self.grads, strict=True) if p is not None and g is not None]
        self._parameters = None
        through_engine = []
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()  # its hooks sit in the engine
        with torch.no_grad():
            for p, g in pairs:
                hooks = p._backward_hooks or p._post_accumulate_grad_hooks
                if distributed or hooks or not p.is_leaf or not p.is_contiguous():
                    through_engine.append((p, g))
                elif p.grad is None:
                    p.grad = g
                else:
                    p.grad.add_(g)
        if through_engine:
            roots, gradients = zip(*through_engine, strict=True)
            _engine_run_backward(roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


class _Known(Function):
    """The loss as a node of the graph, when the pass has already been made: (loss, n, n gradients, n parameters) -> loss."""

    @staticmethod
    def forward(loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (None, None, *(None,) * ctx.count, *Scaled.apply(g, ctx.count, *ctx.saved_tensors))


class Scaled(Function):
    """g times each of n gradients; the n parameters are inputs so that a second derivative finds this node, and its refusal."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t * g.to(t.dtype) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{OP}: a derivative must be the gradient of a parameter, got one of second order: it is not supported")
