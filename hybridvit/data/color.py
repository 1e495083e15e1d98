"""Changes of colour and sharpness, each image of a batch by its own amount.

Brightness to hue are those of `torchvision.transforms.v2.functional`, which takes one amount for
all images. Images are float32 in [0, 1], and so are results; an amount is (B,) float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """(B, C, H, W) times a factor; 1 changes nothing."""
    return (images * _per_image(factor)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean grey for a factor above 1, towards it below."""
    # In float64: the order of summing depends on the batch, and an image must not.
    mean = grey(images).double().mean(dim=(1, 2, 3), keepdim=True).float()
    return _blend(images, mean, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey for a factor above 1, towards it below; (B, 3, H, W)."""
    return _blend(images, grey(images), factor)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hues turned by parts of the colour circle in [-0.5, 0.5]; (B, 3, H, W)."""
    r, g, b = images.unbind(1)
    high = images.amax(dim=1)
    spread = high - images.amin(dim=1)  # value times saturation
    divisor = torch.where(spread == 0, 1, spread)
    sixths = torch.where(
        high == r,
        (g - b) / divisor,
        torch.where(high == g, (b - r) / divisor + 2, (r - g) / divisor + 4),
    )  # (B, H, W), the hue in sixths of the circle
    sixths = sixths.add_(6 * turns[:, None, None]).remainder_(6)
    # How far each falls below the highest: red around cyan, the others two sixths from their own.
    red = (sixths - 3).abs_().neg_().add_(2)
    green, blue = ((sixths - own).abs_().sub_(1) for own in (2, 4))
    falls = torch.stack([red, green, blue], dim=1).clamp_(0, 1)
    return torch.addcmul(high[:, None], falls, spread[:, None], value=-1)


def grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601), (B, C, H, W) to (B, 1, H, W); one channel stays as it is."""
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """A Gaussian of deviation `sigma` in pixels, cut off beyond `radius` pixels; edges mirror."""
    offset = torch.arange(-radius, radius + 1, device=images.device).double()
    # In float64: the last bit of exp may depend on an image's place in the batch.
    weights = torch.exp(-((offset / sigma.double()[:, None]) ** 2) / 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).float()  # (B, 2 radius + 1)
    padding = {2: (0, 0, radius, radius), 3: (radius, radius, 0, 0)}
    for axis, sides in padding.items():
        padded, length = F.pad(images, sides, mode="reflect"), images.shape[axis]
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights.unbind(1)):
            images.addcmul_(_per_image(weight), padded.narrow(axis, i, length))
    return images.clamp(0, 1)


def _blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    share = _per_image(share)
    return (images * share + others * (1 - share)).clamp(0, 1)


def _per_image(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]
