"""A folder of pictures as image data: decoded by Pillow in a few threads, broken files left out and named."""

from __future__ import annotations

import contextlib
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gankern import checks
from gankern.data.dataset import OP, Dataset
from gankern.data.images import to_channels, to_size

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow goes by content, and has an external program run what is PostScript
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
LARGE = 25_000_000  # pixels; such pictures are decoded one at a time, as each takes up to 8 bytes a pixel
_one_large = threading.Lock()


def read_folder(root: Path, size: int | None, channels: int | None, limit: int | None) -> Dataset:
    """Read every picture below `root`; see `load` for the rules."""
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError('data: Pillow must be installed to read pictures, got none (pip install "gankern[train]")') from None
    found = (
        path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    files = sorted(path.relative_to(root) for path in found)
    if not files:
        checks.fail(ValueError, OP, "source", f"hold pictures ({' '.join(SUFFIXES)}) or IDX files", f"none in {root}")

    seen: list[Path] = []
    kept: list[Path] = []
    pictures: list[Tensor] = []
    skipped: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        while batch := files[len(seen) :][: None if limit is None else limit - len(kept)]:  # as many as are still wanted
            seen += batch
            for file, picture in zip(batch, pool.map(lambda file: _read(root / file, size, channels), batch), strict=True):
                if isinstance(picture, str):
                    skipped.append(f"{file}: {picture}")
                    continue
                if size is None and pictures and picture.shape[1:] != pictures[0].shape[1:]:
                    pool.shutdown(wait=False, cancel_futures=True)
                    (h0, w0), (h, w) = pictures[0].shape[1:], picture.shape[1:]
                    wanted = "be given where pictures differ in size"
                    checks.fail(ValueError, OP, "size", wanted, f"None, {kept[0]} of {w0} x {h0} and {file} of {w} x {h}")
                kept.append(file)
                pictures.append(picture)
    if not kept:
        checks.fail(
            ValueError, OP, "source", "hold a picture that can be read", f"{len(skipped)} broken in {root}, first {skipped[0]}"
        )

    if channels is None:
        channels = max(len(picture) for picture in pictures)
    images = torch.empty(len(pictures), channels, *pictures[0].shape[1:], dtype=torch.uint8)
    for i in range(len(pictures)):
        images[i], pictures[i] = pictures[i], pictures[i][:0]  # frees each as it goes, so that memory holds the data once
    folders = sorted({file.parts[0] for file in seen if len(file.parts) > 1})
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    note = f"{len(kept)} pictures"
    if len(folders) > 1 and all(len(file.parts) > 1 for file in seen):
        index = {name: i for i, name in enumerate(folders)}
        labels, classes = torch.tensor([index[file.parts[0]] for file in kept]), tuple(folders)
        note += f", {len(classes)} classes from sub-folders"
    return Dataset(images, labels, root.resolve().name, classes, tuple(skipped), note)


def _read(path: Path, size: int | None, channels: int | None) -> Tensor | str:
    """One picture as uint8 [C, H, W], at its size and kind where these are None; or in words why it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            Image.open(path, formats=FORMATS) as image,
            _one_large if image.width * image.height > LARGE else contextlib.nullcontext(),
        ):
            pixels = torch.from_numpy(_pixels(image))
    except UnidentifiedImageError:
        return f"no picture of a kind that is read ({', '.join(FORMATS)})"
    except Exception as error:  # a decoder fed with broken data raises nearly anything
        return f"{error}" or type(error).__name__
    picture = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    if size is not None:
        picture = to_size(picture.unsqueeze(0), size).squeeze(0)
    return (picture if channels is None else to_channels(picture.unsqueeze(0), channels).squeeze(0)).contiguous()


def _pixels(image: Image.Image) -> np.ndarray:
    """Decode: upright, over white, 8 bits; uint8 [H, W] or [H, W, 3]."""
    from PIL import Image, ImageOps

    grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: 0 to 65535
        return ((np.asarray(image).astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("L" if grey else "RGB"))
