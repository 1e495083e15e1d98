"""Random boxes in images, and parts of images scaled with antialiasing, each image by its own box.

Same boxes and same pixels (to rounding) as torchvision.transforms.v2, which takes one box for all
images.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 10  # at a box that fits, as in torchvision
DRAWS = 2 * ATTEMPTS + 2  # uniforms that a box takes: area and aspect of each attempt, its place
# Weights are multiples of this that add up to about 1. With 8 bits of a pixel every sum is then
# exact in float32, so that no order of summing, no batch size and no device changes a pixel.
UNIT = 2**-15
# Added to a float32 in [0, 2^22), it leaves the nearest integer in the last bits, or the even one.
ROUNDING = 1.5 * 2**23
KEPT = 2**22  # weights of all boxes that are kept: images up to 37 px, in 16 MiB
IN_CACHE = 2**18  # pixels that a CPU scales at a time: as floats they should stay in its cache


class Boxes(NamedTuple):
    """A box in each image, in whole pixels; int64 (B,) each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def crop_boxes(
    draw: Tensor, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> Boxes:
    """Boxes of a random share of the area and aspect (Szegedy et al. 2015, section 6).

    Where none of the attempts fits, the largest centred box whose aspect is allowed.

    Args:
        draw: (B, DRAWS) uniforms in [0, 1).
        size: (H, W) of the images.
        scale: least and greatest share of the area.
        aspect: least and greatest width / height, drawn evenly on a log scale.
    """
    heights, widths = _attempts(draw, size, scale, aspect)
    fits = (heights > 0) & (heights <= size[0]) & (widths > 0) & (widths <= size[1])
    height, width = _first(fits, heights, widths)
    largest = (
        min(size[0], round(size[1] / aspect[0])),
        min(size[1], round(size[0] * aspect[1])),
    )
    found = fits.any(1)
    height = torch.where(found, height, largest[0])
    width = torch.where(found, width, largest[1])
    top, left = _place(draw, size, height, width)
    return Boxes(
        torch.where(found, top, (size[0] - height) // 2),
        torch.where(found, left, (size[1] - width) // 2),
        height,
        width,
    )


def erased_boxes(
    draw: Tensor, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> Boxes:
    """As `crop_boxes`, but smaller than the image on both sides, and empty where none fits."""
    heights, widths = _attempts(draw, size, scale, aspect)
    fits = (heights < size[0]) & (widths < size[1])
    height, width = (side * fits.any(1) for side in _first(fits, heights, widths))
    return Boxes(*_place(draw, size, height, width), height, width)


def resize(images: Tensor, boxes: Boxes, size: tuple[int, int], flipped: Tensor) -> Tensor:
    """Parts (B, C, *size) of images (B, C, H, W), both uint8, scaled bilinearly with antialiasing.

    First rows are scaled, then columns, each rounded to whole grey values. Where `flipped`, (B,),
    the part is mirrored left to right.
    """
    height, width = images.shape[2:]
    scaled = images.new_empty(*images.shape[:2], *size)
    on_cpu = images.device.type == "cpu"
    count = max(1, IN_CACHE // (height * width) if on_cpu else len(images))
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        box = Boxes(*(side[part] for side in boxes))
        rows = _weights(box.top, box.height, height, size[0])  # (b, h, H)
        columns = _weights(box.left, box.width, width, size[1], flipped[part])  # (b, w, W)
        _scale(images[part], rows, columns, scaled[part])
    return scaled


def inside(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """(B, H, W) bool: which pixels of images of that size are inside their box."""
    spans = []
    for pixels, start, length in zip(size, boxes[:2], boxes[2:], strict=True):
        place = torch.arange(pixels, device=start.device) - start[:, None]
        spans.append((place >= 0) & (place < length[:, None]))
    return spans[0][:, :, None] & spans[1][:, None, :]


def _attempts(
    draw: Tensor, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """(B, ATTEMPTS) heights and widths in whole pixels, which may not fit."""
    # In float64: the last bit of exp may differ between a vectorised loop and its tail, and a box
    # must not depend on its image's place in the batch.
    area, place = draw[:, : 2 * ATTEMPTS].double().chunk(2, dim=1)
    area = (scale[0] + (scale[1] - scale[0]) * area) * size[0] * size[1]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * place)
    return (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()


def _first(fits: Tensor, heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) sides of the first attempt that fits."""
    attempt = fits.int().argmax(1, keepdim=True)
    return heights.gather(1, attempt)[:, 0], widths.gather(1, attempt)[:, 0]


def _place(
    draw: Tensor, size: tuple[int, int], height: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) top and left, each place of the box in the image as likely."""
    down, right = draw[:, 2 * ATTEMPTS :].double().unbind(1)
    return (down * (size[0] - height + 1)).long(), (right * (size[1] - width + 1)).long()


def _weights(
    start: Tensor, length: Tensor, pixels: int, count: int, flipped: Tensor | None = None
) -> Tensor:
    """(B, count, pixels) weights of the pixels in [start, start + length), in parts that are
    counted from the end where `flipped`, (B,); small ones are looked up."""
    if 2 * (pixels + 1) ** 2 * count * pixels > KEPT:
        return _computed(start, length, pixels, count, flipped)
    place = start * (pixels + 1) + length
    if flipped is not None:
        place += flipped * (pixels + 1) ** 2
    return _table(pixels, count, start.device).index_select(0, place)


@lru_cache(maxsize=8)
def _table(pixels: int, count: int, device: torch.device) -> Tensor:
    """(2 (pixels + 1)^2, count, pixels) weights, by `flipped`, start and length."""
    every = torch.arange(pixels + 1, device=device)
    start, length = every.repeat_interleave(pixels + 1).repeat(2), every.repeat(2 * (pixels + 1))
    flipped = torch.arange(len(start), device=device) >= (pixels + 1) ** 2
    return _computed(start, length, pixels, count, flipped)


def _computed(
    start: Tensor, length: Tensor, pixels: int, count: int, flipped: Tensor | None
) -> Tensor:
    """(B, count, pixels) weights, multiples of `UNIT`, of the pixels in [start, start + length).

    Triangles around the centres of `count` equal parts, one pixel or one part wide to each side,
    whichever is more. Where `flipped`, (B,), the parts are counted from the end.
    """
    # On the device, because a GPU multiplies by the reciprocal of a number of the host's.
    step = (length.float() / torch.full((), float(count), device=start.device))[:, None]  # (B, 1)
    reach = step.clamp_min(1)
    centre = step * (torch.arange(count, device=start.device) + 0.5) / reach  # (B, count)
    if flipped is not None:
        centre = torch.where(flipped[:, None], centre.flip(1), centre)
    place = torch.arange(pixels, device=start.device) - start[:, None]  # (B, pixels)
    within = (place >= 0) & (place < length[:, None])
    place = torch.where(within, (place + 0.5) / reach, math.inf)
    distance = (place[:, None] - centre[:, :, None]).abs_()
    negative = distance.sub_(1).clamp_max_(0)
    # In float64, so that the order of summing does not show.
    total = negative.sum(2, keepdim=True, dtype=torch.float64)
    return negative.mul_((1 / (UNIT * total)).float()).round_().mul_(UNIT)


def _scale(images: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """Images (B, C, H, W) by their weights (B, h, H) and (B, w, W) into (B, C, h, w) uint8."""
    count, channels, height, width = images.shape
    # Channels are side by side, so that a product has all of them at once.
    pixels = rows.new_empty(count, height, channels, width).copy_(images.transpose(1, 2))
    pixels = torch.bmm(pixels.flatten(1, 2), columns.mT).round_()  # (B, H C, w)
    pixels = torch.bmm(rows, pixels.view(count, height, -1))  # (B, h, C w)
    whole = pixels.add_(ROUNDING).view(torch.int32).unflatten(2, (channels, -1))
    out.copy_(whole.transpose(1, 2))  # the last byte of each
