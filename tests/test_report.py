"""The page of a run as text: what stands in it, what it survives, what its server answers."""

from __future__ import annotations

import html
import http.client
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gankern.cli import watch
from gankern.cli.main import main, train_main
from gankern.report import chart, facts, page, probe, show
from gankern.report.facts import Curve
from gankern.training.run_dir import RunDir
from gankern.training.trained import Trained, load_data

TINY = ["--z-dim", "4", "--g-widths", "8", "--d-widths", "8", "--batch-size", "16", "--device", "cpu", "--log-every", "2"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 grey images of 6 x 6 in three classes."""
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8), labels=np.arange(60) % 3)
    return path


def train(out: Path, *words: str) -> Path:
    assert train_main([*words, "--outdir", str(out), "--resume", "never"]) == 0
    return max(out.glob("0*"))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps, with its page; do not write to it."""
    out = tmp_path_factory.mktemp("runs")
    return train(out, "gan", "--data", str(images), "--steps", "20", "--sample-every", "5", *TINY)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def test_a_run_ends_with_a_page_that_refers_to_nothing_outside(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    assert sections(text) == ["samples", "scores", "curves", "neighbours", "interpolation", "settings"]
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', text)) == {"data:"}
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.count("<script>") == 1
    for words in (
        "gan on dots",
        "20 of 20",
        "60 images of 1×6×6",
        f"torch {torch.__version__}",
        "gankern explain non-saturating",
    ):
        assert words in html.unescape(text), words
    assert [int(s) for s in re.findall(r'data-step="(\d+)"', text)] == [0, 5, 10, 15, 20]
    assert all('alt="' in image for image in re.findall(r"<img[^>]*>", text))


def test_no_report_writes_none(images: Path, tmp_path: Path) -> None:
    assert not (train(tmp_path, "gan", "--data", str(images), "--steps", "2", "--no-report", *TINY) / "report.html").exists()


def test_a_page_that_cannot_be_written_does_not_fail_the_training(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gankern.cli.report.write", full)
    train(tmp_path, "gan", "--data", str(images), "--steps", "2", *TINY)
    assert "; no page: [Errno 28] No space left on device" in capsys.readouterr().out


def test_the_command_writes_only_its_file(run: Path, tmp_path: Path, capsys: Capture) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = content()
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert content() == before
    assert re.search(r"1 run in .*page\.html, 0\.\d MB", capsys.readouterr().out)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]


def test_what_metrics_and_health_wrote_is_shown(run: Path) -> None:
    (run / "metric-fid.jsonl").write_text('{"step": 10, "value": 4.0, "seconds": 1}\n{"step": 20, "value": 2.5}\n{"step": 2')
    (run / "metric-prdc.jsonl").write_text('{"step": 10, "value": 0.5, "recall": 0.25, "seconds": 1}\n')
    (run / "health.jsonl").write_text(json.dumps({"step": 8, "kind": "collapse", "saw": "one <b>mode</b>", "try": "--pack 2"}))
    shown = show(run)
    found = {key: curve for key, curve in shown.facts.curves.items() if key.startswith("metric")}
    assert found == {
        "metric-fid value": Curve("fid", [10, 20], [4.0, 2.5]),
        "metric-prdc value": Curve("prdc: coverage", [10], [0.5]),
        "metric-prdc recall": Curve("prdc: recall", [10], [0.25]),
    }
    text = page([shown])
    assert "health" in sections(text)
    assert "one &lt;b&gt;mode&lt;/b&gt;" in text
    assert "To try: --pack 2" in text


def test_what_stands_in_a_run_is_never_markup(run: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>"
    content = json.loads((run / "config.json").read_text())
    content |= {"data_name": evil, "device_used": evil, "versions": {evil: evil}}
    (run / "config.json").write_text(json.dumps(content))
    (run / "log.jsonl").write_text(json.dumps({"step": 1, evil: 1.0, "d_loss": 2}) + "\n[3]\n" + '{"step": 2, "d_loss": "NaN"}\n')

    text = page([show(run)])
    assert html.unescape(text).count("<script>alert(1)") > 3  # there as text
    assert text.count("<script>") == 1
    assert "<img src=x" not in text


@pytest.mark.parametrize("what", ["half a picture", "no log", "no checkpoint", "damaged checkpoint", "no data"])
def test_a_page_is_written_of_what_there_is(run: Path, what: str, images: Path) -> None:
    newest = RunDir(run).checkpoints()[-1][1]
    if what == "half a picture":
        (run / "fakes000020.png").write_bytes((run / "fakes000020.png").read_bytes()[:60])
    elif what == "no log":
        (run / "log.jsonl").unlink()
    elif what == "no checkpoint":
        newest.unlink()
    elif what == "damaged checkpoint":
        newest.write_bytes(b"12")
    else:
        content = json.loads((run / "config.json").read_text())
        content["settings"]["data"] = str(run / "gone.npz")
        (run / "config.json").write_text(json.dumps(content))
    shown = show(run)
    missing = {
        "half a picture": set(),
        "no log": {"curves"},
        "no checkpoint": {"scores", "neighbours", "interpolation"},
        "damaged checkpoint": {"scores", "neighbours", "interpolation"},
        "no data": {"scores", "neighbours"},
    }[what]
    assert {"samples", "scores", "curves", "neighbours", "interpolation", "settings"} - set(sections(page([shown]))) == missing
    assert len(shown.facts.frames) == (4 if what == "half a picture" else 5)
    said = {"no checkpoint": "no checkpoint yet", "damaged checkpoint": "must be undamaged", "no data": "gone.npz"}
    assert said.get(what, "") in shown.note


def test_runs_are_compared_side_by_side(trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = train(tmp_path, "cgan", "--data", str(images), "--steps", "6", "--lr-g", "0.001", *TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(trained), str(other)]) == 0
    text = (tmp_path / "report.html").read_text()
    apart = text[text.index("Settings that differ") : text.index("<details")]
    assert re.findall(r'<th scope="row">(\w+)</th>', apart) == ["outdir", "steps", "sample_every", "arch", "lr_g"]
    assert "<td>0.0002</td><td>0.001</td>" in apart
    assert text.count("data-film") - text.count("[data-film]") == 2
    chart_of = json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', text)[2]))  # after the two of the scores
    assert [name for name, *_ in chart_of["series"]] == [trained.name, other.name]


PRESETS = {
    "acgan": (["--conv-width", "4", "--z-dim", "4"], True, 5),
    "ebgan": (["--d-widths", "8", "--code", "4", "--g-widths", "8"], True, 5),
    "gmmn": (["--g-widths", "8"], False, 5),
    "mmd-gan": (["--conv-width", "4", "--code", "4"], False, 5),
    "ring": ([], True, 3),
    "ctgan-like": (["--batch-size", "20"], True, 3),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_kind_of_critic_and_of_sample_has_a_page(preset: str, tmp_path: Path) -> None:
    words, scored, dims = PRESETS[preset]
    if preset == "ctgan-like":
        np.savetxt(tmp_path / "t.csv", np.random.default_rng(0).normal(size=(80, 3)), delimiter=",", header="a,b,c", comments="")
        words = ["--data", str(tmp_path / "t.csv"), *words]
    elif preset != "ring":
        words = ["--limit", "80", "--batch-size", "16", *words]
    found = show(train(tmp_path, preset, "--steps", "1", "--device", "cpu", "--no-report", *words))
    assert found.note == ""
    assert found.probe is not None
    assert found.probe.near is not None
    assert found.probe.walk.dim() == dims
    assert (found.probe.scores is not None) == scored
    assert "neighbours" in sections(page([found]))
    assert ("interpolation" in sections(page([found]))) == (preset != "ctgan-like")


def test_neighbours_tell_a_copy_from_something_new(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_data(RunDir(trained).config)
    reals = dataset.samples[5:].float() / 127.5 - 1

    def near(samples: torch.Tensor) -> probe.Near:
        monkeypatch.setattr(Trained, "sample", lambda self, n, seed=0, labels=None: samples[torch.arange(n) % len(samples)])
        found = probe.probe(RunDir(trained).checkpoints()[-1][1], dataset).near
        assert found is not None
        return found

    copied, new = near(reals), near(-reals)
    assert copied.searched == 60
    assert copied.fake < 1e-6 < 0.5 * copied.real
    assert new.fake > 0.5 * new.real == 0.5 * copied.real > 0
    assert copied.picture is not None
    assert torch.equal(copied.picture[:6], copied.picture[6 + probe.GAP : 12 + probe.GAP])  # the first neighbour is the copy
    assert not torch.equal(new.picture[:6], new.picture[6 + probe.GAP : 12 + probe.GAP])  # type: ignore[index]


def test_neighbours_do_not_depend_on_the_chunks(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, dataset = RunDir(trained).checkpoints()[-1][1], load_data(RunDir(trained).config)
    whole = probe.probe(saved, dataset).near
    monkeypatch.setattr(probe, "CHUNK", 7)
    parts = probe.probe(saved, dataset).near
    assert whole is not None
    assert parts is not None
    assert whole.picture is not None
    assert torch.equal(whole.picture, parts.picture)  # type: ignore[arg-type]
    assert (whole.fake, whole.real) == pytest.approx((parts.fake, parts.real), rel=1e-9)


def test_the_way_between_latents_begins_and_ends_at_them(trained: Path) -> None:
    run = Trained(trained)
    both = run.sample(2 * probe.PATHS, probe.SEED)
    ways = probe.walk(run)
    torch.testing.assert_close(ways[:, 0], both[: probe.PATHS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ways[:, -1], both[probe.PATHS :], rtol=1e-4, atol=1e-5)


def test_many_pictures_are_thinned_and_large_ones_made_small(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (900, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "reals.png")
    found = facts.Facts(RunDir(run), frames=3)
    assert [frame.step for frame in found.frames] == [0, 10, 20]
    assert found.reals is not None
    assert (found.reals.width, found.reals.height) == (facts.MOST_WIDTH, 432)
    assert found.reals.uri.startswith("data:image/webp;base64,UklGR")


def test_the_command_that_goes_on_is_understood(trained: Path, capsys: Capture) -> None:
    words = facts.Facts(RunDir(trained)).resume().split()
    assert words[:2] == ["gankern-train", "gan"]
    assert words[words.index("--steps") + 1] == "40"
    assert train_main([*words[1:], "--dry-run"]) == 0
    assert "continued after step 20" in capsys.readouterr().out


def test_a_chart_shows_each_value_where_it_is() -> None:
    text = chart.curves("loss", {1: Curve("a", [0, 50, 100], [0.0, 5.0, 10.0])})
    assert re.findall(r'<path class="c1 " d="([^"]*)"', text) == ["M0.0 288.9L500.0 150.0L1000.0 11.1"]  # 4 % of room
    assert re.findall(r'style="left:([\d.]+)%">(\d+)<', text) == [(f"{v:.2f}", str(v)) for v in range(0, 101, 20)]
    assert json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', text)[0]))["series"] == [["a", [0, 50, 100], [0, 5, 10]]]
    assert chart.curves("loss", {0: Curve("a", [], [])}) == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e30, -1e30], [1e-30, 2e-30], [5.0, 5.0, 5.0]])
def test_any_values_make_a_chart(values: list[float]) -> None:
    text = chart.curves("x", {0: Curve("x", list(range(len(values))), values)})
    assert "nan" not in text
    assert "inf" not in text


def test_a_long_curve_keeps_its_extremes() -> None:
    values = np.sin(np.arange(50_000) / 500).tolist()
    values[31_234], values[40_001] = 9.0, -9.0
    xs, ys = chart._thin(range(50_000), values)
    assert len(xs) <= chart.MOST_POINTS + 2
    assert (max(ys), min(ys)) == (9.0, -9.0)
    assert xs == sorted(xs)
    assert xs[ys.index(9.0)] == 31_234


def test_a_histogram_holds_every_sample() -> None:
    text = chart.histogram("h", "score", [("a", torch.randn(500)), ("b", torch.full((7,), 50.0))], "")
    series = json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', text)[0]))["series"]
    assert [sum(ys) for _, _, ys in series] == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "nowhere"], "run: nowhere must be a run directory or a checkpoint, got no such path"),
        (["report"], "the following arguments are required: RUN"),
        (["report", *["x"] * 7], "RUN must be given at most 6 times, got 7"),
        (["watch", "nowhere"], "run: nowhere must be a run directory with a config.json, got none there"),
        (["watch", "x", "--port", "70000"], "--port must be in [0, 65535], got 70000"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: Capture) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gankern {words[0]}: {sentence}")
    assert error.count("\n") == 1


# --- gankern watch


@pytest.fixture
def server(run: Path) -> Iterator[watch.Server]:
    with watch.Server((watch.HOST, 0), partial(watch.Handler, watch.Live(run))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: watch.Server, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(watch.HOST, server.server_port, timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_is_of_this_machine_only(server: watch.Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        assert get(server, host=host)[0] == 403, host
    assert get(server, host=f"localhost:{port}")[0] == 200


def test_the_server_serves_no_file(server: watch.Server, run: Path) -> None:
    (run.parent / "secret.txt").write_text("secret")
    for path in ("/../secret.txt", "/%2e%2e/secret.txt", "/config.json", "//etc/passwd", "/log.jsonl", f"{run.parent}/secret.txt"):
        assert get(server, path) == (404, "there is only /\n"), path
    assert get(server, method="POST")[0] == 501


def test_the_server_follows_the_run(server: watch.Server, run: Path) -> None:
    status, text = get(server)
    assert status == 200
    first = json.loads(get(server, "/state.json")[1])
    assert f'data-version="{first["version"]}"' in text
    assert first["words"] == "finished: 20 steps"
    assert json.loads(get(server, "/state.json")[1]) == first
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 22, "d_loss": 1.5}\n{"step": 24, "d_lo')  # in the midst of writing
    assert json.loads(get(server, "/state.json")[1])["version"] != first["version"]
    status, text = get(server, "/main.html")
    assert status == 200
    assert "22 of 20" in text
    assert "<html" not in text


def test_the_server_asks_a_checkpoint_once(server: watch.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(watch, "show", lambda path, *rest: asked.append(path) or show(path, *rest))
    for _ in range(3):
        assert get(server)[0] == 200
    assert asked == [Path(server.RequestHandlerClass.args[0].path)]  # type: ignore[attr-defined]


def test_the_server_shows_what_it_can_of_a_strange_run(server: watch.Server, run: Path) -> None:
    """Numbers without measure, a folder in place of a log, a picture that is a link out of the run."""
    run.parent.joinpath("outside.png").write_bytes((run / "reals.png").read_bytes())
    before = get(server)[1].count("data:image/png")
    for name in ("fakes000020.png", "reals.png"):
        (run / name).unlink()
        (run / name).symlink_to(run.parent / "outside.png")
    assert get(server)[1].count("data:image/png") == before - 2
    huge = "1" + 400 * "0"
    (run / "log.jsonl").write_text(f'{{"step": {huge}, "d_loss": 1}}\n{{"step": 3, "d_loss": {huge}}}\n')
    assert json.loads(get(server, "/state.json")[1])["words"].startswith("live: step 3 of 20")
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").mkdir()
    assert json.loads(get(server, "/state.json")[1])["words"].startswith("live: step 0 of 20")
    assert get(server)[0] == 200
    (run / "config.json").unlink()
    (run / "config.json").symlink_to("config.json")
    status, text = get(server)
    assert (status, text.count("\n")) == (503, 1)


def test_a_run_that_is_removed_is_one_sentence(server: watch.Server, run: Path) -> None:
    shutil.rmtree(run)
    status, text = get(server)
    assert status == 503
    assert text.count("\n") == 1


def test_a_port_in_use_is_refused(server: watch.Server, run: Path, capsys: Capture) -> None:
    assert main(["watch", str(run), "--port", str(server.server_port)]) == 2
    error = capsys.readouterr().err
    assert error == f"gankern watch: --port must be free, got {server.server_port}: Address already in use\n"


def test_ctrl_c_ends_the_watch(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.Server, "serve_forever", interrupted)
    assert main(["watch", str(run), "--port", "0"]) == 0
    assert re.fullmatch(r"watching .* at http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)\nended\n", capsys.readouterr().out)
