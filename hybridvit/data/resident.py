"""Small sets decoded once and kept on the device: no workers, augmented in batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hybridvit.data import cache
from hybridvit.data.splits import ArraySplit, Split

LIMIT_BYTES = 2**30
_CHUNK = 256  # images decoded by one thread at a time


class Resident:
    """All images of a split as uint8 on the device.

    Images of files are decoded once for all runs on a machine (`hybridvit.data.cache`), those of
    packed files unpacked once (`hybridvit.data.packed`); on a CPU they stay where they are, unless
    they are resized.

    Raises:
        ValueError: an image cannot be decoded; the message names its file.
    """

    def __init__(self, split: Split, device: torch.device | str, progress: bool) -> None:
        self.labels = split.labels.to(device)  # (N,)
        self.index = split.index.to(device)  # (N,)
        in_memory = _in_memory(split, device)
        self._places = None if in_memory is None else self.index
        # (N, C, H, W), or more of which these are some
        self._storage = _kept(split, progress).to(device) if in_memory is None else in_memory

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """(B, C, H, W) at positions in the split, (B,) int64 on the device or a slice."""
        if self._places is not None:
            positions = self._places[positions]
        if isinstance(positions, slice):
            return self._storage[positions]
        return self._storage.index_select(0, positions)


def _in_memory(split: Split, device: torch.device | str) -> Tensor | None:
    """The memory that a split's images lie in as they are read, on this device."""
    if not isinstance(split, ArraySplit) or split.images.device != torch.device(device):
        return None
    return split.images if split.images.shape[-2:] == split.size else None


def stored_bytes(split: Split) -> int:
    """Bytes of a split's decoded images."""
    return math.prod(cache.shape(split))


def fits(split: Split) -> bool:
    """Whether the decoded split takes at most 1 GiB."""
    return stored_bytes(split) <= LIMIT_BYTES


def _kept(split: Split, progress: bool) -> Tensor:
    """(N, C, H, W) uint8, mapped from the cache where there is one."""
    kept = cache.load(split, lambda: _decoded(split, progress))
    if kept is not None:
        return kept
    images, start = torch.empty(cache.shape(split), dtype=torch.uint8), 0
    for chunk in _decoded(split, progress):
        images[start : start + len(chunk)] = chunk
        start += len(chunk)
    return images


def _decoded(split: Split, progress: bool) -> Iterator[Tensor]:
    """All images in order, some at a time."""
    from tqdm import tqdm

    chunks = [range(n, min(n + _CHUNK, len(split))) for n in range(0, len(split), _CHUNK)]
    # Decoders release the interpreter. The bar waits, because arrays take no time.
    bar = tqdm(total=len(split), desc="decode", unit="image", delay=1, disable=not progress)
    with bar, ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        for images in pool.map(split.read_many, chunks):
            yield images
            bar.update(len(images))
