"""Decoders of image files; the one that a run uses is part of its record.

JPEGs of twice the size that is asked for, or more, are decoded at a smaller scale, by the inverse
cosine transform itself. Both decoders are built on libjpeg-turbo and mostly give equal pixels.
torchvision's is not used: its releases from 0.29 on announce its removal.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from hybridvit.data.files import open_image, unreadable

if TYPE_CHECKING:
    from PIL import Image

Decoder = Literal["pil", "simplejpeg"]
Choice = Literal["pil", "simplejpeg", "fastest"]


def choose(choice: Choice) -> Decoder:
    """The decoder that is meant, or the fastest of those that are installed.

    Raises:
        ValueError: no such decoder, or it is not installed.
    """
    if choice not in get_args(Choice):
        raise ValueError(
            f"decoder={choice!r} should be one of {', '.join(get_args(Choice))} (data.args.decoder)"
        )
    installed = find_spec("simplejpeg") is not None
    if choice == "fastest":
        return "simplejpeg" if installed else "pil"
    if choice == "simplejpeg" and not installed:
        raise ValueError(
            "decoder='simplejpeg' is not installed: pip install 'hybridvit[jpeg]', or set "
            "data.args.decoder=pil"
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
            if decoder == "simplejpeg" and is_jpeg and image.mode in ("L", "RGB"):
                return _simplejpeg(path, size, channels)
            if is_jpeg:
                image.draft(None, (size[1], size[0]))
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
