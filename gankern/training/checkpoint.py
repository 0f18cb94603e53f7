"""Checkpoints: a directory with tensors.safetensors and state.json. Nothing is pickled, so loading one runs no code.

A checkpoint is written under a temporary name, flushed to the disk and renamed: one that has its final name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from gankern import checks

OP = "checkpoint"
FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the flat dict `state`: tensors of any device to tensors.safetensors, all else, which must fit JSON, to state.json.

    An older checkpoint of the same name is replaced.

    Raises:
        OSError: it cannot be written; nothing of an older checkpoint is lost then.
    """
    from safetensors.torch import save_file

    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    try:
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
        rest = {"format": FORMAT, **{k: v for k, v in state.items() if not isinstance(v, Tensor)}}
        save_file(tensors, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(rest, indent=1) + "\n")
        for name in (TENSORS, STATE, ""):
            _sync(temporary / name)
        temporary.chmod(0o755)
        old = path.with_name(f".old-{path.name}")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """What `save` was given, on the CPU; only the tensors whose names start with one of `prefixes`.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of a later format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        rest = json.loads((path / STATE).read_text())
        with safe_open(path / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{OP}: {path} must be readable, got: {error.strerror or error}") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{OP}: {path} must be undamaged, got: {error}") from error
    if not isinstance(rest, dict) or rest.pop("format", None) != FORMAT:
        checks.fail(ValueError, OP, str(path), f"have format {FORMAT}", "another one")
    return rest | tensors
