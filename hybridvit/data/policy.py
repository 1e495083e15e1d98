"""RandAugment (Cubuk et al. 2020) and TrivialAugment (Müller, Hutter 2021), each image by its own.

Operations and their strengths are those of torchvision.transforms.v2 on uint8 images, which takes
one choice for all images: nearest pixels, black where nothing is, whole grey values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import draws

Policy = Literal["none", "rand", "trivial"]

OPERATION = draws.stream("augment.policy.operation")
MAGNITUDE = draws.stream("augment.policy.magnitude")
SIGN = draws.stream("augment.policy.sign")
BINS = 31  # magnitudes 0 to 30
Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, operations and strengths
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def choices(
    key: Tensor, policy: Policy, ops: int, magnitude: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Operations (int64) and their signed strengths (float32), (B, n) each, for keys (B,).

    RandAugment applies n = `ops` operations of the magnitude 0 to 30 in turn, TrivialAugment one
    of a random magnitude. `size` is (H, W), of which RandAugment's shifts are shares.
    """
    count = ops if policy == "rand" else 1
    chosen = draws.integers(key, OPERATION, count, len(OPERATIONS))
    if policy == "rand":
        bins = torch.full_like(chosen, magnitude)
    else:
        bins = draws.integers(key, MAGNITUDE, count, BINS)
    # A sign per operation: operations without one have the same strength both ways.
    sign = (draws.uniform(key, SIGN, count) < 0.5).long()
    return chosen, _strengths(policy, *size, key.device)[sign, chosen, bins]


def apply(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8, each changed by its operation (B,) of a strength (B,)."""
    way = _sorted if images.device.type == "cpu" else _all_ways
    return way(images, operation, strength)


@lru_cache(maxsize=8)
def _strengths(policy: Policy, height: int, width: int, device: torch.device) -> Tensor:
    """(2, operations, BINS) strengths of each operation, with a positive and a negative sign.

    Kept, because making it copies to the device.
    """
    if policy == "rand":
        shear, degrees, tone, lost_bits = 0.3, 30.0, 0.9, 4
        right, down = 150 / 331 * width, 150 / 331 * height
    else:
        shear, degrees, tone, lost_bits = 0.99, 135.0, 0.99, 6
        right = down = 32.0
    greatest = dict(zip(GEOMETRIC, (shear, shear, right, down, degrees), strict=True))
    greatest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), tone)
    table = torch.zeros(2, len(OPERATIONS), BINS)
    for name, end in greatest.items():
        up = torch.linspace(0, end, BINS)
        table[:, OPERATIONS.index(name)] = torch.stack([up, -up])
    table[:, OPERATIONS.index("Posterize")] = (
        8 - torch.arange(BINS) / ((BINS - 1) / lost_bits)
    ).round()
    table[:, OPERATIONS.index("Solarize")] = 255 * torch.linspace(1, 0, BINS)
    return table.to(device)


def _sorted(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """As `apply`: images of the same change lie side by side, and each takes its own alone."""
    kind = _kinds(operation)
    order = kind.argsort(stable=True)
    sizes = torch.bincount(kind, minlength=len(_CHANGES)).tolist()
    parts = (each.index_select(0, order).split(sizes) for each in (images, operation, strength))
    groups = zip(_CHANGES, *parts, strict=True)
    changed = [change(*part) for change, *part in groups]  # of no images, too
    return torch.cat(changed).index_select(0, order.argsort())


def _all_ways(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """As `apply`: images take all changes, of which one is kept.

    Counting those of each would wait for the device.
    """
    kind = _kinds(operation)
    for i, change in enumerate(_CHANGES[1:], start=1):
        changed = change(images, operation, strength)
        images = torch.where(_per_image(kind == i), changed, images)
    return images


def _kinds(operation: Tensor) -> Tensor:
    """Places in `_CHANGES`, where all of `GEOMETRIC` are one."""
    return operation.clamp_max(1).maximum(operation - len(GEOMETRIC) + 1)


def _unchanged(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    return images


def _moved(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Sheared (from the upper left corner), shifted or turned (about the centre, in degrees)."""
    channels, height, width = images.shape[1:]
    is_shear_x, is_shear_y, is_right, is_down, is_turn = (
        operation == OPERATIONS.index(name) for name in GEOMETRIC
    )
    # In float64: the last bit of cos may differ between a vectorised loop and its tail.
    angle = torch.deg2rad(strength.double() * is_turn)
    cos, sin = angle.cos().float(), angle.sin().float()
    # Where the pixel at (x, y) from the centre comes from.
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x, y = x[None, None, :], y[None, :, None]
    shear_x, shear_y = strength * is_shear_x, strength * is_shear_y
    # Shears start at the corner, shifts are by whole pixels.
    down = shear_y * (width / 2) - strength.trunc() * is_down + (height - 1) / 2
    right = shear_x * (height / 2) - strength.trunc() * is_right + (width - 1) / 2
    row = (_flat(cos) * y + _flat(sin + shear_y) * x).add_(_flat(down))  # (B, H, W)
    column = (_flat(cos) * x + _flat(shear_x - sin) * y).add_(_flat(right))
    # What lies outside is taken from a black frame of one pixel.
    row, column = row.round_().clamp_(-1, height), column.round_().clamp_(-1, width)
    framed = F.pad(images, (1, 1, 1, 1)).flatten(2)
    first = width + 3  # place of the upper left pixel in the frame
    source = column.add_(row, alpha=width + 2).add_(first).long().flatten(1)  # (B, H W)
    return framed.gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)


