"""How much faster a training step of each example is with gankern: python -m bench.examples [--rounds 9] [--threads 2]

The two scripts of a pair train in turn, the order reversed every round, for so many steps that a turn lasts about 2 s. A step is
timed from one update of the generator to the next; of each turn the median is taken without the first 3 steps. Printed are the
median step times and the median and the quartiles of the rounds' ratios: above 1, gankern is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import gankern.data
from bench.support import quartiles

FOLDER = Path(__file__).parent.parent / "examples"
PAIRS = {
    "mlp_gan": ["mlp_gan_gankern"],
    "dcgan": ["dcgan_gankern"],
    "cgan": ["cgan_gankern"],
    "wgan_gp": ["wgan_gp_gankern", "wgan_gp_one_pass"],
    "sngan": ["sngan_gankern"],
}
WARM_UP, TURN = 3, 2.0


def step_seconds(name: str, steps: int, batch_size: int) -> float:
    """Median seconds of a step of one example."""
    times: list[float] = []

    def note(optimizer: object, args: object, kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    train = runpy.run_path(str(FOLDER / f"{name}.py"))["train"]
    hook = register_optimizer_step_post_hook(note)
    with tempfile.NamedTemporaryFile(suffix=".png") as picture, contextlib.redirect_stdout(None):
        train(steps=steps, batch_size=batch_size, seed=0, out=picture.name)
    hook.remove()
    ends = times[len(times) // steps - 1 :: len(times) // steps][WARM_UP:]
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("only", nargs="*", help="names of plain examples")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gankern.data.load = functools.cache(gankern.data.load)
    print("| example | plain, ms a step | with gankern | times as fast | quartiles |\n|---|---|---|---|---|")
    for plain, others in PAIRS.items():
        if args.only and plain not in args.only:
            continue
        names = [plain, *others]
        steps = WARM_UP + 2 + max(6, int(TURN / step_seconds(plain, WARM_UP + 5, args.batch_size)))
        rounds = []
        for turn in range(args.rounds):
            order = names[:: 1 if turn % 2 else -1]
            rounds.append({name: step_seconds(name, steps, args.batch_size) for name in order})
        for name in others:
            low, middle, high = quartiles([r[plain] / r[name] for r in rounds])
            before, after = (1000 * statistics.median(r[n] for r in rounds) for n in (plain, name))
            print(f"| `{name}.py` | {before:.1f} | {after:.1f} | {middle:.2f} | {low:.2f} - {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
