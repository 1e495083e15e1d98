"""Decoded images in files that all runs and all ranks of a machine map into memory.

A file holds the pixels of one split and their checksum. Its name is a hash of what they are made
of (the bytes of the image files in order, the image size, the decoder), so that a copy of a data
set finds the same file, and changed images mean another. A note beside it keeps the name for files
that have not changed, which are then not read again. All may be deleted at any time. The folder is
$HYBRIDVIT_CACHE, else ~/.cache/hybridvit; an empty variable turns the cache off.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor

from hybridvit.data.files import absolute
from hybridvit.data.splits import DecodedSplit, Split

FORMAT = 2  # of the files, and of how images are resized
CHECKSUM = 4  # bytes at the end
Source = TypeVar("Source", int, str)


def folder() -> Path | None:
    """Where the files are; None where the cache is off."""
    chosen = os.environ.get("HYBRIDVIT_CACHE", "~/.cache/hybridvit")
    return absolute(chosen, "HYBRIDVIT_CACHE") if chosen else None


def load(split: Split, decoded: Callable[[], Iterable[Tensor]]) -> Tensor | None:
    """The pixels of a split, mapped into memory, from a file that is made where there is none.

    Processes that start together wait for the one that decodes. None for a split that is not
    kept, or where no file can be made.

    Args:
        decoded: all images in order, some at a time.

    Raises:
        ValueError: an image cannot be read, or changes as they are decoded.
    """
    path = place(split)
    if path is None:
        return None

    def unchanged() -> Iterator[Tensor]:
        yield from decoded()
        if place(split) != path:
            raise ValueError(
                "image files changed while they were decoded; start again once nothing writes to "
                "the data set"
            )

    kept = read(path, shape(split))
    if kept is None:
        with turn(path.parent):
            kept = read(path, shape(split))
            if kept is None and write(path, unchanged()):
                kept = read(path, shape(split))
    return kept


def place(split: Split) -> Path | None:
    """The file of a split's pixels; None for one that is not decoded or not of files.

    Reads all image files, or just their note where `files.stamp` shows no change.

    Raises:
        ValueError: an image file cannot be read.
    """
    root = folder()
    if root is None or not isinstance(split, DecodedSplit) or split.version is None:
        return None
    what = f"{FORMAT} {torch.__version__} {shape(split)}"
    return root / f"{key(root, what, split.index.tolist(), split.version, split.stamp)}.pixels"


def key(
    root: Path,
    what: str,
    sources: Sequence[Source],
    version: Callable[[Source], str],
    stamp: Callable[[Source], str | None] | None,
) -> str:
    """A hash of what is made and of the version of each source that it is made of, which is noted
    in the folder for as long as no source's stamp changes."""
    # Before the files are read: a note is not to promise what came later.
    stamps = [stamp(source) for source in sources] if stamp is not None else [None]
    known = [each for each in stamps if each is not None]
    note = root / f"{_hash(what, known)}.key" if len(known) == len(stamps) else None
    name = _noted(note)
    if name is None:
        with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            name = _hash(what, pool.map(version, sources))
        if note is not None:
            with suppress(OSError), replaced(note) as file:  # without it, they are read again
                file.write(name.encode())
    return name


def _noted(note: Path | None) -> str | None:
    try:
        name = "" if note is None else note.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return name if re.fullmatch("[0-9a-f]{32}", name) else None


def _hash(what: str, lines: Iterable[str]) -> str:
    digest = hashlib.sha256(f"{what}\n".encode())
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


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
    try:
        with replaced(path) as file:
            checksum = 0
            for images in chunks:
                content = images.contiguous().numpy().data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(checksum.to_bytes(CHECKSUM, "big"))
    except OSError as error:
        say_not_kept(path, error)
        return False
    return True


def say_not_kept(path: Path, error: OSError) -> None:
    """Tell the user that a file of the cache could not be written."""
    print(
        f"images are not kept in the cache: {str(path.parent)!r} ({error.strerror}); free some "
        "space, or set the environment variable HYBRIDVIT_CACHE to another folder",
        file=sys.stderr,
    )


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the path once it is complete, and is gone if it does not get so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        finally:
            if os.path.exists(file.name):
                os.unlink(file.name)


@contextmanager
def turn(root: Path) -> Iterator[None]:
    """Wait for other processes that decode into the folder; not where it cannot be locked."""
    handle = None
    try:
        with suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            handle = os.open(root, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
