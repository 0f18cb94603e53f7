"""The benches' own machinery: alternation, gate, replay through pytest-benchmark, reports, and gpu.sh up to the GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_gan_loss, bench_linear_lrelu, bench_train_step, report, rivals, scaling, support
from bench.support import OpGroup, Outputs, Settings, Work
from gankern import backend, gan_loss, linear_lrelu
from gankern.cli.main import main
from gankern.ops.gan_loss import GanLoss
from gankern.training.graph import Graph
from tests.replay import record

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BENCH = "bench/bench_gan_loss.py"


class Doubling(OpGroup):
    """y = 2x by three rivals, one of them wrong."""

    def __init__(self) -> None:
        super().__init__("doubling", ["eager", "right", "wrong"], Work(), "fp32", CPU)
        self.closed = False

    def function(self, rival: str) -> Callable[[Tensor], Outputs]:
        factor = 2.001 if rival == "wrong" else 2.0
        return lambda x: {"y": factor * x}

    def inputs(self, exact: bool) -> list[Tensor]:
        return [torch.randn(8)]

    def expected(self, inputs64: list[Tensor], got: Outputs) -> Outputs:
        return {"y": 2 * inputs64[0]}

    def close(self) -> None:
        super().close()
        self.closed = True


# --- alternation and gate --------------------------------------------------------------------------------------------------


def test_every_rival_is_sampled_in_every_round_and_the_order_rotates() -> None:
    log: list[str] = []
    inside: list[str] = []

    @contextmanager
    def context(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        assert inside.pop() == name

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            assert inside == [name]
            log.append(name)

        return run

    samples = support.alternate({n: call(n) for n in "abc"}, rounds=4, inner={"a": 2, "b": 1, "c": 1}, context=context)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value > 0 for values in samples.values() for value in values)
    assert "".join(log) == "caab" + "aabc" + "bcaa" + "caab" + "aabc"  # the warm-up first


def test_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(support, "clock", lambda device: now[0])

    def call() -> None:
        now[0] += 0.25

    assert support.alternate({"a": call}, rounds=2, inner=8) == {"a": [0.25, 0.25]}
    assert support.calls_per_sample(call, CPU, seconds=3.0) == (14, 0.25)  # ceil(1.1 * 3 / 0.25)


def test_a_slowing_machine_does_not_change_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    now, factor = [0.0], [1.0]
    monkeypatch.setattr(support, "clock", lambda device: now[0])

    def call(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds * factor[0]
            factor[0] *= 1.01  # 1 % slower after every call: three times slower at the end

        return run

    samples = support.alternate({"eager": call(2.0), "gankern": call(1.0)}, rounds=60)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    assert abs(medians["eager"] / medians["gankern"] - 2) < 0.03


def test_a_wrong_rival_has_no_number() -> None:
    group = Doubling()
    samples, inner, problems, _ = support.measure(group, rounds=3)
    assert set(samples) == set(inner) == {"eager", "right"}
    assert all(len(values) == 3 for values in samples.values())
    assert set(problems) == {"wrong"}
    assert isinstance(problems["wrong"], AssertionError)
    assert "y: relative error 0.0005 against float64" in str(problems["wrong"])
    assert group.closed


def test_nothing_is_measured_where_eager_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Doubling()
    monkeypatch.setattr(group, "expected", lambda inputs64, got: {"y": 3 * inputs64[0]})
    samples, _, problems, _ = support.measure(group, rounds=1)
    assert samples == {}
    assert set(problems) == {"eager", "right", "wrong"}


def test_extra_memory_is_the_peak_of_a_call_above_what_stays() -> None:
    kept: list[Tensor] = []

    def call() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        kept[:] = [torch.empty(250), second]  # in the place of as many bytes, which this frees after

    call()
    assert support.extra_memory(call, CPU) == 4 * 1500


def test_slow_groups_make_fewer_rounds() -> None:
    assert [support.rounds_for(s, 1.5) for s in (1e-4, 0.01, 0.1, 0.4, 1.0, 5.0)] == [301, 150, 15, 15, 6, 5]


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ({"a": torch.tensor([1.0, 2.0])}, "outputs must be"),
        ({"a": torch.tensor([1.0, 2.0]), "b": torch.ones(1), "c": torch.ones(1)}, "outputs must be"),
        ({"a": torch.tensor([1.0, 2.1]), "b": torch.ones(1)}, "a: relative error"),
        ({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, "a: relative error nan"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "a: 1 elements, expected 2"),
    ],
)
def test_the_comparison_refuses(got: Outputs, words: str) -> None:
    want: Outputs = {"a": (torch.tensor([1.0]), torch.tensor([2.0])), "b": torch.ones(1)}
    support.assert_close({"a": torch.tensor([1.0, 2.0]), "b": torch.ones(1)}, want, 1e-3)
    support.assert_close({"a": torch.tensor([1.0, 2.0])}, want, 1e-3, optional=["b"])
    with pytest.raises(AssertionError, match=words):
        support.assert_close(got, want, 1e-3)


def test_the_gates_of_the_ops_see_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(CPU)
    groups = {g.name: g for g in bench_linear_lrelu.groups(settings)} | {g.name: g for g in bench_gan_loss.groups(settings)}
    for name in ("forward fp32 16x128", "backward fp32 16x128", "double fp32 16x128", "double dropout fp32 16x256"):
        groups[name].check("gankern")
        with monkeypatch.context() as patch:  # another slope
            patch.setattr(bench_linear_lrelu, "linear_lrelu", lambda x, w, b, slope, p: linear_lrelu(x, w, b, 0.3, p))
            groups[name].close()
            with pytest.raises(AssertionError, match="relative error"):
                groups[name].check("gankern")
    for name in ("forward 16", "backward 16", "double 16"):
        for rival in ("gankern", "gankern-vector"):
            groups[name].check(rival)
            with monkeypatch.context() as patch:
                patch.setattr(bench_gan_loss, "gan_loss", scaled)
                groups[name].close()
                with pytest.raises(AssertionError, match="loss: relative error"):
                    groups[name].check(rival)
            groups[name].close()


def scaled(*args: Any, **options: Any) -> GanLoss:
    out = gan_loss(*args, **options)
    return GanLoss(1.001 * out.loss, out.stats)


def test_a_dropout_rate_that_is_not_the_asked_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = [g for g in bench_linear_lrelu.groups(Settings(CPU)) if g.name == "forward dropout fp32 64x512"]
    monkeypatch.setattr(
        bench_linear_lrelu, "linear_lrelu", lambda x, w, b, slope, p: linear_lrelu(x, w, b, slope, 0.33) * 0.67 / 0.7
    )
    with pytest.raises(AssertionError, match=r"dropout 0\.3"):
        group.check("gankern")


def test_exact_inputs_leave_no_sign_to_rounding() -> None:
    for name in ("forward fp32 16x1024", "forward fp32 1024x128"):
        (group,) = [g for g in bench_linear_lrelu.groups(Settings(CPU)) if g.name == name]
        assert isinstance(group, OpGroup)
        x, weight, bias, _ = group.inputs(exact=True)
        z = x.double() @ weight.double().T + bias.double()
        assert torch.equal((x @ weight.T + bias).double(), z)
        assert (z != 0).all()
        assert all(torch.equal(t.bfloat16().float(), t) for t in (x, weight, bias))


@pytest.mark.parametrize("preset", bench_train_step.BATCHES)
def test_the_whole_step_of_each_preset_agrees(preset: str) -> None:
    """At the sizes of --benchmark-disable, the smallest; the rate of the critic three times as high must be seen."""
    group = next(g for g in bench_train_step.groups(Settings(CPU, smoke=True)) if g.name.startswith(f"{preset} "))
    assert isinstance(group, bench_train_step.TrainStep)
    assert group.rivals == ("eager", "eager-tuned", "gankern")
    for rival in group.rivals:
        group.check(rival)
    wrong = dataclasses.replace(group.gate_config, lr_d=3 * group.config.lr_d)
    losses = group.losses(group.make("gankern", wrong, torch.float32, group.batch))
    with pytest.raises(AssertionError, match="losses: relative error"):
        support.assert_close(losses, group.wanted[group.batch, group.config.spectral_norm], bench_train_step.KINKED)


@pytest.mark.parametrize("preset", ["gan", "cgan", "ctgan-like"])
def test_the_row_of_the_graph_engine_sees_the_same_batches(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorder in the place of a CUDA graph."""
    monkeypatch.setattr("gankern.training.graph.Graph", functools.partial(Graph, capture=record))
    group = next(g for g in bench_train_step.groups(Settings(CPU)) if g.name.startswith(f"{preset} "))
    group.check("gankern-graph")


