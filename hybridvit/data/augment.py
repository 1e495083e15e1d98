"""Augmentation of whole batches on the device, each image from its own key.

Both the resident and the streaming path use it, so the same pixels give the same batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import draws
from hybridvit.data import color
from hybridvit.data.splits import cover

Crop = Literal["none", "pad", "resized"]

CROP = draws.stream("augment.crop")
FLIP = draws.stream("augment.flip")
JITTER = draws.stream("augment.jitter")
GRAYSCALE = draws.stream("augment.grayscale")
BLUR = draws.stream("augment.blur")
JITTERED = 0.8  # share of the images whose colours are varied, where they are
ASPECT = (3 / 4, 4 / 3)  # width to height of a resized crop


@dataclass(frozen=True)
class Augment:
    """How training images are varied: crop, flip, colours, grey, blur, in this order.

    Contrastive learning (Chen et al. 2020, Appendix A) varies all: crop=resized, flip=true,
    grayscale=0.2, and jitter=1, blur=0.5 for ImageNet, jitter=0.5 without blur for CIFAR-10.

    Raises:
        ValueError: a value that is not possible; which, and what would be.
    """

    crop: Crop = "none"
    """none; pad: shifted by up to `pad` pixels; resized: a random part, scaled."""
    pad: int = 4
    """pixels of black on each side, for crop=pad"""
    scale: tuple[float, float] = (0.08, 1.0)
    """least and greatest share of the image's area, for crop=resized"""
    flip: bool = False
    """mirror half of the images left to right"""
    jitter: float = 0.0
    """strength s of the colour jitter of 80 % of the images: brightness, contrast and saturation
    by factors in 1 +- 0.8 s, hue by up to 0.2 s of the colour circle; 0 is off"""
    grayscale: float = 0.0
    """share of the images that lose their colour"""
    blur: float = 0.0
    """share of the images that are blurred, by a Gaussian over a tenth of the shorter side"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """least and greatest deviation of the blur in pixels"""

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop={self.crop!r} should be one of {', '.join(get_args(Crop))}")
        if self.pad < 0:
            raise ValueError(f"pad={self.pad} should be 0 or more pixels, e.g. 4")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale={self.scale} should be two shares of the area with 0 < least <= greatest "
                "<= 1, e.g. (0.08, 1.0)"
            )
        if not 0 <= self.jitter <= 2.5:
            raise ValueError(f"jitter={self.jitter} should be a strength in [0, 2.5], e.g. 0.5")
        for name, share in (("grayscale", self.grayscale), ("blur", self.blur)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} should be a share of the images in [0, 1]")
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(
                f"sigma={self.sigma} should be two deviations in pixels with 0 < least <= "
                "greatest, e.g. (0.1, 2.0)"
            )

    @property
    def varies(self) -> bool:
        """Whether two views of an image can differ."""
        return any((self.crop != "none", self.flip, self.jitter, self.grayscale, self.blur))

    def check(self, image_size: tuple[int, int]) -> None:
        """Refuse a padding that could push the whole image out of its crop.

        Raises:
            ValueError: the padding is not smaller than the image.
        """
        if self.crop == "pad" and self.pad >= min(image_size):
            raise ValueError(
                f"pad={self.pad} should be smaller than the images of {image_size[0]} x "
                f"{image_size[1]} pixels, e.g. {min(image_size) // 8}"
            )


def augment(images: Tensor, key: Tensor, how: Augment, out_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) uint8 images and their keys (B,) to (B, 3, *out_size) float32 in [0, 1].

    Grey images are repeated. For crop "none" and "pad", images of another size than `out_size`
    are first resized and centre-cropped to it.
    """
    flipped = draws.uniform(key, FLIP, 1)[:, 0] < (0.5 if how.flip else 0.0)
    if how.crop == "resized":
        floats = _resized_crop(images, key, how.scale, flipped, out_size)
    else:
        images = cover(images, out_size)
        if how.crop == "pad":  # before the conversion to floats, which take four times the memory
            images = _padded_crop(images, key, how.pad, flipped)
        else:
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        floats = _floats(images)
    return _three_channels(_recolored(floats, key, how))


