"""A trained generator alone, in one file: weights and settings (safetensors), or a program that needs no gankern (pt2, ONNX)."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gankern
from gankern import checks
from gankern.data import NAMES, Table
from gankern.nn.fuse import unfuse
from gankern.training.config import TrainConfig
from gankern.training.files import replacing
from gankern.training.run_dir import read_facts
from gankern.training.trained import Trained, build, draw
from gankern.training.trainer import DROPPING

OP = "export"
KEY = "gankern"  # of the facts, in the metadata of each format
FORMATS = ("safetensors", "pt2", "onnx")


class Generator(nn.Module):
    """A generator that `load_generator` has read, in evaluation mode, with what it takes to draw from it.

    Attributes:
        network: the module itself, fused.
        config: the settings of its run.
        shape: of a sample: (C, H, W), or (F,) of a point or row.
        classes: of a conditional generator, else 0.
        table: what restores the units of a table, or None.

    Shape: z [B, config.z_dim] float32 (and labels [B] int64) -> samples [B, *shape]; images in [-1, 1].
    """

    def __init__(self, network: nn.Module, config: TrainConfig, shape: tuple[int, ...], classes: int, table: Table | None) -> None:
        super().__init__()
        self.network, self.config, self.shape, self.classes, self.table = network, config, shape, classes, table
        self.eval().requires_grad_(False)

    def forward(self, z: Tensor, *labels: Tensor) -> Tensor:
        return self.network(z, *labels)

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """n samples, float32 [n, *shape] on the CPU, those of `gankern sample --seed`; `labels` int64 [n], None: all in turn."""
        return draw(self.network, self.config, self.classes, n, seed, labels)


def load_generator(path: str | os.PathLike[str]) -> Generator:
    """The generator in a file of `gankern export --format safetensors`, on the CPU. Nothing in the file is run.

        generator = gankern.load_generator("digits.safetensors")
        images = generator.sample(64, seed=1)                 # float32 [64, 1, 28, 28] in [-1, 1]
        images = generator(gankern.models.sample_latent(64))

    Raises:
        ValueError: no such file, a damaged one, one that is of another program or of other networks than its settings say.
        RuntimeError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise RuntimeError('load_generator: safetensors must be installed, got none (pip install "gankern[train]")') from None
    op, path = "load_generator", Path(path)
    wanted = "be a file of gankern export"
    if not path.is_file():
        checks.fail(ValueError, op, "path", wanted, f"{path}, which is no file")
    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get(KEY)
            state = {key: file.get_tensor(key) for key in file.keys()} if content else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        checks.fail(ValueError, op, "path", "be an intact safetensors file", f"{path}: {error}")
    if content is None:
        checks.fail(ValueError, op, "path", wanted, f"{path}, whose metadata has no {KEY!r}")
    if re.match(r"[0-9a-f]{8}\{", content):
        checks.fail(ValueError, op, "path", wanted, f"{path}, a checkpoint: gankern export RUN writes one")
    facts = read_facts(content, str(path))
    return Generator(build(facts.config, facts.shape, facts.classes, state), facts.config, facts.shape, facts.classes, facts.table)


