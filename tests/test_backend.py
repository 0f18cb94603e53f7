"""Which backend runs: forcing one, the environment variable, and what is said where one cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import gankern
from gankern import backend
from tests.support import DEVICE

ROOT = Path(__file__).parent.parent
X, W = torch.zeros(2, 3), torch.zeros(4, 3)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("GANKERN_BACKEND", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_use_backend_nests_and_restores() -> None:
    before = backend.forced()
    with gankern.use_backend("reference"):
        assert backend.forced() == "reference"
        with gankern.use_backend("triton"):
            assert backend.forced() == "triton"
        assert backend.forced() == "reference"
        with pytest.raises(KeyError), gankern.use_backend("compiled"):
            raise KeyError
        assert backend.forced() == "reference"
    assert backend.forced() == before


@pytest.mark.parametrize("name", ["cuda", "", "Reference", None])
def test_unknown_name(name: object) -> None:
    before = backend.forced()
    with pytest.raises(ValueError) as caught, gankern.use_backend(name):
        pass
    assert str(caught.value) == f"use_backend: name must be one of reference, compiled, triton, got {name!r}"
    assert backend.forced() == before


def test_backward_in_another_thread_runs_on_the_backend_of_the_forward(kernel_backend: str) -> None:
    """Autograd may run a backward pass in a thread of its own, and after the `with` block: it must not matter."""
    x, w = torch.randn(2, 3, device=DEVICE).requires_grad_(), torch.randn(4, 3, device=DEVICE).requires_grad_()
    y = gankern.linear_lrelu(x, w)
    grads: list[torch.Tensor] = []
    with gankern.use_backend("reference"):
        want = torch.autograd.grad(gankern.linear_lrelu(x, w).sum(), (x, w))
        thread = threading.Thread(target=lambda: grads.extend(torch.autograd.grad(y.sum(), (x, w))))
        thread.start()
        thread.join()
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_environment_variable() -> None:
    code = """
from gankern import backend
print(backend.forced())
with backend.use_backend("compiled"):
    print(backend.forced())
"""
    assert run(code, GANKERN_BACKEND="triton").stdout.split() == ["triton", "compiled"]
    assert run(code, GANKERN_BACKEND="auto").stdout.split() == ["None", "compiled"]


def test_environment_variable_with_an_unknown_name() -> None:
    done = run("import gankern, torch; gankern.gan_loss(torch.zeros(2), torch.zeros(2))", GANKERN_BACKEND="fast")
    assert done.returncode != 0
    assert done.stderr.strip().endswith("ValueError: GANKERN_BACKEND: name must be one of reference, compiled, triton, got 'fast'")


def test_reference_runs_everywhere() -> None:
    for device in ("cpu", "cuda", "mps", "meta"):
        assert backend.problem("reference", device) == ""
    with gankern.use_backend("reference"):
        assert gankern.linear_lrelu(X.to("meta"), W.to("meta")).shape == (2, 4)
        assert gankern.gan_loss(X.to("meta"), X.to("meta")).loss.shape == ()
    assert gankern.linear_lrelu(X.to("meta"), W.to("meta")).is_meta, "the automatic choice falls back where nothing else runs"


def test_what_cannot_run_says_why() -> None:
    assert backend.problem("compiled", "meta") == "there is no C++ kernel for meta tensors"
    assert backend.require("op", "reference", "cpu") == "reference"
    with pytest.raises(RuntimeError) as caught:
        backend.require("op", "compiled", "xpu")
    assert str(caught.value) == (
        "op: backend must be able to run on xpu tensors, got 'compiled': there is no C++ kernel for xpu tensors"
    )


def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = "import torch, gankern\nwith gankern.use_backend('triton'): gankern.linear_lrelu(torch.zeros(2, 3), torch.zeros(4, 3))"
    done = run(code)
    assert done.returncode != 0
    assert done.stderr.strip().endswith(
        "RuntimeError: linear_lrelu: backend must be able to run on cpu tensors, got 'triton': "
        "Triton runs on CPU tensors only under its interpreter (set TRITON_INTERPRET=1)"
    )


@pytest.mark.parametrize("package", ["gankern._C", "triton"])
def test_without_an_optional_part(package: str) -> None:
    """Where the C++ library was not built, or triton is not installed: the rest works, and forcing it says what is missing."""
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)
sys.modules[{package!r}] = None
import torch, gankern
x, w = torch.ones(2, 3), torch.ones(4, 3)
assert gankern.linear_lrelu(x, w).sum() == 24
assert gankern.gan_loss(x, x).loss > 0
with gankern.use_backend({("compiled" if package == "gankern._C" else package)!r}):
    try:
        gankern.gan_loss(x, x)
    except RuntimeError as error:
        print(error)
"""
    done = run(code)
    assert (
        done.stdout.strip()
        == {
            "gankern._C": "gan_loss: backend must be able to run on cpu tensors, got 'compiled': "
            "the C++ library for cpu is not built (install with a C++17 compiler: make build)",
            "triton": "gan_loss: backend must be able to run on cpu tensors, got 'triton': "
            "triton is not installed (pip install triton)",
        }[package]
    ), done.stderr


def test_what_is_built_and_required_here_runs() -> None:
    """A library that was built but does not load is a failure, whether or not this session requires it."""
    assert "broken" not in backend.CPU_PROBLEM
    assert "broken" not in backend.CUDA_PROBLEM
