"""gankern.data: every source with its refusals, the three conversions, and the stream of batches."""

from __future__ import annotations

import gzip
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gankern.data import Batches, Dataset, batches, load, to_float
from gankern.data.images import to_channels, to_size
from tests.support import DEVICE


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(n: int) -> Dataset:
    """Image i is [[i]], label i."""
    return Dataset(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))


def says(kind: type[Exception], sentence: str) -> Any:
    return pytest.raises(kind, match="^" + re.escape(sentence) + "$")


# --- mnist ---------------------------------------------------------------------------------------------------------------


def test_mnist_is_the_whole_of_it() -> None:
    """Sizes, class counts and pixel statistics of the published data set."""
    train, test = load("mnist"), load("mnist", split="test")
    assert (len(train), len(test), train.shape, train.name) == (60_000, 10_000, (1, 28, 28), "mnist")
    assert train.samples.dtype == torch.uint8
    assert train.labels is not None
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels is not None
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert train.classes == tuple("0123456789")
    value = torch.arange(256) / 255
    share = torch.bincount(train.samples.flatten(), minlength=256) / train.samples.numel()
    mean = (share * value).sum()
    assert round(mean.item(), 4) == 0.1307
    assert round((share * (value - mean).square()).sum().sqrt().item(), 4) == 0.3081


def test_limit_size_and_channels_of_mnist() -> None:
    full, data = load("mnist", split="test"), load("mnist", split="test", size=32, channels=3, limit=50)
    assert (len(data), data.shape, data.samples.dtype) == (50, (3, 32, 32), torch.uint8)
    assert data.labels is not None
    assert full.labels is not None
    assert torch.equal(data.labels, full.labels[:50])
    assert torch.equal(data.samples[:, 0], data.samples[:, 2])
    assert torch.equal(load("mnist", split="test", limit=7).samples, full.samples[:7])


# --- conversions ---------------------------------------------------------------------------------------------------------


def test_to_float_is_exact_at_the_ends() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    y = to_float(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, x.float() / 127.5 - 1)
    assert (y[0].item(), y[255].item(), x[1].item()) == (-1.0, 1.0, 1)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 40), (41, 41)])
