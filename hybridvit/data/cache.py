"""Decoded images in files that all runs and all ranks of a machine map into memory.

A file holds the pixels of one split and their checksum; its name is a hash of what they were made
of, so that changed images, another size or another decoder mean another file. All may be deleted
at any time. The folder is $HYBRIDVIT_CACHE, else ~/.cache/hybridvit; an empty variable turns the
cache off.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hybridvit.data.splits import DecodedSplit, Split

FORMAT = 1  # of the files, and of how images are resized
CHECKSUM = 4  # bytes at the end


def folder() -> Path | None:
    """Where the files are; None where the cache is off."""
    chosen = os.environ.get("HYBRIDVIT_CACHE", "~/.cache/hybridvit")
    return Path(chosen).expanduser().absolute() if chosen else None


def place(split: Split) -> Path | None:
    """The file of a split's pixels; None for one that is not decoded or not of files."""
    root = folder()
    if root is None or not isinstance(split, DecodedSplit) or split.version is None:
        return None
    digest = hashlib.sha256(f"{FORMAT} {torch.__version__} {shape(split)}\n".encode())
    for i in split.index.tolist():
        digest.update(f"{split.version(i)}\n".encode(errors="surrogateescape"))
    return root / f"{digest.hexdigest()[:32]}.pixels"


def shape(split: Split) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a split's pixels."""
    return (len(split), split.channels, *split.size)


def read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The pixels of a file, mapped into memory; None where it is absent or damaged.

    Writing to them changes this process's copy alone.
    """
    size = math.prod(shape)
    try:
        if path.stat().st_size != size + CHECKSUM:
            return None
        stored = torch.from_file(str(path), shared=False, size=size + CHECKSUM, dtype=torch.uint8)
    except (OSError, RuntimeError):  # torch's error where a file cannot be mapped
        return None
    pixels, checksum = stored[:size], stored[size:]
    found = zlib.crc32(pixels.numpy().data).to_bytes(CHECKSUM, "big")
    return pixels.view(shape) if found == bytes(checksum.tolist()) else None


def write(path: Path, chunks: Iterable[Tensor]) -> bool:
    """Keep the pixels of these images; whether it could be done, else one line says why not.

    Several writers may write the same file at the same time: each renames its own, complete one.

    Raises:
        ValueError: an image cannot be decoded.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary, checksum = file.name, 0
            for images in chunks:
                content = images.contiguous().numpy().data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(checksum.to_bytes(CHECKSUM, "big"))
        os.replace(temporary, path)
    except OSError as error:
        print(
            f"decoded images are not kept: {str(path.parent)!r} ({error.strerror}); free some "
            "space, or set the environment variable HYBRIDVIT_CACHE to another folder",
            file=sys.stderr,
        )
        return False
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return True
