"""Files made to harm: each is refused in one sentence, soon, in bounded memory; nothing in it is run, and nothing is written."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import gankern
from gankern.cli.common import Refused, refusing
from gankern.cli.main import main
from gankern.cli.train import prepare
from gankern.data import Batches, Dataset, load
from gankern.report import show
from gankern.training import PRESETS, TrainConfig, checkpoint
from gankern.training.export import KEY
from gankern.training.run_dir import RunDir
from gankern.training.trained import Trained
from tests import small

GIB = 1 << 30
CHECKPOINT = "checkpoint-000001.safetensors"


class Harm:
    """Unpickled, it makes the file that it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Path]:
    """A folder for the hostile file. The test may take 1 GiB and 10 s of this process, and `done` must not come to be."""
    (tmp_path / "in").mkdir()
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + GIB, hard))
    start = time.process_time()
    yield tmp_path / "in"
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < 10
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def harm(box: Path) -> Harm:
    return Harm(box.parent / "done")


def train_on(box: Path, source: Path) -> None:
    """As gankern-train does."""
    with refusing(), contextlib.ExitStack() as held:
        prepare("gan", TrainConfig(data=str(source), outdir=str(box.parent / "runs"), device="cpu"), held)


def zeros(count: int) -> bytes:
    """A raw deflate stream of so many MiB of zeros, made fast: one block over and over. It has no end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * count


def deflated(start: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def zip_of(name: str, size: int, packed: bytes) -> bytes:
    """An archive of one deflated member that says to have `size` bytes."""
    head = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, 0, len(packed), size, len(name), 0)
    local = b"PK\3\4" + head + name.encode()
    central = b"PK\1\2" + struct.pack("<H", 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    return local + packed + central + b"PK\5\6" + end


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with these chunks between its header and one row of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rest = ((b"IDAT", zlib.compress(bytes(width + 1))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in (header, *chunks, *rest))


def archive(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def array(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def out_of_the_archive(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr(name, array(np.zeros((4, 6, 6), np.uint8)))
    return file.getvalue()


def saved_by_torch(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8)
IDX = bytes((0, 0, 8, 3)) + struct.pack(">3I", *IMAGES.shape) + IMAGES.tobytes()
BOMB = 3 << 10  # MiB
BOMB_SHAPE = (BOMB, 1 << 10, 1 << 10)
NUMPY = "data: source must be an intact NumPy file without pickled objects, got .*"
# name of the file: what it holds, what is said of it. x.d/y: the folder x.d is the source.
SOURCES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pickle.npy": (lambda box: pickle.dumps(harm(box)), NUMPY + "pickled"),
    "pickle.npz": (lambda box: pickle.dumps(harm(box)), NUMPY + "pickled"),
    "pickle.pt": (lambda box: saved_by_torch(harm(box)), "data: source must be an IDX images file"),
    "pickle.pkl": (lambda box: pickle.dumps(harm(box)), "data: source must be an IDX images file"),
    "pickle.csv": (lambda box: pickle.dumps(harm(box)), "data: source must be a CSV file in UTF-8"),
    "pictures.d/pickle.png": (lambda box: pickle.dumps(harm(box)), "no picture of a kind that is read"),
    "objects.npy": (lambda box: array(np.array([[[harm(box)]]])), NUMPY + "Object arrays"),
    "objects.npz": (lambda box: archive(x_train=np.array([[[harm(box)]]])), NUMPY + "Object arrays"),
    "labels.npz": (lambda _: archive(x=IMAGES, y=np.arange(40) * 10**12), "data: labels y must be < 65536, got 39000000000000"),
    "bomb.npz": (
        lambda _: zip_of("x.npy", (BOMB << 20) + 128, deflated(npy_header(BOMB_SHAPE)) + zeros(BOMB)),
        NUMPY + r"x.npy has the shape \[3072, 1024, 1024\] of uint8, more than its 1073741824 bytes",
    ),
    "lies.npz": (
        lambda _: zip_of("x.npy", 1 << 20, deflated(npy_header((1 << 50, 2, 2))) + zeros(1)),
        NUMPY + "more than its 1048576 bytes",
    ),
    "lies.npy": (lambda _: npy_header((1 << 40, 2, 2)) + bytes(100), NUMPY + "more than its"),
    "negative.npy": (lambda _: npy_header((-1, 2, 2)) + bytes(100), NUMPY),
    "up.npz": (lambda _: out_of_the_archive("../../up.npy"), NUMPY + r"\.\./\.\./up.npy is a path out of the archive"),
    "root.npz": (lambda _: out_of_the_archive("/etc/x.npy"), NUMPY + "/etc/x.npy is a path out of the archive"),
    "cut.npz": (lambda _: archive(x=IMAGES)[:-30], NUMPY),
    "cut.npy": (lambda _: array(IMAGES)[:-1], NUMPY),
    "bomb.gz": (
        lambda _: b"\x1f\x8b\x08" + bytes(7) + deflated(b"\0\0\x08\x03" + struct.pack(">3I", *BOMB_SHAPE)) + zeros(BOMB),
        r"data: source must hold at most 1073741824 bytes, as gzipped to \d+, got the header \[3072, 1024, 1024\]",
    ),
    "endless.gz": (
        lambda _: b"\x1f\x8b\x08" + bytes(7) + deflated(b"\0\0\x08\x03" + struct.pack(">3I", 4, 6, 6)) + zeros(BOMB),
        r"data: source must hold 144 bytes after its header \[4, 6, 6\], got more",
    ),
    "lies.idx": (lambda _: IDX[:4] + b"\xff" * 12 + IDX[16:], r"data: source must hold \d+ bytes after its header .* got 1440"),
    "cut.idx": (lambda _: IDX[:-1], "data: source must hold 1440 bytes after its header"),
    "cut.idx.gz": (lambda _: gzip.compress(IDX)[:-9], "data: source must be an intact gzip file"),
    "wide.csv": (lambda _: b"1," * 10**6 + b"1\n", "data: table must have at most 65536 columns, got 1000001 in line 1"),
    "endless.csv": (lambda _: b"1," * 10**7, "data: table must have lines of less than 4194304 characters"),
    "quoted.csv": (lambda _: b'"' + b"a\n" * 10**6, "data: source must be a CSV file in UTF-8, got .* field larger than"),
    "cut.csv": (lambda _: b"a,b\n1,2\n3", "data: table must have 2 entries in each line, got 1 in line 3"),
    "huge.d/x.png": (lambda _: png(60_000, 60_000), "x.png: Image size .3600000000 pixels. exceeds limit"),
    "cut.d/x.png": (lambda _: picture("PNG")[:-40], "x.png: image file is truncated"),
    "words.d/x.png": (
        lambda _: png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
        "x.png: Decompressed data too large",
    ),
    "profile.d/x.png": (lambda _: png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 24)))), "x.png: "),
}


@pytest.mark.parametrize("name", SOURCES)
def test_data(name: str, box: Path) -> None:
    content, sentence = SOURCES[name]
    path = box / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content(box))
    with pytest.raises(Refused, match=sentence) as refusal:
        train_on(box, path.parent if path.parent != box else path)
    assert "\n" not in str(refusal.value)


def test_no_program_is_started_for_a_picture(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run what is PostScript, whatever the name says."""

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, start)
    (box / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%id) (r) file\n%%EOF\n")
    with pytest.raises(Refused, match=r"first x.png: no picture of a kind that is read \(BMP, JPEG, PNG, WEBP\)$"):
        train_on(box, box)


