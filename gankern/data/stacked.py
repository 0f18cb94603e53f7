"""Stacked MNIST: three digits drawn at random as the channels of one image, a thousand modes."""

from __future__ import annotations

import torch

from gankern.data.dataset import Dataset

COUNT = 60_000


def stacked(digits: Dataset, seed: int, limit: int | None) -> Dataset:
    """[COUNT or limit, 3, 28, 28] uint8 with labels 0 to 999: 100 times the first channel's digit, plus 10 times the second's ...

    Source: Che et al., "Mode regularized generative adversarial networks", ICLR 2017, section 4.1; Metz et al., "Unrolled
    generative adversarial networks", ICLR 2017, section 3.3.1.
    """
    assert digits.labels is not None
    count = min(COUNT, limit or COUNT)
    chosen = torch.randint(len(digits), (COUNT, 3), generator=torch.Generator().manual_seed(seed))[:count]
    labels = digits.labels[chosen] @ torch.tensor([100, 10, 1])
    note = f"{count} random triples of digits by seed {seed}, one a channel"
    return Dataset(digits.samples[chosen, 0], labels, "stacked-mnist", tuple(f"{i:03d}" for i in range(1000)), note=note)
