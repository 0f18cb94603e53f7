"""gankern evaluate: what it compares with what, the feature networks it takes, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gankern.cli import evaluate
from gankern.cli.main import main, train_main
from gankern.data import load, to_float
from gankern.metrics import fid, inception, inception_score, kid, mode_score, modes, nearest_neighbour_test, prdc, wasserstein
from gankern.metrics.evaluation import Law, Samples, measure
from gankern.metrics.features import Features
from gankern.metrics.inception import Inception, load_inception
from gankern.training.trained import Trained
from tests.support import DEVICE

pytest.importorskip("scipy")
pytest.importorskip("safetensors")

Capture = pytest.CaptureFixture[str]
TINY = ["--z-dim", "4", "--g-widths", "8", "--d-widths", "8", "--batch-size", "16", "--steps", "2", "--device", "cpu"]


def train(preset: str, out: Path, *flags: str) -> Path:
    assert train_main([preset, "--outdir", str(out), *TINY, *flags]) == 0
    return next(out.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small GAN on 500 digits."""
    return train("gan", tmp_path_factory.mktemp("runs"), "--limit", "500", "--ema", "0.5")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 60 grey images of 12 x 12 in three classes, one of the same in colour."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (60, 12, 12), dtype=np.uint8)
        np.savez(path / f"{name}.npz", images=pixels, labels=np.array([0] * 40 + [1, 2] * 10))
    np.savez(path / "colour.npz", images=np.repeat(pixels[:, None], 3, 1))
    return path