def test_the_groups_of_a_gpu_begin_with_those_that_matter_most(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = bench_train_step.groups(Settings(torch.device("cuda")))
    names = [group.name for group in groups]
    assert names[:4] == ["gan fp32 64", "gan fp32 256", "wgan-gp fp32 64", "dcgan-64 bf16 128"]
    assert len(set(names)) == len(names) == 21
    graphs = {"eager", "eager-tuned", "eager-graph", "gankern", "gankern-graph"}
    assert [set(group.rivals) - graphs for group in groups[:4]] == [{"compile"}, set(), set(), {"compile", "eager-tf32"}]
    every = bench_train_step.groups(Settings(torch.device("cuda"), all_rivals=True))
    assert all({"compile", "compile-max"} <= set(group.rivals) <= bench_train_step.MAKE.keys() for group in every)


def test_a_rival_with_another_penalty_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    group = next(g for g in bench_train_step.groups(Settings(CPU)) if g.name == "ctgan-like fp32 100")
    group.check("eager-tuned")
    real = rivals.distance
    monkeypatch.setattr(rivals, "distance", lambda config, gradient, packs: real(config, gradient, packs // 2))
    with pytest.raises(AssertionError, match="losses: relative error"):
        group.check("eager-tuned")


@pytest.mark.parametrize("preset", ["gan", "wgan-gp"])
def test_the_work_of_a_step_is_that_of_its_products(preset: str) -> None:
    group = next(g for g in bench_train_step.groups(Settings(CPU)) if g.name == f"{preset} fp32 16")
    generator, critic = [(100, 256), (256, 512), (512, 1024), (1024, 784)], [(784, 1024), (1024, 512), (512, 256), (256, 1)]
    g, d = sum(a * b for a, b in generator), sum(a * b for a, b in critic)
    first_g, first_d = 100 * 256, 784 * 1024
    step = 3 * g - first_g + 2 * d  # the generator there and back, and through the critic
    if preset == "gan":
        step += 2 * (3 * d - first_d)
        assert group.work.flops == 2 * 16 * step
    else:  # five critic updates with real, fake and the penalty's graph, which also has products that are zero
        step += 4 * g + 5 * (2 * (3 * d - first_d) + 4 * d)
        assert 2 * 16 * step < group.work.flops < 1.2 * 2 * 16 * step
    parameters = (sum(a * b + b for a, b in generator), sum(a * b + b for a, b in critic))
    n = 5 if preset == "wgan-gp" else 1
    assert group.work.bytes == 24 * (parameters[0] + n * parameters[1]) + 4 * 784 * 16 * n
    assert group.work.images == 16 * n


def test_the_triton_interpreter_is_never_timed() -> None:
    if backend.triton_problem("cpu"):
        pytest.skip(backend.triton_problem("cpu"))
    assert support.gankern_rivals(CPU)[:2] == ["gankern", "gankern-reference"]
    assert "gankern-triton" not in support.gankern_rivals(CPU)


# --- rows of pytest-benchmark ----------------------------------------------------------------------------------------------


def pytest_on(file: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, on the CPU."""
    ours = ("TRITON_INTERPRET", "GANKERN_BACKEND")  # and under pytest-xdist's variables pytest-benchmark would switch itself off
    env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("PYTEST_XDIST")} | environment
    command = [sys.executable, "-m", "pytest", file, "--bench-device", "cpu", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A bench run of two groups in three rounds, and its JSON."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    words = ["-k", "double-16- or double-256-", "--bench-rounds", 3]
    return path, pytest_on(BENCH, *words, "--benchmark-json", path)


def test_a_run_replays_alternated_samples(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    path, done = run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ratio to eager, worst first" in done.stdout
    assert "automatic choice: 2 groups" in done.stdout
    benchmarks = json.loads(path.read_text())["benchmarks"]
    rivals = {"eager", "eager-stats", *support.gankern_rivals(CPU), "gankern-vector"}
    assert {b["group"] for b in benchmarks} == {"gan_loss double 16", "gan_loss double 256"}
    for group in ("double 16", "double 256"):
        rows = {b["params"]["rival"]: b for b in benchmarks if b["params"]["group"] == group}
        assert rows.keys() == rivals
        eager = rows["eager"]["stats"]["median"]
        for row in rows.values():
            stats, facts = row["stats"], row["extra_info"]
            assert len(stats["data"]) == stats["rounds"] == 3
            assert stats["iterations"] == facts["calls_per_sample"] >= 1
            assert facts["ratio_to_eager"] == pytest.approx(eager / stats["median"])
            assert facts["bytes"] == 4 * 2 * int(group.split()[1]) * 4
            assert facts["share_of_floor"] > 0
            assert row["options"]["timer"] == "replayed_clock"
    machine = json.loads(path.read_text())["machine_info"]
    assert machine["gankern"]["torch"] == torch.__version__
    assert "node" not in machine


def test_a_saved_run_can_be_compared_with(run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    assert report.main([str(run[0]), "--compact", str(small)]) == 0
    assert "data" not in json.loads(small.read_text())["benchmarks"][0]["stats"]
    done = pytest_on(BENCH, "-q", "-k", "double-16-", "--bench-rounds", 2, f"--benchmark-compare={small}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_gan_loss[double-16-gankern] (NOW)" in done.stdout
    assert "bench_gan_loss[double-16-gankern] (" in done.stdout.replace("(NOW)", "")


def test_a_forced_backend_and_a_passed_limit_are_said() -> None:
    done = pytest_on(BENCH, "-q", GANKERN_BACKEND="reference")
    assert done.returncode == 4
    assert "GANKERN_BACKEND must be unset for benches, got reference" in done.stderr
    done = pytest_on(BENCH, "-q", "-k", "double-16-", "--bench-seconds", 1e-6)
    assert done.returncode == 0
    assert "the time limit of --bench-seconds was reached" in done.stdout


# --- gankern bench -----------------------------------------------------------------------------------------------------------


def test_the_command_measures_and_writes(
    run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table, picture = tmp_path / "b.json", tmp_path / "b.md", tmp_path / "b.png"
    files = ["--json", str(out), "--markdown", str(table), "--plot", str(picture)]
    assert main(["bench", "--preset", "gan", "--batch", "2", "4", "--rounds", "2", "--device", "cpu", *files]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["group", "eager", "gankern", "eager-tuned"]
    assert "automatic choice: 2 groups" in printed.out
    assert printed.err == "1/2 train_step gan fp32 2\n2/2 train_step gan fp32 4\n"
    assert "| gan fp32 2 |" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    result, of_pytest = json.loads(out.read_text()), json.loads(run[0].read_text())
    assert result.keys() >= {"machine_info", "commit_info", "datetime", "version", "benchmarks"}
    assert result["machine_info"].keys() <= of_pytest["machine_info"].keys()
    ours, theirs = result["benchmarks"], of_pytest["benchmarks"][0]
    assert [b["param"] for b in ours] == [f"gan-fp32-{n}-{r}" for n in (2, 4) for r in ("eager", "eager-tuned", "gankern")]
    assert ours[0].keys() == theirs.keys()
    assert ours[0]["stats"].keys() == theirs["stats"].keys()
    for b in ours:
        assert b["stats"]["rounds"] == len(b["stats"]["data"]) == 2
        assert b["stats"]["min"] <= b["stats"]["q1"] <= b["stats"]["median"] <= b["stats"]["q3"] <= b["stats"]["max"]
        assert b["fullname"] == f"bench/bench_train_step.py::bench_train_step[{b['param']}]"
        assert b["extra_info"]["extra_memory_bytes"] > 0
        assert b["extra_info"]["images_per_s"] == pytest.approx(
            b["extra_info"]["ratio_to_eager"]
            * int(b["group"].split()[-1])
            / (next(e for e in ours if e["group"] == b["group"])["stats"]["median"])
        )
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().out.strip() == printed.out.strip()


def test_the_command_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(setting: rivals.Setting) -> rivals.Step:
        return rivals.tuned(setting._replace(config=dataclasses.replace(setting.config, lr_d=1e-2)))

    monkeypatch.setitem(bench_train_step.MAKE, "eager-tuned", wrong)
    assert main(["bench", "--preset", "gan", "--batch", "2", "--rounds", "1", "--device", "cpu"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["group", "eager", "gankern"]
    assert out[-1].startswith("failed: train_step gan fp32 2 eager-tuned: AssertionError: losses: relative error")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "fly"], "--preset must be one of gan, wgan-gp, cgan, ctgan-like, dcgan-32, sngan, dcgan-64, got 'fly'"),
        (["--op", "fly"], "--op must be one of bias_lrelu, "),
        (["--batch", "1"], "--batch must be >= 2, got 1"),
        (["--batch", "64"], "--batch must be a multiple of 10, the samples in a pack of ctgan-like, got 64"),
        (["--op", "gan_loss", "--batch", "64"], "--batch must come with a --preset: an op has sizes of its own"),
        (["--rounds", "-1"], "--rounds must be >= 0, got -1"),
        (["--op", "gan_loss", "--plot", "x.png"], "--plot must come with a training step: name a --preset"),
        (["--json", "nowhere/x.json"], "nowhere must be a folder that exists, got 'nowhere/x.json'"),
        (["--device", "fly"], "device must be auto, cpu or cuda[:number], got 'fly'"),
    ],
)
def test_the_command_refuses(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"gankern bench: {sentence}")
    assert printed.err.count("\n") == 1


def test_the_command_without_a_checkout_or_with_a_forced_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with backend.use_backend("reference"):
        assert main(["bench"]) == 2
    assert capsys.readouterr().err == "gankern bench: GANKERN_BACKEND must be unset for benches, got 'reference'\n"
    monkeypatch.setattr("gankern.cli.bench.ROOT", tmp_path)
    assert main(["bench"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gankern bench: the benches must be beside the package, and an installed package has none: clone ")
    assert printed.count("\n") == 1


# --- reports ---------------------------------------------------------------------------------------------------------------


def made_up(file: str = "op", gankern: float = 1.0, **facts: Any) -> dict[str, Any]:
    """A JSON of pytest-benchmark: eager 2 ms, gankern `gankern` ms, compile 4 ms, in one group."""
    medians = {"eager": 2.0, "compile": 4.0, "gankern": gankern}
    return {
        "machine_info": {
            "cpu": {"brand_raw": "Some CPU", "count": 2},
            "machine": "x86_64",
            "system": "Linux",
            "python_version": "3.12.1",
            "gankern": {"torch": "2.13.0", "triton": "3.7.1", "gpu": "Some GPU", "driver": "580.1", "threads": 2},
        },
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-11-21T10:00:00+00:00",
        "benchmarks": [
            {
                "group": f"{file} forward 16",
                "params": {"group": "forward 16", "rival": rival},
                "stats": {"median": ms / 1e3, "iqr": ms / 1e4, "data": [ms / 1e3]},
                "extra_info": {"ratio_to_eager": 2.0 / ms, **facts},
            }
            for rival, ms in medians.items()
        ],
    }


def test_the_short_table_begins_with_the_worst_and_marks_losses() -> None:
    rows = report.rows(made_up("good", 0.5)) + report.rows(made_up("bad", 2.5))
    lines = report.short_table(rows)
    assert lines == [
        "group            eager    gankern     compile",
        "bad forward 16   2.00 ms  0.80x LOSS  0.50x LOSS",
        "good forward 16  2.00 ms  4.00x       0.50x LOSS",
    ]
    assert report.short_table(rows, limit=1) == [
        "group           eager    gankern     compile",
        "bad forward 16  2.00 ms  0.80x LOSS  0.50x LOSS",
        "... and 1 more groups",
    ]
    assert report.counts(rows) == "automatic choice: 2 groups, 1 below 0.95x eager, least 0.80x, most 4.00x; " + (
        "half of all rows spread less than 10% (IQR over median)"
    )


def test_the_markdown_names_the_machine_and_every_row() -> None:
    runs = [made_up("one", share_of_floor=0.25, gb_per_s=12.3), made_up("two", 2.5, images_per_s=4321.0)]
    text = report.markdown(runs)
    for line in (
        "- CPU: Some CPU, 2 cores, Linux",
        "- gpu: Some GPU",
        "- driver: 580.1",
        "- torch: 2.13.0",
        "- triton: 3.7.1",
        "- date: 2026-11-21",
        "| group | eager | compile | gankern | IQR | GB/s | of floor |",
        "| forward 16 | 2.00 ms | 4.00 ms (**0.50x**) | 1.00 ms (2.00x) | 10% | 12.3 | 25% |",
        "| group | eager | compile | gankern | IQR | images/s |",
        "| forward 16 | 2.00 ms | 4.00 ms (**0.50x**) | 2.50 ms (**0.80x**) | 10% | 4,321 |",
    ):
        assert line in text.splitlines(), text
    runs[1]["machine_info"]["gankern"]["torch"] = "2.12.1"
    with pytest.raises(ValueError, match="one machine"):
        report.markdown(runs)


def test_rivals_that_beat_the_automatic_choice_are_listed() -> None:
    rows = report.rows(made_up("won", 1.0)) + report.rows(made_up("even", 2.04)) + report.rows(made_up("lost", 2.5))
    assert report.beaten(rows) == ["lost forward 16: gankern has 0.80x the speed of eager"]


def test_the_markdown_has_share_and_memory_of_each_rival() -> None:
    text = report.markdown([made_up("step", share_of_floor=0.256, extra_memory_bytes=3 * 2**19)])
    assert "| group | eager | compile | gankern |\n| --- | --- | --- | --- |\n| forward 16 | 26%, 1.5 MiB | 26%, 1.5 MiB |" in text


def test_the_plot_has_a_panel_for_each_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    speeds = {"gan fp32 16": 2.0, "gan fp32 64": 1.5, "dcgan-64 bf16 128": 3.0}
    rows = [
        {"file": "train_step", "group": group, "rival": rival, "ratio_to_eager": value if rival == "gankern" else 1.0}
        for group, value in speeds.items()
        for rival in ("eager", "gankern")
    ]
    report.plot([*rows, {"file": "gan_loss", "group": "forward 16", "rival": "eager", "ratio_to_eager": 1.0}], tmp_path / "p.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["gan", "dcgan-64 bf16"]
    even, ours = figure.axes[0].lines
    assert list(even.get_ydata()) == [1.0, 1.0]
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([16, 64], [2.0, 1.5])
    assert figure.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["eager", "gankern"]
    with pytest.raises(ValueError, match="rows of train_step, got none"):
        report.plot([], tmp_path / "p.png")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-6, "1.23 us"), (45.67e-6, "45.7 us"), (999e-6, "999 us"), (1e-3, "1.00 ms"), (12.0, "12.0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_the_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "a.json", tmp_path / "a.md"
    path.write_text(json.dumps(made_up()))
    assert report.main([str(path), "--markdown", str(table)]) == 0
    assert "op forward 16  2.00 ms  2.00x" in capsys.readouterr().out
    assert table.read_text().startswith("# Bench results\n")
    assert report.main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("report: ")
    path.write_text("{}")
    assert report.main([str(path)]) == 1


# --- scaling ---------------------------------------------------------------------------------------------------------------


def test_the_model_of_many_gpus_has_the_numbers_made_by_hand() -> None:
    link = scaling.Link(8, 450e9, 3e-6)
    assert scaling.ring(1e9, link) == pytest.approx(2 * 7 / 8 * 1e9 / 450e9 + 14 * 3e-6) == pytest.approx(3.930889e-3)
    assert scaling.ring(1e9, scaling.Link(1, 450e9, 3e-6)) == 0.0
    # 5 updates of 1 000 critic parameters and one of 2 000 generator parameters: 4 000 and 8 000 bytes; 6 x 14 messages
    assert scaling.reducing(1000, 2000, 5, link) == pytest.approx(1.75 * 28_000 / 450e9 + 84 * 3e-6)
    assert scaling.efficiency(9.0, 1.0, overlap=False) == pytest.approx(0.9)
    assert scaling.efficiency(9.0, 1.0, overlap=True) == 1.0
    assert scaling.efficiency(3.0, 3.0, overlap=True) == pytest.approx(0.75)
    assert scaling.parameters("gan") == (1_460_225, 1_486_352, 1)
    assert scaling.parameters("wgan-gp")[2] == 5


def test_the_fit_finds_the_line_and_weighs_relative_errors() -> None:
    a, b = scaling.fit([16, 64, 256, 1024], [2e-3 + 1e-5 * n for n in (16, 64, 256, 1024)])
    assert (a, b) == (pytest.approx(2e-3), pytest.approx(1e-5))
    a, b = scaling.fit([1, 1000], [1.1e-3, 1e-2])  # two points: through both
    assert a + b == pytest.approx(1.1e-3)
    a, _ = scaling.fit([1, 10, 1000, 2000], [1e-3, 1e-3, 0.1, 0.4])  # absolute errors would put a at -0.018
    assert 2e-4 < a < 2e-3


def test_the_scaling_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    axes = (scaling.Axis("batch", "gan", (2, 4, 2**20)),)
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "ROUNDS", (1, 1))
    run = tmp_path / "run.json"
    row = {
        "group": "train_step gan fp32 64",
        "params": {"group": "gan fp32 64", "rival": "gankern"},
        "stats": {"median": 1e-3, "iqr": 0},
    }
    run.write_text(json.dumps({"benchmarks": [{**row, "extra_info": {}}]}))
    out, table, picture = (tmp_path / f"s.{end}" for end in ("json", "md", "png"))
    words = ["--point-seconds", "20", "--measured", run, "--json", out, "--markdown", table, "--plot", picture]
    assert scaling.main(list(map(str, words))) == 0
    assert capsys.readouterr().out.strip() == table.read_text().strip()
    points = json.loads(out.read_text())["points"]
    assert [(p["axis"], p["value"], p["rival"]) for p in points] == [
        (axis.title, value, rival) for axis in axes for value in axis.values for rival in ("eager-tuned", "gankern")
    ]
    assert [p["value"] for p in points if "skipped" in p] == [2**20, 2**20]
    assert all(p["median"] > 0 for p in points if "skipped" not in p)
    text = table.read_text()
    assert "| 1048576 | skipped: would take about " in text
    assert "- gankern: " in text
    reduce = 1.75 * 4 * (1_460_225 + 1_486_352) / 450e9 + 28 * 3e-6
    assert f"| gan fp32 64 | 1.00 ms | {1e-3 / (1e-3 + reduce):.0%} | 100% |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


# --- gpu.sh ----------------------------------------------------------------------------------------------------------------


def test_gpu_script_is_valid_bash_and_stays_within_ten_minutes() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=ROOT, check=False).returncode == 0
    limits = [int(word.split("=")[1].strip(")")) for word in script.split("declare -A LIMIT=(")[1].split(")\n")[0].split()]
    assert len(limits) == 13
    assert sum(limits) == 570 < 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_without_a_gpu_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = gpu_script(sys.executable, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("make gpu: no NVIDIA GPU that PyTorch can use was found (torch ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_gpu_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    """With a python3 that pretends: every step passes but the tests."""
    out, fake = tmp_path / "out", tmp_path / "python3"
    cases = {
        "-": "cat >/dev/null",
        "-c*": "exit 1",
        "*tests/ops*": 'echo "3 failed, 7 passed"; exit 1',
        "*gpu_smoke\\ train*": 'echo "1,000 images/s"',
        "*bench_train_step.py*": 'echo "{}" >"$OUT/bench_train_step.json"',
    }
    fake.write_text('#!/bin/sh\ncase "$*" in\n' + "".join(f"  {case}) {does} ;;\n" for case, does in cases.items()) + "esac\n")
    fake.chmod(0o755)
    done = gpu_script(str(fake), out)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.split(" s in all\n")[1].splitlines()
    results = {line[:14].strip(): line[15:43].strip() for line in lines[:12]}
    assert list(results) == [
        "build",
        "doctor",
        "tests",
        "train",
        "command",
        "train_step",
        "gan_loss",
        "linear_lrelu",
        "mlp_critic",
        "other_ops",
        "memcheck",
        "racecheck",
    ]
    assert results["tests"] == "FAILED (status 1)"
    assert results["command"].startswith("skipped")
    passed = ("doctor", "train", "train_step", "gan_loss", "linear_lrelu", "mlp_critic", "other_ops")
    assert {results[n] for n in passed} == {"passed"}
    assert "1,000 images/s" in lines
    assert "tests: 3 failed, 7 passed" in lines
    assert {p.name for p in out.iterdir()} == {"summary.md", "logs.txt", "bench_train_step.json"}
    summary = (out / "summary.md").read_text()
    assert "| tests | FAILED (status 1) | " in summary
    assert "tests: 3 failed, 7 passed" in summary
    assert "===== tests: FAILED (status 1), 0 s:" in (out / "logs.txt").read_text()


def gpu_script(interpreter: str, out: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": interpreter, "OUT": str(out)}
    return subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