@pytest.mark.parametrize("size", [16, 41, 64])
def test_to_size_crops_the_centre_and_resizes_as_pillow_does(height: int, width: int, size: int) -> None:
    picture = pixels(height, width, 3)
    side, top, left = min(height, width), (height - min(height, width)) // 2, (width - min(height, width)) // 2
    box = (left, top, left + side, top + side)
    want = np.asarray(Image.fromarray(picture).crop(box).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    got = to_size(images, size)
    assert got.dtype == torch.uint8
    assert np.abs(got[0].permute(1, 2, 0).numpy().astype(int) - want).max() <= 1
    floating = to_size(to_float(images), size)
    assert floating.abs().max() <= 1
    assert (floating - to_float(got)).abs().max() <= 2.1 / 127.5


def test_antialiasing_averages_a_checkerboard() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    assert (to_size(board.to(torch.uint8).view(1, 1, 64, 64), 8).float() - 127.5).abs().max() <= 2


def test_to_channels() -> None:
    colour = torch.from_numpy(pixels(3, 3, 5, 4))
    grey = to_channels(colour, 1)
    want = np.asarray(Image.fromarray(colour[1].permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert (grey.shape, grey.dtype) == ((3, 1, 5, 4), torch.uint8)
    assert np.abs(grey[1, 0].numpy().astype(int) - want).max() <= 1
    torch.testing.assert_close(to_channels(to_float(colour), 1), to_float(grey), rtol=0, atol=1.01 / 255)
    assert torch.equal(to_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert to_channels(grey, 1) is grey


# --- a folder of pictures ------------------------------------------------------------------------------------------------


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG"])
def test_lossless_pictures_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    arrays = [pixels(9, 7, 3, seed=i) for i in range(3)]
    for i, array in enumerate(arrays):
        save(tmp_path / f"deep/{i}.{suffix}", array, **({"lossless": True} if suffix == "webp" else {}))
    (tmp_path / "readme.txt").write_text("not a picture")
    (tmp_path / "deep/._0.png").write_text("what macOS leaves behind")
    data = load(tmp_path)
    assert (data.shape, data.name, data.labels, data.classes, data.skipped) == ((3, 9, 7), tmp_path.name, None, (), ())
    assert np.array_equal(data.samples.permute(0, 2, 3, 1).numpy(), np.stack(arrays))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_pictures_come_back_nearly(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    array = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp, (64, 1)).T, np.full((64, 64), 99, np.uint8)], -1)
    save(tmp_path / f"a.{suffix}", array, quality=95)
    data = load(tmp_path)
    assert np.abs(data.samples[0].permute(1, 2, 0).numpy().astype(int) - array).mean() < 4


def test_grey_and_colour_of_any_size_together(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(40, 30))
    save(tmp_path / "b.jpg", pixels(16, 90, 3))
    data = load(tmp_path, size=16)
    assert (data.shape, len(data)) == ((3, 16, 16), 2)
    assert torch.equal(data.samples[0, 0], data.samples[0, 1])
    assert not torch.equal(data.samples[1, 0], data.samples[1, 1])
    assert load(tmp_path, size=16, channels=1).shape == (1, 16, 16)
    with says(
        ValueError, "data: size must be given where pictures differ in size, got None, a.png of 30 x 40 and b.jpg of 90 x 16"
    ):
        load(tmp_path)


def test_only_grey_pictures_stay_grey(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(5, 5))
    save(tmp_path / "b.png", np.array([[0, 255]] * 2, np.uint8).repeat(3, 1)[:, :5].repeat(3, 0)[:5] > 127)
    data = load(tmp_path)
    assert data.shape == (1, 5, 5)
    assert set(data.samples[1].unique().tolist()) == {0, 255}
    assert load(tmp_path, channels=3).shape == (3, 5, 5)


def test_modes_that_a_plain_conversion_ruins(tmp_path: Path) -> None:
    """16-bit grey must be scaled, not clipped; the transparent is white, whatever colour hides there; palettes are looked up."""
    save(tmp_path / "a.png", np.array([[0, 257 * 100], [65535, 257 * 7]], np.uint16))
    save(tmp_path / "b.png", np.array([[[1, 2, 3, 255], [9, 9, 9, 0]]] * 2, np.uint8))
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8)).quantize(2).save(tmp_path / "c.png")
    Image.fromarray(np.array([[[0, 255, 255, 0]] * 2] * 2, np.uint8), "CMYK").convert("CMYK").save(tmp_path / "d.jpg", quality=100)
    images = load(tmp_path).samples
    assert images[0].tolist() == [[[0, 100], [255, 7]]] * 3
    assert images[1, :, 0].T.tolist() == [[1, 2, 3], [255, 255, 255]]
    assert images[2, :, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    assert images[3].shape == (3, 2, 2)
    assert load(tmp_path, channels=1).samples[0].tolist() == [[[0, 100], [255, 7]]]


def test_orientation_is_obeyed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    save(tmp_path / "a.png", np.array([[10, 20, 30], [40, 50, 60]], np.uint8), exif=exif)
    assert load(tmp_path).samples[0, 0].tolist() == [[40, 10], [50, 20], [60, 30]]


def test_labels_from_sub_folders(tmp_path: Path) -> None:
    for i, name in enumerate(["dog/1.png", "cat/deep/x.png", "cat/a.png", "emu/0.png"]):
        save(tmp_path / name, np.full((2, 2), i, np.uint8))
    (tmp_path / "cat/broken.png").write_text("no")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog", "emu")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert data.samples[:, 0, 0, 0].tolist() == [2, 1, 0, 3]
    save(tmp_path / "loose.png", pixels(2, 2))
    assert load(tmp_path).labels is None


def test_one_sub_folder_is_no_class(tmp_path: Path) -> None:
    save(tmp_path / "img_align_celeba/0.png", pixels(2, 2))
    assert load(tmp_path).labels is None


def test_train_and_test_sub_folders_are_splits(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("test", 2)):
        save(tmp_path / part / "a/0.png", np.full((2, 2), value, np.uint8))
        save(tmp_path / part / "b/0.png", np.full((2, 2), value, np.uint8))
    for part, value in (("train", 1), ("test", 2)):
        data = load(tmp_path, split=part)
        assert data.classes == ("a", "b")
        assert data.samples.unique().tolist() == [value]


def test_broken_files_are_skipped_and_named(tmp_path: Path) -> None:
    """Truncated in each format, empty, not a picture at all; the whole ones are all that is left, with their own labels."""
    rng = pixels(48, 48, 3)
    for suffix in ("png", "jpg", "bmp", "webp"):
        save(tmp_path / f"bad/{suffix}.{suffix}", rng)
        whole = (tmp_path / f"bad/{suffix}.{suffix}").read_bytes()
        (tmp_path / f"bad/{suffix}.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad/empty.png").touch()
    (tmp_path / "bad/text.jpg").write_text("hello")
    save(tmp_path / "good/a.png", rng)
    data = load(tmp_path)
    names = ["bad/bmp.bmp", "bad/empty.png", "bad/jpg.jpg", "bad/png.png", "bad/text.jpg", "bad/webp.webp"]
    assert [line.split(": ")[0] for line in data.skipped] == names
    assert all(len(line.split(": ", 1)[1]) > 5 for line in data.skipped)
    assert data.classes == ("bad", "good")
    assert data.labels is not None
    assert data.labels.tolist() == [1]
    assert np.array_equal(data.samples[0].permute(1, 2, 0).numpy(), rng)
    (tmp_path / "good/a.png").unlink()
    with pytest.raises(
        ValueError, match=r"^data: source must hold a picture that can be read, got 6 broken in .*, first bad/bmp\.bmp: "
    ):
        load(tmp_path)


def test_decompression_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond Pillow's limit, where it warns, and beyond twice the limit, where it raises."""
    for name, side in (("a", 10), ("b", 12), ("c", 100)):
        save(tmp_path / f"{name}.png", pixels(side, side))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = load(tmp_path, size=8)
    assert len(data) == 1
    assert [line.split(":")[0] for line in data.skipped] == ["b.png", "c.png"]
    assert all("exceeds limit of" in line for line in data.skipped)


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with says(ValueError, f"data: source must hold pictures (.bmp .jpeg .jpg .png .webp) or IDX files, got none in {tmp_path}"):
        load(tmp_path)


def test_limit_of_a_folder_counts_readable_pictures(tmp_path: Path) -> None:
    """In the order of their paths; those that would come after the last one wanted are not even opened."""
    for i in range(8):
        save(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
    assert load(tmp_path, limit=3).samples[:, 0, 0, 0].tolist() == [0, 1, 2]
    for i in (1, 3, 7):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    for limit, kept, skipped in ((1, [0], []), (3, [0, 2, 4], ["1", "3"]), (9, [0, 2, 4, 5, 6], ["1", "3", "7"])):
        data = load(tmp_path, limit=limit)
        assert data.samples[:, 0, 0, 0].tolist() == kept
        assert [line.split(".png: ")[0] for line in data.skipped] == skipped


def test_pillow_is_only_needed_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", pixels(2, 2))
    monkeypatch.setitem(sys.modules, "PIL", None)  # importing it now raises ImportError
    assert len(load("mnist", split="test")) == 10_000
    with says(RuntimeError, 'data: Pillow must be installed to read pictures, got none (pip install "gankern[train]")'):
        load(tmp_path)


# --- IDX -----------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize(("images_zip", "labels_zip"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "emnist-letters-train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_idx_with_labels(tmp_path: Path, name: str, images_zip: bool, labels_zip: bool) -> None:
    images, labels = pixels(5, 4, 3), np.array([3, 0, 2, 3, 1], np.uint8)
    path = tmp_path / (name + ".gz" * images_zip)
    path.write_bytes(gzip.compress(idx(images)) if images_zip else idx(images))
    beside = tmp_path / (name.replace("images", "labels").replace("idx3", "idx1") + ".gz" * labels_zip)
    beside.write_bytes(gzip.compress(idx(labels)) if labels_zip else idx(labels))
    for source in (path, tmp_path):
        data = load(source)
        assert np.array_equal(data.samples[:, 0].numpy(), images)
        assert data.labels is not None
        assert data.labels.tolist() == labels.tolist()
        assert data.classes == ("0", "1", "2", "3")
    beside.unlink()
    assert load(path).labels is None
    assert "no labels" in load(path).note


def test_idx_folder_has_splits(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels(5, 4, 4)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(2, 4, 4)))
    assert [len(load(tmp_path, split=split)) for split in ("train", "test")] == [5, 2]
    with says(ValueError, "data: split must be train for a source that has no test part, got test"):
        load(tmp_path / "train-images-idx3-ubyte", split="test")


def test_idx_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gankern.data.idx._CHUNK", 10)  # read in several pieces, the last one full
    good, path = idx(pixels(5, 4, 3)), tmp_path / "x-images-idx3-ubyte"

    def refused(content: bytes, sentence: str) -> None:
        path.write_bytes(content)
        with says(ValueError, f"data: source must {sentence}"):
            load(path)

    wanted = "be an IDX images file, which begins with the bytes 00 00 08 03, got"
    refused(b"", f"{wanted} {path} with nothing")
    refused(idx(pixels(5)), f"{wanted} {path} with 00 00 08 01")
    refused(idx(pixels(5, 4, 3), kind=13), f"{wanted} {path} with 00 00 0d 03")
    refused(good[:9], f"hold a whole IDX header, got {path} of 9 bytes")
    refused(good[:-1], f"hold 60 bytes after its header [5, 4, 3], got 59 in {path}")
    refused(good + b"!", f"hold 60 bytes after its header [5, 4, 3], got more in {path}")
    huge = 0xFFFFFFFF
    refused(b"\0\0\x08\x03" + b"\xff" * 12 + b"abc", f"hold {huge**3} bytes after its header {[huge] * 3}, got 3 in {path}")
    refused(idx(pixels(0, 4, 3)), f"hold at least one of its images, got {path} with header [0, 4, 3]")
    path.write_bytes(gzip.compress(good)[:-12])
    with pytest.raises(ValueError, match=r"^data: source must be an intact gzip file, got "):
        load(path)
    path.write_bytes(good)
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(idx(pixels(4)))
    labels = tmp_path / "x-labels-idx1-ubyte"
    with says(ValueError, f"data: labels file must hold 5 labels, one an image, got 4 in {labels}"):
        load(path)
    labels.write_bytes(good)
    with pytest.raises(ValueError, match=r"^data: source must be an IDX labels file, .* 00 00 08 01, got .* with 00 00 08 03$"):
        load(path)


# --- NumPy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["x_train", "images", "samples", "x", "anything"])
@pytest.mark.parametrize("label", ["y_train", "labels", "y", None])
def test_npz_keys(tmp_path: Path, key: str, label: str | None) -> None:
    images = pixels(4, 6, 5)
    if key == "anything" and label is not None:
        np.savez(tmp_path / "a.npz", **{key: images, label: np.arange(4)})
        with pytest.raises(ValueError, match=r"^data: source must have an array called .*, or only one, got .*anything"):
            load(tmp_path / "a.npz")
        return
    np.savez_compressed(tmp_path / "a.npz", **{key: images}, **({label: np.array([[2], [0], [1], [2]])} if label else {}))
    data = load(tmp_path / "a.npz")
    assert (data.name, data.shape) == ("a", (1, 6, 5))
    assert np.array_equal(data.samples[:, 0].numpy(), images)
    assert (None if data.labels is None else data.labels.tolist()) == ([2, 0, 1, 2] if label else None)
    assert data.classes == (("0", "1", "2") if label else ())


def test_npz_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=pixels(4, 2, 2), y_train=np.arange(4), x_test=pixels(3, 2, 2), y_test=np.arange(3))
    assert [len(load(tmp_path / "a.npz", split=split)) for split in ("train", "test")] == [4, 3]
    np.savez(tmp_path / "b.npz", x_train=pixels(4, 2, 2))
    np.save(tmp_path / "c.npy", pixels(4, 2, 2))
    for name in ("b.npz", "c.npy"):
        with says(ValueError, "data: split must be train for a source that has no test part, got test"):
            load(tmp_path / name, split="test")


