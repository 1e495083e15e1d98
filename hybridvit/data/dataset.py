"""What a data set is, and how one is made of arrays or of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridvit.contracts import DataSpec
from hybridvit.data.decode import Choice, Decoder, choose, decode, record
from hybridvit.data.files import ImageFiles, absolute, some
from hybridvit.data.splits import CHUNK, ArraySplit, DecodedSplit, Split, split_validation

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STATISTICS_FILES = 1000  # up to here, all image files are decoded for their mean and deviation
MAX_IMAGE_SIZE = 4096  # pixels a side
TEST_FRACTION = 0.2  # held out where a set has no test split of its own

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


class AbsentData(ValueError):
    """A data set is not where it was looked for."""


@dataclass
class Dataset:
    """A data set with its own train and test split; validation is split off `train` later."""

    name: str
    train: Split
    test: Split
    classes: list[str]
    channels: int  # 1 for grey
    image_size: tuple[int, int]  # (H, W) as read from the splits
    mean: tuple[float, float, float]  # of the training images in [0, 1]; grey repeated
    std: tuple[float, float, float]
    notes: list[str] = field(default_factory=list)  # decisions to tell the user
    decoder: str | None = None  # of image files, with its version

    def check_labels(self) -> None:
        """See whether all labels are places in the classes.

        Raises:
            ValueError: one is not.
        """
        for part, split in (("training", self.train), ("test", self.test)):
            if not len(split):
                continue
            least, most = (int(end) for end in split.labels.aminmax())
            if least < 0 or most >= len(self.classes):
                raise ValueError(
                    f"data set {self.name}: {part} labels are {least} to {most}, and should be 0 "
                    f"to {len(self.classes) - 1}, places in its {len(self.classes)} classes; mend "
                    "its label files, or name all of its classes"
                )

    def spec(self) -> DataSpec:
        """What an objective may know of it."""
        return DataSpec(len(self.classes), self.image_size, self.channels, self.mean, self.std)


def from_arrays(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: list[str],
    image_size: int | None,
    notes: list[str] | None = None,
) -> Dataset:
    """A data set of (images (N, C, H, W) uint8, labels (N,)); statistics at its own size.

    Raises:
        ValueError: the image size is not possible.
    """
    size = check_image_size(image_size) if image_size is not None else None
    split, test_split = ArraySplit(*train, size), ArraySplit(*test, size)
    mean, std = _statistics(torch.split(train[0], CHUNK))
    return Dataset(
        name, split, test_split, classes, split.channels, split.size, mean, std, notes or []
    )


def from_files(
    name: str,
    train: tuple[ImageFiles, Tensor],
    test: tuple[ImageFiles, Tensor],
    classes: list[str],
    channels: int,
    image_size: int,
    decoder: Choice,
    notes: list[str] | None = None,
) -> Dataset:
    """A data set of image files and labels (N,).

    Its mean and deviation are those of the training images as read where these are few, else
    ImageNet's, because computing them would decode every image at each start.

    Raises:
        ValueError: the image size is not possible, the decoder is not installed, or an image
            cannot be decoded.
    """
    size, chosen = check_image_size(image_size), choose(decoder)

    splits = [
        # Not a closure, which could not be sent to workers.
        DecodedSplit(
            partial(_read, files, chosen, size, channels),
            labels,
            size,
            channels,
            files.identify,
            partial(_version, files, record(chosen)),
            partial(_stamp, files, record(chosen)),
        )
        for files, labels in (train, test)
    ]
    notes = list(notes or [])
    if len(splits[0]) <= STATISTICS_FILES:
        mean, std = _statistics(splits[0].read_many([i]) for i in range(len(splits[0])))
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes.append(f"mean and std are ImageNet's: {len(splits[0])} images are too many to decode")
    return Dataset(
        name, splits[0], splits[1], classes, channels, size, mean, std, notes, record(chosen)
    )


def hold_out(labels: Tensor, classes: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Positions (train, test) for a set without a test split, and notes that say so."""
    train, test = split_validation(labels, TEST_FRACTION)
    notes = [f"no test split of its own: {len(test)} of {len(labels)} images are held out by class"]
    tested = set(labels[test].tolist())
    if untested := [name for label, name in enumerate(classes) if label not in tested]:
        notes.append(f"classes of too few images for a test image: {some(untested)}")
    return train, test, notes


def data_root(root: str | None) -> Path:
    """The folder given, else the environment variable HYBRIDVIT_DATA, else `data`, absolute."""
    if root:
        return absolute(root, "data.args.root")
    return absolute(os.environ.get("HYBRIDVIT_DATA") or "data", "HYBRIDVIT_DATA")


def check_image_size(image_size: int) -> tuple[int, int]:
    """(H, W) of square images.

    Raises:
        ValueError: not 1 to 4096 pixels.
    """
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(
            f"image_size={image_size} should be 1 to {MAX_IMAGE_SIZE} pixels, e.g. 224 "
            "(data.args.image_size)"
        )
    return image_size, image_size


def _read(
    files: ImageFiles, decoder: Decoder, size: tuple[int, int], channels: int, i: int
) -> Image.Image | Tensor:
    return decode(files.paths[i], decoder, size, channels)


def _version(files: ImageFiles, decoder: str, i: int) -> str:
    return f"{decoder} {files.digest(i)}"


def _stamp(files: ImageFiles, decoder: str, i: int) -> str | None:
    stamp = files.stamp(i)
    return None if stamp is None else f"{decoder} {stamp}"


def _statistics(batches: Iterable[Tensor]) -> Statistics:
    """Mean and deviation per channel of uint8 images in [0, 1], exact: sums are of integers."""
    value = torch.arange(256)
    histogram = sum(
        torch.stack([torch.bincount(c.flatten(), minlength=256) for c in batch.unbind(1)])
        for batch in batches
    )
    assert isinstance(histogram, Tensor)  # at least one image
    count = histogram.sum(1).double()  # (C,)
    mean = (histogram * value).sum(1).double() / count
    variance = (histogram * value**2).sum(1).double() / count - mean**2
    # A constant channel has no deviation to divide by; one grey level keeps it finite.
    std = variance.clamp_min(1.0).sqrt()
    means, stds = ((v.expand(3) / 255).tolist() for v in (mean, std))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
