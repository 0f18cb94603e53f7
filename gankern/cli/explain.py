"""gankern explain LOSS: what an objective minimises, and how to read the log of a run that has it."""

from __future__ import annotations

import textwrap

from gankern.cli.common import Parser, Refused
from gankern.losses.explanations import EXPLANATIONS, Explanation, Value, expected
from gankern.ops._objectives import OBJECTIVES
from gankern.training import PRESETS, TrainConfig

WIDTH = 110


def command(arguments: list[str]) -> int:
    parser = Parser("gankern explain", description="Explain an objective of gankern-train --loss; without a name, list them.")
    parser.add_argument("loss", nargs="?", metavar="LOSS", help="a name of the list")
    name = parser.parse_args(arguments).loss
    if name is None:
        for loss, row in EXPLANATIONS.items():
            print(f"  {loss:<32} {row.summary}")
        return 0
    if name not in EXPLANATIONS:
        hint = f", a preset, whose loss is {PRESETS[name].config.objective}" if name in PRESETS else ""
        raise Refused(f"loss must be one of {', '.join(EXPLANATIONS)}, got {name!r}{hint}")
    print(text(name, EXPLANATIONS[name]))
    return 0


def text(name: str, row: Explanation) -> str:
    """The whole explanation."""
    values = {"d_loss": row.d_loss, "g_loss": row.g_loss, "d_real": row.d_real, "d_fake": row.d_fake}
    meanings = dict(zip(("d_real", "d_fake"), (f"mean {score}: " for score in row.scores), strict=False))
    lines = [
        f"{name}: {row.summary}",
        "",
        *_entry("critic minimises", row.critic),
        *_entry("generator minimises", row.generator),
        *_entry("where", row.symbols),
        *_entry("source", row.source),
        "",
        "at equilibrium: the generator has the law of the data, and the critic is the best for it",
        *(line for key, value in values.items() for line in _entry(f"  {key}", f"{meanings.get(key, '')}{value}")),
        "",
        *_entry("sign and scale", row.sign),
        "",
        "signs of failure, and what to try",
        *(line for words in row.failures for line in _wrapped(words, "  - ", 4)),
    ]
    return "\n".join(lines)


def _entry(name: str, words: str) -> list[str]:
    return _wrapped(words, f"{name:<21}", 21)


def _wrapped(words: str, start: str, indent: int) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=start, subsequent_indent=" " * indent, break_on_hyphens=False)


class Reader:
    """Puts a row of log.jsonl into words, with the values to expect at equilibrium.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.names = EXPLANATIONS[config.objective].scores
        self.values = expected(config.objective, config.label_smoothing, config.fake_label, config.margin)
        if config.unroll and config.arch != "acgan" and config.objective in OBJECTIVES and OBJECTIVES[config.objective].zero_sum:
            number = expected(config.objective)["d_loss"].number
            self.values["g_loss"] = Value(None if number is None else 0.0 - number, "minus the critic's, after its updates")
        if config.real_label_range or config.fake_label_range or config.label_noise:
            self.values = dict.fromkeys(self.values, Value(None, "no fixed value: the labels are drawn"))
        if config.generator_loss == "matching":
            self.values["g_loss"] = Value(0.0, "features of the same mean")
        classes = " plus the classes' cross entropy" if config.arch == "acgan" else ""
        self.besides = {
            "d_loss": " plus the penalty" * (config.penalty != "none") + classes,
            "g_loss": classes
            + " plus the features' distance" * (config.feature_matching > 0)
            + " plus the reconstruction's error" * (config.reconstruction > 0),
        }

    def equilibrium(self) -> list[tuple[str, str]]:
        """(name, value in words) of each column."""
        return [
            (name, str(value) if value.number is None else f"{value}{self.besides.get(name, '')}")
            for name, value in self.values.items()
        ]

    def losses(self, row: dict[str, float]) -> str:
        """'d_loss 1.310 (1.386 = 2 log 2 when the critic cannot tell), g_loss 0.751 (0.6931 = log 2)'."""
        parts = []
        for name, explained in self.equilibrium()[:2]:
            if name == "d_loss":
                if not self.names:
                    continue  # there is no critic
                if self.values[name].number is not None:
                    explained += " when the critic cannot tell"
            parts.append(f"{name} {row[name]:.3f} ({explained})")
        return ", ".join(parts)

    def scores(self, row: dict[str, float]) -> list[tuple[str, float]]:
        """What the critic says of real and of fake samples, by name; nothing without a critic."""
        return list(zip(self.names, (row["d_real"], row["d_fake"]), strict=False))