@pytest.mark.parametrize("channels", [1, 3])
def test_layouts(tmp_path: Path, channels: int) -> None:
    images = pixels(4, 6, 5, channels)
    np.save(tmp_path / "last.npy", images)
    np.save(tmp_path / "first.npy", np.asfortranarray(images.transpose(0, 3, 1, 2)))
    last, first = load(tmp_path / "last.npy"), load(tmp_path / "first.npy")
    assert (last.shape, last.samples.is_contiguous()) == ((channels, 6, 5), True)
    assert torch.equal(last.samples, first.samples)
    assert np.array_equal(last.samples.permute(0, 2, 3, 1).numpy(), images)
    assert "channels last" in last.note
    assert "channels first" in first.note


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_in_either_range(tmp_path: Path, dtype: str) -> None:
    unit = np.linspace(0, 1, 4 * 9).reshape(4, 3, 3).astype(dtype)
    np.save(tmp_path / "unit.npy", unit)
    np.save(tmp_path / "signed.npy", (unit * 2 - 1).astype(dtype))
    for name, low in (("unit", 0), ("signed", -1)):
        data = load(tmp_path / f"{name}.npy")
        assert data.samples.dtype == torch.float32
        assert f"in [{low}, 1]" in data.note
        assert (data.samples.min().item(), data.samples.max().item()) == (-1.0, 1.0)
        np.testing.assert_allclose(
            data.samples[:, 0].numpy(), unit.astype(np.float64) * 2 - 1, atol=2e-3 if dtype == "float16" else 1e-6
        )
    assert torch.equal(next(Batches(data, 4)).sort(0).values, data.samples.sort(0).values)  # no second scaling


