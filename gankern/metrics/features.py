"""What metrics compare: samples seen through a feature network, or as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import checks
from gankern.data.images import to_channels
from gankern.metrics.digits import digit_features
from gankern.metrics.inception import load_inception
from gankern.metrics.programs import SUFFIXES, first_line, load_program

OP = "features"
NAMES = ("pixels", "bundled", "inception")
BATCH = 256  # samples in one pass


class Seen(NamedTuple):
    """Samples as a feature network sees them.

    features: floating [N, D].
    probabilities: of the network's classes, floating [N, K]; K is 0 if it has none.
    """

    features: Tensor
    probabilities: Tensor


class Features:
    """A feature network, or none: samples [N, ...] -> Seen, on `device`.

    Args:
        name: "pixels": the numbers of a sample as they are, of images in [-1, 1].
            "bundled": the digit classifier that comes with the package, on each channel: see `digit_features`. Ten classes, whose
                probabilities are the means over the channels.
            "inception": the network of published figures, its weights named by the variable GANKERN_INCEPTION; grey is repeated.
            A path ending in .pt2 or .onnx: one's own network, a program of torch.export or an ONNX model. It takes float32
            [B, ...], images in [-1, 1], for any B, and returns features [B, ...], or features and the logits of classes [B, K].
            A path ending in .pth: the weights of "inception".
        stacked: with "bundled": each of three channels is a digit, so there are 1000 classes, 100 times the first digit plus 10
            times the second plus the third.
        device: where the network runs and the features are.

    Attributes:
        name: as given.
        note: in words, what is done to the samples.

    Raises:
        ValueError: an unknown name, no such file, a file that is no network, or has more in it than one.
        RuntimeError: a package that the network needs is not installed.
    """

    def __init__(self, name: str, *, stacked: bool = False, device: torch.device | str = "cpu") -> None:
        self.name, self.device, self.path = name, torch.device(device), ""
        self._look: Callable[[Tensor], Any]
        suffix = Path(name).suffix.lower()
        if name == "pixels":
            self.note = "the numbers as they are"
        elif name == "bundled":
            self._look = _stacked_digits if stacked else _digits
            classes = "1000 classes, triples of digits" if stacked else "10 classes, the mean over the channels"
            self.note = f"the digit classifier at 28 pixels on each channel: {classes}"
        elif name == "inception" or suffix == ".pth":
            net = load_inception(None if name == "inception" else name, self.device)
            self._look = lambda images: net(to_channels(images, 3))
            self.note = "Inception-v3 of 2015 at 299 pixels: 2048 features, 1008 classes"
        elif suffix in SUFFIXES:
            if not Path(name).is_file():
                checks.fail(ValueError, OP, "network", "be a file", f"{os.fspath(name)!r}, which is none")
            self._look, self.note, self.path = load_program(Path(name), self.device), f"the network of {name}", name
        else:
            wanted = f"be {', '.join(NAMES)}, or a path ending in {', '.join(SUFFIXES)} or .pth"
            checks.fail(ValueError, OP, "network", wanted, repr(name))

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Seen:
        """See samples [N, ...], floating, N >= 1: images [N, C, H, W] in [-1, 1], C 1 or 3, or for "pixels" anything.

        Raises:
            ValueError, TypeError: samples of another shape or dtype, or that the network of the file cannot take.
        """
        checks.tensor(OP, "samples", samples)
        checks.floating(OP, "samples", samples)
        if len(samples) == 0:
            checks.fail(ValueError, OP, "samples", "hold at least one", "none")
        if self.name == "pixels":
            features = samples.to(self.device).flatten(1)
            return Seen(features, features[:, :0])
        if not self.path and (samples.dim() != 4 or samples.shape[1] not in (1, 3)):
            wanted = f"be images [N, 1 or 3, H, W] for {self.name}"
            checks.fail(ValueError, OP, "samples", wanted, f"shape {list(samples.shape)}")
        parts = [self._pass(part.to(self.device, torch.float32)) for part in samples.split(BATCH)]
        return Seen(*map(torch.cat, zip(*parts, strict=True)))

    def _pass(self, samples: Tensor) -> Seen:
        if not self.path:
            return Seen(*self._look(samples))
        try:
            out = self._look(samples)
        except Exception as error:  # whatever a foreign network raises
            wanted = f"take float32 [B, {', '.join(map(str, samples.shape[1:]))}] for any B"
            checks.fail(ValueError, OP, self.path, wanted, first_line(error))
        outputs = [out] if isinstance(out, Tensor) else list(out.values()) if isinstance(out, dict) else list(out)
        for part in outputs:
            if not isinstance(part, Tensor) or part.dim() < 2 or len(part) != len(samples) or not part.is_floating_point():
                got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                checks.fail(ValueError, OP, self.path, f"return floating [{len(samples)}, ...] for {len(samples)} samples", got)
        if len(outputs) not in (1, 2):
            checks.fail(
                ValueError, OP, self.path, "return features, or features and the logits of classes", f"{len(outputs)} tensors"
            )
        features = outputs[0].flatten(1)
        return Seen(features, outputs[1].flatten(1).softmax(1) if len(outputs) == 2 else features[:, :0])


def _digits(images: Tensor) -> tuple[Tensor, Tensor]:
    """The features, and of the ten digits the mean probabilities over the channels."""
    features, each = digit_features(images)
    return features, each.mean(1)


def _stacked_digits(images: Tensor) -> tuple[Tensor, Tensor]:
    """The features, and the probabilities of 1000 triples of digits."""
    features, each = digit_features(images)
    if each.shape[1] != 3:
        checks.fail(ValueError, OP, "samples", "have three channels, a digit in each", f"shape {list(images.shape)}")
    return features, torch.einsum("ni,nj,nk->nijk", *each.unbind(1)).flatten(1)
