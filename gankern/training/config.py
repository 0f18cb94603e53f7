"""TrainConfig: every setting of a training run. Its fields, types, defaults and docstrings are the flags of gankern-train."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gankern import checks
from gankern.losses.variants import variant
from gankern.metrics.evaluation import LEAST
from gankern.ops._objectives import OBJECTIVES
from gankern.ops.pairwise import MOST_SIGMAS
from gankern.training import combinations

OP = "train"

if TYPE_CHECKING:
    Loss = str
else:
    Loss = Literal[(*OBJECTIVES, "ebgan", "began", "mmd", "mmd-gan")]

MOST, MOST_LAYERS = 2**62, 1000
# What a resumed run may set anew: none of these changes a weight, and steps only says where to stop.
MAY_CHANGE = frozenset(
    {"outdir", "steps", "device", "engine", "log_every", "sample_every", "checkpoint_every", "keep", "track", "resume", "dry_run"}
    | {
        "health_every",
        "rollbacks",
        "report",
        "metrics",
        "metric_every",
        "metric_samples",
        "metric_budget",
        "keep_best",
        "stop_after",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Raises:
        ValueError, TypeError: a field out of its range, in one sentence that names it.
    """

    data: str = "mnist"
    """Training data: "mnist" (bundled), "stacked-mnist" (of three digits in colour), a folder of pictures, an IDX file, a .npz/.npy
    array of images, a .npz/.npy/.csv table of numbers, or points in the plane: ring, grid, unrolled-ring, 8gaussians, 25gaussians,
    swissroll."""
    outdir: str = "runs"
    """Folder under which the run gets a directory of its own."""
    steps: int = 12000
    """Training steps in all; one step updates the discriminator n_critic times and then the generator once."""
    batch_size: int = 64
    """Real samples an update of the discriminator, and as many generated ones."""
    seed: int = 0
    """Seed of initial weights, generated data, data order, noise and dropout."""
    device: str = "auto"
    """auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1 ..."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32 (exact), tf32 (float32 with tensor-core products, CUDA only), or bf16 (autocast, weights stay float32)."""
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    """eager (one call after another), graph (CUDA: the whole step captured once and replayed), compile (torch.compile of the
    networks), or auto: graph where it can be had, else eager."""
    checkpoint_every: int = 5000
    """Steps between checkpoints; the last step and Ctrl-C always save one. 0: only those."""
    sample_every: int = 1000
    """Steps between pictures of generated samples. 0: only before the first and after the last step."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    log_gradients: bool = False
    """Write the norms of both networks' gradients into log.jsonl too."""
    health_every: int = 500
    """Steps between looks at the run's health: a critic too strong, a generator that stands still, a vanishing gradient, mode
    collapse and oscillation are told, each with what to try. 0: none."""
    rollbacks: int = 3
    """Times that a run whose losses are not finite any more goes back to the state of its last look, picture or checkpoint, and on
    with other noise, before it stops. 0: it stops at once."""
    keep: int = 2
    """Newest checkpoints kept. 0: all."""
    track: Literal["tensorboard", "wandb", "both", "none"] = "tensorboard"
    """Where all that is logged and drawn is shown too: tensorboard (event files in the run directory), wandb (Weights & Biases, an
    extra package; with WANDB_MODE=offline into the run directory only), both, or none."""
    resume: str = "never"
    """never; auto (continue the newest run of this preset and data under the outdir, if any); or a run directory or checkpoint."""
    dry_run: bool = False
    """Print settings, models, device and backends, then stop. Writes nothing."""

    report: bool = True
    """Write report.html when the run has ended: samples over time, curves, settings; also by gankern report."""
    metrics: str = ""
    """Metrics to take of samples (of the averaged weights with --ema) while training, such as fid,kid,1nn: of fid, kid, 1nn, prdc,
    wasserstein; modes (mixtures, digits); is, mode-score (mnist). Images are seen through the bundled digit classifier."""
    metric_every: int = 1000
    """Steps between two looks of the metrics; the last step has one too."""
    metric_samples: int = 2000
    """Real and generated samples that they compare, fewer if there are fewer real ones."""
    metric_budget: float = 0.1
    """Most that the metrics may take, as a share of the time of the training: a look that would exceed it is left out, but for the
    first and the last. 0: no bound."""
    keep_best: str = ""
    """Keep the checkpoint that is best by this one of the metrics too; RUN/best names it."""
    stop_after: int = 0
    """End the training after so many looks in which the metric of keep_best has not improved. 0: never."""

    size: int = 0
    """Side of the square training images. 0: as the data are."""
    channels: Literal[0, 1, 3] = 0
    """1 (grey) or 3 (colour). 0: as the data are."""
    limit: int = 0
    """Use only the first so many samples of the data. 0: all."""

    loss: Loss = "non-saturating"
    """What critic and generator minimise; `gankern explain NAME` has the equations and the values to expect."""
    generator_loss: Literal["default", "saturating", "non-saturating", "max-likelihood", "matching"] = "default"
    """The generator's side, for the losses that have several: those of Goodfellow et al. and the f-divergences; or matching, of the
    critic's mean features alone."""
    margin: float = 1.0
    """The energy up to which ebgan's critic pushes generated samples: a mean squared error of the reconstruction."""
    pulling_away_weight: float = 0.1
    """Weight of the pulling-away term in ebgan's generator loss, which keeps the samples' codes apart. 0: off."""
    began_gamma: float = 0.5
    """The ratio of the energies of generated and real samples that began keeps; lower is less varied."""
    began_lambda: float = 0.001
    """Rate at which began's k follows that ratio."""
    mmd_bandwidths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """Widths sigma of the Gaussian kernels whose sum mmd and mmd-gan take."""
    mmd_root: bool = False
    """Minimise MMD instead of its square with --loss mmd: its gradient does not fade as the samples come close."""
    mmd_reconstruction: float = 8.0
    """Weight of the reconstruction error in mmd-gan's critic loss, where the critic is an auto-encoder."""
    class_weight: float = 1.0
    """Weight of the cross entropy of the classes in both losses of acgan."""
    label_smoothing: float = 1.0
    """The discriminator's target for real images; 0.9 is one-sided label smoothing."""
    fake_label: float = 0.0
    """The discriminator's target for generated images."""
    real_label_range: tuple[float, ...] = ()
    """Draw each real image's target anew at each update, uniformly between these two numbers, such as 0.7 1.2. Nothing: off."""
    fake_label_range: tuple[float, ...] = ()
    """The same for generated images, such as 0 0.3. Nothing: off."""
    label_noise: float = 0.0
    """Probability that an image gets the target of the other kind, at each update of the discriminator. 0: off."""
    n_critic: int = 1
    """Updates of the discriminator a step, each with a batch of its own."""
    penalty: Literal["none", "gp", "lp", "0gp", "dragan", "r1", "r2", "r1r2"] = "none"
    """Penalty on the norm of the discriminator's input gradient: gp (WGAN-GP), lp (one-sided), 0gp, dragan, r1, r2, or
    r1r2 (both)."""
    penalty_weight: float = 10.0
    """Weight of the penalty: lambda; for r1, r2 and each of r1r2 gamma / 2."""
    spectral_norm: bool = False
    """Divide each weight of the discriminator by its largest singular value (SN-GAN)."""
    spectral_norm_g: bool = False
    """The same for the generator (SAGAN)."""
    clip_weights: float = 0.0
    """Clip the discriminator's weights to [-c, c] after each of its updates; 0.01 is that of WGAN. 0: off."""
    clip_gradients: float = 0.0
    """Scale each network's gradient down to this norm where it is longer. 0: off."""

    replay: int = 0
    """Size of a buffer of earlier generated images, from which half of those of each discriminator's update come. 0: off."""
    feature_matching: float = 0.0
    """Weight of the distance of the discriminator's mean features in the generator's loss. 0: off."""
    historical_averaging: float = 0.0
    """Weight of each network's squared distance from the mean of its past parameters. 0: off."""
    reconstruction: float = 0.0
    """VAE-GAN: weight of the squared error of real images after an encoder and the generator, in the generator's loss. 0: off."""
    reconstruct: Literal["pixels", "features"] = "pixels"
    """Of what that error is: the image, or what the discriminator's last layer takes."""
    kl: float = 0.0
    """VAE-GAN: weight of the Kullback-Leibler divergence of the encoder's latent law from N(0, 1)."""
    unroll: int = 0
    """Updates of the discriminator through which the generator's gradient goes (unrolled GAN); 5 to 10 are usual. 0: off."""
    instance_noise: float = 0.0
    """Standard deviation of the noise that is added to all that the discriminator sees. 0: off."""
    instance_noise_steps: int = 0
    """Steps over which that noise fades to 0. 0: it stays."""

    arch: Literal[
        "mlp",
        "dcgan",
        "sngan",
        "resnet",
        "cgan",
        "cdcgan",
        "acgan",
        "autoencoder",
        "conv-autoencoder",
        "tabular",
        "pacgan-toy",
        "unrolled-toy",
        "wgan-gp-toy",
    ] = "mlp"
    """The two networks: mlp; dcgan (Radford et al.); sngan and resnet (the standard CNN and the ResNet of Miyato et al.); cgan
    and cdcgan (MLPs and DCGAN with labels); acgan (the discriminator tells the class too); autoencoder and conv-autoencoder (the
    critic of EBGAN and BEGAN); tabular (those of CTGAN); and those of the 2-D experiments of three papers."""
    conv_width: int = 64
    """Channels of the widest image layer of convolutional networks."""
    d_conv_width: int = 0
    """The same for the discriminator of dcgan alone. 0: conv_width."""
    upsample: Literal["transposed", "shuffle", "nearest"] = "transposed"
    """How a stage of dcgan's generator doubles the side: transposed convolution, PixelShuffle, or nearest neighbours."""
    downsample: Literal["stride", "pool"] = "stride"
    """How a stage of dcgan's discriminator halves the side: stride 2, or average pooling."""
    code: int = 64
    """Length of an auto-encoder's code."""
    d_norm: Literal["none", "batch", "layer"] = "none"
    """Normalisation in the discriminator: none; BatchNorm but for the first layer (dcgan, cdcgan, acgan); layer norm (resnet)."""
    minibatch_features: Literal["none", "discrimination", "distance", "stddev"] = "none"
    """What the discriminator's last layer is told of the whole batch: learned closeness (Salimans et al.), the mean squared
    distance, or the standard deviation (Karras et al.)."""
    virtual_batch_norm: bool = False
    """Take the statistics of the generator's BatchNorm from a fixed batch of latent vectors and the sample itself."""
    pack: int = 1
    """Samples that the discriminator judges together (PacGAN)."""
    z_dim: int = 100
    """Entries of the latent vector z."""
    latent: Literal["normal", "uniform"] = "normal"
    """Law of z: N(0, 1) or U(-1, 1)."""
    g_widths: tuple[int, ...] = (256, 512, 1024)
    """Hidden layers of the generator, from z to the image."""
    g_norm: Literal["none", "batch"] = "none"
    """Normalisation in the generator: none, or BatchNorm before each activation."""
    g_dropout: float = 0.0
    """Dropout in the generator's hidden layers."""
    sample_dropout: bool = False
    """Keep the generator's dropout when samples are drawn, in pictures and by gankern sample."""
    d_widths: tuple[int, ...] = (1024, 512, 256)
    """Hidden layers of the discriminator, from the image to the score."""
    d_dropout: float = 0.0
    """Dropout in the discriminator's hidden layers."""
    negative_slope: float = 0.2
    """Slope of LeakyReLU for negative inputs."""

    optimizer_d: Literal["adam", "sgd", "rmsprop"] = "adam"
    """Optimiser of the discriminator."""
    optimizer_g: Literal["adam", "sgd", "rmsprop"] = "adam"
    """Optimiser of the generator."""
    lr_g: float = 2e-4
    """Learning rate of the generator."""
    lr_d: float = 2e-4
    """Learning rate of the discriminator."""
    ttur: float = 0.0
    """Learning rate of the discriminator as a multiple of lr_g, in place of lr_d: the two time-scale update rule. 0: lr_d."""
    beta1: float = 0.5
    """Adam's first decay rate, for both."""
    beta2: float = 0.999
    """Adam's second decay rate, for both."""
    momentum: float = 0.0
    """Momentum of sgd."""
    ema: float = 0.0
    """Decay of the running average of the generator's weights, which the pictures then show; 0.999 is usual. 0: off."""
    ema_warmup: bool = True
    """Average less over the first steps: decay min(ema, (1 + step) / (10 + step))."""

    def __post_init__(self) -> None:
        for field, kind in typing.get_type_hints(type(self)).items():
            _check_type(field, getattr(self, field), kind)
        if not self.data:
            checks.fail(ValueError, OP, "data", "name a source", "nothing")
        for field in ("steps", "batch_size", "log_every", "z_dim", "n_critic", "conv_width", "code", "pack"):
            checks.number(OP, field, getattr(self, field), 1)
        for field in (
            "d_conv_width",
            "checkpoint_every",
            "sample_every",
            "health_every",
            "rollbacks",
            "keep",
            "metric_every",
            "metric_budget",
            "stop_after",
            "size",
            "limit",
            "negative_slope",
            "lr_g",
            "lr_d",
            "ttur",
            "momentum",
            "unroll",
            "replay",
            "reconstruction",
            "kl",
            "feature_matching",
            "historical_averaging",
            "penalty_weight",
            "margin",
            "pulling_away_weight",
            "began_lambda",
            "mmd_reconstruction",
            "class_weight",
            "clip_weights",
            "clip_gradients",
            "instance_noise",
            "instance_noise_steps",
        ):
            checks.number(OP, field, getattr(self, field), 0)
        checks.number(OP, "metric_samples", self.metric_samples, LEAST)
        checks.number(OP, "seed", self.seed, 0, MOST)
        for field in ("label_smoothing", "fake_label", "label_noise", "g_dropout", "d_dropout", "began_gamma"):
            checks.number(OP, field, getattr(self, field), 0.0, 1.0)
        for field in ("real_label_range", "fake_label_range"):
            value = getattr(self, field)
            if value and (len(value) != 2 or not value[0] <= value[1]):
                checks.fail(ValueError, OP, field, "be two numbers, the smaller one first, or nothing", value)
        for field in ("beta1", "beta2", "ema"):
            value = getattr(self, field)
            if not 0.0 <= value < 1.0:
                checks.fail(ValueError, OP, field, "be in [0, 1)", value)
        for field in ("g_widths", "d_widths"):
            if any(width < 1 for width in getattr(self, field)):
                checks.fail(ValueError, OP, field, "have widths >= 1", getattr(self, field))
            if len(getattr(self, field)) > MOST_LAYERS:
                checks.fail(ValueError, OP, field, f"be of at most {MOST_LAYERS} layers", len(getattr(self, field)))
        if not 1 <= len(self.mmd_bandwidths) <= MOST_SIGMAS or not all(math.isfinite(s) and s > 0 for s in self.mmd_bandwidths):
            checks.fail(ValueError, OP, "mmd_bandwidths", f"be 1 to {MOST_SIGMAS} numbers > 0", self.mmd_bandwidths)
        combinations.check(self)

    @property
    def objective(self) -> str:
        """The row of gankern.gan_loss's table that `loss` and `generator_loss` name together; a loss that is none of it, itself."""
        return variant(self.loss, self.generator_loss)

    @property
    def rate_d(self) -> float:
        """The discriminator's learning rate (Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017)."""
        return self.ttur * self.lr_g if self.ttur else self.lr_d

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: object, source: str = OP) -> TrainConfig:
        """The inverse of `to_json` after a trip through JSON; `source` opens the sentence of a refusal.

        Raises:
            ValueError: `values` is not an object with fields of this class, or a field has another type or range.
        """
        if not isinstance(values, dict):
            checks.fail(ValueError, source, "settings", "be an object", type(values).__name__)
        unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            checks.fail(ValueError, source, "settings", "have known fields only", ", ".join(unknown))
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    def differences(self, other: TrainConfig) -> list[str]:
        """Fields outside MAY_CHANGE in which `other` differs, in words: "batch_size (64, now 32)"."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in MAY_CHANGE]
        return [f"{n} ({getattr(self, n)}, now {getattr(other, n)})" for n in names if getattr(self, n) != getattr(other, n)]


def _check_type(field: str, value: object, kind: Any) -> None:
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, int) and abs(v) > MOST:
            checks.fail(ValueError, OP, field, f"be in [-2^{MOST.bit_length() - 1}, 2^{MOST.bit_length() - 1}]", "more")
    origin = typing.get_origin(kind)
    if origin is Literal:
        checks.one_of(OP, field, value, typing.get_args(kind))
    elif origin is tuple:
        of = typing.get_args(kind)[0]
        if not isinstance(value, tuple) or any(type(v) not in (of, int) for v in value):
            checks.fail(TypeError, OP, field, f"be a tuple of {of.__name__}s", repr(value))
    elif kind is float:
        checks.number(OP, field, value, float("-inf"))  # type: ignore[arg-type]
    elif type(value) is not kind:
        checks.fail(TypeError, OP, field, f"be of type {kind.__name__}", repr(value))