def test_array_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def refused(array: np.ndarray, kind: type[Exception], sentence: str) -> None:
        np.save(path, array, allow_pickle=True)
        with says(kind, f"data: {sentence}"):
            load(path)

    layout = "images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, got shape"
    refused(pixels(4, 784), ValueError, f"{layout} [4, 784]")
    refused(pixels(4, 5, 5, 4), ValueError, f"{layout} [4, 5, 5, 4]")
    refused(pixels(4, 3, 5, 1), ValueError, f"{layout} [4, 3, 5, 1], where both could be C")
    refused(pixels(0, 5, 5), ValueError, "images must hold at least one pixel of one image, got shape [0, 5, 5]")
    refused(np.zeros((2, 5, 5), np.int64), TypeError, "images must be uint8 or floating, got int64")
    floats = "images must be uint8, or floating in [0, 1] or [-1, 1], got values in"
    refused(np.array([[[0.0, 255.0]]]), ValueError, f"{floats} [0, 255]")
    refused(np.array([[[0.0, np.nan]]]), ValueError, f"{floats} [nan, nan]")
    np.save(path, np.array([[[None]]]), allow_pickle=True)
    with pytest.raises(
        ValueError, match=r"^data: source must be an intact NumPy file without pickled objects, got .*allow_pickle=False"
    ):
        load(path)
    for name, content in (("b.npy", b"\x93NUMPY"), ("b.npz", b"PK\x03\x04 cut off"), ("c.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^data: source must be an intact NumPy file without pickled objects, got "):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("labels", "kind", "sentence"),
    [
        (np.arange(3), ValueError, "labels y must have shape [4], one an image, got [3]"),
        (np.arange(4.0), TypeError, "labels y must be whole numbers, got float64"),
        (np.arange(4) - 1, ValueError, "labels y must be >= 0, got -1"),
    ],
)
def test_label_refusals(tmp_path: Path, labels: np.ndarray, kind: type[Exception], sentence: str) -> None:
    np.savez(tmp_path / "a.npz", x=pixels(4, 2, 2), y=labels)
    with says(kind, f"data: {sentence}"):
        load(tmp_path / "a.npz")


