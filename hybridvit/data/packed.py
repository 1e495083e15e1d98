"""Packed data sets (CIFAR, MNIST), unpacked once into a file that all runs of a machine map into
memory.

It lies in the folder of `hybridvit.data.cache`, under a hash of the bytes of the packed files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybridvit.data import cache
from hybridvit.data.files import ImageFiles

FORMAT = 1
NAMES = ("images", "labels", "test_images", "test_labels")


class Arrays(NamedTuple):
    """All images (N, C, H, W) uint8 and labels (N,) int64 of both splits."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


def load(name: str, files: ImageFiles, read: Callable[[], Arrays]) -> Arrays:
    """What `read` makes of a data set's packed files, from a file that is made where there is none.

    Processes that start together wait for the one that reads. Where no packed file is there yet,
    or none can be made of them, it is read all the same.

    Raises:
        ValueError: of `read`, or a file cannot be read.
    """
    root = cache.folder()
    if root is None or not files.paths:
        return read()

    def place() -> Path:
        places = range(len(files.paths))
        key = cache.key(root, f"{name} {FORMAT}", places, files.digest, files.stamp)
        return root / f"{key}.arrays"

    path = place()
    kept = _read(path)
    if kept is not None:
        return kept
    with cache.turn(root):
        kept = _read(path)
        if kept is not None:
            return kept
        arrays = read()
        # Not what was downloaded only now, or changed as it was read.
        wrote = place() == path and _write(path, arrays)
    return (_read(path) if wrote else None) or arrays


def _write(path: Path, arrays: Arrays) -> bool:
    from safetensors.torch import save

    tensors = dict(zip(NAMES, (*arrays.train, *arrays.test), strict=True))
    said = {name: _checksum(tensor) for name, tensor in tensors.items()}
    try:
        with cache.replaced(path) as file:
            file.write(save(tensors, {**said, "classes": json.dumps(arrays.classes)}))
    except OSError as error:
        cache.say_not_kept(path, error)
        return False
    return True


def _read(path: Path) -> Arrays | None:
    """The arrays of a file, mapped into memory; None where it is absent or damaged.

    Writing to them changes this process's copy alone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = file.metadata()
            tensors = {name: file.get_tensor(name) for name in NAMES}
            classes = json.loads(said["classes"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if any(said.get(name) != _checksum(tensor) for name, tensor in tensors.items()):
        return None
    images, labels, test_images, test_labels = tensors.values()
    return Arrays((images, labels), (test_images, test_labels), classes)


def _checksum(tensor: Tensor) -> str:
    return str(zlib.crc32(tensor.view(torch.uint8).numpy().data))
