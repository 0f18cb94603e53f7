"""Checkpoints: one safetensors file each. Nothing is pickled, so loading one runs no code.

What is no tensor stands as JSON in the file's metadata, with the CRC-32 of each tensor and of itself, all of which `load` checks.
(On a core of the CI machine: CRC-32 3.9 GB/s, SHA-256 1.4 GB/s, BLAKE2b 0.8 GB/s.) A file is written under a temporary name,
flushed to the disk and renamed: one that has its final name is complete.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankern import checks
from gankern.training.files import replacing

OP = "checkpoint"
FORMAT = 2
KEY = "gankern"  # of the metadata; one entry, as safetensors writes several in any order


class Damaged(ValueError):
    """A checkpoint whose bytes are not those that were written."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the flat dict `state` of tensors of any device, and of all else that fits JSON. The same state gives the same bytes.

    An older checkpoint of the same name is replaced.

    Raises:
        OSError: it cannot be written; an older checkpoint is as it was then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    content = json.dumps({"format": FORMAT, "state": rest, "crc32": {k: _crc(v) for k, v in sorted(tensors.items())}})
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {KEY: f"{zlib.crc32(content.encode()):08x}{content}"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(0o644)  # as other files; safetensors leaves them to their owner


def load(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """What `save` was given, on the CPU; only the tensors whose names start with one of `prefixes`.

    Raises:
        Damaged: it is.
        ValueError: it is missing, cannot be read, or is of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(KEY, "")
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{OP}: {path} must be readable, got: {error.strerror or error}") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise Damaged(f"{OP}: {path} must be undamaged, got: {error}") from error
    if not entry:
        checks.fail(ValueError, OP, str(path), "be written by gankern", "another safetensors file")
    total, text = entry[:8], entry[8:]
    if total != f"{zlib.crc32(text.encode()):08x}":
        checks.fail(Damaged, OP, str(path), "be undamaged", "another checksum of what is no tensor")
    try:
        content = json.loads(text)
        kind, rest, sums = content["format"], dict(content["state"]), dict(content["crc32"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{OP}: {path} must hold what gankern writes, got {type(error).__name__}: {error}") from error
    if kind != FORMAT:
        checks.fail(ValueError, OP, str(path), f"have format {FORMAT}", kind)
    sums = {k: v for k, v in sums.items() if k.startswith(prefixes)}
    for key in sorted(sums.keys() | tensors.keys()):
        if key not in sums or key not in tensors or _crc(tensors[key]) != sums[key]:
            checks.fail(Damaged, OP, str(path), "be undamaged", f"another checksum of {key}")
    return rest | tensors


def load_newest(paths: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> tuple[Path, dict[str, Any], list[str]]:
    """The first of `paths` (at least one) that is whole, what `load` gives of it, and why those before it were passed over.

    Raises:
        ValueError: all are damaged; or one before the first whole one cannot be read, or is of another format: it may be good.
    """
    damaged: list[str] = []
    for path in paths:
        try:
            return path, load(path, prefixes), damaged
        except Damaged as error:
            damaged.append(str(error))
    raise ValueError(damaged[0] if len(damaged) == 1 else f"{OP}: one of {len(damaged)} must be undamaged, got: {damaged[0]}")


def _crc(tensor: Tensor) -> int:
    """Of dtype, shape and bytes."""
    head = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, head)
