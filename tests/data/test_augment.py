"""Augmentation against loops over images, and its distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from hybridvit import draws
from hybridvit.data.augment import (
    BLUR,
    CROP,
    FLIP,
    GRAYSCALE,
    JITTER,
    Augment,
    Crop,
    augment,
    plain,
)


def batch(count: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Random images and keys."""
    generator = torch.Generator().manual_seed(count + width)
    shape = (count, channels, height, width)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    index = torch.arange(count)
    return images, draws.image_keys(0, torch.zeros_like(index), index)


def run(images: Tensor, key: Tensor, crop: Crop, *, pad: int = 3, flip: bool = True) -> Tensor:
    size = (images.shape[2], images.shape[3])
    return augment(images, key, Augment(crop=crop, pad=pad, scale=(0.3, 0.9), flip=flip), size)


@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crop_equals_a_loop(channels: int) -> None:
    images, key = batch(40, channels, 7, 5)
    result = run(images, key, "pad")
    shifts = set()
    for i in range(40):
        top, left = draws.integers(key[i : i + 1], CROP, 2, 7)[0].tolist()
        mirrored = bool(draws.uniform(key[i : i + 1], FLIP, 1) < 0.5)
        shifts.add((top, left, mirrored))
        for y in range(7):
            for x in range(5):
                row, column = top + y - 3, left + (4 - x if mirrored else x) - 3
                inside = 0 <= row < 7 and 0 <= column < 5
                expected = images[i, :, row, column] / 255 if inside else torch.zeros(channels)
                assert torch.equal(result[i, :, y, x], expected.expand(3))
    assert len(shifts) > 20


def test_flip_alone_mirrors_half() -> None:
    images, key = batch(400, 3, 4, 6)
    result = run(images, key, "none")
    mirrored = 0
    for image, out in zip(images / 255, result, strict=True):
        assert torch.equal(out, image) != torch.equal(out, image.flip(2))
        mirrored += torch.equal(out, image.flip(2))
    assert abs(mirrored - 200) < 4 * 10  # four deviations of a fair coin
    assert torch.equal(run(images, key, "none", flip=False), images / 255)


def test_crop_offsets_are_uniform_and_unrelated_to_flips() -> None:
    count = 20_000
    _, key = batch(count, 1, 1, 1)
    # A picture that says where each pixel came from: its row and column.
    images = (torch.arange(16)[:, None] * 16 + torch.arange(16)).to(torch.uint8)
    result = run(images.expand(count, 1, 16, 16), key, "pad", pad=2) * 255
    centre = result[:, 0, 8, 8].round().long()
    mirrored = result[:, 0, 8, 7] > result[:, 0, 8, 8]
    rows = centre // 16 - 8 + 2
    columns = torch.where(mirrored, centre % 16 - 7, centre % 16 - 8) + 2
    cells = torch.stack([rows, columns, mirrored.long()]).unique(dim=1, return_counts=True)
    assert cells[0].shape[1] == 5 * 5 * 2
    expected = count / 50
    chi2 = float(((cells[1] - expected) ** 2 / expected).sum())
    assert chi2 < 85.4  # 99.9 % of a chi-square distribution with 49 degrees of freedom


def test_resized_crop_equals_a_loop_of_resizes() -> None:
    # On a linear ramp, bilinear sampling is exact: the result shows the crop's box.
    size = 64
    ramp = torch.arange(size).float()
    images = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    images = torch.cat([images, images[:1]])[None].expand(300, -1, -1, -1).to(torch.uint8)
    _, key = batch(300, 1, 1, 1)
    how = Augment(crop="resized", scale=(0.3, 0.9), flip=True)
    result = augment(images, key, how, (16, 16)) * 255
    inner = slice(2, -2)  # away from the border, where sampling is clamped
    dx, dy = result[:, 0].diff(dim=2)[:, inner, inner], result[:, 1].diff(dim=1)[:, inner, inner]
    assert (dx - dx.mean((1, 2), keepdim=True)).abs().max() < 1e-3
    width, height = dx.mean((1, 2)).abs() * 16, dy.mean((1, 2)) * 16
    mirrored = dx.mean((1, 2)) < 0
    assert 100 < int(mirrored.sum()) < 200
    share, aspect = width * height / size**2, width / height
    assert share.min() > 0.3 * 0.99
    assert share.max() < 0.9 * 1.01
    assert abs(float(share.mean()) - 0.6) < 0.05
    assert aspect.min() > 0.74
    assert aspect.max() < 1.34
    assert abs(float(aspect.log().mean())) < 0.03
    assert (width <= size * 1.001).all()
    assert (height <= size * 1.001).all()
    # The first sampled point is half an output pixel inside the box, which is inside the image.
    top = result[:, 1, 3, 5] + 0.5 - 3.5 * height / 16
    assert (top > -0.01).all()
    assert (top + height < size + 0.01).all()


