"""IDX files, the format of MNIST: big-endian magic (0, 0, type 8 = uint8, dimensions), one 32-bit size a dimension, then the bytes.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", the section on file formats.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from gankern import checks
from gankern.data.dataset import OP, Dataset
from gankern.data.limits import unfolded

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_CHUNK = 1 << 20


def find_idx(folder: Path, split: str) -> Path | None:
    """The images file of a split in a folder of IDX files named as MNIST's (train-images-idx3-ubyte.gz ...), or None."""
    files = sorted(path for path in folder.glob("*-images*idx3*") if path.is_file())
    return next((path for path in files for prefix in PREFIXES[split] if f"{prefix}-images" in path.name), None)


def read_idx(path: Path) -> Dataset:
    """Read an images file, and the labels file beside it if there is one. [N, H, W] uint8 -> [N, 1, H, W]."""
    images = _read(path, 3).unsqueeze(1)
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    beside = next((p for p in (path.with_name(name), path.with_name(plain), path.with_name(plain + ".gz")) if p.is_file()), None)
    data = Dataset(images, name=path.name.split(".")[0], note=f"IDX images {path.name}, no labels beside it")
    if beside is None or beside == path:
        return data
    labels = _read(beside, 1).to(torch.int64)
    if len(labels) != len(images):
        checks.fail(ValueError, OP, "labels file", f"hold {len(images)} labels, one an image", f"{len(labels)} in {beside}")
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Dataset(images, labels, data.name, classes, note=f"IDX images {path.name} with labels {beside.name}")


def _read(path: Path, dims: int) -> Tensor:
    """The uint8 array of an IDX file with that many dimensions; a header or length that does not fit is refused."""
    kind = "labels" if dims == 1 else "images"
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes((0, 0, 8, dims)):
                wanted = f"be an IDX {kind} file, which begins with the bytes 00 00 08 {dims:02x}"
                checks.fail(ValueError, OP, "source", wanted, f"{path} with {header[:4].hex(' ') or 'nothing'}")
            if len(header) < 4 + 4 * dims:
                checks.fail(ValueError, OP, "source", "hold a whole IDX header", f"{path} of {len(header)} bytes")
            shape = struct.unpack(f">{dims}I", header[4:])
            if zipped and math.prod(shape) > unfolded(path):
                wanted = f"hold at most {unfolded(path)} bytes, as gzipped to {path.stat().st_size}"
                checks.fail(ValueError, OP, "source", wanted, f"the header {list(shape)} in {path}")
            content = bytearray()  # by pieces: a false size in the header must not become an allocation
            while len(content) <= math.prod(shape) and (piece := file.read(_CHUNK)):
                content += piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        checks.fail(ValueError, OP, "source", "be an intact gzip file", f"{path}: {error}")
    if len(content) != math.prod(shape):
        count = f"{len(content)}" if len(content) < math.prod(shape) else "more"
        checks.fail(ValueError, OP, "source", f"hold {math.prod(shape)} bytes after its header {list(shape)}", f"{count} in {path}")
    if not content:
        checks.fail(ValueError, OP, "source", f"hold at least one of its {kind}", f"{path} with header {list(shape)}")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
