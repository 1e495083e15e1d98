"""Packed data sets (CIFAR, MNIST), unpacked once into a file that all runs of a machine map into
memory.

It lies in the folder of `hybridvit.data.cache`, under a hash of the bytes of the packed files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybridvit.data import cache, files

FORMAT = 1
NAMES = ("images", "labels", "test_images", "test_labels")


class Arrays(NamedTuple):
    """All images (N, C, H, W) uint8 and labels (N,) int64 of both splits."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


def load(name: str, packed: Sequence[Path], read: Callable[[], Arrays]) -> Arrays:
    """What `read` makes of a data set's packed files, from a file that is made where there is none.

    Where a packed file is absent or cannot be read, `read` has the word: it may download them, or
    say what is wrong.

    Args:
        packed: all that is read, always in the same order.

    Raises:
        ValueError: of `read`.
    """
    path = _place(name, packed)
    if path is None:
        return read()
    kept = _read(path)
    if kept is None:
        kept = read()
        if _place(name, packed) == path and _write(path, kept):  # they did not change meanwhile
            kept = _read(path) or kept
    return kept


def _place(name: str, packed: Sequence[Path]) -> Path | None:
    root, paths = cache.folder(), [str(path) for path in packed]
    if root is None or not all(map(os.path.isfile, paths)):
        return None
    try:
        key = cache.key(root, f"{name} {FORMAT}", paths, files.digest, files.stamp)
    except OSError:
        return None
    return root / f"{key}.arrays"


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
    except (OSError, RuntimeError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if any(said.get(name) != _checksum(tensor) for name, tensor in tensors.items()):
        return None
    images, labels, test_images, test_labels = tensors.values()
    return Arrays((images, labels), (test_images, test_labels), classes)


def _checksum(tensor: Tensor) -> str:
    return str(zlib.crc32(tensor.view(torch.uint8).numpy().data))
