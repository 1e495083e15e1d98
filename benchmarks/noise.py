"""Random images as a data set of hybridvit, so that ours are trained through its public path."""

from __future__ import annotations

import torch

from hybridvit.data.dataset import Dataset, from_arrays
from hybridvit.registry import Parts


def noise(images: int = 256, size: int = 32, classes: int = 10) -> Dataset:
    """Random colour images, the same each time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    names = [str(number) for number in range(classes)]
    return from_arrays("noise", (pixels, labels), (pixels[:2], labels[:2]), names, None)


def register(parts: Parts) -> None:
    """Add the data set to a run's parts: `plugins: ["noise:register"]`."""
    parts.datasets.add("noise", noise)
