"""Decoders of image files; the one that a run uses is part of its record.

JPEGs of twice the size that is asked for, or more, are decoded at a smaller scale, by the inverse
cosine transform itself. All decoders are built on libjpeg-turbo and mostly give equal pixels.
torchvision's cannot scale, and leaves such images to Pillow; its releases from 0.29 on announce its
removal, so that it may be missing.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from hybridvit.data.files import open_image, unreadable

if TYPE_CHECKING:
    from PIL import Image

Decoder = Literal["simplejpeg", "torchvision", "pil"]  # the fastest one first
Choice = Literal["simplejpeg", "torchvision", "pil", "fastest"]


def choose(choice: Choice) -> Decoder:
    """The decoder that is meant, or the fastest of those that are installed.

    Raises:
        ValueError: no such decoder, or it is not installed.
    """
    if choice not in get_args(Choice):
        raise ValueError(
            f"decoder={choice!r} should be one of {', '.join(get_args(Choice))} (data.args.decoder)"
        )
    if choice == "fastest":
        return next(decoder for decoder in get_args(Decoder) if _is_installed(decoder))
    if not _is_installed(choice):
        raise ValueError(
            f"decoder={choice!r} is not installed; set data.args.decoder=fastest for what is, or "
            "pip install 'hybridvit[jpeg]' for simplejpeg, the fastest of all"
        )
    return choice


def record(decoder: Decoder) -> str:
    """Decoder and version, e.g. 'pil 12.3.0'."""
    return f"{decoder} {version('pillow' if decoder == 'pil' else decoder)}"


def decode(
    path: str, decoder: Decoder, size: tuple[int, int], channels: int
) -> Image.Image | Tensor:
    """A file's image: PIL's, of any mode, or (C, H, W) uint8; JPEGs are scaled to cover `size`.

    Raises:
        ValueError: the file is no image that can be read; the message names it.
    """
    with open_image(path) as image:  # closes the file; the pixels stay
        is_jpeg = image.format == "JPEG"
        try:
            is_plain = is_jpeg and image.mode in ("L", "RGB")
            if is_plain and decoder == "simplejpeg":
                # It refuses what libjpeg warns of; Pillow reads a file that is whole all the same.
                with suppress(ValueError):
                    return _simplejpeg(path, size, channels)
            whole = image.size
            if is_jpeg:
                image.draft(None, (size[1], size[0]))
            if is_plain and decoder == "torchvision" and image.size == whole:
                return _torchvision(path, channels)
            image.load()
        except Exception as error:  # a damaged file makes decoders raise anything
            raise unreadable(path, error) from None
    return image


def _simplejpeg(path: str, size: tuple[int, int], channels: int) -> Tensor:
    simplejpeg = import_module("simplejpeg")  # an extra, which type checkers may not find
    with open(path, "rb") as file:
        pixels = simplejpeg.decode_jpeg(
            file.read(),
            "GRAY" if channels == 1 else "RGB",
            min_height=size[0],
            min_width=size[1],
            min_factor=2,  # 5/8 and 7/8 are slower than the whole, and rougher
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _torchvision(path: str, channels: int) -> Tensor:
    from torchvision.io import decode_jpeg, read_file

    pixels: Tensor = decode_jpeg(read_file(path), "GRAY" if channels == 1 else "RGB")
    return pixels


def _is_installed(decoder: Decoder) -> bool:
    if decoder == "torchvision":  # releases may drop its decoders, and builds leave them out
        import torchvision

        known = hasattr(getattr(torchvision, "io", None), "decode_jpeg")
        return known and hasattr(torch.ops.image, "decode_jpeg")
    return decoder == "pil" or find_spec(decoder) is not None
