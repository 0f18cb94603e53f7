"""gankern-train PRESET --help: every setting in its group, with its choices and the preset's own value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from typing import Any, Literal

from gankern.training import PRESETS, TrainConfig

# The group that begins with each of these settings.
GROUPS = {
    "data": "the run",
    "metrics": "metrics while training",
    "size": "the data",
    "loss": "the objective",
    "label_smoothing": "labels",
    "n_critic": "the critic's updates, and what bounds it",
    "replay": "techniques",
    "arch": "the networks",
    "optimizer_d": "the optimisers",
}


def settings(preset: str) -> str:
    """The whole text."""
    row, documented, kinds = PRESETS[preset], _docstrings(), typing.get_type_hints(TrainConfig)
    width = min(max(shutil.get_terminal_size().columns, 60), 110)
    lines = [
        f"usage: gankern-train {preset} [OPTIONS]",
        "",
        *textwrap.wrap(f"{row.summary} ({row.source})", width),
        *textwrap.wrap(f"expect: {row.expect}", width, subsequent_indent="  "),
    ]
    for field in dataclasses.fields(TrainConfig):
        name, value = field.name, getattr(row.config, field.name)
        if name in GROUPS:
            lines += ["", f"{GROUPS[name]}:"]
        flag, choices = _flag(name, kinds[name])
        default = {True: "on", False: "off"}[value] if isinstance(value, bool) else shown(value) or "nothing"
        indent = " " * 6
        words = f"{documented[name]}{choices} (default: {default})"
        lines += [
            f"  {flag}",
            *textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False),
        ]
    return "\n".join(lines)


def shown(value: object) -> str:
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flag(name: str, kind: Any) -> tuple[str, str]:
    """The flag with what it takes; and the choices, where they are too many for that line."""
    flag, within = f"--{name.replace('_', '-')}", typing.get_args(kind)
    if kind is bool:
        return f"{flag}, --no-{flag[2:]}", ""
    if typing.get_origin(kind) is Literal:
        few = len(within) <= 8
        return (f"{flag} {{{','.join(map(str, within))}}}", "") if few else (f"{flag} NAME", f" One of {', '.join(within)}.")
    if within:
        return f"{flag} [{within[0].__name__.upper()} ...]", ""
    return f"{flag} {kind.__name__.upper()}", ""


def _docstrings() -> dict[str, str]:
    """What stands below each field of TrainConfig, in one line."""
    (definition,) = ast.parse(inspect.getsource(TrainConfig)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found
