"""How much faster a training step of each example is with gankern: python -m bench.examples [--steps 200] [--threads 1] [names]

The plain script and its ports train at the same time, each in a thread, but never two at once: they take turns after every step,
so that a machine that slows down slows them all. A step is timed from one update of the generator to the next. Printed are the
medians and the median and the quartiles of the ratios of steps that followed each other: above 1, gankern is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import runpy
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import gankern.data
from bench.support import quartiles

FOLDER = Path(__file__).parent.parent / "examples"
PORTS = {
    "mlp_gan": ["mlp_gan_gankern"],
    "dcgan": ["dcgan_gankern"],
    "cgan": ["cgan_gankern"],
    "wgan_gp": ["wgan_gp_gankern", "wgan_gp_one_pass"],
    "sngan": ["sngan_gankern"],
}
UPDATES = {"wgan_gp": 6}  # calls of an optimiser a step, where they are not 2
WARM_UP = 5


def step_seconds(names: list[str], updates: int, steps: int, batch_size: int) -> list[list[float]]:
    """Seconds of every step but the first ones, of each script."""
    turns = [threading.Semaphore(index == 0) for index in range(len(names))]
    seconds: list[list[float]] = [[] for _ in names]
    mine = threading.local()

    def next_turn() -> None:
        turns[(mine.index + 1) % len(names)].release()

    def after_update(*_: object) -> None:
        mine.updates += 1
        if mine.updates % updates == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[mine.index].append(time.perf_counter() - mine.start)
            next_turn()
            turns[mine.index].acquire()
            mine.start = time.perf_counter()

    def run(index: int) -> None:
        turns[index].acquire()
        mine.index, mine.updates, mine.start = index, 0, time.perf_counter()
        try:
            train = runpy.run_path(str(FOLDER / f"{names[index]}.py"))["train"]
            with tempfile.NamedTemporaryFile(suffix=".png") as picture:
                train(steps=steps + WARM_UP, batch_size=batch_size, seed=0, out=picture.name)
        finally:
            next_turn()

    hook = register_optimizer_step_post_hook(after_update)
    with ThreadPoolExecutor(len(names)) as pool, contextlib.redirect_stdout(None):
        for done in [pool.submit(run, index) for index in range(len(names))]:
            done.result()
    hook.remove()
    return [s[WARM_UP:] for s in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("names", nargs="*", choices=[*PORTS, []], help="plain examples; all by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gankern.data.load = functools.cache(gankern.data.load)
    print("| script | plain, ms a step | with gankern | times as fast | quartiles |\n|---|---|---|---|---|")
    for plain in args.names or PORTS:
        names = [plain, *PORTS[plain]]
        before, *others = step_seconds(names, UPDATES.get(plain, 2), args.steps, args.batch_size)
        for name, after in zip(names[1:], others, strict=True):
            low, middle, high = quartiles([a / b for a, b in zip(before, after, strict=True)])
            medians = " | ".join(f"{1000 * statistics.median(s):.1f}" for s in (before, after))
            print(f"| `{name}.py` | {medians} | {middle:.2f} | {low:.2f} - {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