def test_links_and_pipes_in_a_folder(box: Path) -> None:
    """Links in circles, to a device without end, and a pipe that nobody writes to are no pictures; the one there is, is read."""
    (box / "again").symlink_to(box)
    (box / "self.png").symlink_to("self.png")
    (box / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(box / "pipe.png")
    (box / "one").mkdir()
    Image.fromarray(IMAGES[0]).save(box / "one/x.png")
    assert len(load(box)) == 1
    for name in ("self.png", "zero.png", "pipe.png"):
        with pytest.raises(Refused, match=r"which does not exist|Symlink loop"):
            train_on(box, box / name)


def test_many_names(box: Path) -> None:
    for i in range(100_000):
        os.close(os.open(box / f"{i}.txt", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    with pytest.raises(Refused, match="data: source must hold pictures"):
        train_on(box, box)
    assert time.process_time() - start < 5
    shutil.rmtree(box)
    box.mkdir()


# --- runs and exported files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint; do not write to it."""
    config = small.config("gan", outdir=str(tmp_path_factory.mktemp("runs")), data="noise.npz", resume="never")
    run = RunDir.create("gan", config, "noise", small.shape(config), {})
    t = small.trainer(config)
    t.step(torch.zeros(config.batch_size, *small.shape(config)))
    position = {f"data.{key}": value for key, value in small.batches(config).state_dict().items()}
    run.save(t.state_dict() | position | {"device": "cpu"}, 0)
    return run.path


HEADERS = {
    "no length": b"",
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "header as long as the file": struct.pack("<Q", 1 << 26) + b" " * (1 << 26),
    "deep header": struct.pack("<Q", 10**6) + b'{"a":' + b"[" * (10**6 - 5),
    "outside": struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}'[:64].ljust(64),
    "overflow": struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'.ljust(80),
    "pickle": pickle.dumps([1, 2]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors(name: str, box: Path, whole: Path) -> None:
    shutil.copytree(whole, box / "run")
    tensors = box / "run" / CHECKPOINT
    tensors.write_bytes(HEADERS[name])
    with pytest.raises(Refused, match="checkpoint"), refusing():
        Trained(box / "run")
    with pytest.raises(ValueError, match="path must be an intact safetensors file"):
        gankern.load_generator(tensors)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("[" * 10**6, "must be JSON, got"),
        ("{" + '"a":' * 3, "must be JSON, got"),
        ("9" * 10**6, "must be JSON, got"),
        ({"settings": {"data": "mnist", "post_init": "import os"}}, "settings must have known fields only, got post_init"),
        ({"settings": [1]}, "settings must be an object, got list"),
        ({"settings": {"g_widths": [10**400]}}, "g_widths must be in "),
        ({"settings": {"g_widths": [1] * 10**5}}, "g_widths must be of at most 1000 layers, got 100000"),
        ({"settings": {"g_widths": [2**28] * 900, "z_dim": 2**28}}, "generator: state must have the entry"),
        ({"settings": {"g_widths": [2**40] * 900}}, "overflow"),
        ({"settings": {"lr_g": float("nan")}}, "lr_g must be a finite number"),
        ({"shape": [2**40] * 3}, "must name a preset and the shape of a sample"),
        ({"shape": [1] * 9}, "must name a preset and the shape of a sample"),
        ({"classes": 2**70}, r"must have classes in \[0, 2\^31\)"),
        ({"preset": "../../x"}, "must be of a known preset"),
        ({"table": {"columns": 3}}, "must have a table of 1 columns"),
    ],
)
def test_settings(change: Any, sentence: str, box: Path, whole: Path) -> None:
    shutil.copytree(whole, box / "run")
    path = box / "run/config.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Refused, match=sentence) as refusal, refusing():
        Trained(box / "run")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 2000


ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    2**62,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "\0",
    [],
    [0],
    ["a"],
    [-1.5],
    {},
    [[]],
)


@pytest.mark.parametrize("field", TrainConfig.__dataclass_fields__)
def test_any_value_of_a_setting(field: str) -> None:
    """Taken or refused in one sentence; what is taken makes a network, or is refused before memory is taken for one."""
    base = small.config("gan").to_json()
    said = []
    for value in ODD:
        try:
            config = TrainConfig.from_json({**base, field: value})
        except ValueError as error:
            said.append(str(error))
            continue
        if value in (2**62, 1e308):
            with contextlib.suppress(Refused), refusing(), torch.device("meta"):
                PRESETS["gan"].build(config, small.shape(config))
    assert said
    assert not any("\n" in words for words in said)


def test_state_of_a_resumed_run(box: Path, whole: Path) -> None:
    noise = box / "noise.npz"
    np.savez(noise, images=small.images(small.config("gan")).samples[:, 0].numpy())
    config = json.loads((whole / "config.json").read_text())
    config["settings"]["data"] = str(noise)

    def resume(**changes: Any) -> None:
        shutil.rmtree(box / "run", ignore_errors=True)
        shutil.copytree(whole, box / "run")
        (box / "run/config.json").write_text(json.dumps(config))
        checkpoint.save(box / "run" / CHECKPOINT, checkpoint.load(whole / CHECKPOINT) | changes)  # with good checksums
        settings = TrainConfig.from_json(config["settings"] | {"resume": str(box / "run"), "steps": 9, "device": "cpu"})
        with refusing(), contextlib.ExitStack() as held:
            prepare("gan", settings, held)

    resume()  # the others differ from this one alone
    for key, value, sentence in (
        ("step", "1", "must hold the step in its name, got '1'"),
        ("step", True, "step must be an int"),
        ("step", 2, "must hold the step in its name, got 2"),
        ("watch.rollbacks", "x", "rollbacks must be an int"),
        ("more", 1, "state must not have the entry more"),
        ("generator.0.weight", torch.zeros(1), "generator.0.weight must be torch.float32"),
        ("rng.noise", torch.zeros(5056, dtype=torch.uint8), ""),
        ("data.position", -7, "position must be a finite number >= 0"),
        ("data.epoch", [1], "epoch must be an int"),
        ("data.generator", torch.zeros(3, dtype=torch.uint8), ""),
        ("device", "cuda", "device must be cuda"),
    ):
        with pytest.raises(Refused, match=sentence or None):
            resume(**{key: value})


def test_words_of_a_checkpoint(box: Path, whole: Path) -> None:
    """What is no tensor, with a good checksum."""
    for text in ("[" * 10**6, "[]", "3", '{"format": 2}', '{"format": 2, "state": [1], "crc32": {}}', '{"format": []}'):
        save_file({"a": torch.zeros(1)}, box / "x", {checkpoint.KEY: f"{zlib.crc32(text.encode()):08x}{text}"})
        with pytest.raises(ValueError, match=r"^checkpoint: .* must "):
            checkpoint.load(box / "x")


def test_links_in_a_run_that_is_continued(box: Path, whole: Path) -> None:
    """What is written under the name of a link would go elsewhere."""
    other = box / "other"
    for name in ("log.jsonl", ".lock", ".tmp-config.json", "reals.png"):
        other.write_text("mine")
        shutil.rmtree(box / "run", ignore_errors=True)
        shutil.copytree(whole, box / "run")
        (box / "run" / name).unlink(missing_ok=True)
        (box / "run" / name).symlink_to(other)
        with pytest.raises(ValueError, match=f"must hold no symbolic link when it is continued, got {name}"):
            RunDir(box / "run").locked()
        assert other.read_text() == "mine"


def test_pipes_in_a_run(box: Path, whole: Path) -> None:
    """Nobody writes to them: they are not there."""
    shutil.copytree(whole, box / "run")
    for name in ("log.jsonl", "checkpoint-000002.safetensors", "fakes000001.png", "reals.png"):
        os.mkfifo(box / "run" / name)
    assert Trained(box / "run").path.name == CHECKPOINT
    facts = show(box / "run").facts
    assert (facts.rows, facts.frames, facts.reals) == ([], [], None)
    (box / "run/config.json").unlink()
    os.mkfifo(box / "run/config.json")
    with pytest.raises(ValueError, match=r"must be a run directory with a config\.json"):
        RunDir(box / "run")


def test_log_with_other_lines(box: Path, whole: Path) -> None:
    shutil.copytree(whole, box / "run")
    for line in ("[" * 10**5, "[1]", "3", '{"step": "x"}', "{}", "not JSON"):
        (box / "run/log.jsonl").write_text('{"step": 1, "d_loss": 2}\n' + line + '\n{"step": 2}\n')
        run = RunDir(box / "run")
        assert run.rows() == [{"step": 1, "d_loss": 2}, {"step": 2}]
        run.rewind(1)
        assert (box / "run/log.jsonl").read_text() == '{"step": 1, "d_loss": 2}\n'


def test_state_of_batches() -> None:
    stream = Batches(Dataset(torch.zeros(8, 1, 2, 2)), 2)
    state = stream.state_dict()
    for key, value in (("position", -1), ("position", 1.5), ("epoch", "1"), ("epoch", -3), ("size", 9)):
        with pytest.raises((ValueError, TypeError), match="data: "):
            stream.load_state_dict({**state, key: value})


# --- any bytes ------------------------------------------------------------------------------------------------------------------


def mutants(content: bytes, count: int) -> Iterator[bytes]:
    """Cut short, with bytes changed, with a piece taken out or doubled."""
    rng = random.Random(0)
    for _ in range(count):
        a, b = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
        changed = bytearray(content)
        for _ in range(rng.choice((1, 4, 30))):
            changed[min(int(rng.expovariate(8 / len(content))), len(content) - 1)] = rng.randrange(256)
        yield rng.choice((content[:a], bytes(changed), content[:a] + content[b:], content[:b] + content[a:]))


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.dstack([IMAGES[0]] * 3)).save(file, kind)
    return file.getvalue()


