"""A cheaper `Function.apply`.

For a Function with `setup_context`, `Function.apply` inspects the signature of `forward` at every call to fill in default
arguments: 15 us of 25 us for a small op (torch 2.13). Ours have none, so outside torch.func transforms and torch.compile the call
goes straight to the method under it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from gankern import backend, checks


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`; every argument of `function.forward` must be given.

    Raises:
        RuntimeError: a kernel in torch.func inside torch.compile, where its second derivative would silently be zero (torch 2.13).
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        wanted = "be chosen automatically or be 'reference' for torch.func inside torch.compile"
        checks.fail(RuntimeError, "gankern", "backend", wanted, repr(backend.forced()))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
