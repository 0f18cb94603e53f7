"""load: one word or path -> Dataset. Which reader a source needs is seen here; the readers know one format each."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gankern import checks
from gankern.data.arrays import ARRAY_SUFFIXES, read_arrays
from gankern.data.dataset import OP, Dataset
from gankern.data.folder import read_folder
from gankern.data.idx import find_idx, read_idx
from gankern.data.images import to_channels, to_size
from gankern.data.stacked import stacked
from gankern.data.tables import read_csv
from gankern.data.toys import TOYS, toy

MNIST = Path(__file__).with_name("mnist.npz")
SPLITS = ("train", "test")
NAMES = ("mnist", "stacked-mnist", *TOYS)  # sources that are no path


def load(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read, or generate, a whole data set into memory.

    Sources:
        "mnist": the digits that come with the package, [60 000 or 10 000, 1, 28, 28] with labels ("./mnist" is a folder).
        "stacked-mnist": 60 000 random triples of these, [N, 3, 28, 28], by `seed`; the label is the number they read, 0 to 999.
        A folder of pictures (.png .jpg .jpeg .webp .bmp), searched recursively, in the order of their paths. Orientation tags are
            obeyed, transparent areas are laid over white, 16-bit grey is reduced to 8. Where all lie in two or more sub-folders,
            these are the classes. A folder with the sub-folders train and test is read from the one that `split` names.
            Broken files are left out and named in `skipped`, as are those beyond Pillow's limit, Image.MAX_IMAGE_PIXELS.
        A folder with IDX files named as MNIST's, or the path of one IDX images file, gzipped or not; the labels file is looked for
            beside it (train-images-idx3-ubyte -> train-labels-idx1-ubyte).
        A .npz file: images under x_train (or x_test, by `split`), images, samples or x, or as its only array; labels under y_train
            (y_test), labels or y. A .npy file: the images. Nothing pickled is ever loaded. Images are [N, H, W], [N, H, W, C] or
            [N, C, H, W] with C 1 or 3, uint8, or floating in [0, 1] or [-1, 1]: without a negative value they are taken for [0, 1].
            An array [N, F] of any other numbers than uint8 is a table.
        A .csv file: a table of numbers, with or without a line of names above. The columns of a table are standardised.
        "ring", "grid", "unrolled-ring", "8gaussians", "25gaussians", "swissroll" (names, not files): 100 000 points in the plane,
            generated from `seed`. ring: 8 Gaussians of s.d. 0.01 on the unit circle; grid: 25 of s.d. 0.05 at {-4, -2, 0, 2, 4}^2
            (PacGAN). unrolled-ring: 8 of s.d. 0.02 at radius 2 (Metz et al.). 8gaussians: s.d. 0.0141 at radius 1.414;
            25gaussians: s.d. 0.0177 at {-1.41, -0.71, 0, 0.71, 1.41}^2; swissroll (WGAN-GP, as in the authors' code).

    Args:
        source: see above.
        size: side of the images; each is cropped to the largest centred square and resized with antialiasing. None keeps their
            size, and needs pictures that are all equally large.
        channels: 1 (colour becomes luma) or 3 (grey is repeated); None keeps what is there (in a folder 3 if any has colour).
        split: "train" or "test", for sources that have both parts; all else is "train".
        limit: take the first `limit` samples only, of a folder the first `limit` pictures that can be read.
        seed: of generated points, >= 0; another one draws others of the same law.

    Returns:
        Images as uint8, or as float32 in [-1, 1] where the source is floating; points and tables as float32 [N, F].

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
    checks.integer(OP, "seed", seed, 0)
    checks.one_of(OP, "channels", channels, (None, 1, 3))
    checks.one_of(OP, "split", split, SPLITS)
    if source == "mnist":
        data = replace(read_arrays(MNIST, split, limit), note=f"the {split} digits of MNIST")
    elif source == "stacked-mnist":
        data = stacked(read_arrays(MNIST, split, None), seed, limit)
    elif source in TOYS:
        data = toy(str(source), seed, split)
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
            wanted = f"be {', '.join(NAMES)}, a folder of pictures, an IDX file or a .npz, .npy or .csv file"
            checks.fail(ValueError, OP, "source", wanted, f"{str(source)!r}, which does not exist")
        elif path.suffix.lower() in ARRAY_SUFFIXES:
            data = read_arrays(path, split, limit)
        else:
            _only_train(split)
            data = read_csv(path, limit) if path.suffix.lower() == ".csv" else read_idx(path)
    for name, value in (("size", size), ("channels", channels)):
        if value is not None and data.kind != "images":
            checks.fail(ValueError, OP, name, "be left out for samples that are no images", value)
    samples = data.samples[:limit]
    if channels is not None:
        samples = to_channels(samples, channels)
    if size is not None:
        samples = to_size(samples, size)
    return replace(data, samples=samples, labels=None if data.labels is None else data.labels[:limit])


def _only_train(split: str) -> None:
    if split != "train":
        checks.fail(ValueError, OP, "split", "be train for a source that has no test part", split)
