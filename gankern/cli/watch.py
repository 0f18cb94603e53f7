"""gankern watch RUN: the page of a run, served while it trains, to this machine only."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gankern.cli.common import Parser, Refused, need, refusing
from gankern.data import Dataset
from gankern.report import Shown, main, page
from gankern.report.facts import Facts
from gankern.report.shown import show
from gankern.training import run_dir
from gankern.training.trained import load_data

HOST, PORT = "127.0.0.1", 8642
QUIET_S = 30.0  # without a new line in the log; then the page says so


def command(arguments: list[str]) -> int:
    parser = Parser("gankern watch", description="Serve the page of a run at this machine, anew as the training goes on.")
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--port", type=int, default=PORT, help=f"of http://{HOST}; 0: any that is free (default: {PORT})")
    options = parser.parse_args(arguments)
    need("safetensors", "PIL")
    if not 0 <= options.port < 2**16:
        raise Refused(f"--port must be in [0, 65535], got {options.port}")
    with refusing():
        live = Live(Path(options.run))
        try:
            server = Server((HOST, options.port), functools.partial(Handler, live))
        except OSError as error:
            raise Refused(f"--port must be free, got {options.port}: {error.strerror}") from None
    with server:
        print(f"watching {options.run} at http://{HOST}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
    return 0


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # the browser went away
            traceback.print_exc()


class Live:
    """A run that may be training: what is costly is kept until its files change.

    Raises:
        ValueError: `path` is no run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = run_dir.RunDir(path).path
        self.lock = threading.Lock()
        self.dataset: Dataset | None = None
        self.asked: Path | None = None  # the checkpoint that `last` tells of
        self.last: Shown | None = None

    def version(self) -> str:
        """Another string whenever a file of the run has changed."""
        facts = []
        for path in sorted(self.path.iterdir()):
            try:
                facts.append((path.name, path.stat().st_mtime_ns))
            except OSError:  # removed meanwhile
                continue
        return f"{hash(tuple(facts)) & 0xFFFFFFFFFFFF:x}"

    def state(self) -> dict[str, str]:
        """What the page polls: its version, and in words how far the training is."""
        run = run_dir.RunDir(self.path)
        rows, steps = run.numbers(), run.config.steps
        step = int(rows[-1]["step"]) if rows else 0
        words = f"live: step {step} of {steps}" if step < steps else f"finished: {steps} steps"
        age = time.time() - (self.path / (run_dir.LOG if rows else run_dir.CONFIG)).stat().st_mtime
        if step < steps and age > QUIET_S:
            words += f"; nothing new for {age:.0f} s"
        return {"version": self.version(), "words": words}

    def shown(self) -> Shown:
        """The run as it is now; its newest checkpoint is asked once."""
        with self.lock:
            run, saved = run_dir.locate(self.path)
            if saved and saved[0] != self.asked:
                if self.dataset is None:
                    with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):  # `show` finds it again and says it
                        self.dataset = load_data(run.config)
                self.last, self.asked = show(self.path, self.dataset), saved[0]
            return show(self.path) if self.last is None else self.last._replace(facts=Facts(run))


class Handler(BaseHTTPRequestHandler):
    """Three answers made in memory; no file is served by its name. A Host that is not this machine's is refused: a page elsewhere
    whose name was made to mean 127.0.0.1 (DNS rebinding) sends its own."""

    timeout = 10

    def __init__(self, live: Live, *arguments: object) -> None:
        self.live = live
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        try:
            found = self.found()
        except (OSError, ValueError) as error:  # the run was removed, or may not be read
            found = 503, "text/plain", f"{error}\n"
        self.answer(*found)

    def found(self) -> tuple[int, str, str]:
        """Status, kind and text of the answer."""
        port = self.server.server_port  # type: ignore[attr-defined]
        if self.headers.get("Host", "") not in {f"{HOST}:{port}", f"localhost:{port}"}:
            return 403, "text/plain", f"Host must be {HOST}:{port}\n"
        if self.path == "/":
            version = self.live.version()
            return 200, "text/html", page([self.live.shown()], version)
        if self.path == "/main.html":
            return 200, "text/html", main([self.live.shown()])
        if self.path == "/state.json":
            return 200, "application/json", json.dumps(self.live.state())
        return 404, "text/plain", "there is only /\n"

    def answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
