"""What a checkpoint shows when it is asked: nearest training neighbours, latent interpolation, the critic's scores."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gankern.data import Dataset, to_float
from gankern.metrics import nearest_neighbours
from gankern.models import sample_latent
from gankern.training import checkpoint, pictures
from gankern.training.config import TrainConfig
from gankern.training.presets import PRESETS
from gankern.training.trained import Trained
from gankern.training.trainer import generate
from gankern.training.views import some

SEED = 1  # of the samples: not those of the pictures
SEARCHED = 60_000 * 784  # most numbers of the data that are searched for neighbours
CHUNK = 8192  # samples of the data that are searched at once
COLUMNS, NEAREST, JUDGED = 10, 3, 64  # samples shown with their neighbours, neighbours of each, samples whose distance counts
PATHS, STOPS = 6, 10  # of the interpolation
SCORED = 1 << 18  # numbers in the samples that the critic scores, but 64 to 2000 samples
POINTS = 1000  # of data in the plane, behind the interpolation
GAP = 4  # white pixels between the samples and their neighbours


class Near(NamedTuple):
    """Memorisation: samples against the training data.

    picture: uint8 [H, W, C]: samples in the first row, their nearest training samples below, nearest first. None: no images.
    fake: median distance of samples to the nearest training sample.
    real: the same of training samples to the nearest other one.
    searched: how many of the training data were searched.
    """

    picture: Tensor | None
    fake: float
    real: float
    searched: int


class Scores(NamedTuple):
    """What the critic says of samples: finite numbers [N], [M], and what they are."""

    name: str
    real: Tensor
    fake: Tensor


class Probe(NamedTuple):
    """step, source: of the weights, "ema" or "generator".

    near, scores: None where there is nothing to show. walk: float32 [PATHS, STOPS, *shape], samples between pairs of latents.
    points: of the data, float32 [N, 2]; None where these lie in no plane.
    """

    step: int
    source: str
    near: Near | None
    walk: Tensor
    scores: Scores | None
    points: Tensor | None


def probe(path: Path, dataset: Dataset | None) -> Probe:
    """Ask the newest whole checkpoint of a run, or the one at `path`, on the CPU.

    Args:
        dataset: what the run was trained on; None: it cannot be read any more.

    Raises:
        ValueError: see `Trained`.
    """
    trained = Trained(path)
    near = scores = points = None
    if dataset is not None:
        near, scores = _near(trained, dataset), _scores(trained, dataset)
        points = some(dataset, POINTS) if dataset.shape == (2,) else None
    return Probe(trained.step, trained.source, near, walk(trained), scores, points)


def _near(trained: Trained, dataset: Dataset) -> Near | None:
    fakes = trained.sample(JUDGED, SEED)
    count = min(len(dataset), max(SEARCHED // fakes[0].numel(), NEAREST + 1))
    rows = torch.linspace(0, len(dataset) - 1, count).long()
    if count <= NEAREST or not fakes.isfinite().all():
        return None
    reals = to_float(dataset.samples[rows[torch.linspace(0, count - 1, min(JUDGED, count)).long()]])
    distances, indices = [], []
    for part in rows.split(CHUNK):
        k = min(NEAREST, len(part))
        found = nearest_neighbours(torch.cat([fakes, reals]).flatten(1), to_float(dataset.samples[part]).flatten(1), k)
        distances.append(found.distance)
        indices.append(part[found.indices])
    distance, order = torch.cat(distances, 1).topk(NEAREST, largest=False)
    nearest = torch.cat(indices, 1).gather(1, order)
    picture = None
    if fakes.dim() == 4:
        below = to_float(dataset.samples[nearest[:COLUMNS].T.flatten()])
        top, bottom = (pictures.grid(t, COLUMNS) for t in (fakes[:COLUMNS], below))
        picture = torch.cat([top, torch.full((GAP, *top.shape[1:]), 255, dtype=torch.uint8), bottom])
    return Near(picture, distance[:JUDGED, 0].median().item(), distance[JUDGED:, 1].median().item(), count)


def walk(trained: Trained) -> Tensor:
    """Samples along PATHS ways between two latents each: float32 [PATHS, STOPS, *shape]; one class a way, where there are classes.

    Of normal latents the way is a part of a great circle, else straight (White, "Sampling generative networks", 2016, section 2).
    """
    config, classes = trained.run.config, trained.run.classes
    start, end = sample_latent(2 * PATHS, config.z_dim, config.latent, torch.Generator().manual_seed(SEED)).chunk(2)
    t = torch.linspace(0, 1, STOPS)[:, None]
    if config.latent == "normal":
        cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-0.9999, 0.9999)
        angle = cosine.acos()[:, None, None]
        z = (((1 - t) * angle).sin() * start[:, None] + (t * angle).sin() * end[:, None]) / angle.sin()
    else:
        z = (1 - t) * start[:, None] + t * end[:, None]
    labels = [torch.arange(PATHS).repeat_interleave(STOPS) % classes] if classes else []
    return generate(trained.generator, z.flatten(0, 1), *labels).float().view(PATHS, STOPS, *trained.run.shape)


@torch.no_grad()
def _scores(trained: Trained, dataset: Dataset) -> Scores | None:
    run, config = trained.run, trained.run.config
    if config.loss in ("mmd", "mmd-gan"):  # no critic, or one that scores no sample by itself
        return None
    _, critic = PRESETS[run.preset].build(config, run.shape, run.classes)
    head = "discriminator."
    state = checkpoint.load(trained.path, (head,))
    critic.load_state_dict({key.removeprefix(head): value for key, value in state.items() if key.startswith(head)})
    count = min(len(dataset), 2000, max(64, SCORED // dataset.samples[0].numel()))
    count -= count % config.pack
    rows = torch.linspace(0, len(dataset) - 1, count).long()
    real = [to_float(dataset.samples[rows])]
    fake = [trained.sample(count, SEED)]
    if run.classes and not getattr(critic, "classifies", False):  # one that tells the classes is not told them
        assert dataset.labels is not None
        real.append(dataset.labels[rows])
        fake.append(torch.arange(count) % run.classes)
    found = [_ask(critic.eval(), config, *inputs) for inputs in (real, fake)]
    if any(scores is None or len(scores) == 0 for scores in found):
        return None
    name = "energy: mean squared error of the reconstruction" if config.loss in ("ebgan", "began") else "score C(x)"
    return Scores(name, *found)  # type: ignore[arg-type]


def _ask(critic: nn.Module, config: TrainConfig, *inputs: Tensor) -> Tensor | None:
    """One finite number a sample or pack, float32 [N]; None if the critic gives something else."""
    size = max(config.batch_size - config.batch_size % config.pack, config.pack)
    scores = []
    for part in zip(*(t.split(size) for t in inputs), strict=True):
        out = critic(*part)
        out = out[0] if isinstance(out, tuple) else out
        if out.shape == part[0].shape:
            out = (out - part[0]).square().flatten(1).mean(1)
        if out.numel() != len(part[0]) // config.pack:
            return None
        scores.append(out.flatten().float())
    found = torch.cat(scores) if scores else torch.zeros(0)
    return found[found.isfinite()]
