"""A split of a data set: labels in memory, images read by position as uint8 (C, H, W)."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import draws

if TYPE_CHECKING:
    from PIL import Image

VALIDATION = draws.stream("data.validation")
SAMPLE = draws.stream("data.sample")
CHUNK = 4096  # images hashed at a time


class Split(ABC):
    """Images and labels. A split may select from its storage; `index` says which images it holds.

    Positions count within the split, `index` within the data set's own train or test split.
    """

    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64: place of each image in the storage
    size: tuple[int, int]  # (H, W) of the images read
    channels: int  # 1 or 3

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read_many(self, positions: Sequence[int]) -> Tensor:
        """(B, C, H, W) uint8 images at these positions.

        Raises:
            ValueError: an image cannot be decoded; the message names its file.
        """

    @abstractmethod
    def identity(self) -> Iterator[bytes]:
        """Bytes that change when an image of the split does."""

    def read(self, i: int) -> Tensor:
        """(C, H, W) uint8 image at position i."""
        return self.read_many([i])[0]


AnySplit = TypeVar("AnySplit", bound=Split)


class ArraySplit(Split):
    """Images in memory, (N, C, h, w) uint8, resized when read if `size` is not (h, w)."""

    def __init__(self, images: Tensor, labels: Tensor, size: tuple[int, int] | None = None) -> None:
        if len(images) != len(labels):
            raise ValueError(
                f"{len(images)} images have {len(labels)} labels; each image needs one label"
            )
        self.images = images
        self.labels = labels.long()
        self.index = torch.arange(len(labels))
        self.channels = images.shape[1]
        self.size = size or (images.shape[2], images.shape[3])

    def read_many(self, positions: Sequence[int]) -> Tensor:
        images = self.images[self.index[torch.as_tensor(positions, dtype=torch.int64)]]
        if images.shape[-2:] == self.size:
            return images
        return cover(images, self.size).round().clamp(0, 255).to(torch.uint8)

    def identity(self) -> Iterator[bytes]:
        yield str(tuple(self.images.shape[1:])).encode()
        for index in torch.split(self.index, CHUNK):
            yield self.images[index].numpy().tobytes()


class DecodedSplit(Split):
    """Images decoded each time they are read, by a function of their place in the storage.

    Each image is converted to grey or RGB, resized until it covers `size` (antialiased bilinear)
    and cut to its centre. Transparency is dropped, not blended.

    Args:
        decode: image at a place in the storage: PIL's, or (C, H, W) uint8.
        identify: what names the version of an image in the fingerprint, e.g. path and file size;
            without it the decoded pixels do.
        version: what names all that an image's pixels depend on, for keeping them in a cache;
            without it they are not kept.
        stamp: what is quick to know and changes with the version, None for an image where that is
            not sure; without it the version is always asked for.
    """

    def __init__(
        self,
        decode: Callable[[int], Image.Image | Tensor],
        labels: Tensor,
        size: tuple[int, int],
        channels: int,
        identify: Callable[[int], str] | None = None,
        version: Callable[[int], str] | None = None,
        stamp: Callable[[int], str | None] | None = None,
    ) -> None:
        self.decode = decode
        self.labels = labels.long()
        self.index = torch.arange(len(labels))
        self.size = size
        self.channels = channels
        self.identify = identify
        self.version = version
        self.stamp = stamp

    def read_many(self, positions: Sequence[int]) -> Tensor:
        return torch.stack([self._pixels(int(self.index[i])) for i in positions])

    def identity(self) -> Iterator[bytes]:
        for place in self.index.tolist():
            if self.identify is None:
                yield self._pixels(place).numpy().tobytes()
            else:
                yield f"{self.identify(place)}\n".encode(errors="surrogateescape")

    def _pixels(self, place: int) -> Tensor:
        image = self.decode(place)
        pixels = image if isinstance(image, Tensor) else _from_pil(image, self.channels)
        return cover(pixels[None], self.size, torch.uint8)[0]


def _from_pil(image: Image.Image, channels: int) -> Tensor:
    """(C, H, W) uint8, in memory (H, W, C), which is resized fastest."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when it has to drop a palette's transparency
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def subset(split: AnySplit, indices: Tensor) -> AnySplit:
    """The images at positions `indices`, which keep their `index`; no pixel is copied."""
    part = copy.copy(split)
    part.labels = split.labels[indices]
    part.index = split.index[indices]
    return part


def split_validation(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Positions (train, validation), ascending, with the same fraction of each class.

    The images are chosen by a hash of their position, so the split depends on the labels
    and `fraction` alone; runs that share them share the split. A class gives
    `fraction` of its images, rounded, and keeps at least one for training.

    Raises:
        ValueError: the fraction is outside [0, 1), or above 0 but takes no image.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"a held-out fraction of {fraction} is not possible; use one from 0 up to below 1"
        )
    if fraction == 0:
        return torch.arange(len(labels)), torch.arange(0)
    position = torch.arange(len(labels))
    keys = draws.image_keys(0, torch.zeros_like(position), position)
    shuffled = draws.integers(keys, VALIDATION, 1, 2**62)[:, 0].argsort(stable=True)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within it
    counts = torch.bincount(labels)
    place = position - (counts.cumsum(0) - counts)[labels[grouped]]  # within the class
    taken = (counts.double() * fraction + 0.5).long().minimum(counts - 1)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[grouped] = place < taken[labels[grouped]]
    if not held_out.any():
        raise ValueError(
            f"a held-out fraction of {fraction} takes none of {len(labels)} images in "
            f"{int((counts > 0).sum())} classes; use a larger fraction, or more images a class"
        )
    return position[~held_out], position[held_out]


def sample(n: int, count: int) -> Tensor:
    """Ascending positions of `count` of n images, the same for every run.

    Raises:
        ValueError: more than there are.
    """
    if count > n:
        raise ValueError(
            f"data.train_images={count} is more than the {n} images there are to train on; "
            "use fewer, or null for all"
        )
    key = torch.zeros(1, dtype=torch.int64)
    return draws.permutation(key, SAMPLE, n)[0, :count].sort().values


def fingerprint(split: Split) -> str:
    """SHA-256 over labels and images; over paths and file sizes where images are files."""
    digest = hashlib.sha256(split.labels.numpy().tobytes())
    for part in split.identity():
        digest.update(part)
    return digest.hexdigest()


def cover(images: Tensor, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Images (B, C, H, W) resized, as `dtype`, until they cover `size`, then cut to their centre.

    Images of that size are returned as they are.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = max(size[0] / height, size[1] / width)
    # Not below `size`, which rounding errors of the scale could bring about.
    scaled = [
        max(math.floor(n * scale + 0.5), s) for n, s in zip((height, width), size, strict=True)
    ]
    resized = F.interpolate(
        images.to(dtype), scaled, mode="bilinear", align_corners=False, antialias=True
    )
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return resized[..., top : top + size[0], left : left + size[1]]