def _flat(amount: Tensor) -> Tensor:
    return amount[:, None, None]


def _brightness(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    return _cut(images.float().mul_(_per_image(1 + strength)))


def _color(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images, _grey(images), strength)


def _contrast(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    # In float64, where sums of whole grey values are exact in any order.
    mean = _grey(images).double().mean(dim=(1, 2, 3), keepdim=True).float()
    return _blend(images, mean, strength)


def _sharpness(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    if min(images.shape[-2:]) <= 2:
        return images
    # Rows follow one another, so that neighbours are sums of long lines; what they say of the
    # border, which stays as it is, is not read.
    width = images.shape[3]
    pixels = images.flatten(1).short()  # (B, C H W)
    rows = (pixels[:, : -2 * width] + pixels[:, width:-width]).add_(pixels[:, 2 * width :])
    box = (rows[:, :-2] + rows[:, 1:-1]).add_(rows[:, 2:])
    edge = width + 1
    inner = pixels[:, edge:-edge]
    smooth = (box.add_(inner, alpha=4) / 13).round_()  # no thirteenth is a half
    lines = _cut(smooth.sub_(inner).mul_(-strength[:, None]).add_(inner))
    sharpened = images.clone()
    inside = (..., slice(1, -1), slice(1, -1))
    sharpened[inside] = F.pad(lines, (edge, edge)).view_as(images)[inside]
    return sharpened


def _posterize(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    lost = _per_image(8 - strength).to(torch.uint8)
    return images >> lost << lost


def _solarize(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    bright = images >= _per_image(strength.ceil()).to(torch.uint8)
    return images ^ bright.to(torch.uint8).neg_()  # 255 - x inverts the bits of x


def _autocontrast(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    low = images.amin(dim=(2, 3), keepdim=True).float()
    spread = images.amax(dim=(2, 3), keepdim=True).float() - low
    step = torch.where(spread == 0, 1, spread * (1 / 255))
    return _cut((images - torch.where(spread == 0, 0, low)).div_(step))


def _equalize(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Each channel's grey values spread evenly, in whole steps as Pillow does."""
    values = images.flatten(2).long()  # (B, C, H W)
    counts = values.new_zeros(*images.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    most = counts.gather(2, values.amax(2, keepdim=True))  # pixels of the greatest value
    step = (values.shape[2] - most) // 255  # (B, C, 1) pixels a grey value
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step == 0, torch.arange(256, device=step.device), table)
    return table.to(torch.uint8).gather(2, values).view_as(images)


# The order counts: keys choose by place.
_TONES: dict[str, Change] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
OPERATIONS = ("Identity", *GEOMETRIC, *_TONES)
_CHANGES: tuple[Change, ...] = (_unchanged, _moved, *_TONES.values())


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) in whole grey values, (B, C, H, W) to (B, 1, H, W) float32."""
    if images.shape[1] == 1:
        return images.float()
    r, g, b = images.float().unbind(1)
    # Weights are whole numbers, so that the sum is exact in any order.
    return (2989 * r).add_(g, alpha=5870).add_(b, alpha=1140).mul_(1e-4).floor_()[:, None]


def _blend(images: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    """Away from the others for a strength above 0, towards them below."""
    share = _per_image(1 + strength)
    return _cut(images.float().mul_(share).add_(others * (1 - share)))


def _cut(values: Tensor) -> Tensor:
    """Grey values cut to whole ones, as torchvision does; overwrites those given."""
    return values.clamp_(0, 255).int().to(torch.uint8)  # int32, for which a CPU has instructions


def _per_image(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]
