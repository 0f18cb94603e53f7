"""What the commands share: refusals in one sentence, the argument parser, the extra packages."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from gankern import backend


class Refused(Exception):
    """Bad input. Its message is the one sentence that the user sees; the exit status is 2."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what bad input raises into Refused. For the preparation of a command only: a fault in its work shows its traceback."""
    try:
        yield
    except FileExistsError as error:  # of a directory that was to be made
        raise Refused(f"{error.filename} must be a folder, got a file") from error
    except OSError as error:
        raise Refused(f"{error.strerror or error}: {error.filename}" if error.filename else str(error)) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refused(" ".join(str(error).split())) from error


class Parser(argparse.ArgumentParser):
    """argparse, with errors as Refused."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (see {self.prog} --help)")


def need(*modules: str, extra: str = "train") -> None:
    """Refuse if a module of an extra is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f'{", ".join(missing)} must be installed for this: pip install "gankern[{extra}]"')


def pick_device(name: str) -> torch.device:
    """The device of --device; "auto" is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such device here, or a forced backend cannot run on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda[:number], got {name!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda[:number], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be one that torch {torch.__version__} sees ({count} CUDA devices), got {name!r}")
    forced = backend.forced()
    if forced is not None:
        backend.require("gankern", forced, device.type)
    return device