EVERYTHING = {"flip": True, "jitter": 0.5, "grayscale": 0.4, "blur": 0.5}


@pytest.mark.parametrize("colors", [False, True])
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_neighbours(
    crop: Crop, channels: int, colors: bool
) -> None:
    how = Augment(crop=crop, pad=2, scale=(0.1, 1.0), **(EVERYTHING if colors else {}))
    images, key = batch(37, channels, 40, 40)
    together = augment(images, key, how, (40, 40))
    assert together.shape == (37, 3, 40, 40)
    assert together.dtype == torch.float32
    assert together.min() >= 0
    assert together.max() <= 1
    for part in (slice(0, 1), slice(5, 18), slice(36, 37), slice(0, 36)):
        alone = augment(images[part], key[part], how, (40, 40))
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_equal_a_loop_of_torchvisions(channels: int) -> None:
    images, key = batch(90, channels, 40, 60)
    how = Augment(jitter=0.6, grayscale=0.3, blur=0.4, sigma=(0.5, 2.0))
    result = augment(images, key, how, (40, 60))
    kinds = set()
    for i in range(90):
        image, one = images[i] / 255, key[i : i + 1]
        u = draws.uniform(one, JITTER, 5)[0].tolist()
        loses = draws.uniform(one, GRAYSCALE, 1).item() < 0.3
        blurs, place = draws.uniform(one, BLUR, 2)[0].tolist()
        if u[4] < 0.8:
            low, width = 1 - 0.8 * 0.6, 2 * 0.8 * 0.6
            image = tv.adjust_brightness(image, low + width * u[0])
            image = tv.adjust_contrast(image, low + width * u[1])
            image = tv.adjust_saturation(image, low + width * u[2])
            image = tv.adjust_hue(image, 0.12 * (2 * u[3] - 1))
        if loses:
            image = tv.rgb_to_grayscale(image, num_output_channels=channels)
        if blurs < 0.4:
            image = tv.gaussian_blur(image, [5, 5], [0.5 + 1.5 * place] * 2)  # 40 // 20 each side
        kinds.add((u[4] < 0.8, loses, blurs < 0.4))
        torch.testing.assert_close(result[i], image.expand(3, -1, -1), rtol=0, atol=5e-6)
    assert len(kinds) == 8


def test_shares_of_what_is_varied() -> None:
    images, key = batch(4000, 3, 4, 4)
    before = plain(images, (4, 4))
    for share, how in (
        (0.8, Augment(jitter=0.5)),
        (0.2, Augment(grayscale=0.2)),
        (0.5, Augment(blur=0.5, sigma=(1.0, 1.0))),
    ):
        result = augment(images, key, how, (4, 4))
        changed = float((result != before).any(dim=(1, 2, 3)).float().mean())
        # Images that are not chosen stay as they are, to the bit.
        assert abs(changed - share) < 4 * (share * (1 - share) / 4000) ** 0.5, how


