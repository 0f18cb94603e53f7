"""Settings that do not go together: each pair is refused in one sentence that names both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gankern import checks
from gankern.ops._objectives import OBJECTIVES
from gankern.training import quality

if TYPE_CHECKING:
    from gankern.training.config import TrainConfig

OP = "train"
_MLPS = ("mlp", "cgan", "autoencoder")  # --g-norm is of their generators
_NO_NORM = ("unrolled-toy", "wgan-gp-toy")
_DCGANS = ("dcgan", "cdcgan", "acgan")
_AUTOENCODERS = ("autoencoder", "conv-autoencoder")
_CONVOLUTIONS = (*_DCGANS, "sngan", "resnet", "conv-autoencoder")
# The architectures whose networks each of these shapes.
_SHAPES = {
    "conv_width": _CONVOLUTIONS,
    "d_conv_width": ("dcgan",),
    "upsample": (*_DCGANS, "conv-autoencoder"),
    "downsample": (*_DCGANS, "conv-autoencoder"),
    "code": _AUTOENCODERS,
    "d_norm": (*_DCGANS, "resnet"),
    "g_widths": (*_MLPS, "tabular"),
    "g_norm": _MLPS,
    "g_dropout": _MLPS,
    "d_widths": (*_MLPS, "tabular"),
    "d_dropout": ("mlp", "cgan", "tabular"),
    "negative_slope": (*_MLPS, *_DCGANS, "conv-autoencoder", "tabular"),
}
_OF_ENCODER = (("g_widths", "negative_slope"), ("conv_width", "downsample", "negative_slope"))  # without and with convolutions
_OF_CRITIC = ("d_conv_width", "downsample", "code", "d_norm", "d_widths", "d_dropout", "optimizer_d", "lr_d", "ttur")
NO_CRITIC = {
    "penalty": "none",
    "n_critic": 1,
    "spectral_norm": False,
    "clip_weights": 0.0,
    "pack": 1,
    "minibatch_features": "none",
    "replay": 0,
}


def check(c: TrainConfig) -> None:
    """Refuse the first impossible pair of settings.

    Raises:
        ValueError: there is one.
    """
    _ = c.objective  # loss and generator_loss
    metrics = quality.names(c.metrics)
    if metrics and not c.metric_every:
        _refuse("metric_every", "be >= 1 with --metrics", c.metric_every)
    if c.keep_best and c.keep_best not in metrics:
        _refuse("keep_best", f"be one of --metrics ({c.metrics or 'nothing'})", repr(c.keep_best))
    if c.batch_size == 1 and (c.arch == "tabular" or (c.g_norm == "batch" and c.arch in _MLPS)):
        _refuse("batch_size", "be >= 2 with BatchNorm", 1)
    if c.batch_size == 1 and c.loss == "ebgan" and c.pulling_away_weight:
        _refuse("batch_size", "be >= 2 with --pulling-away-weight, which compares samples", 1)
    if c.loss in ("wgan", "mmd-gan") and c.penalty == "none" and not c.spectral_norm and not c.clip_weights:
        _refuse("loss", "have a bounded critic: --penalty, --spectral-norm or --clip-weights", f"{c.loss} alone")
    if c.clip_weights and c.penalty in ("gp", "dragan"):
        _refuse("clip_weights", f"be 0 with --penalty {c.penalty}, which bounds the critic in its place", c.clip_weights)
    if c.loss == "mmd":
        for field, off in NO_CRITIC.items():
            if getattr(c, field) != off:
                _refuse(field, f"be {off} with --loss mmd, which has no critic", getattr(c, field))
    if c.loss in ("ebgan", "began") and c.penalty != "none":
        _refuse("penalty", f"be none with --loss {c.loss}, whose critic gives energies and no scores", c.penalty)
    for field, plain in (("label_smoothing", 1.0), ("fake_label", 0.0)):
        if getattr(c, field) != plain and not _has_targets(c.objective):
            _refuse(field, f"be {plain:g} with --loss {c.loss}, which has no targets", getattr(c, field))
    _check_labels(c)
    _check_techniques(c)
    if c.penalty != "none" and c.d_norm == "batch":
        _refuse("d_norm", "be none with --penalty, whose norm is of each sample by itself", "batch")
    if c.d_norm == ("batch" if c.arch == "resnet" else "layer"):
        _refuse("d_norm", f"be none or {'layer' if c.arch == 'resnet' else 'batch'} with --arch {c.arch}", c.d_norm)
    if c.minibatch_features != "none" and c.penalty != "none":
        _refuse("minibatch_features", "be none with --penalty, whose norm is of each sample by itself", c.minibatch_features)
    if c.minibatch_features != "none" and c.arch in ("autoencoder", "conv-autoencoder"):
        _refuse("minibatch_features", f"be none with --arch {c.arch}, whose critic gives no score", c.minibatch_features)
    if c.virtual_batch_norm and (c.arch in _NO_NORM or (c.arch in _MLPS and c.g_norm == "none")):
        _refuse("virtual_batch_norm", f"be False with --arch {c.arch} and --g-norm {c.g_norm}: no BatchNorm in the generator", True)
    if c.virtual_batch_norm and c.batch_size == 1:
        _refuse("batch_size", "be >= 2 with --virtual-batch-norm", 1)
    if c.pack > 1 and c.arch in ("cgan", "cdcgan", "acgan"):
        _refuse("pack", f"be 1 with --arch {c.arch}, whose discriminator is told one class a sample", c.pack)
    if c.pack > 1 and c.arch in ("autoencoder", "conv-autoencoder"):
        _refuse("pack", f"be 1 with --arch {c.arch}, whose critic reconstructs each sample", c.pack)
    if c.batch_size % c.pack:
        _refuse("batch_size", f"be a multiple of pack ({c.pack})", c.batch_size)


def idle(c: TrainConfig) -> dict[str, str]:
    """The settings that change nothing beside the others, each with the reason, in words that follow "must be left out"."""
    found = {
        field: f"with --arch {c.arch}, whose networks do not have it" for field, archs in _SHAPES.items() if c.arch not in archs
    }
    if c.d_norm != "batch" and (c.virtual_batch_norm or c.arch in _NO_NORM or (c.arch in _MLPS and c.g_norm == "none")):
        found["sync_batch_norm"] = f"with --arch {c.arch}, whose networks have no BatchNorm here"
    optimizers = [c.optimizer_g, c.optimizer_d]
    if c.loss == "mmd":
        of_critic = _OF_CRITIC if c.arch in _MLPS else (*_OF_CRITIC, "negative_slope")
        found |= dict.fromkeys(of_critic, "with --loss mmd, which has no critic")
        optimizers.pop()
    if c.reconstruction:
        for field in _OF_ENCODER[c.arch in _CONVOLUTIONS]:
            found.pop(field, None)
    for fields, used, without in (
        (("margin", "pulling_away_weight"), c.loss == "ebgan", "--loss ebgan"),
        (("began_gamma", "began_lambda"), c.loss == "began", "--loss began"),
        (("mmd_bandwidths",), c.loss in ("mmd", "mmd-gan"), "--loss mmd or mmd-gan"),
        (("mmd_root",), c.loss == "mmd", "--loss mmd"),
        (("mmd_reconstruction",), c.loss == "mmd-gan" and c.arch in _AUTOENCODERS, "--loss mmd-gan and an auto-encoder"),
        (("class_weight",), c.arch == "acgan", "--arch acgan"),
        (("penalty_weight",), c.penalty != "none", "--penalty"),
        (("reconstruct",), c.reconstruction > 0, "--reconstruction"),
        (("instance_noise_steps",), c.instance_noise > 0, "--instance-noise"),
        (("sample_dropout",), c.g_dropout > 0, "--g-dropout"),
        (("momentum",), "sgd" in optimizers, "an optimiser sgd"),
        (("beta1", "beta2"), "adam" in optimizers, "an optimiser adam"),
        (("ema_warmup",), c.ema > 0, "--ema"),
        (("metric_every", "metric_samples", "metric_budget"), bool(c.metrics), "--metrics"),
        (("stop_after",), bool(c.keep_best), "--keep-best"),
    ):
        if not used:
            found |= dict.fromkeys(fields, f"without {without}")
    for field, other in (("lr_d", "ttur"), ("label_smoothing", "real_label_range"), ("fake_label", "fake_label_range")):
        if getattr(c, other):
            found[field] = f"with --{other.replace('_', '-')}, which takes its place"
    if c.objective in OBJECTIVES and OBJECTIVES[c.objective].fake is None and not c.label_noise:
        found |= dict.fromkeys(("fake_label", "fake_label_range"), f"with --loss {c.loss}, whose pairs have one target")
    return found


def _check_techniques(c: TrainConfig) -> None:
    from gankern.training.networks import CONDITIONAL

    features = c.feature_matching or c.generator_loss == "matching"
    field = "feature_matching" if c.feature_matching else "generator_loss"
    if features and c.objective not in OBJECTIVES:
        _refuse(field, f"be left out with --loss {c.loss}, whose critic gives no logits", getattr(c, field))
    if c.feature_matching and c.generator_loss == "matching":
        _refuse("feature_matching", "be 0 with --generator-loss matching, which is the same term alone", c.feature_matching)
    if c.generator_loss == "matching" and c.arch == "acgan":
        _refuse("generator_loss", "be another with --arch acgan, whose generator learns the classes too", c.generator_loss)
    for field in ("replay", "reconstruction"):
        if getattr(c, field) and c.arch in CONDITIONAL:
            _refuse(field, f"be 0 with --arch {c.arch}, whose fakes have classes", getattr(c, field))
    if c.kl and not c.reconstruction:
        _refuse("kl", "be 0 with --reconstruction 0, which leaves no encoder", c.kl)
    if c.kl and c.latent != "normal":
        _refuse("latent", "be normal with --kl, the divergence from N(0, 1)", c.latent)
    if c.reconstruction and c.reconstruct == "features" and c.objective not in OBJECTIVES:
        _refuse("reconstruct", f"be pixels with --loss {c.loss}, whose critic gives no logits", c.reconstruct)
    if c.replay and c.replay < c.batch_size // 2:
        _refuse("replay", f"be >= {c.batch_size // 2}, half of --batch-size", c.replay)
    if c.unroll:
        for other, met, why in (
            ("--loss mmd", c.loss == "mmd", "has no critic"),
            ("--loss began", c.loss == "began", "moves its k at each pass"),
            ("--generator-loss matching", c.generator_loss == "matching", "takes the critic as it is"),
            ("--clip-gradients", c.clip_gradients, "is no part of the unrolled updates"),
            ("--historical-averaging", c.historical_averaging, "is no part of the unrolled updates"),
        ):
            if met:
                _refuse("unroll", f"be 0 with {other}, which {why}", c.unroll)


def _check_labels(c: TrainConfig) -> None:
    """A term is linear in its target, or quadratic: a drawn target's expected gradient is that of its mean."""
    for field in ("real_label_range", "fake_label_range"):
        ends = getattr(c, field)
        if ends and not _has_targets(c.objective):
            _refuse(field, f"be left out with --loss {c.loss}, which has no targets", ends)
        if ends and "lsgan" not in c.loss and not 0.0 <= sum(ends) / 2 <= 1.0:
            _refuse(field, f"have its middle in [0, 1] with --loss {c.loss}, which falls without bound else", ends)
    if c.label_noise and c.objective not in OBJECTIVES:
        _refuse("label_noise", f"be 0 with --loss {c.loss}, which has no targets", c.label_noise)


def _has_targets(objective: str) -> bool:
    """Whether the critic aims at a value of its own for real and for fake samples: cross entropies and squares."""
    return objective in OBJECTIVES and OBJECTIVES[objective].real.term in ("bce", "jensen-shannon", "square", "square-sides")


def _refuse(field: str, wanted: str, got: object) -> None:
    checks.fail(ValueError, OP, field, wanted, got)