# --- arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"source": 3}, TypeError, "source must be a str or a path, got int"),
        ({"size": 0}, ValueError, "size must be a finite number >= 1, got 0"),
        ({"size": 28.0}, TypeError, "size must be an int, got float"),
        ({"limit": True}, TypeError, "limit must be an int, got bool"),
        ({"limit": -1}, ValueError, "limit must be a finite number >= 1, got -1"),
        ({"channels": 2}, ValueError, "channels must be one of None, 1, 3, got 2"),
        ({"split": "val"}, ValueError, "split must be one of train, test, got 'val'"),
        (
            {"source": "/no/such"},
            ValueError,
            "source must be mnist, stacked-mnist, ring, grid, unrolled-ring, 8gaussians, 25gaussians, swissroll, a folder of "
            "pictures, an IDX file or a .npz, .npy or .csv file, got '/no/such', which does not exist",
        ),
    ],
)
def test_load_refusals(options: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with says(kind, f"data: {sentence}"):
        load(**{"source": "mnist", **options})


def test_dataset_refusals() -> None:
    good = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((good.numpy(),), TypeError, "samples must be a torch.Tensor, got ndarray"),
        ((good.int(),), TypeError, "samples must be uint8 or float32, got int32"),
        ((good[0, 0, 0],), ValueError, "samples must have shape [N, ...], got [2]"),
        ((good[:0],), ValueError, "samples must hold at least one number of one sample, got shape [0, 1, 2, 2]"),
        ((good, torch.zeros(3, dtype=torch.int64)), ValueError, "labels must have shape [4], got [3]"),
        ((good, torch.zeros(4)), TypeError, "labels must have dtype int64, got float32"),
    ]
    for arguments, kind, sentence in cases:
        with says(kind, f"data: {sentence}"):
            Dataset(*arguments)


