"""The input pipelines of torchvision and timm: PIL images, transforms, two worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any

import torch
from cases import Input
from noise import MEAN, STD, pictures
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from turns import Turns, device, ready

# As ours: two operations on each image, all of one strength. Without mstd, whose noise has timm
# posterize to 0 bits, which Pillow 13 refuses; p1, because ours leaves no operation out by chance.
RANDAUGMENT = "rand-m9-n2-p1-inc1"


def inputs(framework: str, job: Input) -> Turns:
    """Batches of a peer's loader, epoch after epoch."""
    loader, where = LOADERS[framework](job), device()
    batches = chain.from_iterable(repeat(loader))

    def step() -> int:
        images, _ = next(batches)
        return len(images.to(where))

    # Twice what the workers have ready when a turn begins.
    return ready(step, uncounted=4 * job.workers)


class Pictures(Dataset[tuple[Any, int]]):
    """Random images as torchvision's in-memory sets give them: an array each, made a PIL image."""

    def __init__(self, job: Input) -> None:
        pixels, labels = pictures(job.images, job.image)
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[i])
        assert self.transform is not None
        return self.transform(image), self.labels[i]


def torchvision_loader(job: Input) -> Iterable[Any]:
    """torchvision's transforms in a DataLoader."""
    from torchvision import transforms

    assert job.policy == "flip"
    data = Pictures(job)
    data.transform = transforms.Compose(
        [
            transforms.RandomCrop(job.image, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        data,
        batch_size=job.batch,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def timm_loader(job: Input) -> Iterable[Any]:
    """timm's loader, which normalises on the device."""
    from timm.data.loader import create_loader

    assert job.policy == "randaugment"
    data: Any = Pictures(job)
    loader: Iterable[Any] = create_loader(
        data,
        input_size=(3, job.image, job.image),
        batch_size=job.batch,
        is_training=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        auto_augment=RANDAUGMENT,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=job.workers,
        pin_memory=torch.cuda.is_available(),
        device=device(),
    )
    return loader


LOADERS: dict[str, Callable[[Input], Iterable[Any]]] = {
    "torchvision": torchvision_loader,
    "timm": timm_loader,
}
