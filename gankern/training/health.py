"""The health of a run: what its vitals say, in words, and which settings to try.

The thresholds lie between runs that were made to fail (a critic at 100 times its learning rate, a generator that stands still, a
ring without packing) and healthy runs of the presets. A check speaks after several looks that agree, so looks should lie some
hundred steps apart: the first samples of any run are all alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from gankern.data.toys import MIXTURES
from gankern.losses.explanations import expected
from gankern.ops._objectives import OBJECTIVES
from gankern.training.combinations import idle
from gankern.training.config import TrainConfig
from gankern.training.vitals import Vitals

ALWAYS = 0.999  # share of pairs in the right order from which on the critic makes no mistake
SURE = 0.995  # D(x) - D(G(z)) as a share of the distance of its targets: 0.986 in a healthy DCGAN's first steps, 0.999 at 100 times
STILL = 1e-3  # movement of the samples; healthy: above 0.03 even 50 steps apart
HARDLY = 0.02
FADED = 0.05  # the generator's gradient, as a share of its largest; 0.03 where the critic of `gan-minimax` has won
ADAM = 1e-8  # root mean square of a gradient that vanishes beside Adam's epsilon
ALIKE = 0.08  # spread; healthy: above 0.09 even in the first steps
MODES, CLASSES = 0.5, 0.25  # effective number of modes and of classes, as a share of all
AMONG = 0.97  # accuracy on real samples below which some of the fakes lie among them
DIGITS = 0.75  # confidence of the classifier in fakes that are digits
HOPS = 2.0  # way of the mean of the samples in four looks; healthy: 1.8 at the beginning of `gan`, 0.3 on a ring that holds
SWAPPED = 3.0  # share of the samples that changed class or mode, in four looks; healthy: 2.3 and 0.5
STRAIGHT = 1.5  # turn over shift: 2 on a straight way, 1 where each move goes anywhere
TIMES = 10.0  # the swing of d_loss against its usual one, where the objective has no value to compare with
QUIET = 4  # looks without a sign after which it is a new onset


class Sign(NamedTuple):
    """kind: a key of `CHECKS`, or "divergence". saw: what was seen. advice: what to try."""

    kind: str
    saw: str
    advice: str


class Monitor:
    """Judges one look after another; a sign that lasts is told once.

    Args:
        config: of the run.

    Attributes:
        history: the vitals of all looks so far.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.history: list[Vitals] = []
        self.seen: dict[str, int] = {}  # the number of looks when each sign was seen last

    def look(self, vitals: Vitals) -> list[Sign]:
        """The signs that begin with this look. Looks at later steps, from before a rollback, are forgotten."""
        kept = [v for v in self.history if v.step < vitals.step]
        if len(kept) < len(self.history):
            self.history, self.seen = [], {}
            for earlier in kept:
                self.look(earlier)
        self.history.append(vitals)
        found, now = [], len(self.history)
        for kind, check in CHECKS.items():
            saw = check(self.config, self.history)
            if saw and now - self.seen.get(kind, -QUIET) > QUIET:
                found.append(Sign(kind, saw, advice(kind, self.config)))
            if saw:
                self.seen[kind] = now
        return found


def critic_too_strong(config: TrainConfig, history: list[Vitals]) -> str:
    """Three looks in which the critic orders all pairs, and its scores have reached its targets or the generator hardly moves."""
    last, distance = history[-3:], _targets(config)
    if len(last) < 3 or any(v.ranked is None or v.ranked < ALWAYS for v in last):
        return ""
    if distance and all(v.gap is not None and v.gap >= SURE * distance for v in last):
        return f"the critic is too strong: D(x) - D(G(z)) is {last[-1].gap:.4f} of at most {distance:g}"
    if all(v.moved is not None and v.moved <= HARDLY for v in last):
        return (
            f"the critic is too strong: it tells all real samples from all fakes, and the fakes move by only {last[-1].moved:.2g}"
        )
    return ""


def generator_stands_still(config: TrainConfig, history: list[Vitals]) -> str:
    """Two looks before each of which no sample has moved, while the critic finds no sample good."""
    last = history[-2:]
    if len(last) == 2 and all(v.moved is not None and v.moved <= STILL and _beaten(v) for v in last):
        return f"the generator stands still: its samples moved by {last[-1].moved:.2g} of the distance between real ones"
    return ""


def gradient_vanishes(config: TrainConfig, history: list[Vitals]) -> str:
    """Two looks at a gradient far below the run's own, or below what Adam feels, while the critic finds no sample good."""
    norms = [v.gradient for v in history if v.gradient is not None]
    if not norms or len(history) < 2:
        return ""
    limit = max(FADED * max(norms), ADAM)
    if all(v.gradient is not None and v.gradient <= limit and _beaten(v) for v in history[-2:]):
        return f"the generator's gradient vanishes: {norms[-1]:.2g} an entry, at most {max(norms):.2g} so far"
    return ""


def mode_collapse(config: TrainConfig, history: list[Vitals]) -> str:
    """Three looks at samples that are all alike, or of few of the classes or modes."""
    last = history[-3:]
    if len(last) < 3:
        return ""
    v = last[-1]
    apart = v.spread > 1.1 * last[0].spread  # as in the beginning, when what is no digit yet is taken for an 8
    if not apart and all(w.spread <= ALIKE for w in last) and (v.moved is None or v.moved > STILL):
        return (
            f"mode collapse: two samples differ by {v.spread:.2g} of the distance of two real ones; nearest neighbours of "
            f"{v.nn_fake:.0%} of the fakes are fakes"
        )
    counts = [_few(w, config) for w in last]
    if all(counts) and v.shares is not None and (not apart or config.data in MIXTURES):
        return f"mode collapse: the samples are of about {counts[-1]:.1f} of {len(v.shares)} {_kinds(config)}"
    return ""


