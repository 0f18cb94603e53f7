"""Which backend runs: the only file that looks at environment variables, devices and what is built.

Three names. `reference` is plain PyTorch and runs anywhere. `compiled` is the C++ library (`gankern._C` for the CPU,
`gankern/_cuda*.so` for CUDA). `triton` needs the triton package and a CUDA device, or TRITON_INTERPRET=1 for CPU tensors.
The automatic choice is made per op, in the op's own file, beside the measurement that justifies it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAMES = ("reference", "compiled", "triton")
_HERE = Path(__file__).parent


def _check_name(source: str, name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: name must be one of {', '.join(NAMES)}, got {name!r}")
    return name


# The name that is forced, or "auto". A global and not a context variable: torch.compile can read and guard it, and it is cheap.
# What GANKERN_BACKEND asks for is checked when an op first asks, so that a bad name is an error of the op and not of the import.
_name = os.environ.get("GANKERN_BACKEND", "") or "auto"


def automatic() -> bool:
    """Whether the choice is ours."""
    return _name == "auto"


def forced() -> str | None:
    """The name that the user forced, or None: the automatic choice.

    Raises:
        ValueError: GANKERN_BACKEND is no backend's name.
    """
    return None if _name == "auto" else _check_name("GANKERN_BACKEND", _name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the `with` block, in every thread; one that cannot run raises RuntimeError.

    Args:
        name: "reference", "compiled" or "triton".

    Raises:
        ValueError: `name` is none of these.
    """
    global _name
    before, _name = _name, _check_name("use_backend", name)
    try:
        yield
    finally:
        _name = before


# --- what is built -------------------------------------------------------------------------------------------------------


def _load_cpu() -> str:
    """Import gankern._C, which registers the CPU ops. Returns "" on success, else the reason in words."""
    if importlib.util.find_spec("gankern._C") is None:
        return "not built (install with a C++17 compiler: make build)"
    try:
        import gankern._C  # noqa: F401
    except ImportError as error:
        return f"built but broken: {error}"
    return ""


def cuda_library() -> Path | None:
    """The CUDA library that setup.py built, or None."""
    return next(iter(sorted(_HERE.glob("_cuda*.so"))), None)


def _load_cuda() -> str:
    path = cuda_library()
    if path is None:
        return "not built (needs nvcc and a CUDA build of torch: make build)"
    if torch.version.cuda is None:
        return f"built, but torch {torch.__version__} has no CUDA"
    if CPU_PROBLEM:
        return f"needs gankern._C, which is {CPU_PROBLEM}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built but broken: {error}"
    return ""


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CPU_PROBLEM = _load_cpu()
CUDA_PROBLEM = _load_cuda()


def compiled_problem(device_type: str) -> str:
    """Why the C++ library cannot run on this device type ("cpu", "cuda" ...), or "" if it can."""
    if device_type not in ("cpu", "cuda"):
        return f"there is no C++ kernel for {device_type} tensors"
    problem = CPU_PROBLEM if device_type == "cpu" else CUDA_PROBLEM
    return f"the C++ library for {device_type} is {problem}" if problem else ""


def triton_interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter (TRITON_INTERPRET=1, read when kernels are first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_problem(device_type: str) -> str:
    """Why Triton cannot run on this device type, or "" if it can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device_type == "cpu" and not triton_interpreted():
        return "Triton runs on CPU tensors only under its interpreter (set TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels do not run on {device_type} tensors"
    return ""


def problem(name: str, device_type: str) -> str:
    """Why backend `name` cannot run on this device type, or "" if it can."""
    if name == "compiled":
        return compiled_problem(device_type)
    return triton_problem(device_type) if name == "triton" else ""


def preferred(device_type: str) -> str:
    """The first of "compiled" and "triton" that can run on this device type, else "reference"."""
    return "compiled" if not compiled_problem(device_type) else "triton" if not triton_problem(device_type) else "reference"


def require(op: str, name: str, device_type: str) -> str:
    """Return `name` if it can run, else raise RuntimeError saying why it cannot: a forced backend never falls back."""
    why = problem(name, device_type)
    if why:
        raise RuntimeError(f"{op}: backend must be able to run on {device_type} tensors, got {name!r}: {why}")
    return name
