"""NumPy files, .npz and .npy, as images or tables; nothing pickled is loaded."""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gankern import checks
from gankern.data.dataset import OP, Dataset
from gankern.data.limits import unfolded
from gankern.data.tables import standardised

ARRAY_SUFFIXES = (".npz", ".npy")
IMAGE_KEYS = {"train": ("x_train", "images", "samples", "x"), "test": ("x_test",)}
LABEL_KEYS = {"train": ("y_train", "labels", "y"), "test": ("y_test",)}
CHANNELS = (1, 3)
MOST_CLASSES = 1 << 16


def read_arrays(path: Path, split: str, limit: int | None) -> Dataset:
    """Read images or a table, and labels if there are some; see `load` for keys, layouts and ranges."""
    try:
        with path.open("rb") as file:
            _check(path, file)
            loaded = np.load(file, allow_pickle=False)
            arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else loaded
            only = list(arrays)[:1] if len(arrays) == 1 and split == "train" else []
            key = next((k for k in (*IMAGE_KEYS[split], *only) if k in arrays), "")
            label_key = next((k for k in LABEL_KEYS[split] if k in arrays and k != key), "")
            array, labels = (arrays[k] if k else None for k in (key, label_key))
    except Exception as error:  # a reader fed with broken data raises nearly anything
        checks.fail(ValueError, OP, "source", "be an intact NumPy file without pickled objects", f"{path}: {error}")
    if array is None and split == "test":
        checks.fail(ValueError, OP, "split", "be train for a source that has no test part", split)
    if array is None:
        wanted = f"have an array called {', '.join(IMAGE_KEYS[split])}, or only one"
        checks.fail(ValueError, OP, "source", wanted, f"{', '.join(sorted(arrays)) or 'none'} in {path}")
    note = f"{key} {list(array.shape)}"
    if array.ndim == 2 and array.dtype.kind in "fiu" and array.dtype != np.uint8:
        if split == "test":
            checks.fail(ValueError, OP, "split", "be train for a table", split)
        columns = [f"x{i + 1}" for i in range(array.shape[1])]
        data = standardised(array[:limit], columns, path, f"{note} {array.dtype.name}")
    else:
        images, found = _images(array)
        data = Dataset(images[:limit], name=path.stem, note=f"{note} {found}")
    if labels is None:
        return replace(data, note=f"{data.note}, no labels")
    target = _labels(labels, label_key, len(array))
    classes = tuple(map(str, range(int(target.max()) + 1)))
    return replace(data, labels=target[:limit], classes=classes, note=f"{data.note}, labels {label_key}")


def _check(path: Path, file: BinaryIO) -> None:
    """Refuse, before memory is taken, arrays larger than what is there or than a file of this size may unfold to."""
    size, most = path.stat().st_size, unfolded(path)
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as members:
            for member in members.infolist():
                if member.filename.startswith("/") or ".." in PurePosixPath(member.filename).parts:
                    raise ValueError(f"{member.filename} is a path out of the archive")
                if member.filename.endswith(".npy"):
                    with members.open(member) as content:
                        _check_size(member.filename, content, min(member.file_size, most))
    else:
        file.seek(0)
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            file.seek(0)
            _check_size(path.name, file, size)
    file.seek(0)


def _check_size(name: str, file: IO[bytes], most: int) -> None:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > most:
        raise ValueError(f"{name} has the shape {list(shape)} of {dtype}, more than its {most} bytes")


def _images(array: np.ndarray) -> tuple[Tensor, str]:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W] uint8 or float32 in [-1, 1], and in words what it was."""
    shape = array.shape
    first, last = (array.ndim == 4 and shape[axis] in CHANNELS for axis in (1, 3))
    if array.ndim != 3 and first == last:
        got = f"shape {list(shape)}" + (", where both could be C" if first else "")
        checks.fail(ValueError, OP, "images", "have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3", got)
    if array.size == 0:
        checks.fail(ValueError, OP, "images", "hold at least one pixel of one image", f"shape {list(shape)}")
    layout = "grey" if array.ndim == 3 else "channels first" if first else "channels last"
    if array.dtype == np.uint8:
        images, scale = torch.from_numpy(array), "uint8"
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1.0 and high <= 1.0):  # also NaN
            checks.fail(
                ValueError, OP, "images", "be uint8, or floating in [0, 1] or [-1, 1]", f"values in [{low:.4g}, {high:.4g}]"
            )
        images, scale = torch.from_numpy(array.astype(np.float32)), f"{array.dtype.name} in [{'0' if low >= 0 else '-1'}, 1]"
        if low >= 0:
            images.mul_(2.0).sub_(1.0)
    else:
        checks.fail(TypeError, OP, "images", "be uint8 or floating", array.dtype.name)
    if array.ndim == 3:
        images = images.unsqueeze(1)
    elif last:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), f"{scale}, {layout}"


def _labels(array: np.ndarray, key: str, count: int) -> Tensor:
    """[N] or [N, 1] whole numbers >= 0 -> int64 [N]."""
    if array.shape not in ((count,), (count, 1)):
        checks.fail(ValueError, OP, f"labels {key}", f"have shape [{count}], one an image", list(array.shape))
    if array.dtype.kind not in "iu":
        checks.fail(TypeError, OP, f"labels {key}", "be whole numbers", array.dtype.name)
    if array.min() < 0:
        checks.fail(ValueError, OP, f"labels {key}", "be >= 0", int(array.min()))
    if array.max() >= MOST_CLASSES:
        checks.fail(ValueError, OP, f"labels {key}", f"be < {MOST_CLASSES}", int(array.max()))
    return torch.from_numpy(array.reshape(count).astype(np.int64))
