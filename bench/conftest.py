"""Options, rows and summary of the benches. See support.py for how they measure.

A bench file has `groups(settings) -> list[Group]` and one function `bench_<op>(row)`; its rows are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import report
from bench.support import COMPILE, Session, Settings, TimeIsUp, machine, replayed_clock
from gankern import backend

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "gankern benches")
    group.addoption("--bench-device", default="auto", help="cpu, cuda, or auto: CUDA if there is one")
    group.addoption("--all-rivals", action="store_true", help="torch.compile at every size, not only at some (minutes more)")
    group.addoption("--bench-rounds", type=int, default=0, help="samples of each rival; default: as many as a group's time allows")
    group.addoption("--bench-seconds", type=float, default=0.0, help="skip the groups not begun after so many seconds; 0: none")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own imports
    if backend.forced() is not None:
        raise pytest.UsageError(f"GANKERN_BACKEND must be unset for benches, got {backend.forced()}")
    name = config.getoption("bench_device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        torch.device(name), config.getoption("all_rivals"), config.getoption("bench_rounds"), config.getoption("benchmark_disable")
    )
    config.stash[SESSION] = Session(settings, config.getoption("bench_seconds"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One row for each group of the file and each rival of the group: parameters `group` and `rival`, by name."""
    if "row" not in metafunc.fixturenames:
        return
    session, rows, smoked = metafunc.config.stash[SESSION], [], False
    file = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
    for group in metafunc.module.groups(session.settings):
        session.groups[file, group.name] = group
        for rival in group.rivals:
            if rival == COMPILE and session.settings.smoke and not session.settings.all_rivals:
                if smoked:  # compiling takes seconds: one is enough to see that the row works
                    continue
                smoked = True
            rows.append(pytest.param(group.name, rival, id=f"{group.name.replace(' ', '-')}-{rival}"))
    metafunc.parametrize(("group", "rival"), rows)


def pytest_itemcollected(item: pytest.Item) -> None:
    if "row" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.benchmark(timer=replayed_clock))


@pytest.fixture
def row(request: pytest.FixtureRequest, benchmark: Any, group: str, rival: str) -> Callable[[], None]:
    """Call it to measure this row (or to replay it, where its group has been measured)."""
    file = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    session = request.config.stash[SESSION]

    def measure_and_replay() -> None:
        try:
            session.replay(benchmark, file, group, rival)
        except TimeIsUp:
            pytest.skip("the time limit of --bench-seconds was reached before this group")

    return measure_and_replay


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name says nothing of its speed
    machine_info["gankern"] = machine(config.stash[SESSION].settings.device)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[SESSION].rows
    if rows:
        terminalreporter.section("ratio to eager, worst first (medians of alternating samples)")
        for line in (*report.short_table(rows), report.counts(rows), *report.beaten(rows)):
            terminalreporter.write_line(line)