def oscillation(config: TrainConfig, history: list[Vitals]) -> str:
    """Samples that go back and forth over four looks, or a critic's loss that swings as far as its own size in two."""
    last, before = history[-4:], history[-5:-1]
    if len(before) == 4:
        ways = [v.shift for v in last if v.shift is not None]
        turns = [v.turn for v in last if v.turn is not None]
        if len(turns) == 4 and sum(ways) >= HOPS and sum(turns) <= STRAIGHT * sum(ways):
            return f"oscillation: in four looks the mean of the samples went {sum(ways):.1f} times the distance of two real ones"
        swapped = [_swapped(a, b) for a, b in zip(before, last, strict=True)]
        if sum(swapped) >= SWAPPED:
            return f"oscillation: between two looks {swapped[-1]:.0%} of the samples changed to other {_kinds(config)}"
    limit = abs(expected(config.objective, config.label_smoothing, config.fake_label, config.margin)["d_loss"].number or 0.0)
    if not limit:
        earlier = [v.swing for v in history[:-2] if v.swing is not None]
        limit = TIMES * statistics.median(earlier) if len(earlier) >= 4 else math.inf
    if len(history) > 1 and all(v.swing is not None and v.swing > limit > 0 for v in history[-2:]):
        return f"oscillation: d_loss swings with a standard deviation of {history[-1].swing:.3g}, where {limit:.3g} is much"
    return ""


CHECKS: dict[str, Callable[[TrainConfig, list[Vitals]], str]] = {
    "critic": critic_too_strong,
    "generator": generator_stands_still,
    "gradient": gradient_vanishes,
    "collapse": mode_collapse,
    "oscillation": oscillation,
}


def _kinds(config: TrainConfig) -> str:
    """What the shares of the vitals are shares of."""
    return "modes" if config.data in MIXTURES else "digits"


def _targets(config: TrainConfig) -> float:
    """How far D(x) and D(G(z)) of the best critic are apart when it always knows; 0 where the critic gives no probabilities."""
    row = OBJECTIVES.get(config.objective)
    if row is None or row.real.term != "bce" or row.relative != "no":
        return 0.0
    real, fake = config.real_label_range or (config.label_smoothing,), config.fake_label_range or (config.fake_label,)
    return (1.0 - 2.0 * config.label_noise) * (statistics.mean(real) - statistics.mean(fake))


def _beaten(v: Vitals) -> bool:
    """Whether the critic is right; at equilibrium a small gradient is no fault."""
    return v.ranked is None or v.ranked >= ALWAYS


def _few(v: Vitals, config: TrainConfig) -> float:
    """The effective number of classes or modes, exp of the entropy, where it is low; 0: it is not, or cannot be told."""
    if v.shares is None or (config.data not in MIXTURES and (v.nn_real > AMONG or v.sure is None or v.sure < DIGITS)):
        return 0.0
    number = math.exp(-sum(p * math.log(p) for p in v.shares if p > 0))
    return number if number <= (CLASSES if config.data not in MIXTURES else MODES) * len(v.shares) else 0.0


def _swapped(a: Vitals, b: Vitals) -> float:
    """The total variation between their shares, in [0, 1]."""
    if a.shares is None or b.shares is None or len(a.shares) != len(b.shares):
        return 0.0
    return sum(abs(p - q) for p, q in zip(a.shares, b.shares, strict=True)) / 2


def remedies(kind: str, c: TrainConfig) -> list[dict[str, Any]]:
    """What may help against a sign, the likeliest first."""
    slower = {"ttur": c.ttur / 4} if c.ttur else {"lr_d": c.lr_d / 4}
    gentle: list[dict[str, Any]] = [{"instance_noise": 0.1}, {"label_smoothing": 0.9}, {"d_dropout": 0.3}]
    bounded: list[dict[str, Any]] = [{"penalty": "r1"}, {"spectral_norm": True}]
    halves = {"lr_g": c.lr_g / 2, **({} if c.ttur else {"lr_d": c.lr_d / 2})}
    alive = {"generator_loss": "non-saturating"}
    found: dict[str, list[dict[str, Any]]] = {
        "critic": [slower, *bounded, *gentle],
        "generator": [*([{"lr_g": c.rate_d}] if c.lr_g < c.rate_d / 10 else []), alive, slower, *bounded, *gentle],
        "gradient": [alive, {"loss": "wgan", "penalty": "gp"}, *bounded, *gentle, slower],
        "collapse": [{"pack": 2 * c.pack}, {"minibatch_features": "distance"}, {"unroll": 5}, {"penalty": "gp"}, slower],
        "oscillation": [slower, {"pack": 2 * c.pack}, {"penalty": "r1"}, halves, {"beta1": 0.0}, {"clip_gradients": 1.0}],
        "divergence": [{"precision": "fp32"}, {"clip_gradients": 1.0}, halves, *bounded],
    }
    return found[kind]


def advice(kind: str, config: TrainConfig) -> str:
    """The first three remedies that these settings allow and do not have yet, as flags of gankern-train."""
    flags: list[str] = []
    for changes in remedies(kind, config):
        try:
            new = dataclasses.replace(config, **changes)
        except ValueError:
            continue
        other = new.objective != config.objective if "generator_loss" in changes else new != config
        if other and not idle(new).keys() & changes.keys():
            words = (
                f"--{k.replace('_', '-')}" + ("" if v is True else f" {v:g}" if isinstance(v, float) else f" {v}")
                for k, v in changes.items()
            )
            flags.append(" ".join(words))
    return " or ".join(flags[:3])
