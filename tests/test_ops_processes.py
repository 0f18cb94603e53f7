"""Ops called by many threads at once, in forked processes and DataLoader workers, and on more elements than 32 bits count."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import gankern
from gankern import backend
from gankern.cli.probes import PROBES
from tests.support import DEVICE, need

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="threads and forks of the CPU ops")

LARGE = 2**16 + 3  # elements, enough to be shared out among threads


def everything() -> list[Tensor]:
    """Values and gradients of every op, and of some on tensors that are shared out among threads."""
    found = []
    for probe in PROBES.values():
        if probe.run is not None:
            found += probe.run(torch.device("cpu"))
    x = torch.linspace(-1.0, 1.0, 4 * LARGE).view(4, LARGE).requires_grad_()
    for y in (gankern.bias_lrelu(x), gankern.gradient_norm_penalty(x).value, gankern.gan_loss(x, n_real=2 * LARGE).loss):
        found += [y.detach(), *torch.autograd.grad(y.sum(), x)]
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    need("compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with backend.use_backend("compiled"):  # for all threads: the choice is global
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_many_threads_at_once_get_the_same_bits() -> None:
    want = everything()
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(all(torch.equal(a, b) for _ in range(3) for a, b in zip(everything(), want, strict=True)))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert outcomes == [True] * 6


@pytest.mark.usefixtures("two_threads")
def test_a_graph_is_differentiated_in_another_thread_than_it_was_made() -> None:
    x = torch.linspace(-1.0, 1.0, 4 * LARGE).view(4, LARGE).requires_grad_()
    y = gankern.gradient_norm_penalty(gankern.bias_lrelu(x)).value
    (want,) = torch.autograd.grad(y, x, retain_graph=True)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, x, retain_graph=True))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [torch.equal(g, want) for g in found] == [True] * 4


def in_a_fork(work: Callable[[], bool], seconds: float = 60.0) -> str:
    """How a forked child that runs `work` ends: "right", "wrong", or by which signal; SIGKILL after so many seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline += seconds
        time.sleep(0.01)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "right" if os.WEXITSTATUS(status) == 0 else "wrong"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_ops_run_in_a_fork_of_a_process_that_has_run_them() -> None:
    want = everything()

    def work() -> bool:
        torch.set_num_threads(1)  # as DataLoader does in its workers: the OpenMP threads of the parent are not here
        return all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))

    assert in_a_fork(work) == "right"
    assert in_a_fork(lambda: time.sleep(9) is None, seconds=0.1) == "SIGKILL"  # the clock itself
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


class Mixed(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = torch.linspace(-1.0, 1.0, LARGE).view(1, -1)
        return gankern.bias_lrelu(gankern.interpolate(x, -x, torch.tensor([i / 8])))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_ops_run_in_the_workers_of_a_data_loader() -> None:
    items = Mixed()
    want = [items[i] for i in range(8)]
    got = list(DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_elements_than_32_bits_count() -> None:
    """Three samples of 2^30 + 8 zeros, which take no memory until they are written to, but for a number at the end of each."""
    need("compiled")
    columns = 2**30 + 8
    memory = mmap.mmap(-1, 3 * columns * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    x = torch.frombuffer(memory, dtype=torch.bfloat16).view(3, columns)
    x[:, -1] = torch.tensor([3.0, 4.0, 5.0])
    with backend.use_backend("compiled"):
        assert gankern.gradient_norm_penalty(x, target=0.0).norms.tolist() == [3.0, 4.0, 5.0]


@pytest.mark.skipif("GANKERN_SANITIZED" not in os.environ, reason="for make sanitize")
def test_the_library_is_the_instrumented_one() -> None:
    import gankern._C

    assert "sanitized" in str(gankern._C.__file__)
    assert "__asan_init" in Path(gankern._C.__file__).read_bytes().decode("latin-1")
