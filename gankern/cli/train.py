"""gankern-train PRESET: train a GAN, into a run directory of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gankern
from gankern import checks, data
from gankern.cli.common import Parser, Refused, need, pick_device, refusing
from gankern.cli.explain import Reader
from gankern.cli.fit import Ready, fit, follow, to_resume
from gankern.cli.help import settings, shown
from gankern.training import PRESETS, TrainConfig, Trainer, checkpoint, distributed, precision, quality, run_dir
from gankern.training.combinations import idle
from gankern.training.graph import make
from gankern.training.networks import CONDITIONAL
from gankern.training.run_dir import RunDir
from gankern.training.trained import load_data


def command(arguments: list[str]) -> int:
    names = ", ".join(PRESETS)
    if not arguments:
        raise Refused(f"a preset must be named: {names} (see gankern-train --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print("usage: gankern-train PRESET [OPTIONS]\n\npresets:")
        _print_presets()
        print("\ngankern-train PRESET --help lists the options.")
        return 0
    if name not in PRESETS:
        raise Refused(f"preset must be one of {names}, got {name!r}")
    need("tyro", "rich", "PIL", "safetensors", "tensorboard", "matplotlib")
    with contextlib.ExitStack() as held:
        with flagged(), refusing():
            held.enter_context(distributed.session())
            if distributed.rank():  # the first process speaks
                held.enter_context(contextlib.redirect_stdout(io.StringIO()))
            with distributed.together():
                config = parse(name, rest)
            ready = prepare(name, config, held)
        if ready is None:
            return 0
        try:
            return distributed.everyone(follow(ready) if distributed.rank() else fit(name, ready))[0]
        except OSError as error:  # of a file: the data are in memory; or another process is gone
            saved, where = ready.run.checkpoints()[-1:], f" {error.filename}" if error.filename else ""
            words = f"all is saved up to step {saved[0][0]}; to resume: {to_resume(name, ready)}" if saved else "nothing is saved"
            reason = str(error) if isinstance(error, ConnectionError) else f"cannot write{where}: {error.strerror or error}"
            print(f"gankern-train: stopped after step {ready.trainer.steps_done}, {reason}; {words}", file=sys.stderr)
            if distributed.world_size() > 1:
                raise SystemExit(1) from None  # nobody waits for the others
            return 1


@contextlib.contextmanager
def flagged() -> Iterator[None]:
    """A complaint about a setting names it as its flag: what was "train: batch_size must ..." is "--batch-size must ..."."""
    try:
        yield
    except Refused as refusal:
        sentence = re.sub("^(train|data): ", "", str(refusal))
        name = sentence.partition(" must ")[0]
        if name in TrainConfig.__dataclass_fields__:
            raise Refused(f"--{name.replace('_', '-')}{sentence.removeprefix(name)}") from None
        raise Refused(str(refusal).removeprefix("train: ")) from None


def list_presets(arguments: list[str]) -> int:
    Parser("gankern presets", description="List the presets of gankern-train.").parse_args(arguments)
    _print_presets()
    return 0


def _print_presets() -> None:
    for name, preset in PRESETS.items():
        print(f"  {name:<16} {preset.summary} ({preset.source})\n{'':<18} expect: {preset.expect}")


def parse(preset: str, arguments: list[str]) -> TrainConfig:
    """TrainConfig from flags; tyro's framed complaint becomes one sentence."""
    import tyro

    prog = f"gankern-train {preset}"
    if "-h" in arguments or "--help" in arguments:
        print(settings(preset))
        raise SystemExit(0)
    typed = {word.partition("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for word in arguments if word[:2] == "--"}
    default, plain = PRESETS[preset].config, TrainConfig.__dict__
    while True:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                config = tyro.cli(TrainConfig, prog=prog, default=default, args=arguments)
            break
        except SystemExit:
            text = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
            words = unframed(text).rstrip(".").removeprefix("Error parsing TrainConfig: ")
            meant = re.findall(r"^[│ ]*(--[a-z][\w-]*)", text.partition("Perhaps you meant")[2], re.MULTILINE)
            words += f", perhaps {' or '.join(meant)} is meant" if meant else ""
        about = re.match(r"train: (?P<name>\w+) must (be [\w. ]+ with --(?P<flag>[\w-]+)(?P<why>.*), got )?", words)
        name, flag = about.group("name", "flag") if about else ("", None)
        if about and name not in typed:
            words += " from the preset"
            if flag and flag.replace("-", "_") in typed and getattr(default, name) != plain[name]:
                # What was asked for by name goes before what came with the preset
                print(f"{name} {shown(getattr(default, name))} of the preset is left out with --{flag}{about['why']}")
                arguments = [*arguments, *given(name, plain[name])]
                typed.add(name)
                continue
        raise Refused(f"{words or 'the flags must be understood'} (see {prog} --help)")
    for name, why in idle(config).items():
        value = getattr(config, name)
        if name in typed and value != getattr(TrainConfig, name):
            raise Refused(f"train: {name} must be left out {why}, got {shown(value)} (see {prog} --help)")
    return config


def given(name: str, value: object) -> tuple[str, ...]:
    """A setting as words of the command line."""
    option = name.replace("_", "-")
    return (f"--{'' if value else 'no-'}{option}",) if isinstance(value, bool) else (f"--{option}", str(value))


def unframed(complaint: str) -> str:
    """The first part of tyro's complaint: a title, then parts between rules, drawn with or without boxes."""
    lines = [line.strip(" │") for line in complaint.splitlines()[1:]]
    body = itertools.dropwhile(is_rule, lines)
    return " ".join(itertools.takewhile(lambda line: not is_rule(line), body))


def is_rule(line: str) -> bool:
    return not line.strip("─-╭╮╰╯")


def prepare(preset: str, config: TrainConfig, held: contextlib.ExitStack) -> Ready | None:
    """All that may refuse: device, data, models, the run to resume, which is locked as long as `held`. None: all is done."""
    if config.data not in data.NAMES:  # the run is found again from another folder too
        config = dataclasses.replace(config, data=str(Path(config.data).expanduser().resolve()))
    run, saved, state, damaged = distributed.by_first(lambda: claim(preset, config, held))
    step = 0 if saved is None else run_dir.step_of(saved)
    watched = {key.removeprefix("watch."): state.pop(key) for key in list(state) if key.startswith("watch.")}
    checks.integer("resume", "rollbacks", watched.get("rollbacks", 0), 0)
    for sentence in damaged:
        print(f"{sentence}; going back to {saved}")
    if run is not None and step >= config.steps:
        print(f"{run.path} is finished: {step} steps made, {config.steps} asked for; nothing to do")
        return None
    with distributed.together():
        device = distributed.own_device(pick_device(config.device))
        distributed.check(config)
        if config.track in ("wandb", "both"):
            need("wandb", extra="wandb")
        dataset = load_data(config)
        if skipped := dataset.skipped:
            print(f"skipped {len(skipped)} unreadable files: {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}")
        quality.check(config, dataset)
        needed = config.batch_size * config.n_critic
        if config.n_critic > 1 and needed > len(dataset):
            words = f"--batch-size times --n-critic must be at most the {len(dataset)} {dataset.kind} of {dataset.name}"
            raise Refused(f"{words}, got {config.batch_size} * {config.n_critic} = {needed}")
        classes = count_classes(config, dataset, run)
        if run is not None and run.table != dataset.table:
            raise Refused(f"resume: data must have the columns of {run.path}, with their means and deviations, got others")
        torch.manual_seed(config.seed)
        networks = PRESETS[preset].build(config, dataset.shape, classes)
        batches = data.Batches(dataset, needed, seed=config.seed, device=device)
    trainer = Trainer(*networks, config, device)
    distributed.seed_own(config.seed)
    before = now = distributed.world_size()
    if saved is not None:
        before = restore(trainer, batches, saved, state)
    if config.dry_run:
        describe(preset, config, trainer, dataset, run)
        return None
    engine = make(config.engine, trainer, batches)
    facts = {"data_name": dataset.name, dataset.kind: len(dataset), "versions": versions(), "device_used": str(device)}

    def begin() -> RunDir:
        if run is None:
            made = RunDir.create(preset, config, dataset.name, dataset.shape, facts, classes, dataset.table)
            held.enter_context(made.locked())
            print(f"new run {made.path}: {len(dataset)} {dataset.kind} of {dataset.name} {list(dataset.shape)}, on {device}")
            return made
        run.rewind(step or -1)  # a run that begins draws and logs step 0 anew
        run_dir.write_config(run.path, preset, config, dataset.shape, facts, classes, dataset.table)
        print(f"continuing {run.path} after step {step}" if saved else f"{run.path} has no checkpoint yet: starting it over")
        return run

    run = distributed.by_first(begin)
    if before != now:
        print(
            f"trained by {before} process{'es' * (before > 1)} so far, by {now} from here on. The same to rounding: weights,"
            " optimisers, averages, order of the data, noise. Not the same: dropout draws anew; BatchNorm without --sync-batch-norm"
            f" and minibatch features see {config.batch_size // now} samples at a time in place of {config.batch_size // before}"
        )
    if engine.why:
        print(f"engine {engine.name}: {engine.why}")
    if config.precision == "bf16" and device.type == "cpu":
        cost = precision.bf16_cost(device)
        if cost > 1.0:
            print(f"note: bfloat16 products take {cost:.1f} times as long as float32 ones on this CPU; --precision fp32 is faster")
    seconds = max((row.get("time_s", 0.0) for row in run.numbers()), default=0.0)
    return Ready(config, trainer, batches, dataset, classes, run, seconds, engine, watched)


def claim(
    preset: str, config: TrainConfig, held: contextlib.ExitStack
) -> tuple[RunDir | None, Path | None, dict[str, Any], list[str]]:
    """The run to continue, locked; its newest checkpoint that is whole, with what that holds; and what is said of damaged ones."""
    path = find_run(preset, config)
    if path is None:
        return None, None, {}, []
    run, found = run_dir.locate(path)
    if not config.dry_run:
        held.enter_context(run.locked())
        run, found = run_dir.locate(path)  # whoever had it till now may have saved and removed some
    return (run, *(checkpoint.load_newest(found) if found else (None, {}, [])))


def count_classes(config: TrainConfig, dataset: data.Dataset, run: RunDir | None) -> int:
    """How many classes a conditional model has: those of the data, of a resumed run its own. 0: it is not conditional."""
    if config.arch not in CONDITIONAL or dataset.labels is None:  # the networks refuse to be built without
        return 0
    found = max(len(dataset.classes), int(dataset.labels.max()) + 1)
    if run is not None and run.classes != found:
        raise Refused(f"resume: data must have the {run.classes} classes of {run.path}, got {found}")
    return found


def find_run(preset: str, config: TrainConfig) -> Path | None:
    """The run that --resume means, or the checkpoint; None is a new run."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        run = RunDir.newest(Path(config.outdir), preset, config.data)
        if run is None:
            print(f"no run of {preset} on {config.data} under {config.outdir} to continue: starting one")
            return None
        path = run.path
    else:
        path = Path(config.resume)
        run, _ = run_dir.locate(path)
    if run.preset != preset:
        raise Refused(f"resume: preset must be {run.preset}, that of {run.path}, got {preset}")
    differences = run.config.differences(config)
    if differences:
        raise Refused(f"resume: settings must be those of {run.path}, got others in {', '.join(differences)}")
    return path


def restore(trainer: Trainer, batches: data.Batches, saved: Path, state: dict[str, Any]) -> int:
    """Load the state of the checkpoint `saved` into trainer and sampler; returns how many processes had trained it."""
    if state.get("step") != run_dir.step_of(saved):
        raise ValueError(f"resume: {saved} must hold the step in its name, got {state.get('step')!r}")
    device = state.pop("device", None)
    if device != trainer.device.type:
        raise ValueError(f"resume: device must be {device}, whose random state {saved} holds, got {trainer.device.type}")
    position = {key.removeprefix("data."): state.pop(key) for key in list(state) if key.startswith("data.")}
    if position.keys() != batches.state_dict().keys():
        raise ValueError(f"resume: {saved} must hold the data's {', '.join(batches.state_dict())}, got {', '.join(position)}")
    batches.load_state_dict(position)
    streams = {key: state.pop(key) for key in list(state) if key.startswith("rank")}
    trainer.load_state_dict(state)
    return distributed.set_streams(streams, trainer.device, trainer.config.seed, trainer.steps_done)


def versions() -> dict[str, str]:
    return {"gankern": gankern.__version__, "torch": torch.__version__, "python": platform.python_version()}


def describe(preset: str, config: TrainConfig, trainer: Trainer, dataset: data.Dataset, run: RunDir | None) -> None:
    """What --dry-run prints."""
    from gankern.cli.doctor import backends

    row = PRESETS[preset]
    print(f"preset {preset}: {row.summary} ({row.source})\nexpect: {row.expect}\n\nsettings")
    unused = idle(config)
    for name, value in config.to_json().items():
        if name not in unused:
            print(f"  {name:<22} {shown(value) or 'nothing'}")
    print(f"\ndata      {len(dataset)} {dataset.kind} {list(dataset.shape)}: {dataset.note}\ndevice    {trainer.device}\n")
    for role, model in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
        print(f"{role}, {sum(p.numel() for p in model.parameters()):,} parameters\n{model}\n")
    print(f"at equilibrium (see gankern explain {config.objective})")
    for name, words in Reader(config).equilibrium():
        print(f"  {name:<14} {words}")
    print("\nops")
    for op, name, why in backends(trainer.device):
        print(f"  {op:<22} {name:<10} {why}")
    where = f"a new directory under {config.outdir}" if run is None else f"{run.path}, continued after step {trainer.steps_done}"
    print(f"\nwould train into {where}; nothing was written")


if __name__ == "__main__":  # torchrun -m gankern.cli.train
    from gankern.cli.main import train_main

    raise SystemExit(train_main())