def report(capsys: Capture, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Capture, *words: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("gankern evaluate: ").strip()


# --- what is compared with what


def test_a_run_beside_the_held_out_part_of_its_data(run: Path, capsys: Capture) -> None:
    """Every number is that of the pure function on the run's own samples and on test digits."""
    got = report(capsys, str(run), "--n", "50", "--seed", "3")
    assert got["real"] == {"source": "mnist", "part": "test", "samples": 10_000}
    assert got["fake"] == {"source": str(run), "step": 2, "weights": "ema", "data": "mnist"}
    assert (got["n"], got["seed"], got["modes_of_data"]) == (50, 3, 10)
    assert (got["features"]["name"], got["features"]["dimensions"]) == ("bundled", 256)
    assert {"gankern", "torch"} <= got["versions"].keys()
    digits, network = load("mnist", split="test"), Features("bundled")
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(3))
    real, others, fake = (
        network(samples)
        for samples in (
            *(to_float(digits.samples[order[part]]) for part in (slice(50), slice(50, 100))),
            Trained(run).sample(50, 3),
        )
    )
    for name, other in (("metrics", fake), ("metrics_of_real", others)):
        want = {
            "fid": fid(real=real.features, fake=other.features),
            "kid": kid(real=real.features, fake=other.features, subset_size=50, seed=3).mean,
            "1nn": nearest_neighbour_test(real=real.features, fake=other.features).accuracy,
            "wasserstein": wasserstein(real=real.features, fake=other.features),
            "is": inception_score(fake=other.probabilities, seed=3).mean,
            "mode_score": mode_score(real=real.probabilities, fake=other.probabilities),
            **prdc(real=real.features, fake=other.features)._asdict(),
            "modes": len(other.probabilities.argmax(1).unique()),
        }
        assert {key: got[name][key] for key in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert got["metrics"].keys() == got["metrics_of_real"].keys() >= {*want, "is_std", "ms_ssim", "reverse_kl"}


def test_the_training_part_is_what_the_run_was_trained_on(run: Path, capsys: Capture) -> None:
    got = report(capsys, str(run), "--n", "20", "--split", "train", "--metrics", "fid", "--weights", "last")
    assert got["real"] == {"source": "mnist", "part": "train", "samples": 500}
    assert got["fake"]["weights"] == "generator"
    assert list(got["metrics"]) == ["fid"]
    for part, words in (
        ("train", "its training part, which the run was trained on"),
        ("test", "its test part, held out of the run's training"),
    ):
        assert main(["evaluate", str(run), "--n", "20", "--split", part, "--metrics", "fid", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(f" samples of mnist: {words}")


def test_where_the_test_part_is_too_small_for_two_sets_the_other_real_samples_are_of_the_training_part(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    pixels = np.load(images / "a.npz")["images"]
    np.savez(tmp_path / "parts.npz", x_train=pixels[:45], x_test=pixels[45:])
    words = ["--real", str(tmp_path / "parts.npz"), "--fake", str(images / "b.npz"), "--features", "pixels", "--metrics", "1nn"]
    got = report(capsys, *words)
    assert got["real"] == {"source": words[1], "part": "test", "samples": 15}
    assert (got["n"], got["metrics_of_real"].keys()) == (15, got["metrics"].keys())
    assert not report(capsys, *words, "--split", "train")["metrics_of_real"]


def test_which_is_real(images: Path, capsys: Capture) -> None:
    a, b = str(images / "a.npz"), str(images / "b.npz")
    named = report(capsys, "--real", a, "--fake", b)
    pair = report(capsys, a, b)
    alone = report(capsys, b, "--real", a)
    assert named["real"]["source"] == a
    assert named["real"]["part"] == "all"
    assert named["metrics"] == pair["metrics"] == alone["metrics"]
    assert named["metrics"]["1nn_real"] == report(capsys, b, a)["metrics"]["1nn_fake"]
    assert named["metrics_of_real"].keys() == {"ms_ssim"}  # 60 samples are too few for two sets of 60
    assert report(capsys, a, b, "--n", "30")["metrics_of_real"].keys() == named["metrics"].keys()
    assert main(["evaluate", b, "--real", a, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"real      60 of the 60 samples of {a}: all of it"
    assert lines[1] == f"fake      60 of {b}, of 60 samples"
    assert lines[3].startswith("note      fid of 60 samples with 144 features is far too high")
    row = next(line for line in lines if line.startswith("precision"))
    assert row.split()[1:4] == [f"{named['metrics']['precision']:.4g}", "-", "higher"]


def test_the_same_samples(images: Path, capsys: Capture) -> None:
    got = report(capsys, str(images / "a.npz"), str(images / "a.npz"))["metrics"]
    want = {"fid": 0.0, "1nn": 0.0, "precision": 1.0, "recall": 1.0, "coverage": 1.0, "wasserstein": 0.0}
    assert {key: got[key] for key in want} == pytest.approx(want, abs=1e-6)  # 1nn: each is a copy of a real one
    assert got["kid"] < 1e-3


def test_grey_beside_colour(images: Path, capsys: Capture) -> None:
    got = report(capsys, str(images / "b.npz"), str(images / "colour.npz"))
    assert got["features"]["dimensions"] == 3 * 144
    assert got["metrics"]["fid"] == pytest.approx(0, abs=1e-6)


def test_classes_are_drawn_as_often_as_in_the_data(images: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    path = train("cgan", tmp_path, "--data", str(images / "a.npz"))
    asked: list[Tensor] = []
    sample = Trained.sample
    monkeypatch.setattr(Trained, "sample", lambda self, n, seed, labels: (asked.append(labels), sample(self, n, seed, labels))[1])
    report(capsys, str(path), "--metrics", "fid")
    assert asked[0].bincount().tolist() == [40, 10, 10]


def test_tables_are_compared_in_the_deviations_of_the_real_columns(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.normal([1e6 + 5, 300], [0.1, 20], (400, 2)), rng.normal([1e6 + 5.1, 300], [0.1, 20], (400, 2))
    for name, values in (("real", real), ("fake", fake)):
        np.savetxt(tmp_path / f"{name}.csv", values, delimiter=",", header="a,b", comments="")
    np.savez(tmp_path / "fake.npz", samples=fake)
    got = report(capsys, str(tmp_path / "real.csv"), str(tmp_path / "fake.csv"), "--metrics", "fid,prdc")
    scaled = [torch.from_numpy((values - real.mean(0)) / real.std(0)) for values in (real, fake)]
    assert got["metrics"]["fid"] == pytest.approx(fid(real=scaled[0], fake=scaled[1]), rel=1e-4)
    assert got["metrics"]["fid"] > 0.7  # one deviation apart in one column
    unnamed = report(capsys, str(tmp_path / "real.csv"), str(tmp_path / "fake.npz"), "--metrics", "fid,prdc")
    assert unnamed["metrics"] == got["metrics"]


def test_points_of_a_mixture(tmp_path: Path, capsys: Capture) -> None:
    """Half of the ring's modes, in a file."""
    data = load("ring")
    points = data.samples[data.samples[:, 1] > 0.5][:300]
    np.savez(tmp_path / "half.npz", samples=points.numpy())
    got = report(capsys, "--real", "ring", "--fake", str(tmp_path / "half.npz"))
    want = modes(points, *data.mixture)
    assert want.found == 3
    assert got["modes_of_data"] == 8
    assert got["metrics"]["modes"] == 3
    assert got["metrics"]["reverse_kl"] == pytest.approx(want.reverse_kl, rel=1e-4)
    assert got["metrics_of_real"]["modes"] == 8
    assert not {"is", "mode_score", "ms_ssim"} & got["metrics"].keys()


def test_a_class_that_the_data_have_not_is_null_in_json(images: Path, tmp_path: Path, capsys: Capture) -> None:
    data = load("mnist", split="test", limit=600)
    for name, keep in (("ones", data.labels == 1), ("twos", data.labels == 2)):
        np.savez(tmp_path / f"{name}.npz", images=data.samples[keep][:40, 0].numpy())
    words = [str(tmp_path / "ones.npz"), str(tmp_path / "twos.npz"), "--features", "bundled", "--metrics", "modes"]
    assert report(capsys, *words)["metrics"]["reverse_kl"] is None
    assert main(["evaluate", *words]) == 0
    assert " inf " in capsys.readouterr().out


# --- feature networks


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return to_float(load("mnist", split="test", limit=300).samples).to(DEVICE)


def test_the_bundled_network_knows_digits_of_any_size_and_colour(digits: Tensor) -> None:
    seen = Features("bundled", device=DEVICE)(digits)
    assert seen.features.shape == (300, 256)
    labels = load("mnist", split="test", limit=300).labels.to(DEVICE)
    large = nn.functional.interpolate(digits, (56, 56), mode="bilinear").expand(-1, 3, -1, -1)
    wide = nn.functional.pad(large, (7, 7), value=-1.0)
    for images in (digits, large, wide):
        assert (Features("bundled", device=DEVICE)(images).probabilities.argmax(1) == labels).float().mean() > 0.96


def test_stacked_digits_have_a_thousand_modes() -> None:
    data = load("stacked-mnist", split="test", limit=200)
    seen = Features("bundled", stacked=True, device=DEVICE)(to_float(data.samples).to(DEVICE))
    assert (seen.features.shape, seen.probabilities.shape) == ((200, 768), (200, 1000))
    assert (seen.probabilities.argmax(1).cpu() == data.labels).float().mean() > 0.95
    torch.testing.assert_close(seen.probabilities.sum(1), torch.ones(200, device=DEVICE))
    found = measure("modes", real=Samples(data.samples, seen), fake=Samples(data.samples, seen), law=Law(even=True))
    assert found["modes"] == pytest.approx(len(data.labels.unique()), abs=3)
    assert found["reverse_kl"] == pytest.approx(math.log(1000 / found["modes"]), abs=0.2)  # nearly one of each


def test_lost_classes_are_lost_modes() -> None:
    data = load("mnist", split="test", limit=1500)
    images = to_float(data.samples)
    network, labels = Features("bundled"), data.labels
    real, other = (Samples(part, network(part)) for part in (images[:400], images[400:800]))
    few = images[400:][labels[400:] < 3][:300]
    before = measure("modes", real=real, fake=other, law=Law())
    after = measure("modes", real=real, fake=Samples(few, network(few)), law=Law())
    assert before["modes"] == 10
    assert before["reverse_kl"] < 0.1
    assert 3 <= after["modes"] <= 6
    assert after["reverse_kl"] > 1.0


class Net(nn.Module):
    """Four pixels and three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :4], self.head(x.flatten(1)[:, :4])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.pt2"
    batch = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(Net(), (torch.zeros(2, 1, 12, 12),), dynamic_shapes=batch), path)
    return path


def test_a_network_of_ones_own(program: Path, images: Path, capsys: Capture) -> None:
    samples = torch.linspace(-1, 1, 600 * 144).view(600, 1, 12, 12)
    seen = Features(str(program), device=DEVICE)(samples)
    torch.testing.assert_close(seen.features.cpu(), samples.flatten(1)[:, :4])
    torch.testing.assert_close(seen.probabilities.cpu(), samples.flatten(1)[:, :3].softmax(1))
    got = report(capsys, str(images / "a.npz"), str(images / "b.npz"), "--features", str(program))
    assert got["features"]["dimensions"] == 4
    assert got["modes_of_data"] == 3
    with pytest.raises(ValueError, match=r"net.pt2 must take float32 \[B, 2, 12, 12\] for any B, got .*"):
        Features(str(program))(torch.zeros(3, 2, 12, 12))


def onnx_model(path: Path, batch: str | int) -> Path:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kinds = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [batch, 1, 12, 12]), ("y", [batch, 144]))]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Flatten", ["x"], ["y"])], "net", kinds[:1], kinds[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_an_onnx_model(tmp_path: Path) -> None:
    samples = torch.rand(300, 1, 12, 12)
    seen = Features(str(onnx_model(tmp_path / "net.onnx", "B")), device=DEVICE)(samples)
    torch.testing.assert_close(seen.features.cpu(), samples.flatten(1))
    assert seen.probabilities.shape == (300, 0)
    with pytest.raises(ValueError, match=r"fixed.onnx must take float32 \[B, 1, 12, 12\] for any B, got .*"):
        Features(str(onnx_model(tmp_path / "fixed.onnx", 7)))(samples)
    (tmp_path / "broken.onnx").write_bytes(b"onnx")
    with pytest.raises(ValueError, match=r"broken.onnx must be an ONNX model, got .*"):
        Features(str(tmp_path / "broken.onnx"))


def test_onnxruntime_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r'onnxruntime must be installed, got none \(pip install "gankern\[onnx\]"\)'):
        Features(str(tmp_path / "net.onnx"))


@pytest.mark.parametrize(
    ("net", "got"),
    [
        (lambda x: "four", "str"),
        (lambda x: x.mean(), r"torch.float32 \[\]"),
        (lambda x: x[:1], r"torch.float32 \[1, 1, 12, 12\]"),
        (lambda x: [x, x, x], "3 tensors"),
        (lambda x: x.long(), "torch.int64"),
    ],
)
def test_networks_that_return_something_else(net: Callable[[Tensor], Any], got: str, program: Path) -> None:
    features = Features(str(program))
    features._look = net
    with pytest.raises(ValueError, match=rf"net.pt2 must return .*, got {got}"):
        features(torch.zeros(5, 1, 12, 12))


# --- no code from files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def changed(program: Path, out: Path, record: str, change: Callable[[bytes], bytes]) -> Path:
    """The program with one record changed, or added."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith(record) else old.read(name))
        if not any(name.endswith(record) for name in old.namelist()):
            new.writestr(f"{name.split('/')[0]}/{record}", change(b""))
    return out


def pickled(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Payload(path), content)
    return content.getvalue()


MODEL, CONSTANTS = "models/model.json", "data/constants/model_constants_config.json"
OPAQUE = b'{"config": {"x": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true, "tensor_meta": null}}}'


@pytest.mark.parametrize(
    ("record", "change", "got"),
    [
        ("data/sample_inputs/model.pt", lambda old, path: pickled(path), "something else, which could run code"),
        ("data/weights/model_weights_config.json", lambda old, path: old.replace(b": false", b": true"), "'use_pickle' in"),
        (CONSTANTS, lambda old, path: OPAQUE, "'use_pickle' in"),
        ("data/constants/opaque_obj_0", lambda old, path: pickle.dumps(Payload(path)), "the record data/constants/opaque_obj_0"),
        ("data/aotinductor/model/a.so", lambda old, path: b"ELF", "the record data/aotinductor/model/a.so"),
        (MODEL, lambda old, path: old.replace(b"torch.ops.aten.linear.default", b"torch.os.system"), "'torch.os.system' in"),
        (MODEL, lambda old, path: old.replace(b"torch.ops.aten.linear.default", b"torch.ops.aten.from_file.default"), "from_file"),
        (MODEL, lambda old, path: old.replace(b"Symbol('s77'", b"__import__('os'"), "__import__"),
        (MODEL, lambda old, path: old.replace(b'"forward_arg_names": ["x"]', b'"forward_arg_names": ["x=print(1)"]'), "x=print"),
        (MODEL, lambda old, path: old.replace(b'\\"context\\": \\"null\\"', b'\\"__enum__\\": \\"null\\"'), "__enum__"),
        (MODEL, lambda old, path: old[:100], "Unterminated|Expecting"),
    ],
)  # fmt: skip
def test_a_program_with_code_in_it_is_refused(
    record: str, change: Callable[[bytes, Path], bytes], got: str, program: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    bad = changed(program, tmp_path / "bad.pt2", record, lambda old: change(old, mark))
    assert bad.read_bytes() != program.read_bytes()
    with pytest.raises(ValueError, match=rf"^features: .*bad.pt2 must [^\n]*, got [^\n]*({got})[^\n]*$"):
        Features(str(bad))
    assert not mark.exists()


def test_a_copy_of_the_program_is_not_refused(program: Path, tmp_path: Path) -> None:
    Features(str(changed(program, tmp_path / "good.pt2", MODEL, lambda old: old)))


def test_such_a_program_runs_code_when_torch_loads_it(program: Path, tmp_path: Path) -> None:
    """Else the refusal would guard nothing."""
    mark = tmp_path / "mark"
    bad = changed(program, tmp_path / "bad.pt2", "data/sample_inputs/model.pt", lambda old: pickled(mark))
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(bad)
    assert mark.exists()


# --- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published names and shapes with other numbers."""
    rng, state = torch.Generator().manual_seed(0), Inception().state_dict()
    for name, value in state.items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=rng)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=rng)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path


def test_inception_gives_what_torch_fidelity_gives(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with these weights and images."""
    monkeypatch.setattr(inception, "CHECKSUM", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    monkeypatch.setenv("GANKERN_INCEPTION", str(weights))
    pixels = (torch.arange(2 * 3 * 20 * 30) * 7919 % 256).view(2, 3, 20, 30)
    seen = Features("inception", device=DEVICE)(pixels / 127.5 - 1)
    assert (seen.features.shape, seen.probabilities.shape) == ((2, 2048), (2, 1008))
    torch.testing.assert_close(seen.features.mean(1).cpu(), torch.tensor([2.259948, 2.123183]), rtol=1e-4, atol=0)
    values, places = seen.features[0].topk(4)
    assert places.tolist() == [928, 65, 1899, 1683]
    torch.testing.assert_close(values.cpu(), torch.tensor([30.739292, 21.247446, 20.175222, 17.756815]), rtol=1e-4, atol=0)
    torch.testing.assert_close(seen.probabilities[:, 980].cpu(), torch.tensor([0.939193, 0.819366]), rtol=1e-3, atol=0)


def test_other_inception_weights_are_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"weights must be .*, whose SHA-256 begins with 6726825d, got [0-9a-f]{8} of .*weights.pth"
    ):
        load_inception(weights)
    (tmp_path / "bad.pth").write_bytes(pickled(tmp_path / "mark"))
    with pytest.raises(ValueError, match="whose SHA-256 begins with 6726825d"):
        Features(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "mark").exists()
    monkeypatch.delenv("GANKERN_INCEPTION", raising=False)
    with pytest.raises(ValueError, match=r"the releases of torch-fidelity .* or by the variable GANKERN_INCEPTION, got none"):
        Features("inception")
    with pytest.raises(ValueError, match=r"got '/nowhere.pth', which is no file"):
        Features("/nowhere.pth")


# --- refusals


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "sources must be a run, or --real X --fake Y, or REAL FAKE, got none"),
        (["a.npz", "b.npz", "--real", "a.npz"], "sources must be a run, .*, or REAL FAKE, got a.npz b.npz --real a.npz"),
        (["nowhere"], "run: nowhere must be a run directory or a checkpoint, got no such path"),
        (["a.npz"], "--real must name real samples, as a.npz is no run that knows its data, got none"),
        (["a.npz", "none.npz"], "data: source must be mnist, .*, got 'none.npz', which does not exist"),
        (["none.npz", "a.npz"], "data: source must be mnist, .*, got 'none.npz', which does not exist"),
        (["a.npz", "b.npz", "--metrics", "fid,beauty"], "--metrics must be of fid,kid,.*modes, got 'beauty'"),
        (["a.npz", "b.npz", "--metrics", "is"], "--metrics must be those .*, got is, which needs features with classes"),
        (["a.npz", "b.npz", "--metrics", "modes"], ".* got modes, which needs a mixture of Gaussians or features with classes"),
        (["ring", "ring", "--metrics", "ms-ssim"], ".* got ms-ssim, which needs images of at least 11 pixels a side"),
        (["a.npz", "b.npz", "--n", "9"], "--n must be >= 10, got 9"),
        (["a.npz", "b.npz", "--n", "61"], r"--n must be in \[10, 60\], as a.npz has 60 samples, got 61"),
        (["few.npz", "b.npz"], r"few.npz must have at least 10 samples, got 9"),
        (["a.npz", "b.npz", "--seed", "-1"], r"--seed must be in \[0, 2\^62\), got -1"),
        (["a.npz", "b.npz", "--split", "test"], "data: split must be train for a source that has no test part, got test"),
        (["a.npz", "b.npz", "--features", "vgg"], "features: network must be pixels, bundled, inception, .*, got 'vgg'"),
        (["a.npz", "b.npz", "--features", "x.pt2"], "features: network must be a file, got 'x.pt2', which is none"),
        (["ring", "ring", "--features", "bundled"], r"features: samples must be images \[N, 1 or 3, H, W\] for bundled, got .*"),
        (["a.npz", "large.npz"], r"fake samples must have the shape of the real ones, \[1, 12, 12\], got \[1, 14, 14\]"),
        (["a.npz", "ring"], r"fake samples must have the shape of the real ones, \[1, 12, 12\], got \[2\]"),
        (["one.csv", "two.csv"], "fake samples must have the columns a, b, got a, c"),
        (["grey.npz", "b.npz"], "fid: real must hold samples that differ, got 60 copies of one"),
        (["a.npz", "nan.npz"], r"data: images must be uint8, or floating in \[0, 1\] or \[-1, 1\], got values in \[nan, nan\]"),
        (["a.npz", "b.npz", "--device", "tpu"], "device must be auto, cpu or cuda.*, got 'tpu'"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], sentence: str, images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    np.savez("few.npz", images=np.zeros((9, 12, 12), dtype=np.uint8))
    np.savez("large.npz", images=np.zeros((60, 14, 14), dtype=np.uint8))
    np.savez("grey.npz", images=np.zeros((60, 12, 12), dtype=np.uint8))
    np.savez("nan.npz", images=np.full((60, 12, 12), np.nan))
    for name, header in (("one", "a,b"), ("two", "a,c")):
        np.savetxt(f"{name}.csv", np.random.default_rng(0).normal(size=(20, 2)), delimiter=",", header=header, comments="")
    assert re.fullmatch(f"{sentence}.*", refusal(capsys, *words))


def test_a_checkpoint_is_judged_as_its_run_is(run: Path, capsys: Capture) -> None:
    """By its own name, and by a link as RUN/best is."""
    (saved,) = run.glob("checkpoint-*.safetensors")
    link = run / "best"
    link.symlink_to(saved.name)
    try:
        got = [report(capsys, str(name), "--n", "20", "--metrics", "fid,kid") for name in (run, saved, link)]
    finally:
        link.unlink()
    assert got[0]["metrics"] == got[1]["metrics"] == got[2]["metrics"]
    assert got[1]["fake"]["source"] == str(saved)
    assert got[0]["metrics"].keys() == {"fid", "kid"}  # a subset that is all there is has no deviation


def test_a_run_is_not_taken_for_real_samples(run: Path, capsys: Capture) -> None:
    """Its directory has pictures of fakes."""
    assert refusal(capsys, str(run), "mnist") == f"--real must be real samples, got the run {run}"


def test_help_says_what_is_compared(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert "gankern evaluate REAL FAKE" in out
    assert ",".join(evaluate.METRICS) in "".join(out.split())