def test_jitter_covers_its_ranges_evenly() -> None:
    # On a flat colour contrast does nothing but round, so brightness shows in the value, ...
    count = 4000
    _, key = batch(count, 1, 1, 1)
    images = torch.full((count, 1, 2, 2), 100, dtype=torch.uint8)
    value = augment(images, key, Augment(jitter=0.5), (2, 2))[:, 0, 0, 0] * 255 / 100
    changed = value[(value - 1).abs() > 1e-4]
    assert 0.6 - 1e-3 < changed.min() < 0.61
    assert 1.39 < changed.max() < 1.4 + 1e-3
    assert abs(float(changed.mean()) - 1) < 4 * 0.8 / 12**0.5 / 3200**0.5
    # ... and the hue of a pure red in which channel takes part of it: by up to 36 degrees.
    red = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 200
    result = augment(red, key, Augment(jitter=0.5), (2, 2))[:, :, 0, 0]
    low = result.amin(dim=1)
    turn = (result[:, 1] - result[:, 2]) / (result[:, 0] - low) / 6
    assert turn.abs().max() < 0.1 + 1e-3
    assert turn.min() < -0.095
    assert turn.max() > 0.095


def test_grey_sets_stay_grey() -> None:
    images, key = batch(50, 1, 24, 24)
    result = augment(images, key, Augment(crop="resized", **EVERYTHING), (24, 24))
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])
    # Losing a colour that an image has not changes nothing.
    kept = augment(images, key, Augment(), (24, 24))
    assert torch.equal(augment(images, key, Augment(grayscale=1.0), (24, 24)), kept)


def test_each_variation_has_draws_of_its_own() -> None:
    assert len({CROP, FLIP, JITTER, GRAYSCALE, BLUR}) == 5
    images, key = batch(50, 3, 24, 24)
    both = augment(images, key, Augment(crop="pad", flip=True, jitter=0.5), (24, 24))
    crop = augment(images, key, Augment(crop="pad", flip=True), (24, 24))
    once_more = augment((crop * 255).round().byte(), key, Augment(jitter=0.5), (24, 24))
    torch.testing.assert_close(both, once_more, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_any_size_becomes_the_asked_one(crop: Crop) -> None:
    images, key = batch(3, 1, 20, 30)
    for size in ((8, 8), (40, 24)):
        how = Augment(crop=crop, pad=2, **EVERYTHING)
        assert augment(images, key, how, size).shape == (3, 3, *size)


def test_augmentation_changes_with_the_epoch_alone() -> None:
    images, _ = batch(8, 3, 16, 16)
    index = torch.arange(8)
    first, again, later = (
        run(images, draws.image_keys(0, torch.full_like(index, epoch), index), "pad")
        for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_plain_changes_nothing_but_the_type() -> None:
    images, _ = batch(4, 1, 8, 8)
    assert torch.equal(plain(images, (8, 8)), (images / 255).expand(-1, 3, -1, -1))
    assert plain(images, (5, 9)).shape == (4, 3, 5, 9)


def test_values_that_are_not_possible() -> None:
    with pytest.raises(ValueError, match="crop='random' should be one of none, pad, resized"):
        Augment(crop="random")
    with pytest.raises(ValueError, match="pad=-1 should be 0 or more"):
        Augment(pad=-1)
    for scale in ((0.0, 1.0), (0.5, 0.2), (0.5, 1.5), (0.5,)):
        with pytest.raises(ValueError, match=r"scale=.* should be two shares"):
            Augment(scale=scale)
    with pytest.raises(ValueError, match=r"jitter=3.0 should be a strength in \[0, 2.5\]"):
        Augment(jitter=3.0)
    with pytest.raises(ValueError, match=r"grayscale=-0.1 should be a share"):
        Augment(grayscale=-0.1)
    with pytest.raises(ValueError, match=r"blur=1.5 should be a share"):
        Augment(blur=1.5)
    for sigma in ((0.0, 1.0), (2.0, 1.0), (1.0,)):
        with pytest.raises(ValueError, match=r"sigma=.* should be two deviations in pixels"):
            Augment(sigma=sigma)
    with pytest.raises(ValueError, match="pad=8 should be smaller than the images of 8 x 9"):
        Augment(crop="pad", pad=8).check((8, 9))
    Augment(crop="none", pad=8).check((8, 8))
