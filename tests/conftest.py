"""Where the tests run: GANKERN_TEST_DEVICE=cpu (default: Triton under its interpreter) or cuda (the same tests on the GPU)."""

import ctypes
import functools
import inspect
import os

if os.environ.setdefault("GANKERN_TEST_DEVICE", "cpu") == "cpu":  # before anything imports triton, which reads it once
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the `poisoned` fixture asks cuBLAS to be deterministic

from collections.abc import Iterator
from types import FunctionType

import pytest
import torch

from gankern import backend as backends
from tests import support


def quicken_interpreter() -> None:
    """Triton's interpreter searches all of triton.language for what to replace, at each launch and at each call of a function in a
    kernel: most of the time that a small kernel takes. Once a launch is enough, and what there is to find is always the same."""
    from triton import language
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_attr", "_patch_builtin", "_patch_lang", "GridExecutor")):
        return  # another Triton: slower, and right

    patch_lang, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    @functools.cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]

    def patch_builtin(package: object, *rest: object) -> None:
        for name in names(package):
            member = getattr(package, name)
            if language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    def patch_once(fn: FunctionType) -> object:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return patch_lang(fn)

    def launch_anew(*args: object, **kwargs: object) -> None:
        done.clear()  # the end of a launch undoes its replacements
        launch(*args, **kwargs)

    for package in (language, language.tensor, language.math, language.core, language.core.tensor_descriptor_base):
        names(package)  # before anything is replaced
    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
    interpreter.GridExecutor.__call__ = launch_anew


if backends.triton_interpreted() and not backends.problem("triton", "cpu"):
    quicken_interpreter()


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
def one_thread() -> Iterator[None]:
    """One CPU thread, as in the processes that tests start: another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def steady(one_thread: None) -> Iterator[None]:
    """For whole trainings: one CPU thread, the fastest where small networks and processes share the cores; no TF32 on a GPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


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
