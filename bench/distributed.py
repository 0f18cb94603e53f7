"""python -m bench.distributed: training steps of one process and of several, by gloo on the CPU, at the same global batch.

Each process has one thread. `step` is the time of a step by the clock, which needs as many idle cores as processes; `processor` is
what one process spends on a step, sums over the processes included, and `efficiency` is that of one process alone / N times it: the
share of the work of N processes that one process would have done as well. Medians of rounds of steps, the processes anew for each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

from gankern.data import Batches, load
from gankern.training import PRESETS, Trainer
from gankern.training.graph import Eager

CASES = (("gan", 64), ("gan", 256), ("gan", 1024), ("wgan-gp", 64), ("wgan-gp", 256))
COUNTS = (1, 2)
ROUNDS = 3
SECONDS = 1.0  # of processor time in a round, for one process


def work(rank: int, count: int, folder: str, preset: str, batch: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=count)
    torch.save(timed(preset, batch, steps), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def timed(preset: str, batch: int, steps: int) -> tuple[float, float]:
    """Milliseconds a step, by the clock and by the processor."""
    config = PRESETS[preset].config
    torch.manual_seed(0)
    dataset = load("mnist")
    trainer = Trainer(*PRESETS[preset].build(config, dataset.shape), config)
    engine = Eager(trainer, Batches(dataset, batch * config.n_critic))
    for _ in range(2):
        engine.step()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - clock) / steps * 1e3, (time.process_time() - processor) / steps * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(
        "| preset | global batch | processes | step (ms) | samples/s | processor (ms) | efficiency |\n|---|---|---|---|---|---|---|"
    )
    for preset, batch in CASES:
        steps, found = max(3, int(SECONDS * 1e3 / timed(preset, batch, 3)[1])), dict[int, list[tuple[float, float]]]()
        for _ in range(ROUNDS):
            for count in COUNTS:
                with tempfile.TemporaryDirectory() as folder:
                    arguments = (count, folder, preset, batch, steps)
                    torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method="fork")
                    both = [torch.load(f"{folder}/{rank}") for rank in range(count)]
                found.setdefault(count, []).append((max(c for c, _ in both), statistics.mean(p for _, p in both)))
        alone = statistics.median(p for _, p in found[1])
        for count, rounds in found.items():
            clock, processor = (statistics.median(values) for values in zip(*rounds, strict=True))
            share = alone / (count * processor)
            samples = batch * PRESETS[preset].config.n_critic / clock * 1e3
            print(f"| {preset} | {batch} | {count} | {clock:.1f} | {samples:.0f} | {processor:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
