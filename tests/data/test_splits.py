"""Splits: reading, subsets, held-out images and fingerprints."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from hybridvit.data.splits import (
    ArraySplit,
    DecodedSplit,
    cover,
    fingerprint,
    sample,
    split_validation,
    subset,
)


def random_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_array_split_reads_what_it_holds() -> None:
    images, labels = random_images(5, 3, 6, 4), torch.tensor([0, 1, 0, 2, 1])
    split = ArraySplit(images, labels)
    assert len(split) == 5
    assert split.size == (6, 4)
    assert split.channels == 3
    assert torch.equal(split.read(3), images[3])
    assert torch.equal(split.read_many([4, 0]), images[[4, 0]])


def test_array_split_refuses_missing_labels() -> None:
    with pytest.raises(ValueError, match="5 images have 4 labels"):
        ArraySplit(random_images(5, 1, 2, 2), torch.zeros(4))


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_does_not_depend_on_the_batch(channels: int) -> None:
    split = ArraySplit(random_images(7, channels, 32, 32), torch.zeros(7), size=(20, 20))
    together = split.read_many(range(7))
    assert together.dtype == torch.uint8
    assert together.shape == (7, channels, 20, 20)
    for i in range(7):
        assert torch.equal(split.read(i), together[i])


def test_resizing_agrees_with_pillow() -> None:
    image = random_images(1, 1, 40, 40)
    ours = ArraySplit(image, torch.zeros(1), size=(10, 10)).read(0)[0].int()
    pillow = Image.fromarray(image[0, 0].numpy()).resize((10, 10), Image.Resampling.BILINEAR)
    theirs = torch.tensor(list(pillow.tobytes())).view(10, 10)
    assert (ours - theirs).abs().max() <= 1


def test_cover_keeps_the_centre() -> None:
    image = torch.zeros(1, 1, 4, 12)
    image[..., 4:8] = 1
    assert torch.equal(cover(image, (4, 4)), torch.ones(1, 1, 4, 4))
    assert cover(image, (9, 5)).shape == (1, 1, 9, 5)
    assert cover(torch.rand(1, 3, 3, 1000), (1, 1)).shape == (1, 3, 1, 1)


def test_subset_keeps_the_original_index() -> None:
    images = random_images(6, 3, 2, 2)
    part = subset(ArraySplit(images, torch.arange(6)), torch.tensor([4, 1, 5]))
    again = subset(part, torch.tensor([2, 0]))
    assert part.labels.tolist() == part.index.tolist() == [4, 1, 5]
    assert again.labels.tolist() == again.index.tolist() == [5, 4]
    assert torch.equal(again.read_many([0, 1]), images[[5, 4]])


def test_decoded_split_asks_for_the_original_place() -> None:
    asked: list[int] = []

    def decode(place: int) -> Image.Image:
        asked.append(place)
        return Image.new("L", (4, 4), place)

    split = subset(DecodedSplit(decode, torch.zeros(9), (2, 2), 1), torch.tensor([7, 3]))
    assert split.read(1).unique().tolist() == [3]
    assert asked == [3]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 40, (40, 40, 40)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (9, 255), (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x1234, (0x12, 0x12, 0x12)),
    ],
)
def test_modes_become_rgb(mode: str, colour: int, expected: tuple[int, int, int]) -> None:
    split = DecodedSplit(lambda i: Image.new(mode, (5, 7), colour), torch.zeros(1), (3, 3), 3)
    assert split.read(0).flatten(1).unique(dim=1)[:, 0].tolist() == list(expected)


def test_palette_with_transparency_becomes_rgb() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = b"\xff\x00"
    split = DecodedSplit(lambda i: image, torch.zeros(1), (2, 2), 3)
    assert split.read(0)[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (1, 50), (33, 33), (8, 8)])
def test_decoding_covers_and_cuts_the_centre(shape: tuple[int, int]) -> None:
    width, height = shape
    image = Image.linear_gradient("L").resize((width, height))  # dark at the top
    pixels = DecodedSplit(lambda i: image, torch.zeros(1), (8, 8), 1).read(0).float()
    assert pixels.shape == (1, 8, 8)
    flipped = DecodedSplit(
        lambda i: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), torch.zeros(1), (8, 8), 1
    ).read(0)
    assert (flipped.flip(2).float() - pixels).abs().max() <= 1  # a centred cut is symmetric
    assert (pixels.diff(dim=1) >= 0).all()


def test_validation_split_is_stratified_and_complete() -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate([1000, 100, 10, 2, 1])])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    train, val = split_validation(labels, 0.1)
    assert sorted(train.tolist() + val.tolist()) == list(range(len(labels)))
    assert labels[val].bincount(minlength=5).tolist() == [100, 10, 1, 0, 0]
    assert torch.equal(train, train.sort().values)
    assert torch.equal(val, val.sort().values)


def test_every_class_keeps_a_training_image() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    train, _ = split_validation(labels, 0.99)
    assert labels[train].bincount().tolist() == [1, 1, 1]


def test_validation_split_depends_on_its_own_seed_alone() -> None:
    labels = torch.arange(200) % 4
    torch.manual_seed(1)
    first = split_validation(labels, 0.25)
    torch.manual_seed(2)
    second = split_validation(labels, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], torch.arange(0, 200)[:50])  # neither the first images


def test_a_larger_fraction_holds_out_more_of_the_same() -> None:
    labels = torch.arange(300) % 3
    small, large = (set(split_validation(labels, f)[1].tolist()) for f in (0.1, 0.3))
    assert small < large


def test_fraction_zero_is_empty_and_others_are_refused() -> None:
    labels = torch.tensor([0, 1, 1])
    train, val = split_validation(labels, 0)
    assert train.tolist() == [0, 1, 2]
    assert val.tolist() == []
    for fraction in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=f"fraction of {fraction} is not possible"):
            split_validation(labels, fraction)
    with pytest.raises(ValueError, match="takes none of 2 images in 2 classes"):
        split_validation(torch.tensor([0, 1]), 0.5)


def test_fingerprint_sees_labels_pixels_shape_and_order() -> None:
    images, labels = random_images(4, 1, 2, 8), torch.tensor([0, 1, 1, 0])
    split = ArraySplit(images, labels)
    changed = images.clone()
    changed[3, 0, 1, 7] ^= 1
    prints = [
        fingerprint(split),
        fingerprint(ArraySplit(changed, labels)),
        fingerprint(ArraySplit(images, labels.flip(0) + 1)),
        fingerprint(ArraySplit(images.reshape(4, 1, 8, 2), labels)),
        fingerprint(subset(split, torch.tensor([3, 1, 2, 0]))),
    ]
    assert len(set(prints)) == 5
    assert fingerprint(ArraySplit(images.clone(), labels.clone())) == prints[0]
    assert fingerprint(subset(split, torch.arange(4))) == prints[0]


def test_fingerprint_of_decoded_images_without_names_reads_pixels() -> None:
    def split(colour: int) -> DecodedSplit:
        return DecodedSplit(lambda i: Image.new("L", (2, 2), colour), torch.zeros(2), (2, 2), 1)

    assert fingerprint(split(1)) == fingerprint(split(1)) != fingerprint(split(2))


def test_a_sample_is_fixed_and_spread_over_all_images() -> None:
    first = sample(1000, 300)
    assert torch.equal(first, sample(1000, 300))
    assert first.unique().tolist() == first.tolist()  # ascending, each once
    assert len(first) == 300
    thirds = torch.bincount(first // 334, minlength=3).tolist()
    assert all(abs(count - 100) < 5 * (1000 * 0.3 * 0.7 / 3) ** 0.5 for count in thirds)
    assert sample(3, 3).tolist() == [0, 1, 2]


def test_a_sample_of_more_images_than_there_are() -> None:
    with pytest.raises(ValueError, match="train_images=4 is more than the 3 images"):
        sample(3, 4)
