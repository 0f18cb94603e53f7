"""A generator in a file of its own, loaded back: each architecture, each format; what its card says works without gankern."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.cli.main import main
from gankern.data import Table
from gankern.training import TrainConfig
from gankern.training.export import FORMATS, KEY, export
from gankern.training.run_dir import RunDir
from gankern.training.trained import Trained
from tests import small

TABLE = Table(("height", "weight"), (1.7, 70.0), (0.1, 12.0))
# Every generator, and what else changes its layers.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("gan-bn", {"spectral_norm_g": True, "g_dropout": 0.3, "latent": "uniform"}),
    "dcgan": ("dcgan", {"upsample": "shuffle"}),
    "dcgan-vbn": ("improved", {}),
    "sngan": ("sngan", {"size": 0}),
    "resnet": ("sngan", {"size": 0, "arch": "resnet"}),
    "cgan": ("cgan", {}),
    "cdcgan": ("cdcgan", {}),
    "cdcgan-vbn": ("cdcgan", {"virtual_batch_norm": True}),
    "tabular": ("ctgan-like", {}),
    "pacgan-toy": ("ring", {}),
    "wgan-gp-toy": ("swissroll", {}),
}


def finished(path: Path, preset: str, changes: dict[str, Any], table: Table | None = None) -> Trained:
    """A run as after two steps of training, and its generator."""
    config = small.config(preset, outdir=str(path / "secret"), **changes)
    trainer = small.trainer(config)
    for _ in range(2):
        count = config.batch_size * config.n_critic
        labels = [torch.arange(count) % small.CLASSES] if small.classes(config) else []
        trainer.step(torch.randn(count, *small.shape(config)), *labels)
    run = RunDir.create(preset, config, "noise", small.shape(config), {}, small.classes(config), table)
    run.save(trainer.state_dict(), 0)
    return Trained(run.path)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return finished(tmp_path_factory.mktemp("runs"), *CASES[request.param])


def inputs(trained: Trained, n: int) -> tuple[Tensor, ...]:
    z = torch.randn(n, trained.run.config.z_dim, generator=torch.Generator().manual_seed(n))
    return (z, (torch.arange(n) + 1) % trained.run.classes) if trained.run.classes else (z,)


def assert_same(trained: Trained, loaded: Any) -> None:
    trained.generator.eval()
    for n in (1, 2, 7):
        with torch.no_grad():
            want = trained.generator(*inputs(trained, n))
        torch.testing.assert_close(torch.as_tensor(loaded(*inputs(trained, n))), want, rtol=1e-4, atol=1e-5)
    assert want.std() > 0


def test_safetensors(trained: Trained, tmp_path: Path) -> None:
    export(trained, tmp_path / "g.safetensors", "safetensors")
    generator = gankern.load_generator(tmp_path / "g.safetensors")
    assert isinstance(generator, nn.Module)
    assert not generator.training
    assert_same(trained, generator)
    assert torch.equal(generator.sample(5, seed=3), trained.sample(5, seed=3))
    assert (generator.shape, generator.classes, generator.table) == (trained.run.shape, trained.run.classes, trained.run.table)


def test_pt2(trained: Trained, tmp_path: Path) -> None:
    export(trained, tmp_path / "g.pt2", "pt2")
    extra = {f"{KEY}.json": ""}
    program = torch.export.load(tmp_path / "g.pt2", extra_files=extra)
    assert json.loads(extra[f"{KEY}.json"])["preset"] == trained.run.preset
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not any("gankern" in name for name in operators), operators
    assert_same(trained, program.module())


@pytest.mark.parametrize("trained", ["mlp", "dcgan-vbn", "tabular"], indirect=True)
def test_onnx(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    export(trained, tmp_path / "g.onnx", "onnx")
    assert [p.name for p in tmp_path.iterdir() if p.name != "g.onnx.md"] == ["g.onnx"]  # the weights are in it
    session = runtime.InferenceSession(tmp_path / "g.onnx")
    names = [i.name for i in session.get_inputs()]
    assert names == ["z", "labels"][: 1 + (trained.run.classes > 0)]
    assert json.loads(session.get_modelmeta().custom_metadata_map[KEY])["shape"] == list(trained.run.shape)
    assert_same(trained, lambda *x: session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0])


def test_every_generator_is_here() -> None:
    has_that_of = {"acgan": "cdcgan", "autoencoder": "mlp", "conv-autoencoder": "dcgan", "unrolled-toy": "wgan-gp-toy"}
    archs = {small.config(preset, **changes).arch for preset, changes in CASES.values()}
    assert archs | {a for a, same in has_that_of.items() if same in archs} == set(get_args(get_type_hints(TrainConfig)["arch"]))


def card(path: Path) -> tuple[str, str]:
    """The text, and the Python in it."""
    text = path.read_text()
    return text, re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def test_cards_need_no_gankern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    trained = finished(tmp_path, "cgan", {})
    monkeypatch.chdir(tmp_path)
    for kind in FORMATS:
        assert export(trained, Path(f"g.{kind}"), kind) == Path(f"g.{kind}.md")
        _, code = card(tmp_path / f"g.{kind}.md")
        found: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            if kind != "safetensors":
                patch.setitem(sys.modules, "gankern", None)  # importing it now raises ImportError
            exec(code, found)
        assert found["samples"].shape == (16, 1, 6, 6)
    text, _ = card(tmp_path / "g.safetensors.md")
    assert "architecture cgan" in text
    assert "0 to 2" in text
    assert "Linear(in_features=15, out_features=8, bias=True)" in text
    for path in tmp_path.glob("g.*"):
        for machine in (tmp_path, Path(gankern.__file__).parent, Path(torch.__file__).parent):
            assert str(machine).encode() not in path.read_bytes()


def test_table_with_its_units(tmp_path: Path) -> None:
    trained = finished(
        tmp_path, "ctgan-like", {"arch": "wgan-gp-toy", "pack": 1, "g_widths": (256,), "data": "/home/me/people.csv"}, TABLE
    )
    export(trained, tmp_path / "g.safetensors", "safetensors")
    assert gankern.load_generator(tmp_path / "g.safetensors").table == TABLE
    text, _ = card(tmp_path / "g.safetensors.md")
    assert "| weight | 70 | 12 |" in text
    assert "people.csv" in text
    assert "/home" not in text


def test_dropout_that_stays(tmp_path: Path) -> None:
    trained = finished(tmp_path, "gan", {"g_dropout": 0.5, "sample_dropout": True})
    export(trained, tmp_path / "g.pt2", "pt2")
    module, z = torch.export.load(tmp_path / "g.pt2").module(), torch.ones(4, 5)
    assert not torch.equal(module(z), module(z))
    assert "dropout is on" in (tmp_path / "g.pt2.md").read_text()
    export(trained, tmp_path / "g.safetensors", "safetensors")
    assert torch.equal(gankern.load_generator(tmp_path / "g.safetensors").sample(4), trained.sample(4))
    with pytest.raises(ValueError, match=r"^export: format must be safetensors or pt2 for a run with --sample-dropout, got onnx$"):
        export(trained, tmp_path / "g.onnx", "onnx")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished(tmp_path, "gan", {}).run.path
    assert main(["export", str(run), "--weights", "last"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"the generator of {run} after step 2 \(generator weights\) in generator.safetensors, 0.00 MB; generator.safetensors.md\n",
        said,
    )
    last = Trained(run, "last").generator.state_dict()
    loaded = gankern.load_generator("generator.safetensors").network.state_dict()
    assert all(torch.equal(last[key], loaded[key]) for key in last)
    assert main(["export", str(run), "--out", "deep/er/ema.safetensors"]) == 0
    ema = gankern.load_generator("deep/er/ema.safetensors").network.state_dict()
    assert any(not torch.equal(last[key], ema[key]) for key in last)
    assert sorted(p.name for p in (tmp_path / "deep/er").iterdir()) == ["ema.safetensors", "ema.safetensors.md"]
    capsys.readouterr()
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "must be a run directory or a checkpoint" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "pt2", "--out", "g.onnx"]) == 2
    assert "--format must be onnx for --out g.onnx, got pt2" in capsys.readouterr().err
    assert not Path("g.onnx").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert 'pip install "gankern[train]"' in capsys.readouterr().err


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = finished(tmp_path, "gan", {})
    export(trained, tmp_path / "g.safetensors", "safetensors")
    before = (tmp_path / "g.safetensors").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        export(trained, tmp_path / "g.safetensors", "safetensors")
    assert (tmp_path / "g.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.safetensors", "g.safetensors.md", "secret"]


def test_load_generator_refuses(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained, path = finished(tmp_path, "gan", {}), tmp_path / "g.safetensors"
    export(trained, path, "safetensors")
    content, (checkpoint,) = path.read_bytes(), trained.run.path.glob("checkpoint-*")
    state = {key: value.clone() for key, value in trained.generator.state_dict().items()}
    facts = {"preset": "gan", "shape": [1, 6, 6], "settings": TrainConfig(**small.WIDTHS).to_json()}
    name, weight = next(iter(state.items()))
    for written, sentence in (
        (b"", "path must be an intact safetensors file"),
        (content[:-1], "path must be an intact safetensors file"),
        (checkpoint.read_bytes(), "path must be a file of gankern export, got .*, a checkpoint: gankern export RUN writes one"),
        ((state, None), "path must be a file of gankern export, got .* whose metadata has no 'gankern'"),
        ((state, "{"), "must be JSON"),
        ((state, "[" * 100_000), "must be JSON"),
        ((state, json.dumps(facts | {"classes": -1})), r"must have classes in \[0, 2\^31\)"),
        ((state, json.dumps(facts | {"settings": {"widths": 3}})), "settings must have known fields only, got widths"),
        ((state, json.dumps(facts | {"shape": [1, 7, 7]})), r"2.weight must be torch.float32 \[49, 10\], got"),
        (({**state, name: weight.double()}, json.dumps(facts)), f"{name} must be torch.float32"),
        (({**state, "more": weight.clone()}, json.dumps(facts)), "state must not have the entry more"),
        (({"less": weight}, json.dumps(facts)), "state must have the entry"),
    ):
        if isinstance(written, bytes):
            path.write_bytes(written)
        else:
            save_file(written[0], path, None if written[1] is None else {KEY: written[1]})
        with pytest.raises(ValueError, match=sentence):
            gankern.load_generator(path)
    with pytest.raises(
        ValueError, match=r"^load_generator: path must be a file of gankern export, got .*nowhere, which is no file$"
    ):
        gankern.load_generator(tmp_path / "nowhere")


def test_settings_alone_allocate_nothing(tmp_path: Path) -> None:
    """A few bytes that name a network of petabytes are refused by the size of the weights that are there."""
    from safetensors.torch import save_file

    settings = TrainConfig(z_dim=2**30, g_widths=(2**30,) * 9, d_widths=(2**30,) * 9).to_json()
    facts = {"preset": "gan", "shape": [1, 28, 28], "settings": settings}
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "g.safetensors", {KEY: json.dumps(facts)})
    with pytest.raises(ValueError, match="state must have the entry"):
        gankern.load_generator(tmp_path / "g.safetensors")
