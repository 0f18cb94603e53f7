"""Every Triton kernel compiles ahead of time for sm_80, sm_90, sm_100: no spills, within shared memory, indices of 64 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, CUDA programming guide, compute capabilities


def problems(kernels: list[str], rows: list[dict[str, Any]], architectures: Iterable[int] = SHARED) -> list[str]:
    """What is wrong with these compiled kernels, a sentence each."""
    found = [
        f"{k} was not compiled for sm_{sm}"
        for sm in architectures
        for k in kernels
        if not any((r["kernel"], r["sm"]) == (k, sm) for r in rows)
    ]
    for r in rows:
        what = f"{r['kernel']} ({r['case']}) on sm_{r['sm']}"
        if r["stack"] or r["local"]:
            found.append(f"{what} spills: {r['stack']} bytes of stack, {r['local']} of local memory")
        found += [f"{what} has an index of 32 bits: {line}" for line in r["narrow"]]
        if r["shared"] > SHARED[r["sm"]]:
            found.append(f"{what} needs {r['shared']} bytes of shared memory, there are {SHARED[r['sm']]}")
    return found


def test_problems_are_found():
    good = {"kernel": "k", "case": "c", "sm": 80, "stack": 0, "local": 0, "shared": 1024, "narrow": []}
    rows = [good, {**good, "sm": 90, "stack": 8}, {**good, "sm": 100, "shared": 300 * 1024}]
    assert [p.split(" ", 3)[-1].split(":")[0] for p in problems(["k"], rows)] == [
        "sm_90 spills",
        "sm_100 needs 307200 bytes of shared memory, there are 232448",
    ]
    assert "has an index of 32 bits: tt.addptr" in problems(["k"], [{**good, "narrow": ["tt.addptr"]}], [80])[0]
    assert problems(["k", "forgotten"], [good])[:2] == ["forgotten was not compiled for sm_80", "k was not compiled for sm_90"]


def test_narrow_indices_are_found():
    pytest.importorskip("triton")
    from tests.triton_aot import narrow

    ir = """
        %eight = arith.constant 8 : i32
        %program = tt.get_program_id x : i32 loc(#loc1)
        %column = arith.muli %program, %eight : i32 loc(#loc2)
        %offset = arith.muli %program, %width : i32 loc(#loc2)
        %all = tt.splat %offset : i32 -> tensor<8xi32> loc(#loc3)
        %sum = arith.addi %all, %lane : tensor<8xi32> loc(#loc3)
        %early = arith.extsi %program : i32 to i64 loc(#loc2)
        %late = arith.extsi %offset : i32 to i64 loc(#loc2)
        %good = tt.addptr %x, %column : !tt.ptr<f32>, i32 loc(#loc4)
        %fine = tt.addptr %x, %early : !tt.ptr<f32>, i64 loc(#loc4)
        %bad = tt.addptr %x, %sum : tensor<8x!tt.ptr<f32>>, tensor<8xi32> loc(#loc4)
        %offset = arith.addi %column, %lane : i32 loc(#loc5)
        %again = arith.extsi %offset : i32 to i64 loc(#loc5)
    """
    assert [line.split()[0] for line in narrow(ir)] == ["%late", "%bad"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sm", SHARED)
def test_every_kernel_compiles_without_spills(sm: int, tmp_path: Path):
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "tests/triton_aot.py"), str(sm)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    kernels, *rows = map(json.loads, done.stdout.splitlines())
    print(f"\n{'kernel':34} {'case':44} sm registers spilled shared")
    for r in rows:
        print(f"{r['kernel']:34} {r['case']:44} {r['sm']:3} {r['reg']:8} {r['stack'] + r['local']:7} {r['shared']:6}")
    found = problems(kernels, rows, [sm])
    assert not found, "\n".join(found)
