"""Random images: as tensors for the peers, and as a data set of hybridvit for ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a peer's process imports nothing of ours
    from hybridvit.data.dataset import Dataset
    from hybridvit.registry import Parts

MEAN, STD = (0.5,) * 3, (12**-0.5,) * 3  # of uniform noise in [0, 1]


def pictures(images: int, size: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random colour images (N, 3, H, W) uint8 and labels (N,), the same each time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(classes, (images,), generator=generator)


def noise(images: int = 256, size: int = 32, classes: int = 10) -> Dataset:
    """The same images as a data set."""
    from hybridvit.data.dataset import from_arrays

    pixels, labels = pictures(images, size, classes)
    names = [str(number) for number in range(classes)]
    return from_arrays("noise", (pixels, labels), (pixels[:2], labels[:2]), names, None)


def register(parts: Parts) -> None:
    """Add the data set to a run's parts: `plugins: ["noise:register"]`."""
    parts.datasets.add("noise", noise)