ANY = {
    "x.npz": archive(x=IMAGES, y=np.arange(40)),
    "x.npy": array(IMAGES),
    "x-images-idx3-ubyte": IDX,
    "x-images-idx3-ubyte.gz": gzip.compress(IDX),
    "x.csv": b"a,b,c\n" + b"1,2.5,-3e4\n" * 20,
    **{f"pictures.d/x.{kind}": picture(kind) for kind in ("png", "jpeg", "bmp", "webp")},
}


@pytest.mark.parametrize("name", ANY)
def test_any_bytes(name: str, box: Path) -> None:
    """Read or refused, never anything else."""
    path = box / name
    path.parent.mkdir(exist_ok=True)
    said = []
    for content in mutants(ANY[name], 150):
        path.write_bytes(content)
        try:
            load(path.parent if path.parent != box else path, limit=100)
        except (ValueError, TypeError) as error:
            said.append(str(error))
    assert len(said) > 40
    assert all(words.startswith("data: ") for words in said)


def test_samples_that_are_not_finite(box: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, box / "run")
    path = box / "run" / CHECKPOINT
    state = checkpoint.load(path)
    checkpoint.save(path, {k: v * float("nan") if k.startswith("ema.") else v for k, v in state.items()})
    assert main(["sample", str(box / "run"), "--out", str(box / "x.npz")]) == 2
    assert capsys.readouterr().err == f"gankern sample: samples of {path} must be finite, got NaN or infinity\n"
    assert not (box / "x.npz").exists()


