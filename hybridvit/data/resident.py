"""Small sets decoded once and kept on the device: no workers, augmented in batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from hybridvit.data.splits import Split

LIMIT_BYTES = 2**30
_CHUNK = 256  # images decoded by one thread at a time


class Resident:
    """All images of a split as one uint8 tensor on the device.

    Raises:
        ValueError: an image cannot be decoded; the message names its file.
    """

    def __init__(self, split: Split, device: torch.device | str, progress: bool) -> None:
        from tqdm import tqdm

        shape = (len(split), split.channels, *split.size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)  # (N, C, H, W)
        self.labels = split.labels.to(device)  # (N,)
        self.index = split.index.to(device)  # (N,)
        chunks = [range(n, min(n + _CHUNK, len(split))) for n in range(0, len(split), _CHUNK)]
        # PIL releases the interpreter while it decodes. The bar waits, because arrays take no time.
        bar = tqdm(total=len(split), desc="decode", unit="image", delay=1, disable=not progress)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for chunk, images in zip(chunks, pool.map(split.read_many, chunks), strict=True):
                self.images[chunk.start : chunk.stop] = images.to(device)
                bar.update(len(chunk))

    def __len__(self) -> int:
        return len(self.labels)


def fits(split: Split) -> bool:
    """Whether the decoded split takes at most 1 GiB."""
    return len(split) * split.channels * split.size[0] * split.size[1] <= LIMIT_BYTES
