"""Changes of colour against torchvision's, which takes one amount for all images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from hybridvit.data import color


def pictures(channels: int = 3) -> Tensor:
    """(24, C, 23, 31): noise, and images with ties between channels, black, white and greys."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, channels, 23, 31, generator=generator)
    images[1], images[2] = 0, 1
    images[3] = images[3, :1]
    images[4] = images[4].round()
    images[5, 1:] = images[5, :1]
    images[6] = (images[6] * 4).floor() / 4
    return images


def amounts(low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    amount = low + (high - low) * torch.rand(24, generator=generator)
    amount[::5] = torch.tensor([low, high, (low + high) / 2, high, low])
    return amount


CASES = [
    (color.brightness, tv.adjust_brightness, (0.0, 2.5)),
    (color.contrast, tv.adjust_contrast, (0.0, 2.5)),
    (color.saturation, tv.adjust_saturation, (0.0, 2.5)),
    (color.hue, tv.adjust_hue, (-0.5, 0.5)),
]


@pytest.mark.parametrize(
    ("own", "theirs", "bounds"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_colors_equal_torchvisions_image_by_image(
    own: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    bounds: tuple[float, float],
) -> None:
    images, amount = pictures(), amounts(*bounds)
    result = own(images, amount)
    expected = torch.stack([theirs(i, float(a)) for i, a in zip(images, amount, strict=True)])
    assert not torch.allclose(expected, images, atol=0.05)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize(("own", "theirs"), [c[:2] for c in CASES[:2]])
def test_brightness_and_contrast_of_one_channel(
    own: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor]
) -> None:
    images, amount = pictures(1), amounts(0.2, 1.8)
    expected = torch.stack([theirs(i, float(a)) for i, a in zip(images, amount, strict=True)])
    torch.testing.assert_close(own(images, amount), expected, rtol=0, atol=2e-6)


def test_hue_turns_primary_colors_into_one_another() -> None:
    primaries = torch.eye(3)[:, :, None, None]  # red, green, blue
    third = torch.full((3,), 1 / 3)
    torch.testing.assert_close(
        color.hue(primaries, third), primaries.roll(-1, 0), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        color.hue(primaries, -third), primaries.roll(1, 0), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(color.hue(pictures(), torch.zeros(24)), pictures())


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_equals_torchvisions(channels: int) -> None:
    images = pictures(channels)
    torch.testing.assert_close(color.grey(images), tv.rgb_to_grayscale(images))


@pytest.mark.parametrize("radius", [1, 2, 11])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_equals_torchvisions_image_by_image(radius: int, channels: int) -> None:
    images, sigma = pictures(channels), amounts(0.1, 3.0)
    result = color.blur(images, sigma, radius)
    expected = torch.stack(
        [
            tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(s)] * 2)
            for image, s in zip(images, sigma, strict=True)
        ]
    )
    assert not torch.allclose(expected, images, atol=0.05)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_inputs_are_left_alone() -> None:
    images, one = pictures(), torch.full((24,), 0.7)
    for change in (color.brightness, color.contrast, color.saturation, color.hue):
        change(images, one)
    color.blur(images, one, 2)
    assert torch.equal(images, pictures())
