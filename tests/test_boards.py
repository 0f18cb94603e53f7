"""What TensorBoard and Weights & Biases receive of a run."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gankern.cli.boards import Boards
from gankern.cli.common import Refused
from gankern.cli.main import train_main
from gankern.training import TrainConfig
from gankern.training.run_dir import RunDir

TINY = ["--z-dim", "4", "--g-widths", "8", "--d-widths", "8", "--batch-size", "16", "--device", "cpu", "--log-gradients"]
PERIODS = ["--log-every", "2", "--sample-every", "4", "--checkpoint-every", "4"]
SCALARS = {f"loss/{n}" for n in ("d_loss", "g_loss")} | {f"score/{n}" for n in ("d_real", "d_fake")} | {"speed/images_per_s"}
SCALARS |= {f"techniques/{n}" for n in ("g_grad_norm", "d_grad_norm")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8))
    return path


def train(images: Path, outdir: Path, *flags: str) -> Path:
    assert train_main(["gan", "--data", str(images), "--outdir", str(outdir), *TINY, *PERIODS, *flags]) == 0
    return outdir / "00000-gan-dots-b16"


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run))
    found.Reload()
    return found


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes a log as LevelDB's, blocks of 32 KiB, pieces (checksum, length, kind, bytes)."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if -at % 2**15 < 7:  # no room for a piece in this block
            at += -at % 2**15
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(run: Path) -> list[dict[str, Any]]:
    """Each row that Weights & Biases keeps for later, of all its files in order."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def test_both_boards_receive_the_same(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(images, tmp_path, "--track", "both", "--steps", "4")
    train(images, tmp_path, "--track", "both", "--steps", "6", "--resume", str(run))
    shown, kept = events(run), history(run)
    assert set(shown.Tags()["scalars"]) == SCALARS
    for name in SCALARS:
        ours = [(event.step, event.value) for event in shown.Scalars(name)]
        theirs = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in kept if name in row]
        assert ours == theirs
        assert [step for step, _ in ours] == [2, 4, 6]
    for name, steps in (("reals", [0]), ("fakes", [0, 4, 6])):
        assert [event.step for event in shown.Images(name)] == steps
        assert [row["step"] for row in kept if f"{name}/_type" in row] == steps
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert len(ids) == 1


def test_none_writes_no_events(images: Path, tmp_path: Path) -> None:
    run = train(images, tmp_path, "--track", "none", "--steps", "2")
    assert not [p for p in run.iterdir() if "tfevents" in p.name or p.name == "wandb"]
    assert (run / "log.jsonl").exists()


def test_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"preset": "gan", "shape": [1, 2, 2], "settings": {}}))
    boards = Boards(RunDir(tmp_path), TrainConfig(), 0)
    boards.add_text("health", "the critic is too strong", 7)
    boards.close()
    (event,) = events(tmp_path).Tensors("health/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (7, b"the critic is too strong")


def test_steps_made_again_replace_the_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"preset": "gan", "shape": [1, 2, 2], "settings": {}}))
    boards = Boards(RunDir(tmp_path), TrainConfig(), 0)
    for step in (1, 2, 3):
        boards.add_scalar("loss/d_loss", step, step)
    boards.rewind(1)
    boards.add_scalar("loss/d_loss", 20, 2)
    boards.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss/d_loss")] == [(1, 1), (2, 20)]


def test_wandb_that_is_missing_or_does_not_start(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise Failure("api_key not configured")

    class Failure(Exception):
        pass

    fake: Any = ModuleType("wandb")
    fake.init, fake.Error, fake.Settings = refuse, Failure, SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text(json.dumps({"preset": "gan", "shape": [1, 2, 2], "settings": {}}))
    sentence = r"^wandb must start \(WANDB_MODE=offline needs no account\), got: api_key not configured$"
    with pytest.raises(Refused, match=sentence):
        Boards(RunDir(tmp_path), TrainConfig(track="wandb"), 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else SimpleNamespace())
    capsys.readouterr()
    assert train_main(["gan", "--data", str(images), "--outdir", str(tmp_path / "runs"), *TINY, "--track", "wandb"]) == 2
    assert capsys.readouterr().err == 'gankern-train: wandb must be installed for this: pip install "gankern[wandb]"\n'
    assert not (tmp_path / "runs").exists()


def test_pictures_are_the_same_on_a_board(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"preset": "gan", "shape": [1, 2, 2], "settings": {}}))
    boards = Boards(RunDir(tmp_path), TrainConfig(), 0)
    picture = torch.arange(24, dtype=torch.uint8).view(4, 6, 1)
    boards.add_image("fakes", picture, 3)
    boards.close()
    (event,) = events(tmp_path).Images("fakes")
    assert (event.step, event.width, event.height) == (3, 6, 4)
