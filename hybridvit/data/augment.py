"""Augmentation of whole batches on the device, each image from its own key.

Both the resident and the streaming path use it, so the same pixels give the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import draws
from hybridvit.data import color, crops
from hybridvit.data import policy as policies
from hybridvit.data.policy import Policy
from hybridvit.data.splits import cover

Crop = Literal["none", "pad", "resized"]

CROP = draws.stream("augment.crop")
FLIP = draws.stream("augment.flip")
JITTER = draws.stream("augment.jitter")
GRAYSCALE = draws.stream("augment.grayscale")
BLUR = draws.stream("augment.blur")
ERASE = draws.stream("augment.erase")
ERASED = draws.stream("augment.erase.box")
JITTERED = 0.8  # share of the images whose colours are varied, where they are
ASPECT = (3 / 4, 4 / 3)  # width to height of a resized crop
ERASED_ASPECT = (1 / 3.3, 1 / 0.3)  # width to height of an erased box


@dataclass(frozen=True)
class Augment:
    """How training images are varied: crop, flip, policy, colours, grey, blur, erasing, in this
    order.

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
    policy: Policy = "none"
    """rand: `policy_ops` operations of `policy_magnitude` (RandAugment); trivial: one operation of
    any magnitude (TrivialAugment, its wide space)"""
    policy_ops: int = 2
    """operations on an image, for policy=rand"""
    policy_magnitude: int = 9
    """strength of the operations in 0 to 30, for policy=rand"""
    jitter: float = 0.0
    """strength s of the colour jitter of 80 % of the images: brightness, contrast and saturation
    by factors in 1 +- 0.8 s, hue by up to 0.2 s of the colour circle; 0 is off"""
    grayscale: float = 0.0
    """share of the images that lose their colour"""
    blur: float = 0.0
    """share of the images that are blurred, by a Gaussian over a tenth of the shorter side"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """least and greatest deviation of the blur in pixels"""
    erase: float = 0.0
    """share of the images that lose a box (random erasing)"""
    erase_scale: tuple[float, float] = (0.02, 0.33)
    """least and greatest share of the image's area that the box takes"""

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad={self.pad} should be 0 or more pixels, e.g. 4")
        _check_area("scale", self.scale, "[0.08, 1.0]")
        if self.policy_ops < 1:
            raise ValueError(
                f"policy_ops={self.policy_ops} should be 1 or more operations, e.g. 2; "
                "policy=none applies none"
            )
        if not 0 <= self.policy_magnitude < policies.BINS:
            raise ValueError(
                f"policy_magnitude={self.policy_magnitude} should be 0 to {policies.BINS - 1}, "
                "e.g. 9"
            )
        if not 0 <= self.jitter <= 2.5:
            raise ValueError(f"jitter={self.jitter} should be a strength in [0, 2.5], e.g. 0.5")
        for name in ("grayscale", "blur", "erase"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} should be a share of the images in [0, 1]")
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(
                f"sigma={list(self.sigma)} should be two deviations in pixels with 0 < least <= "
                "greatest, e.g. [0.1, 2.0]"
            )
        _check_area("erase_scale", self.erase_scale, "[0.02, 0.33]")

    @property
    def varies(self) -> bool:
        """Whether two views of an image can differ."""
        shares = (self.flip, self.jitter, self.grayscale, self.blur, self.erase)
        return self.crop != "none" or self.policy != "none" or any(shares)

    def check(self, image_size: tuple[int, int]) -> None:
        """Refuse a padding that could push the whole image out of its crop.

        Raises:
            ValueError: the padding is not smaller than the image.
        """
        if self.crop == "pad" and self.pad >= min(image_size):
            raise ValueError(
                f"data.augment.pad={self.pad} should be smaller than the images of "
                f"{image_size[0]} x {image_size[1]} pixels, e.g. {min(image_size) // 8}"
            )


def augment(
    images: Tensor,
    key: Tensor,
    how: Augment,
    out_size: tuple[int, int],
    fill: Tensor | None = None,
) -> Tensor:
    """(B, C, H, W) uint8 images and their keys (B,) to (B, 3, *out_size) float32 in [0, 1].

    Grey images are repeated. For crop "none" and "pad", images of another size than `out_size`
    are first resized and centre-cropped to it. `fill` (3,) is the colour of erased boxes, black
    if none.
    """
    flipped = draws.uniform(key, FLIP, 1)[:, 0] < (0.5 if how.flip else 0.0)
    if how.crop == "resized":
        draw = draws.uniform(key, CROP, crops.DRAWS)
        boxes = crops.crop_boxes(draw, (images.shape[2], images.shape[3]), how.scale, ASPECT)
        images = crops.resize(images, boxes, out_size, flipped)
    else:
        images = cover(images, out_size)
        if how.crop == "pad":  # before the conversion to floats, which take four times the memory
            images = _padded_crop(images, key, how.pad, flipped)
        else:
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    if how.policy != "none":
        images = _by_policy(images, key, how)
    images = _three_channels(_recolored(_floats(images), key, how))
    return _erased(images, key, how, fill) if how.erase else images


def plain(images: Tensor, out_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) uint8 to (B, 3, *out_size) float32 in [0, 1], nothing random."""
    return _three_channels(_floats(cover(images, out_size)))


def _check_area(name: str, scale: tuple[float, float], usual: str) -> None:
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"{name}={list(scale)} should be two shares of the area with 0 < least <= greatest "
            f"<= 1, e.g. {usual}"
        )


def _floats(images: Tensor) -> Tensor:
    # On the device: a GPU divides by a number of the host's by multiplying with its reciprocal,
    # which changes the last bit of half of all grey values.
    white = torch.full((), 255.0, device=images.device)
    if images.dtype == torch.uint8:  # first all floats: dividing bytes takes twice as long
        return images.float().div_(white)
    return (images / white).clamp(0, 1)


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
    source = (rows[:, :, None] * framed.shape[3] + columns[:, None, :]).flatten(1)  # (B, H W)
    cropped = framed.flatten(2).gather(2, source[:, None].expand(-1, channels, -1))
    return cropped.view_as(images)


def _by_policy(images: Tensor, key: Tensor, how: Augment) -> Tensor:
    if images.dtype != torch.uint8:  # resized, and not rounded
        images = images.round().clamp(0, 255).to(torch.uint8)
    size = (images.shape[2], images.shape[3])
    chosen = policies.choices(key, how.policy, how.policy_ops, how.policy_magnitude, size)
    for operation, strength in zip(*(each.unbind(1) for each in chosen), strict=True):
        images = policies.apply(images, operation, strength)
    return images


def _erased(images: Tensor, key: Tensor, how: Augment, fill: Tensor | None) -> Tensor:
    """A box of some of the images (B, 3, H, W) in one colour (Zhong et al. 2020)."""
    size = (images.shape[2], images.shape[3])
    draw = draws.uniform(key, ERASED, crops.DRAWS)
    box = crops.inside(crops.erased_boxes(draw, size, how.erase_scale, ERASED_ASPECT), size)
    box &= (draws.uniform(key, ERASE, 1) < how.erase)[:, :, None]
    color = images.new_zeros(3) if fill is None else fill.to(images)
    return torch.where(box[:, None], color[:, None, None], images)
