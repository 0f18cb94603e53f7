"""Imports point one way, and importing gankern is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"_C", "backend", "checks", "triton", "metrics", "data"},
    {"ops"},
    {"nn", "losses", "regularizers"},
    {"models"},
    {"training"},
    {"reproduce", "report"},
    {"cli", "__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TOP = len(LAYERS) - 1  # the package itself re-exports from everywhere: only the commands may import its names
FREE = {"__version__"}


def imports(tree: ast.AST, module: list[str], is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of everything under gankern that a file imports: plain, relative, inside functions, by import_module."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # `import gankern` itself names nothing yet: its attributes are looked at below
            found += [(node.lineno, a.name) for a in node.names if a.name != "gankern" or a.asname]
        elif isinstance(node, ast.ImportFrom):
            keep = len(module) - node.level + is_package
            base = ".".join([*module[:keep], *([node.module] if node.module else [])]) if node.level else node.module or ""
            found += [(node.lineno, f"{base}.{a.name}") for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gankern":
            found.append((node.lineno, f"gankern.{node.attr}"))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return [(line, name) for line, name in found if name.split(".")[0] == "gankern"]


def upward(root: Path) -> list[str]:
    """Every import under root/gankern that points up, and every file that belongs to no layer."""
    wrong = []
    for path in sorted((root / "gankern").rglob("*.py")):
        module = ["gankern", *path.relative_to(root / "gankern").with_suffix("").parts]
        is_package = module[-1] == "__init__"
        module = module[:-1] if is_package else module
        if module == ["gankern"]:
            continue
        where = path.relative_to(root)
        if module[1] not in RANK:
            wrong.append(f"{where}: {module[1]} has no place in the order of imports")
            continue
        for line, name in imports(ast.parse(path.read_text()), module, is_package):
            part = [*name.split("."), "*"][1]
            if part not in FREE and RANK.get(part, TOP) > RANK[module[1]]:
                wrong.append(f"{where}:{line}: imports {name}, which lies above {module[1]}")
    return wrong


def test_imports_point_one_way() -> None:
    assert upward(ROOT) == []


PLANTED = {
    "import gankern.nn": "gankern.nn",
    "import gankern.nn.linear as x": "gankern.nn.linear",
    "from gankern import training": "gankern.training",
    "from gankern.cli.main import main": "gankern.cli.main.main",
    "from gankern import gan_loss": "gankern.gan_loss",
    "from .. import models": "gankern.models",
    "from ..training import trainer": "gankern.training.trainer",
    "import gankern\ny = gankern.nn.LinearLeakyReLU": "gankern.nn",
    "import gankern as g": "gankern",
    "def f():\n    from gankern import losses": "gankern.losses",
    "import importlib\nimportlib.import_module('gankern.models.mlp')": "gankern.models.mlp",
}


@pytest.mark.parametrize("code", PLANTED)
def test_the_checker_catches_a_planted_import(tmp_path: Path, code: str) -> None:
    ops = tmp_path / "gankern" / "ops"
    ops.mkdir(parents=True)
    (ops / "__init__.py").touch()
    (tmp_path / "gankern" / "__init__.py").write_text("from gankern.training import trainer\n")  # exempt
    bad = ops / "bad.py"
    bad.write_text(f"from gankern import __version__, backend, checks\nfrom . import _philox\nimport torch\n{code}\n")
    line = 4 + code.count("\n")
    assert upward(tmp_path) == [f"gankern/ops/bad.py:{line}: imports {PLANTED[code]}, which lies above ops"]


def test_the_checker_knows_relative_imports_of_a_package(tmp_path: Path) -> None:
    (tmp_path / "gankern" / "ops").mkdir(parents=True)
    (tmp_path / "gankern" / "ops" / "__init__.py").write_text("from . import linear_lrelu\nfrom .. import nn\n")
    (tmp_path / "gankern" / "stray.py").touch()
    assert upward(tmp_path) == [
        "gankern/ops/__init__.py:2: imports gankern.nn, which lies above ops",
        "gankern/stray.py: stray has no place in the order of imports",
    ]


def run(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_importing_gankern_is_light() -> None:
    """Neither Triton nor anything of the extras is imported, CUDA is not initialised, nothing is compiled or written."""
    heavy = (
        "triton",
        "matplotlib",
        "PIL",
        "rich",
        "tyro",
        "tensorboard",
        "safetensors",
        "torch._dynamo",
        "torch._inductor",
        "torchvision",
    )
    loaded = run(
        "import sys, torch; before = set(sys.modules); import gankern\n"
        "print(*sorted(set(sys.modules) - before), *(['CUDA'] if torch.cuda.is_initialized() else []), sep='\\n')"
    ).split()
    assert "gankern.ops.linear_lrelu" in loaded
    assert [
        m
        for m in loaded
        if m == "CUDA" or m.startswith(heavy) or m.startswith(("gankern.triton", "gankern.training", "gankern.cli"))
    ] == []


def test_every_public_name_is_an_attribute_of_the_package() -> None:
    """gankern.losses.GANLoss and gankern.metrics.fid need no import of their own."""
    names = "gankern.losses.GANLoss, gankern.metrics.fid, gankern.training.PRESETS, gankern.data.load, gankern.models.MLPGenerator"
    run(f"import gankern; {names}; [getattr(gankern, name) for name in gankern.__all__]")