# --- batches -------------------------------------------------------------------------------------------------------------


def test_batches_are_the_images() -> None:
    data = load("mnist", split="test", limit=300)
    stream = Batches(data, 64, device=DEVICE)
    x, y = stream.with_labels()
    assert (x.shape, x.dtype, x.device.type, y.dtype) == ((64, 1, 28, 28), torch.float32, DEVICE, torch.int64)
    again = Batches(data, 64, device=DEVICE)
    indices = again.indices().cpu()
    assert data.labels is not None
    assert torch.equal(x.cpu(), data.samples[indices].float() / 127.5 - 1)
    assert torch.equal(y.cpu(), data.labels[indices])
    assert torch.equal(next(Batches(data, 64, device=DEVICE)), x)
    assert data.samples.dtype == torch.uint8


def test_float64_as_the_default_dtype_changes_nothing() -> None:
    want = next(Batches(numbered(8), 4))
    torch.set_default_dtype(torch.float64)
    try:
        got = next(Batches(numbered(8), 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_each_epoch_has_each_image_once_in_a_new_order() -> None:
    stream = Batches(numbered(12), 4, seed=3)
    epochs = [torch.cat([stream.indices() for _ in range(3)]) for _ in range(5)]
    assert all(epoch.sort().values.tolist() == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert stream.epoch == 4


def test_the_last_partial_batch_is_dropped() -> None:
    stream = Batches(numbered(11), 4)
    drawn = [stream.with_labels()[1] for _ in range(20)]
    assert all(len(batch) == 4 for batch in drawn)
    assert stream.epoch == 9
    assert all(len(set(torch.cat(drawn[i : i + 2]).tolist())) == 8 for i in range(0, 20, 2))


def test_seeds() -> None:
    def order(seed: int) -> list[int]:
        return Batches(numbered(50), 50, seed=seed).indices().tolist()

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first
    assert order(1) != first


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7])
def test_resume_is_exact(before: int, tmp_path: Path) -> None:
    stream = Batches(numbered(11), 4, seed=5)
    for _ in range(before):
        next(stream)
    torch.save(stream.state_dict(), tmp_path / "state")
    rest = [next(stream) for _ in range(9)]
    other = Batches(numbered(11), 4, seed=99, device=DEVICE)
    next(other)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert all(torch.equal(next(other).cpu(), want) for want in rest)
    assert other.state_dict().keys() == stream.state_dict().keys()
    assert torch.equal(other.state_dict()["generator"], stream.state_dict()["generator"])


def test_a_state_is_not_changed_by_what_follows() -> None:
    stream = Batches(numbered(8), 4)
    state = stream.state_dict()
    copy = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    for _ in range(7):
        next(stream)
    assert all(torch.equal(copy[k], state[k]) if isinstance(copy[k], Tensor) else copy[k] == state[k] for k in copy)


def test_batches_refusals() -> None:
    with says(ValueError, "data: batch_size must be at most the 8 images of samples, got 9"):
        Batches(numbered(8), 9)
    with says(ValueError, "data: batch_size must be a finite number >= 1, got 0"):
        Batches(numbered(8), 0)
    with says(TypeError, "data: data must be a gankern.data.Dataset, got Tensor"):
        Batches(torch.zeros(4, 2), 2)  # type: ignore[arg-type]
    with says(TypeError, "data: batch_size must be an int, got float"):
        Batches(numbered(8), 4.0)  # type: ignore[arg-type]
    with says(ValueError, "data: seed must be a finite number >= 0, got -1"):
        Batches(numbered(8), 4, seed=-1)
    with says(ValueError, "data: state must come from a data set of 9 samples, got one of 8"):
        Batches(numbered(9), 4).load_state_dict(Batches(numbered(8), 4).state_dict())
    with says(ValueError, "data: labels must be in the data, got none"):
        Batches(Dataset(torch.zeros(4, 1, 2, 2)), 2).with_labels()


@pytest.mark.gpu
def test_data_without_room_on_the_gpu_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("mnist", limit=300)
    resident = Batches(data, 64, device="cuda")
    monkeypatch.setattr(batches, "RESIDENT_FRACTION", 0.0)
    streamed = Batches(data, 64, device="cuda")
    assert (resident.resident, streamed.resident) == (True, False)
    for _ in range(20):
        for ours, theirs in zip(streamed.with_labels(), resident.with_labels(), strict=True):
            assert ours.is_cuda
            assert torch.equal(ours, theirs)
