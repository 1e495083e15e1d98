"""Augmentation against loops over images, and its distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hybridvit import draws
from hybridvit.data import crops
from hybridvit.data import policy as policies
from hybridvit.data.augment import (
    BLUR,
    CROP,
    ERASE,
    ERASED,
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


@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crop_and_flip_are_torchvisions(channels: int) -> None:
    images, key = batch(40, channels, 7, 5)
    result = run(images, key, "pad")
    offsets = draws.integers(key, CROP, 2, 7)
    mirrored = draws.uniform(key, FLIP, 1)[:, 0] < 0.5
    for i in range(40):
        expected = tv.crop(tv.pad(images[i], [3, 3]), *offsets[i].tolist(), 7, 5)
        expected = tv.horizontal_flip(expected) if mirrored[i] else expected
        assert torch.equal(result[i], (expected / 255).expand(3, -1, -1))


def test_padded_crops_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    transform, picture = v2.RandomCrop((7, 5), padding=3), [torch.zeros(3, 7, 5)]
    given = [transform.make_params(picture) for _ in range(4000)]
    theirs = torch.tensor([[params["top"], params["left"]] for params in given])
    _, key = batch(4000, 1, 1, 1)
    ours = draws.integers(key, CROP, 2, 7)
    # A cell for each pair of offsets.
    counts = [(x @ torch.tensor([7, 1])).bincount(minlength=49).tolist() for x in (ours, theirs)]
    assert chi2_contingency(counts).pvalue > 1e-3


def test_an_erased_box_is_torchvisions() -> None:
    images, key = batch(60, 3, 20, 30)
    color = torch.tensor([0.0, 0.25, 0.75])
    result = augment(images, key, Augment(erase=1.0), (20, 30), color)
    draw = draws.uniform(key, ERASED, crops.DRAWS)
    boxes = crops.erased_boxes(draw, (20, 30), (0.02, 0.33), (1 / 3.3, 1 / 0.3))
    for i in range(60):
        top, left, height, width = (int(side[i]) for side in boxes)
        expected = tv.erase(images[i] / 255, top, left, height, width, color[:, None, None])
        assert torch.equal(result[i], expected)


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


def test_resized_crop_equals_a_loop_of_torchvisions() -> None:
    images, key = batch(60, 3, 30, 40)
    result = augment(images, key, Augment(crop="resized", scale=(0.1, 0.9), flip=True), (16, 20))
    draw = draws.uniform(key, CROP, crops.DRAWS)
    boxes = crops.crop_boxes(draw, (30, 40), (0.1, 0.9), (3 / 4, 4 / 3))
    mirrored = draws.uniform(key, FLIP, 1)[:, 0] < 0.5
    assert 15 < int(mirrored.sum()) < 45
    for i in range(60):
        box = [int(side[i]) for side in boxes]
        expected = tv.resized_crop(images[i], *box, [16, 20], antialias=True) / 255
        expected = expected.flip(2) if mirrored[i] else expected
        assert (result[i] - expected).abs().mean() < 0.3 / 255


@pytest.mark.parametrize("how", [Augment(policy="rand", flip=True), Augment(policy="trivial")])
def test_a_policy_acts_on_the_flipped_image_before_its_colours(how: Augment) -> None:
    images, key = batch(50, 3, 20, 24)
    flipped = (augment(images, key, Augment(flip=how.flip), (20, 24)) * 255).round().byte()
    chosen = policies.choices(key, how.policy, 2, 9, (20, 24))
    for operation, strength in zip(*(each.unbind(1) for each in chosen), strict=True):
        flipped = policies.apply(flipped, operation, strength)
    assert torch.equal(augment(images, key, how, (20, 24)), flipped / 255)
    later = augment(images, key, replace(how, jitter=0.5), (20, 24))
    assert torch.equal(later, augment(flipped, key, Augment(jitter=0.5), (20, 24)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_share_loses_a_box_of_the_given_colour(channels: int) -> None:
    count = 800
    images, key = batch(count, channels, 20, 30)
    before = plain(images.clamp(1, 255), (20, 30))
    color = torch.tensor([0.0, 0.25, 0.0])
    how = Augment(erase=0.4, erase_scale=(0.1, 0.2))
    after = augment(images.clamp(1, 255), key, how, (20, 30), color)
    changed = (after != before).any(1)
    lost = changed.any((1, 2))
    assert abs(float(lost.float().mean()) - 0.4) < 4 * (0.24 / count) ** 0.5
    area = changed[lost].float().mean((1, 2))
    assert area.min() > 0.1 - 0.03  # sides are rounded
    assert area.max() < 0.2 + 0.03
    for i in lost.nonzero()[:, 0].tolist():
        rows, columns = changed[i].any(1), changed[i].any(0)
        assert torch.equal(changed[i], rows[:, None] & columns)  # a box
        top, left = rows.nonzero()[:, 0], columns.nonzero()[:, 0]
        assert int(top[-1] - top[0]) + 1 == len(top)
        assert int(left[-1] - left[0]) + 1 == len(left)
        pixels = after[i, :, changed[i]]
        assert torch.equal(pixels, color[:, None].expand_as(pixels))
    black = augment(images, key, how, (20, 30))
    assert (black[changed[:, None].expand(-1, 3, -1, -1)] == 0).all()


EVERYTHING = {
    "flip": True,
    "policy": "rand",
    "jitter": 0.5,
    "grayscale": 0.4,
    "blur": 0.5,
    "erase": 0.5,
}


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


@pytest.mark.parametrize("strength", [0.6, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_colors_equal_a_loop_of_torchvisions(channels: int, strength: float) -> None:
    images, key = batch(90, channels, 40, 60)
    ranges = v2.ColorJitter(brightness=0.8 * strength, hue=min(0.5, 0.2 * strength))
    (low, high), (_, turn) = ranges.brightness, ranges.hue
    how = Augment(jitter=strength, grayscale=0.3, blur=0.4, sigma=(0.5, 2.0))
    result = augment(images, key, how, (40, 60))
    kinds = set()
    for i in range(90):
        image, one = images[i] / 255, key[i : i + 1]
        u = draws.uniform(one, JITTER, 5)[0].tolist()
        loses = draws.uniform(one, GRAYSCALE, 1).item() < 0.3
        blurs, place = draws.uniform(one, BLUR, 2)[0].tolist()
        if u[4] < 0.8:
            image = tv.adjust_brightness(image, low + (high - low) * u[0])
            image = tv.adjust_contrast(image, low + (high - low) * u[1])
            image = tv.adjust_saturation(image, low + (high - low) * u[2])
            image = tv.adjust_hue(image, turn * (2 * u[3] - 1))
        if loses:
            image = tv.rgb_to_grayscale(image, num_output_channels=channels)
        if blurs < 0.4:
            image = tv.gaussian_blur(image, [5, 5], [0.5 + 1.5 * place] * 2)  # 40 // 20 each side
        kinds.add((u[4] < 0.8, loses, blurs < 0.4))
        torch.testing.assert_close(result[i], image.expand(3, -1, -1), rtol=0, atol=5e-6)
    assert len(kinds) == 8


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_a_policy_acts_on_whole_grey_values_of_what_was_resized(policy: policies.Policy) -> None:
    images, key = batch(60, 3, 30, 40)
    whole = (plain(images, (16, 20)) * 255).round().byte()
    found = augment(images, key, Augment(policy=policy), (16, 20))
    assert torch.equal(found, augment(whole, key, Augment(policy=policy), (16, 20)))


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
    policy = {policies.OPERATION, policies.MAGNITUDE, policies.SIGN}
    assert len({CROP, FLIP, JITTER, GRAYSCALE, BLUR, ERASE, ERASED} | policy) == 10
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


@pytest.mark.parametrize(
    "how",
    [
        {"flip": True},
        {"crop": "pad"},
        {"crop": "resized"},
        {"policy": "trivial"},
        {"jitter": 0.1},
        {"grayscale": 0.1},
        {"blur": 0.1},
        {"erase": 0.1},
    ],
)
def test_whether_two_views_can_differ(how: dict[str, object]) -> None:
    assert Augment(**how).varies
    assert not Augment().varies


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_runs_by_shape_alone(crop: Crop) -> None:
    images, key = (each.to("meta") for each in batch(6, 3, 24, 24))
    result = augment(images, key, Augment(crop=crop, **EVERYTHING), (24, 24))
    assert result.shape == (6, 3, 24, 24)


def test_values_that_are_not_possible() -> None:
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
    with pytest.raises(ValueError, match="policy_ops=0 should be 1 or more operations"):
        Augment(policy="rand", policy_ops=0)
    with pytest.raises(ValueError, match="policy_magnitude=31 should be 0 to 30"):
        Augment(policy_magnitude=31)
    with pytest.raises(ValueError, match=r"erase=2.0 should be a share"):
        Augment(erase=2.0)
    with pytest.raises(ValueError, match=r"erase_scale=\[0.5, 0.2\] should be two shares"):
        Augment(erase_scale=(0.5, 0.2))
    for sigma in ((0.0, 1.0), (2.0, 1.0), (1.0,)):
        with pytest.raises(ValueError, match=r"sigma=.* should be two deviations in pixels"):
            Augment(sigma=sigma)
    with pytest.raises(ValueError, match="pad=8 should be smaller than the images of 8 x 9"):
        Augment(crop="pad", pad=8).check((8, 9))
    Augment(crop="none", pad=8).check((8, 8))
