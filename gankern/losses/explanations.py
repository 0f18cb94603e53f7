"""What each objective minimises, and the numbers to expect of it: the table behind `gankern explain`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gankern.ops._objectives import OBJECTIVES
from gankern.ops.gan_loss import gan_loss

LOG2 = math.log(2)


class Value(NamedTuple):
    """A number and where it comes from; or only words, where there is no fixed number."""

    number: float | None
    words: str = ""

    def __str__(self) -> str:
        if self.number is None:
            return self.words
        return f"{self.number:.4g} = {self.words}" if self.words else f"{self.number:.4g}"


class Explanation(NamedTuple):
    """One objective. The values are those at equilibrium: the generator has the data's law, and the critic is the best for it.

    critic, generator: what each minimises, in NOTATION or `symbols`. scores: what the log's d_real and d_fake are; () where there
    is no critic. failures: signs, each with what to try.
    """

    summary: str
    critic: str
    generator: str
    source: str
    sign: str
    d_loss: Value
    g_loss: Value
    d_real: Value
    d_fake: Value
    failures: tuple[str, ...]
    symbols: str = "a_r = C(x) and a_f = C(G(z)), the critic's logits; D = sigmoid(C); sp(a) = log(1 + exp(a))"
    scores: tuple[str, ...] = ("D(x)", "D(G(z))")


_WEAKEN = "Add --instance-noise 0.1 or --d-dropout 0.3, bound it (--penalty r1, --spectral-norm), or lower --lr-d."
_SMOOTH = "Or smooth its labels: --label-smoothing 0.9."
_STRONG = f"D(x) near 1, D(G(z)) near 0: the critic has won. {_WEAKEN}"
_WINS = f"{_STRONG} {_SMOOTH}"
_APART = f"d_loss near 0, g_loss far above its equilibrium: the critic has won. {_WEAKEN} {_SMOOTH}"
_LOST = (
    "d_loss stays at its equilibrium while the pictures are bad: the critic learns nothing. Raise --lr-d, --n-critic or its widths."
)
_COLLAPSE = (
    "The pictures repeat each other though the losses look well: modes are lost. Add --penalty gp or r1, --d-dropout 0.3, a larger "
    "--batch-size, or let the critic see several samples at once (--pack 2, --minibatch-features distance)."
)
_SWINGS = "The losses swing ever wider: lower both rates, or set --beta1 0, --ema 0.999 and --clip-gradients."
_FADES = "g_loss close to 0 and hardly moving: the gradient of the saturating form has faded. Take --loss non-saturating."
_UNBOUNDED = (
    "Losses in the hundreds: the logits leave the range where the divergence is estimated well. Add --penalty gp, "
    "--clip-gradients 1 or lower rates."
)
_GOODFELLOW = 'Goodfellow et al., "Generative adversarial nets", NeurIPS 2014'
_HALF = Value(0.5, "1/2")


def _logistic(summary: str, generator: str, g_loss: Value, sign: str, source: str, *failures: str) -> Explanation:
    return Explanation(
        summary, "mean sp(-a_r) + mean sp(a_f)", generator, source,
        f"d_loss >= 0: from 0, where the critic is always right and sure, over 2 log 2, where it cannot tell. {sign}",
        Value(2 * LOG2, "2 log 2"), g_loss, _HALF, _HALF, failures,
    )  # fmt: skip


def _divergence(
    name: str, critic: str, saturating: str, alternative: str, logit: float, *g_losses: Value
) -> dict[str, Explanation]:
    """f-GAN: both forms of one divergence."""
    d = Value(1 / (1 + math.exp(-logit)), f"sigmoid({logit:g})")
    rows = {}
    for ending, generator, g_loss in zip(("", "-alternative"), (saturating, alternative), g_losses, strict=True):
        rows[ending] = Explanation(
            f"f-GAN, {name}; the generator maximises {'g(a)' if ending else 'f*(g(a)), the bound itself'}", critic, generator,
            'Nowozin, Cseke, Tomioka, "f-GAN", NeurIPS 2016, eq. 4 and 6, tables 2 and 6' + (", section 3.2" if ending else ""),
            "-d_loss is a lower bound of the divergence, so d_loss <= 0 for a good critic; it rises to 0 as the laws meet. g_loss "
            "is of either sign and has no bound.",
            Value(0.0), g_loss, d, d, (_UNBOUNDED, _STRONG, _COLLAPSE),
        )  # fmt: skip
    return rows


def _relativistic(name: str, critic: str, generator: str, equation: str, equal: Value, *failures: str) -> Explanation:
    anything = Value(None, "no fixed value: only differences of logits count")
    return Explanation(
        f"relativistic; {name}", critic, generator,
        f'Jolicoeur-Martineau, "The relativistic discriminator", ICLR 2019, {equation}',
        "Both losses >= 0, and at equilibrium the same: each side wants its samples to look more real than the other's. One falls "
        "as the other rises.",
        equal, equal, anything, anything, failures,
    )  # fmt: skip


_F_GAN = {
    "kl": _divergence("Kullback-Leibler", "-mean a_r + mean exp(a_f - 1)", "-mean exp(a_f - 1)", "-mean a_f", 1,
                      Value(-1.0), Value(-1.0)),
    "reverse-kl": _divergence("reverse Kullback-Leibler", "mean exp(-a_r) + mean (a_f - 1)", "-mean (a_f - 1)",
                              "mean exp(-a_f)", 0, Value(1.0), Value(1.0)),
    "pearson": _divergence("Pearson chi²", "-mean a_r + mean (a_f²/4 + a_f)", "-mean (a_f²/4 + a_f)", "-mean a_f", 0,
                           Value(0.0), Value(0.0)),
    "hellinger": _divergence("squared Hellinger", "mean (exp(-a_r) - 1) + mean (exp(a_f) - 1)", "-mean (exp(a_f) - 1)",
                             "mean (exp(-a_f) - 1)", 0, Value(0.0), Value(0.0)),
    "jensen-shannon": _divergence("Jensen-Shannon", "mean sp(-a_r) + mean sp(a_f) - 2 log 2", "-mean sp(a_f) + log 2",
                                  "mean sp(-a_f) - log 2", 0, Value(0.0), Value(0.0)),
}  # fmt: skip
_GAN_DIVERGENCE = 'Nowozin, Cseke, Tomioka, "f-GAN", NeurIPS 2016, table 2 (GAN)'
_ENERGIES = ("E(x)", "E(G(z))")
_KERNEL = "k(x, y) = sum over sigma of exp(-||x - y||² / (2 sigma²)); x' and z' are other samples of the same batch"

EXPLANATIONS: dict[str, Explanation] = {
    "non-saturating": _logistic(
        "the GAN as it is trained; the generator maximises log D(G(z))", "mean sp(-a_f)", Value(LOG2, "log 2"),
        "g_loss >= 0 too, and large where the critic wins.", f"{_GOODFELLOW}, eq. 1 and the remark after it",
        _WINS, _LOST, _COLLAPSE, _SWINGS,
    ),
    "minimax": _logistic(
        "the GAN as a game with sum zero; the generator minimises log(1 - D(G(z)))", "-mean sp(a_f)", Value(-LOG2, "-log 2"),
        "g_loss <= 0, and close to 0 where the critic wins: there its gradient fades.", f"{_GOODFELLOW}, eq. 1",
        _FADES, _WINS, _LOST, _COLLAPSE,
    ),
    "maximum-likelihood": _logistic(
        "the generator follows the gradient of maximum likelihood, where the critic is the best", "-mean exp(a_f)", Value(-1.0),
        "g_loss < 0: minus the mean ratio of the densities, with few samples that count; exp goes on by its tangent beyond 30.",
        'Goodfellow, "NIPS 2016 tutorial: generative adversarial networks", section 3.2.4', _FADES, _UNBOUNDED, _COLLAPSE,
    ),
    "lsgan": Explanation(
        "least squares: logits aim at 1 for real and at 0 for fake samples", "1/2 mean (a_r - 1)² + 1/2 mean a_f²",
        "1/2 mean (a_f - 1)²", 'Mao et al., "Least squares generative adversarial networks", ICCV 2017, eq. 2 and 9',
        "Both losses >= 0; d_loss 0 where the critic is always right. No loss is far beyond 1 for long.",
        Value(0.25, "1/4"), Value(0.125, "1/8"), Value(1 / (1 + math.exp(-0.5)), "sigmoid(1/2)"),
        Value(1 / (1 + math.exp(-0.5)), "sigmoid(1/2)"),
        ("g_loss near 1/2, d_loss near 0: the critic has won. Add --instance-noise 0.1, --spectral-norm, or lower --lr-d.",
         _LOST, _COLLAPSE, _SWINGS),
    ),
    "lsgan-pearson": Explanation(
        "least squares that minimise a Pearson divergence: logits aim at 1 and -1",
        "1/2 mean (a_r - 1)² + 1/2 mean (a_f + 1)²", "1/2 mean a_f²",
        'Mao et al., "Least squares generative adversarial networks", ICCV 2017, eq. 2 and 8',
        "Both losses >= 0; d_loss 0 where the critic is always right, g_loss 0 where it cannot tell.",
        Value(1.0), Value(0.0), _HALF, _HALF,
        ("g_loss near 1/2, d_loss near 0: the critic has won. Add --instance-noise 0.1, --spectral-norm, or lower --lr-d.",
         _LOST, _COLLAPSE, _SWINGS),
    ),
    "hinge": Explanation(
        "logits beyond 1 and -1 cost the critic nothing", "mean max(0, 1 - a_r) + mean max(0, 1 + a_f)", "-mean a_f",
        'Lim and Ye, "Geometric GAN", 2017; Miyato et al., "Spectral normalization", ICLR 2018, eq. 16 and 17',
        "d_loss >= 0; 0 where all samples are beyond the margin. g_loss of either sign: only its course counts.",
        Value(2.0), Value(None, "no fixed value, from -1 to 1: any logit between is as good"),
        Value(None, "no fixed value, from 0.27 to 0.73"), Value(None, "the same as D(x)"),
        ("d_loss near 0: no sample gives the critic a gradient any more. Bound it: --spectral-norm or --penalty gp.",
         _LOST, _COLLAPSE),
    ),
    "wgan": Explanation(
        "Wasserstein distance, by a critic with bounded slope", "mean a_f - mean a_r", "-mean a_f",
        'Arjovsky, Chintala, Bottou, "Wasserstein GAN", ICML 2017, algorithm 1; Gulrajani et al., NeurIPS 2017 (the penalty)',
        "-d_loss, without its penalty, is the distance's estimate, in the critic's largest slope: it falls to 0 as the samples get "
        "better. g_loss has any offset: only its course counts.",
        Value(0.0), Value(None, "no fixed value: logits have any offset"),
        Value(None, "no fixed value: a score, no probability"), Value(None, "the same as D(x)"),
        ("-d_loss does not rise at the start: the critic is far from the best one. More of --n-critic (5), --lr-d, or a larger "
         "--clip-weights.",
         "d_loss swings in sign: the critic is behind the generator. --beta1 0 --beta2 0.9, --n-critic 5, lower --lr-g.",
         "-d_loss grows on and on: the slope is not bounded. --penalty gp instead of --clip-weights; no --d-norm batch."),
    ),
    **{f"fgan-{name}": rows[""] for name, rows in _F_GAN.items()},
    **{f"fgan-{name}-alternative": rows["-alternative"] for name, rows in _F_GAN.items()},
    "fgan-gan": _logistic(
        "f-GAN, the GAN's own divergence 2 JS - log 4; the same as minimax", "-mean sp(a_f)", Value(-LOG2, "-log 2"),
        "-d_loss is a lower bound of the divergence. g_loss <= 0.", _GAN_DIVERGENCE, _FADES, _WINS, _LOST, _COLLAPSE,
    ),
    "fgan-gan-alternative": _logistic(
        "f-GAN, the GAN's own divergence; the same as non-saturating", "mean sp(-a_f)", Value(LOG2, "log 2"),
        "-d_loss is a lower bound of the divergence. g_loss >= 0.", f"{_GAN_DIVERGENCE} and section 3.2", _WINS, _LOST, _COLLAPSE,
    ),
    "relativistic": _relativistic(
        "each real sample against one fake one", "mean sp(-(a_r - a_f))", "mean sp(-(a_f - a_r))", "eq. 8 and 9",
        Value(LOG2, "log 2"), _APART, _LOST, _SWINGS,
    ),
    "relativistic-lsgan": _relativistic(
        "pairs, least squares", "1/2 mean (a_r - a_f - 1)²", "1/2 mean (a_f - a_r - 1)²", "eq. 8 and 9 with squares",
        Value(0.5, "1/2"), _LOST, _SWINGS,
    ),
    "relativistic-hinge": _relativistic(
        "pairs, hinge", "mean max(0, 1 - (a_r - a_f))", "mean max(0, 1 - (a_f - a_r))", "eq. 8 and 9 with the hinge", Value(1.0),
        _LOST, _SWINGS,
    ),
    "relativistic-average": _relativistic(
        "each sample against the other half's mean", "mean sp(-(a_r - mean a_f)) + mean sp(a_f - mean a_r)",
        "mean sp(a_r - mean a_f) + mean sp(-(a_f - mean a_r))", "eq. 14 and 15", Value(2 * LOG2, "2 log 2"), _APART, _LOST, _SWINGS,
    ),
    "relativistic-average-lsgan": _relativistic(
        "averages, least squares", "1/2 mean (a_r - mean a_f - 1)² + 1/2 mean (a_f - mean a_r + 1)²",
        "1/2 mean (a_r - mean a_f + 1)² + 1/2 mean (a_f - mean a_r - 1)²", "eq. 14 and 15 with squares", Value(1.0), _LOST, _SWINGS,
    ),
    "relativistic-average-hinge": _relativistic(
        "averages, hinge", "mean max(0, 1 - (a_r - mean a_f)) + mean max(0, 1 + (a_f - mean a_r))",
        "mean max(0, 1 + (a_r - mean a_f)) + mean max(0, 1 - (a_f - mean a_r))", "eq. 14 and 15 with the hinge", Value(2.0),
        _LOST, _SWINGS,
    ),
    "ebgan": Explanation(
        "energies: the critic is an auto-encoder that reconstructs real samples well, fake ones badly",
        "mean E(x) + mean max(0, m - E(G(z)))", "mean E(G(z)) + w PT(codes of G(z)), PT the mean squared cosine of two codes",
        'Zhao, Mathieu, LeCun, "Energy-based generative adversarial network", ICLR 2017, eq. 1, 2 and 4; theorems 1 and 2',
        "Energies >= 0. d_loss >= 0: 0 where the critic has won, the margin where it cannot tell.",
        Value(1.0, "the margin"), Value(None, "the energy, plus the pulling-away term"),
        Value(None, "no fixed value, from 0 to the margin"), Value(None, "the same as E(x)"),
        ("E(G(z)) at the margin, E(x) near 0: the critic has won. Lower --margin or --lr-d.",
         "E(x) and E(G(z)) both near 0: the auto-encoder copies anything. A shorter code, or a larger --margin.",
         "The pictures repeat each other: more of --pulling-away-weight."),
        "E(x): the mean squared error of the critic's reconstruction of x; m: --margin; w: --pulling-away-weight", _ENERGIES,
    ),
    "began": Explanation(
        "energies in balance: the reconstruction error of fake samples is kept at gamma times that of real ones",
        "mean E(x) - k mean E(G(z)), k <- min(max(k + lambda (gamma E(x) - E(G(z))), 0), 1)", "mean E(G(z))",
        'Berthelot, Schumm, Metz, "BEGAN: boundary equilibrium generative adversarial networks", 2017, section 3.4',
        "All >= 0 but for d_loss, which is (1 - gamma k) E(x) in balance. Progress is the fall of E(x) + |gamma E(x) - E(G(z))|.",
        Value(None, "(1 - gamma k) E(x)"), Value(None, "gamma E(x)"), Value(None, "no fixed value: it falls"),
        Value(None, "gamma E(x)"),
        ("E(G(z)) stays below gamma E(x), so that k rises to 1: the generator makes samples that are easy to copy. Lower "
         "--began-gamma or --lr-g.",
         "The pictures repeat each other: more of --began-gamma.",
         "k swings: less of --began-lambda."),
        "E(x): the mean absolute error of the critic's reconstruction of x; gamma: --began-gamma; lambda: --began-lambda; k from 0",
        _ENERGIES,
    ),
    "mmd": Explanation(
        "moment matching without a critic: the distance of the kernel means of a real and a fake batch",
        "nothing", "MMD² = mean k(x, x') + mean k(G(z), G(z')) - 2 mean k(x, G(z)), or its root with --mmd-root",
        'Li, Swersky, Zemel, "Generative moment matching networks", ICML 2015, eq. 3',
        "g_loss >= 0; it starts below 2 K for K widths. With no critic, d_loss, d_real and d_fake are 0.",
        Value(0.0),
        Value(None, "close to 0: (2 / B) (K - mean k), or its root, for K widths and a batch of B, as the estimate is biased"),
        Value(0.0), Value(0.0),
        ("g_loss hardly moves: no width fits the distances of the data. --mmd-bandwidths around the median distance, --mmd-root.",
         "Blurred or repeated pictures: the batch is too small to show the law. --batch-size 1000; or learned features: "
         "--loss mmd-gan."),
        _KERNEL, (),
    ),
    "mmd-gan": Explanation(
        "moment matching of features that the critic learns",
        "-MMD² of the features, + w mean |reconstruction - sample|² of both halves where the critic is an auto-encoder",
        "MMD² = mean k(f(x), f(x')) + mean k(f(G(z)), f(G(z'))) - 2 mean k(f(x), f(G(z)))",
        'Li et al., "MMD GAN", NeurIPS 2017, eq. 3 and algorithm 1; Bińkowski et al., "Demystifying MMD GANs", ICLR 2018',
        "g_loss >= 0; d_loss = -g_loss but for the reconstruction and the penalty. W is the witness function, mean k(f(x), .) - "
        "mean k(f(G(z)), .); W(x) - W(G(z)) = MMD².",
        Value(None, "-g_loss, plus reconstruction and penalty"),
        Value(None, "close to 0: (2 / B) (K - mean k), for K widths and a batch of B, as the estimate is biased"),
        Value(None, "close to 0, half of g_loss"), Value(None, "close to 0, minus half of g_loss"),
        ("g_loss near 2 K: the features are further apart than the largest width. --penalty gp, or less of --clip-weights.",
         "g_loss near 0 from the start: the features do not move. --lr-d, --n-critic 5, other --mmd-bandwidths.",
         _COLLAPSE),
        f"f: the critic's features; {_KERNEL}; w: --mmd-reconstruction", ("W(x)", "W(G(z))"),
    ),
}  # fmt: skip


def expected(objective: str, real_label: float = 1.0, fake_label: float = 0.0, margin: float = 1.0) -> dict[str, Value]:
    """The equilibrium's d_loss, g_loss, d_real and d_fake with these settings.

    Between laws that are equal, the best critic's logit meets the mean of its labels.
    """
    row = EXPLANATIONS[objective]
    values = {name: getattr(row, name) for name in ("d_loss", "g_loss", "d_real", "d_fake")}
    if objective == "ebgan":
        values["d_loss"] = Value(margin, "the margin")
    if (real_label, fake_label) == (1.0, 0.0) or objective not in OBJECTIVES or OBJECTIVES[objective].relative != "no":
        return values
    aim = torch.tensor([(real_label + fake_label) / 2] * 2, dtype=torch.float64)
    logits = aim if objective == "lsgan" else 2 * aim - 1 if objective == "lsgan-pearson" else aim.logit()
    critic = gan_loss(logits, n_real=1, objective=objective, real_label=real_label, fake_label=fake_label)
    generator = gan_loss(None, logits, objective, "generator")
    numbers = (critic.value, generator.value, critic.d_real, critic.d_fake)
    return {name: Value(number.item()) for name, number in zip(values, numbers, strict=True)}