def plain(images: Tensor, out_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) uint8 to (B, 3, *out_size) float32 in [0, 1], nothing random."""
    return _three_channels(_floats(cover(images, out_size)))


def _floats(images: Tensor) -> Tensor:
    return (images.float() / 255).clamp(0, 1)


def _three_channels(images: Tensor) -> Tensor:
    return images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images


def _recolored(images: Tensor, key: Tensor, how: Augment) -> Tensor:
    """Colours, grey and blur of each image (B, C, H, W); one channel has no colours to lose."""
    if how.jitter:
        images = _jittered(images, key, how.jitter)
    if how.grayscale and images.shape[1] == 3:
        chosen = draws.uniform(key, GRAYSCALE, 1)[:, 0] < how.grayscale
        images = torch.where(chosen[:, None, None, None], color.grey(images), images)
    if how.blur:
        share, place = draws.uniform(key, BLUR, 2).unbind(1)
        sigma = how.sigma[0] + (how.sigma[1] - how.sigma[0]) * place
        blurred = color.blur(images, sigma, max(1, min(images.shape[-2:]) // 20))
        images = torch.where((share < how.blur)[:, None, None, None], blurred, images)
    return images


def _jittered(images: Tensor, key: Tensor, strength: float) -> Tensor:
    """Colour jitter of most images, as in SimCLR but in a fixed order."""
    draw = draws.uniform(key, JITTER, 5)
    least, greatest = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    bright, contrast, saturated = (least + (greatest - least) * draw[:, :3]).unbind(1)
    jittered = color.contrast(color.brightness(images, bright), contrast)
    if images.shape[1] == 3:
        jittered = color.saturation(jittered, saturated)
        jittered = color.hue(jittered, 0.2 * strength * (2 * draw[:, 3] - 1))
    return torch.where((draw[:, 4] < JITTERED)[:, None, None, None], jittered, images)


def _padded_crop(images: Tensor, key: Tensor, pad: int, flipped: Tensor) -> Tensor:
    """Each image shifted by its own offset into its black frame, then flipped."""
    channels, height, width = images.shape[1:]
    top, left = draws.integers(key, CROP, 2, 2 * pad + 1).unbind(1)  # (B,) each
    rows = top[:, None] + torch.arange(height, device=key.device)  # (B, H)
    columns = torch.arange(width, device=key.device).expand(len(key), width)
    columns = left[:, None] + torch.where(flipped[:, None], columns.flip(1), columns)  # (B, W)
    framed = F.pad(images, (pad, pad, pad, pad))  # (B, C, H + 2 pad, W + 2 pad)
    framed = framed.gather(2, rows[:, None, :, None].expand(-1, channels, -1, framed.shape[3]))
    return framed.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def _resized_crop(
    images: Tensor, key: Tensor, scale: tuple[float, float], flipped: Tensor, size: tuple[int, int]
) -> Tensor:
    """A random part of each image, scaled bilinearly (Szegedy et al. 2015, section 6).

    As torchvision's RandomResizedCrop, except that a part that does not fit is clamped to the
    image instead of drawn again (up to ten times there), corners are not rounded to whole pixels,
    and reducing has no antialiasing.
    """
    height, width = images.shape[-2:]
    # In float64 until the end: the last bit of exp may differ between a vectorised loop and its
    # tail, and an image's crop must not depend on its place in the batch.
    area, aspect, down, right = draws.uniform(key, CROP, 4).double().unbind(1)
    area = (scale[0] + (scale[1] - scale[0]) * area) * height * width
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = torch.exp(low + (high - low) * aspect)
    crop_height = (area / aspect).sqrt().clamp(max=height)
    crop_width = (area * aspect).sqrt().clamp(max=width)
    x = _sample_points(right * (width - crop_width), crop_width, width, size[1])
    y = _sample_points(down * (height - crop_height), crop_height, height, size[0])
    x = torch.where(flipped[:, None], x.flip(1), x)
    grid = torch.stack(
        [x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3
    )  # (B, H, W, 2)
    floats = images.float() / 255
    return F.grid_sample(floats, grid, "bilinear", "border", align_corners=False).clamp(0, 1)


def _sample_points(start: Tensor, length: Tensor, pixels: int, count: int) -> Tensor:
    """(B, count) float32 centres of `count` equal parts of [start, start + length], in [-1, 1]."""
    centres = (torch.arange(count, device=start.device).double() + 0.5) / count
    points = start[:, None] + length[:, None] * centres
    return (points * (2 / pixels) - 1).float()
