"""Image files from anywhere, opened with care: they may come from strangers.

Only common formats, no pickles, no special files, and a cap on the pixels of one image.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".gif")
MAX_PIXELS = 64 * 2**20  # of one image
SETTLED = 2.0  # seconds after which a file's next change has another time
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")


@dataclass(frozen=True)
class ImageFiles:
    """Paths in a folder."""

    root: str
    paths: list[str]

    def identify(self, i: int) -> str:
        """Relative path and file size in bytes of image i."""
        path = self.paths[i]
        return f"{os.path.relpath(path, self.root)} {os.path.getsize(path)}"

    def digest(self, i: int) -> str:
        """SHA-256 of the bytes of image i.

        Raises:
            ValueError: the file cannot be read; the message names it.
        """
        path = self.paths[i]
        _check_regular(path)
        try:
            return digest(path)
        except OSError as error:
            raise unreadable(path, error) from None

    def stamp(self, i: int) -> str | None:
        """`stamp` of image i."""
        return stamp(self.paths[i])

    def are_grey(self) -> bool:
        """Whether no image has colours; reads every header.

        Raises:
            ValueError: a file is no image that can be read; the message names it.
        """
        grey = True
        for path in self.paths:
            with open_image(path) as image:
                grey = image.mode in GREY_MODES and grey
        return grey


def digest(path: str) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: str) -> str | None:
    """What changes whenever a file does: its path, place on the disk, size, and times of
    modification and of change, which no program can set; None where a change might not show.

    Files whose times are less than `SETTLED` seconds old have None, because two changes in
    one step of the clock have the same time. Not seen is what changes a disk from below its
    file system, what another machine writes to a network file system that has not told this
    one yet, and writing while the system's clock was set back to a time of before.
    """
    try:
        status = os.stat(path)
    except OSError:  # whoever reads it has more to say
        return None
    times = (status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - max(times) < SETTLED * 1e9:
        return None
    return f"{path} {status.st_dev} {status.st_ino} {status.st_size} {times}"


def absolute(path: str | Path, what: str) -> Path:
    """A path from the root on, where ~ is a home directory.

    Raises:
        ValueError: it is that of a user who has none; `what` names where the path is from.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ValueError(
            f"{what}={str(path)!r}: there is no such user; write ./~ for a name"
        ) from None


def list_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Image files below a folder in sorted order, and how many others by suffix.

    Hidden files and folders are skipped, links to folders are not followed.
    """
    images, others = [], Counter[str]()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix in SUFFIXES:
                images.append(os.path.join(parent, name))
            else:
                others[suffix or "no suffix"] += 1
    return images, others


def one_line(error: BaseException) -> str:
    """An error in one line: its kind, and the first 200 characters of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def some(names: Iterable[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(repr(name) for name in listed[:5]) + more


def open_image(path: str) -> Image.Image:
    """An image file whose header was read.

    Raises:
        ValueError: it is no image, or has too many pixels; the message names it.
    """
    from PIL import Image

    _check_regular(path)
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image {path!r} is too large ({error}); scale it down") from None
    except Exception as error:  # a damaged file makes decoders raise anything
        raise unreadable(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"image {path!r} has {image.width} x {image.height} pixels, more than the "
            f"{MAX_PIXELS // 2**20} Mi allowed; scale it down or remove it"
        )
    return image


def unreadable(path: str, error: Exception) -> ValueError:
    """What to tell the user of a file that a decoder refuses."""
    return ValueError(
        f"image {path!r} cannot be decoded ({one_line(error)}); "
        f"remove it or replace it by a valid {', '.join(FORMATS)} file"
    )


def _check_regular(path: str) -> None:
    if not os.path.isfile(path):  # a pipe would block for ever
        raise ValueError(f"image {path!r} is missing or no regular file; restore or remove it")
