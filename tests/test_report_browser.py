"""The page in a headless Chromium: what moves, loads, is logged and is asked for, and what fits on a phone."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gankern.cli import watch
from gankern.cli.main import main, train_main

PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of the system or of playwright's own; under CI there must be one."""
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("needs playwright (pip install playwright)")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root, as in CI, has no sandbox
        except Error as error:
            missing(f"needs a Chromium (Debian: apt-get install chromium): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs, of pictures and of points, the first with metrics and a long name; do not write to them."""
    out = tmp_path_factory.mktemp("runs")
    np.savez(out / "dots.npz", images=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
    np.savetxt(out / "points.csv", np.random.default_rng(0).normal(size=(60, 2)), delimiter=",")
    small = ["--g-widths", "8", "--d-widths", "8", "--batch-size", "16", "--steps", "8", "--device", "cpu"]
    for name, every in (("dots.npz", "4"), ("points.csv", "0")):
        words = ["--data", str(out / name), "--outdir", str(out), "--log-every", "2", "--sample-every", every, *small]
        assert train_main(["gan", *words]) == 0
    first, second = sorted(out.glob("0*"))
    (first / "health.jsonl").write_text(json.dumps({"step": 4, "kind": "collapse", "saw": "x" * 200, "try": "--pack 2"}) + "\n")
    return [first, second]


class Seen:
    """A page, with what it asked for and what went wrong in it."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = DESK, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(url)

    def shown(self) -> list[str]:
        """The steps of the generated pictures that are to be seen."""
        images = self.page.locator("[data-film] img:visible")
        return [image.get_attribute("data-step") for image in images.all()]

    def close(self) -> None:
        assert self.faults == []
        self.page.close()


@pytest.fixture
def compared(browser: Any, runs: list[Path], tmp_path: Path) -> Iterator[Seen]:
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    seen = Seen(browser, (tmp_path / "both.html").as_uri())
    yield seen
    seen.close()


def test_pictures_load_and_nothing_is_asked_for(browser: Any, runs: list[Path]) -> None:
    for run in runs:
        url = (run / "report.html").as_uri()
        seen = Seen(browser, url)
        widths = seen.page.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
        assert len(widths) >= 3
        assert min(widths) > 0
        assert [asked for asked in seen.asked if not asked.startswith("data:")] == [url]
        seen.close()


def test_the_policy_lets_no_request_out(browser: Any, runs: list[Path]) -> None:
    seen = Seen(browser, (runs[0] / "report.html").as_uri())
    seen.page.evaluate("new Image().src = 'http://127.0.0.1:9/x.png'")
    blocked = seen.page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'out', () => 'blocked')")
    assert blocked == "blocked"
    assert len(seen.faults) >= 2
    assert all("Content Security Policy" in fault for fault in seen.faults)
    seen.page.close()


def test_the_slider_moves_by_keyboard_and_plays(compared: Seen) -> None:
    from playwright.sync_api import expect

    page = compared.page
    assert compared.shown() == ["8", "8"]
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    assert compared.shown() == ["4", "0"]
    assert page.inner_text("#step-now") == "step 4"
    page.keyboard.press("Home")
    assert compared.shown() == ["0", "0"]
    page.focus("#play")
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Pause"
    expect(page.locator("#play")).to_have_text("Play", timeout=20_000)
    assert compared.shown() == ["8", "8"]


def test_a_chart_reads_out_what_is_under_the_pointer_and_the_arrows(browser: Any, runs: list[Path]) -> None:
    seen = Seen(browser, (runs[0] / "report.html").as_uri())
    figure = seen.page.locator("#curves .chart").first
    plot, read = figure.locator(".plot"), figure.locator(".read")
    rows = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text().splitlines()]
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    seen.page.mouse.move(box["x"] + 2, box["y"] + 50)
    assert read.inner_text().startswith("step 2: critic's loss ")
    assert float(read.inner_text().split("critic's loss ")[1].split(",")[0]) == pytest.approx(rows[0]["d_loss"], rel=1e-3)
    seen.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50)
    assert read.inner_text().startswith("step 8: ")
    seen.page.mouse.move(0, 0)
    assert read.inner_text() == ""
    plot.focus()
    seen.page.keyboard.press("ArrowLeft")
    assert read.inner_text().startswith("step 6: ")
    seen.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_screen(browser: Any, runs: list[Path], tmp_path: Path, size: Any, scheme: str) -> None:
    main(["report", *map(str, runs), "--out", str(tmp_path / "both.html")])
    for url in [(tmp_path / "both.html").as_uri(), *((run / "report.html").as_uri() for run in runs)]:
        seen = Seen(browser, url, size, scheme)
        seen.page.locator("summary").click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        wide = "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && e.getBoundingClientRect().right > "
        assert seen.page.evaluate(f"{wide} innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))") == []
        assert seen.page.evaluate(CONTRAST) == []
        seen.close()


# Every text whose contrast with the page's background is below 4.5 (WCAG 2.1, 1.4.3).
CONTRAST = """(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => {
    const [r, g, b] = rgb(colour).map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => (!e ? "white" : getComputedStyle(e).backgroundColor !== "rgba(0, 0, 0, 0)" ?
    getComputedStyle(e).backgroundColor : behind(e.parentElement));
  const found = [];
  for (const e of document.querySelectorAll("body *:not(script):not(svg):not(svg *)")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.outerHTML.slice(0, 80));
  }
  return found;
})()"""


def test_the_live_page_follows_a_run(browser: Any, runs: list[Path], tmp_path: Path) -> None:
    from playwright.sync_api import expect

    run = Path(shutil.copytree(runs[0], tmp_path / runs[0].name))
    for later in (run / "fakes000008.png", run / "report.html"):
        later.unlink()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text(lines[0] + lines[1][:20])  # in the midst of writing
    with watch.Server((watch.HOST, 0), partial(watch.Handler, watch.Live(run))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            seen = Seen(browser, url)
            expect(seen.page.locator("#live")).to_contain_text("live: step 2 of 8", timeout=20_000)
            assert seen.shown() == ["4"]
            seen.page.locator("summary").click()
            (run / "log.jsonl").write_text("".join(lines))
            shutil.copy(runs[0] / "fakes000008.png", run)
            expect(seen.page.locator("#live")).to_have_text("finished: 8 steps", timeout=20_000)
            assert seen.shown() == ["8"]
            assert seen.page.locator("details").get_attribute("open") is not None  # as it was left
            seen.page.focus("#step")
            seen.page.keyboard.press("ArrowLeft")
            assert seen.shown() == ["4"]  # the new parts work
            assert {asked.split("?")[0] for asked in seen.asked if asked.startswith("http")} == {
                url, url + "state.json", url + "main.html"
            }  # fmt: skip
            seen.close()
        finally:
            server.shutdown()
