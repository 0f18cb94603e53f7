"""One op is one name, in the same place of each folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = ("tests/ops/test_{}.py", "bench/bench_{}.py", "csrc/{}.cpp", "csrc/{}.cu", "gankern/triton/{}.py")


def problems(root: Path) -> list[str]:
    """What is missing for an op of gankern/ops, and which kernel or op test belongs to none (_name.py is a helper, not an op)."""

    def names(folder: str, suffix: str, prefix: str = "") -> set[str]:
        stems = {f.stem.removeprefix(prefix) for f in (root / folder).glob(f"{prefix}*{suffix}")}
        return {s for s in stems if not s.startswith("_")}

    ops, helpers = names("gankern/ops", ".py"), {s.lstrip("_") for s in (f.stem for f in (root / "gankern/ops").glob("_*.py"))}
    found = [f"missing: {place.format(op)}" for op in sorted(ops) for place in PLACES if not (root / place.format(op)).is_file()]
    strays = {f"csrc/{n}.cpp" for n in names("csrc", ".cpp") - ops - {"module"}}
    strays |= {f"csrc/{n}.cu" for n in names("csrc", ".cu") - ops}
    strays |= {f"gankern/triton/{n}.py" for n in names("gankern/triton", ".py") - ops}
    strays |= {f"tests/ops/test_{n}.py" for n in names("tests/ops", ".py", "test_") - ops - helpers}
    return found + [f"belongs to no op of gankern/ops: {s}" for s in sorted(strays)]


def test_every_op_has_its_files_and_no_file_is_without_an_op() -> None:
    assert problems(ROOT) == []


def test_the_walk_finds_ops() -> None:
    assert {"gan_loss", "linear_lrelu"} <= {f.stem for f in (ROOT / "gankern/ops").glob("*.py")}


def test_the_check_names_what_is_wrong(tmp_path: Path) -> None:
    for place in (
        "gankern/ops/__init__.py",
        "gankern/ops/_helper.py",
        "gankern/ops/new.py",
        "csrc/module.cpp",
        "csrc/math.h",
        "csrc/new.cpp",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    for place in (
        "csrc/old.cu",
        "gankern/triton/old.py",
        "gankern/triton/new.py",
        "tests/ops/test_new.py",
        "tests/ops/test_helper.py",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert problems(tmp_path) == [
        "missing: bench/bench_new.py",
        "missing: csrc/new.cu",
        "belongs to no op of gankern/ops: csrc/old.cu",
        "belongs to no op of gankern/ops: gankern/triton/old.py",
    ]