def test_any_bytes_of_a_generator(box: Path) -> None:
    config = small.config("gan")
    generator, _ = PRESETS["gan"].build(config, small.shape(config))
    facts = {"preset": "gan", "shape": small.shape(config), "settings": config.to_json()}
    save_file(generator.state_dict(), box / "good", {KEY: json.dumps(facts)})
    gankern.load_generator(box / "good")
    refused = 0
    for content in mutants((box / "good").read_bytes(), 150):
        (box / "bad").write_bytes(content)
        try:
            gankern.load_generator(box / "bad")
        except ValueError:
            refused += 1
    assert refused > 100


# --- the source -----------------------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_unpickles_or_evaluates_a_file() -> None:
    """Every call that could run what a file holds: none but torch.load(weights_only=True)."""
    found = []
    for path in sorted(Path(gankern.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    f"{path.name}: {n}" for n in names if n.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib")
                ]
            if isinstance(node, ast.Call):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                called = ast.unparse(node.func)
                bad = called in ("eval", "exec", "os.system", "yaml.load") or called.startswith("subprocess.")
                bad |= called == "torch.load" and options.get("weights_only") != "True"
                bad |= options.get("allow_pickle", "False") != "False"
                found += [f"{path.name}: {called}"] * bad
    # what fuse evaluates is the source of the forward of a module that already runs
    assert found == ["_calls.py: eval"]
