"""A CPU stand-in for a CUDA graph: it records the operators of a run and replays them into the very same tensors.

As in a CUDA graph, all that is not an operator (Python numbers, branches, which tensor is used) is that of the recording. Each
operator runs again on the recorded arguments, and what it returns goes into the tensors that it returned then; what it changes
in place, and views, act on the recorded memory. An operator of ours is one entry, whatever it calls inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gankern.training import Trainer


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(not isinstance(leaf, (Tensor, torch.ScriptObject)) and leaf is not None for leaf in tree_leaves(out)):
            raise RuntimeError(f"{func} gives the host a number: a recording cannot follow it")
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            fresh = func(*args, **kwargs)
            for work in (leaf for leaf in tree_leaves(fresh) if isinstance(leaf, torch.ScriptObject)):
                work.wait()  # a sum over processes
            for new, old in zip(tensors(fresh), tensors(recorded), strict=True):
                if new is not old and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def tensors(out: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def record(body: Callable[[], None], rewind: Callable[[], None], trainer: Trainer) -> Recording:
    """In place of `gankern.training.graph.cuda_graph`: unlike that, the recording run happens."""
    rewind()
    body()
    rewind()
    recording = Recording()
    with recording:
        body()
    return recording
