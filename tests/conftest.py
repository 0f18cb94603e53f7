"""Where the tests run: GANKERN_TEST_DEVICE=cpu (default: Triton under its interpreter) or cuda (the same tests on the GPU)."""

import ctypes
import os

if os.environ.setdefault("GANKERN_TEST_DEVICE", "cpu") == "cpu":  # before anything imports triton, which reads it once
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the `poisoned` fixture asks cuBLAS to be deterministic

from collections.abc import Iterator

import pytest
import torch

from gankern import backend as backends
from tests import support


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run on the device of this test session, forced for the length of the test."""
    support.need(request.param)
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["compiled", "triton"])
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `backend`, without the definition itself."""
    support.need(request.param)
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def steady() -> Iterator[None]:
    """For whole trainings: one CPU thread, the fastest where small networks and processes share the cores; no TF32 on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (integers: their largest value), from Python and from C++: an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns, in every caller of aten::empty
    poison_malloc(True)  # our C++ ops for the CPU allocate below aten::empty
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.ops.aten.empty.memory_format([3], device=support.DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        poison_malloc(False)


def poison_malloc(on: bool) -> None:
    """Have glibc fill what malloc returns with 0xFF, NaN in every floating dtype; other C libraries have no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb = -6
        mallopt(m_perturb, 0x100 if on else 0)  # the low byte is inverted; any other bit switches it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left with them alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_triton_aot.py", "test_cuda_build.py"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