def export(trained: Trained, path: Path, kind: str) -> Path:
    """Write the generator to `path` in one of FORMATS, and beside it a card in Markdown; returns the card's path.

    pt2 and onnx hold the plain network, without gankern's ops, for batches of any size. Dropout is off, unless the run keeps it
    when samples are drawn (sample_dropout).

    Raises:
        ValueError: another format; onnx for a run with sample_dropout.
        OSError: it cannot be written.
    """
    checks.one_of(OP, "format", kind, FORMATS)
    if kind == "onnx" and trained.run.config.sample_dropout:
        checks.fail(ValueError, OP, "format", "be safetensors or pt2 for a run with --sample-dropout", kind)
    facts = _facts(trained)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in trained.generator.state_dict().items()}
    plain = unfuse(build(trained.run.config, trained.run.shape, trained.run.classes, state)).eval()
    card = path.with_name(f"{path.name}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if kind == "safetensors":
            from safetensors.torch import save_file

            save_file(state, temporary, {"format": "pt", KEY: json.dumps(facts)})
        else:
            program = _program(trained, plain)
            if kind == "pt2":
                content = io.BytesIO()  # in a file of its own name, the members would have that of the temporary one
                torch.export.save(program, content, extra_files={f"{KEY}.json": json.dumps(facts)})
                temporary.write_bytes(content.getvalue())
            else:
                _save_onnx(program, temporary, facts)
        temporary.chmod(0o644)  # as other files; safetensors leaves them to their owner
    with replacing(card) as temporary:
        temporary.write_text(_card(trained, path.name, kind, facts, plain))
    return card


def _facts(trained: Trained) -> dict[str, Any]:
    """What is known of a generator, without the paths of the machine that trained it."""
    run, config = trained.run, trained.run.config
    data = config.data if config.data in NAMES else Path(config.data).name
    settings = dataclasses.replace(config, data=data, outdir=TrainConfig.outdir, resume=TrainConfig.resume).to_json()
    facts = {"gankern": gankern.__version__, "preset": run.preset, "shape": run.shape, "classes": run.classes, "settings": settings}
    facts |= {"step": trained.step, "weights": trained.source}
    return facts | ({} if run.table is None else {"table": run.table._asdict()})


class _Unconditional(nn.Module):
    """A network whose input has a name, which becomes that of the program."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


class _Conditional(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.network(z, labels)


def _program(trained: Trained, plain: nn.Module) -> torch.export.ExportedProgram:
    """The plain network, dynamic in the batch."""
    run, config = trained.run, trained.run.config
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
        module.training = config.sample_dropout and isinstance(module, DROPPING)
    named = (_Conditional if run.classes else _Unconditional)(plain)
    inputs = [torch.zeros(2, config.z_dim), *([torch.zeros(2, dtype=torch.int64)] if run.classes else [])]
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(named, tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has the paths of this machine
    return program


def _save_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["samples"])
    assert written is not None
    written.model.metadata_props[KEY] = json.dumps(facts)
    written.save(path)


_LOAD = {
    "safetensors": "import gankern\n\ngenerator = gankern.load_generator({file!r})\nsamples = generator.sample(16)",
    "pt2": "import torch\n\ngenerator = torch.export.load({file!r}).module()\n{inputs}\nsamples = generator({names})",
    "onnx": "import onnxruntime\nimport torch\n\n{inputs}\nsession = onnxruntime.InferenceSession({file!r})\n"
    "(samples,) = session.run(None, {feeds})",
}


def _card(trained: Trained, file: str, kind: str, facts: dict[str, Any], plain: nn.Module) -> str:
    """What the file holds, how to draw from it, and the settings that made it."""
    run, config = trained.run, trained.run.config
    law = "torch.randn(16, {})" if config.latent == "normal" else "2 * torch.rand(16, {}) - 1"
    inputs = {"z": law.format(config.z_dim)} | ({"labels": f"torch.arange(16) % {run.classes}"} if run.classes else {})
    use = _LOAD[kind].format(
        file=file,
        inputs="\n".join(f"{name} = {value}" for name, value in inputs.items()),
        names=", ".join(inputs),
        feeds="{" + ", ".join(f'"{name}": {name}.numpy()' for name in inputs) + "}",
    )
    units = "images in [-1, 1]" if len(run.shape) == 3 else "rows, each column standardised" if run.table else "points"
    lines = [
        f"# {file}",
        "",
        f"The generator of a GAN: preset {run.preset} of gankern {facts['gankern']}, architecture {config.arch}, trained on "
        f"{facts['settings']['data']} for {trained.step} steps; the weights are {_WEIGHTS[trained.source]}.",
        "",
        f"- z: float32 [B, {config.z_dim}], drawn from {'N(0, 1)' if config.latent == 'normal' else 'U(-1, 1)'}",
        *([f"- labels: int64 [B], 0 to {run.classes - 1}"] if run.classes else []),
        f"- samples: float32 [B, {', '.join(map(str, run.shape))}], {units}",
        *(["- dropout is on: equal z give samples that differ"] if config.sample_dropout else []),
        "",
        "```python",
        use,
        "```",
        "",
        *(_columns(run.table) if run.table else []),
    ]
    if kind == "safetensors":
        lines += [
            "Without gankern: build these layers in PyTorch under these names, and load the weights with "
            "`safetensors.torch.load_file`. LinearLeakyReLU is Linear, then LeakyReLU.",
            *("", "```", str(plain), "```", ""),
        ]
    changed = {name: value for name, value in facts["settings"].items() if value != getattr(TrainConfig, name)}
    lines += ["Settings that are not the default:", "", "```json", json.dumps(changed, indent=1), "```", ""]
    return "\n".join(lines)


_WEIGHTS = {"ema": "their running average", "generator": "those of the last step"}


def _columns(table: Table) -> Sequence[str]:
    rows = (f"| {name} | {mean:.9g} | {std:.9g} |" for name, mean, std in zip(*table, strict=True))
    return ["A column in the units of the table is mean + std * sample:", "", "| column | mean | std |", "|---|---|---|", *rows, ""]
