"""load: one word or path -> ImageData. Which reader a source needs is seen here; the readers know one format each."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gankern import checks
from gankern.data.arrays import ARRAY_SUFFIXES, read_arrays
from gankern.data.folder import read_folder
from gankern.data.idx import find_idx, read_idx
from gankern.data.images import OP, ImageData, to_channels, to_size

MNIST = Path(__file__).with_name("mnist.npz")
SPLITS = ("train", "test")


def load(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    limit: int | None = None,
) -> ImageData:
    """Read a whole image data set into memory.

    Sources:
        "mnist": the digits that come with the package, [60 000 or 10 000, 1, 28, 28] with labels ("./mnist" is a folder).
        A folder of pictures (.png .jpg .jpeg .webp .bmp), searched recursively, in the order of their paths. Orientation tags are
            obeyed, transparent areas are laid over white, 16-bit grey is reduced to 8. Where all lie in two or more sub-folders,
            these are the classes. A folder with the sub-folders train and test is read from the one that `split` names.
            Broken files are left out and named in `skipped`, as are those beyond Pillow's limit, Image.MAX_IMAGE_PIXELS.
        A folder with IDX files named as MNIST's, or the path of one IDX images file, gzipped or not; the labels file is looked for
            beside it (train-images-idx3-ubyte -> train-labels-idx1-ubyte).
        A .npz file: images under x_train (or x_test, by `split`), images, samples or x, or as its only array; labels under y_train
            (y_test), labels or y. A .npy file: the images. Nothing pickled is ever loaded. Images are [N, H, W], [N, H, W, C] or
            [N, C, H, W] with C 1 or 3, uint8, or floating in [0, 1] or [-1, 1]: without a negative value they are taken for [0, 1].

    Args:
        source: see above.
        size: side of the images; each is cropped to the largest centred square and resized with antialiasing. None keeps their
            size, and needs pictures that are all equally large.
        channels: 1 (colour becomes luma) or 3 (grey is repeated); None keeps what is there (in a folder 3 if any has colour).
        split: "train" or "test", for sources that have both parts; all else is "train".
        limit: take the first `limit` images only.

    Returns:
        The images as uint8, or as float32 in [-1, 1] where the source is floating.

    Raises:
        ValueError: a source that is missing, broken, empty, without that split, or of another shape or range.
        TypeError: an argument of another type, or images of another dtype.
        RuntimeError: a folder of pictures, and Pillow is not installed.
    """
    if not isinstance(source, (str, os.PathLike)):
        checks.fail(TypeError, OP, "source", "be a str or a path", type(source).__name__)
    if size is not None:
        checks.integer(OP, "size", size, 1)
    if limit is not None:
        checks.integer(OP, "limit", limit, 1)
    checks.one_of(OP, "channels", channels, (None, 1, 3))
    checks.one_of(OP, "split", split, SPLITS)
    if source == "mnist":
        data = replace(read_arrays(MNIST, split), note=f"the {split} digits of MNIST")
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            if all((path / part).is_dir() for part in SPLITS):
                path, split = path / split, "train"
            idx = find_idx(path, split)
            if idx is None:
                _only_train(split)
                return read_folder(path, size, channels, limit)
            data = read_idx(idx)
        elif not path.is_file():
            wanted = "be mnist, a folder of pictures, an IDX file or a .npz or .npy file"
            checks.fail(ValueError, OP, "source", wanted, f"{str(source)!r}, which does not exist")
        elif path.suffix.lower() in ARRAY_SUFFIXES:
            data = read_arrays(path, split)
        else:
            _only_train(split)
            data = read_idx(path)
    images = data.images[:limit]
    if channels is not None:
        images = to_channels(images, channels)
    if size is not None:
        images = to_size(images, size)
    return replace(data, images=images, labels=None if data.labels is None else data.labels[:limit])


def _only_train(split: str) -> None:
    if split != "train":
        checks.fail(ValueError, OP, "split", "be train for a source that has no test part", split)
