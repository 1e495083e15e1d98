"""RandAugment and TrivialAugment against torchvision's, operation by operation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hybridvit import draws
from hybridvit.data import policy as policies
from hybridvit.data.policy import OPERATIONS, Policy, apply, choices

OFFICIAL = {"rand": v2.RandAugment(), "trivial": v2.TrivialAugmentWide()}
SIGNED = OPERATIONS[1:10]


def keys(count: int) -> Tensor:
    index = torch.arange(count)
    return draws.image_keys(0, torch.zeros_like(index), index)


def pictures(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Smooth ones, noise, flat ones, dark ones, and ones with few values."""
    generator = torch.Generator().manual_seed(7)
    shape = (count, channels, *size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    small = torch.rand(count, channels, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 255).byte()
    images[::2] = smooth[::2]
    images[1::6] = images[1::6] // 4 + 20
    images[3::6] = images[3::6] // 64 * 64
    images[5] = 100
    return images


def official(image: Tensor, operation: str, strength: float) -> Tensor:
    """torchvision's own dispatch, solarize with a threshold in 0 to 255."""
    if operation == "Solarize":
        return tv.solarize(image, threshold=strength)
    result: Tensor = OFFICIAL["rand"]._apply_image_or_video_transform(
        image, operation, strength, interpolation="nearest", fill={torch.Tensor: None}
    )
    return result


def official_strength(policy: Policy, operation: str, bin_: int, size: tuple[int, int]) -> float:
    values, _ = OFFICIAL[policy]._AUGMENTATION_SPACE[operation]
    magnitudes = values(31, *size)
    if magnitudes is None:
        return 0.0
    return float(magnitudes[bin_]) * (255 if operation == "Solarize" else 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 20)), (3, (37, 50))])
def test_each_operation_equals_torchvisions(
    operation: str, policy: Policy, channels: int, size: tuple[int, int]
) -> None:
    images = pictures(12, channels, size)
    place = torch.full((12,), OPERATIONS.index(operation))
    for bin_ in (0, 1, 9, 17, 30):
        for sign in (1, -1) if operation in SIGNED else (1,):
            strength = sign * official_strength(policy, operation, bin_, size)
            result = apply(images, place, torch.full((12,), strength).float())
            expected = torch.stack([official(image, operation, strength) for image in images])
            difference = (result.float() - expected.float()).abs()
            if operation in SIGNED[:5]:  # nearest pixels: a few are on the edge between two
                assert (difference > 0).float().mean() < 2e-3, strength
            else:
                assert difference.max() <= 1, strength
                assert difference.mean() < 0.06, strength


def test_operations_that_are_exact() -> None:
    images = pictures(12, 3, (32, 32))
    for operation, strength in (
        ("Identity", 0.0),
        ("TranslateX", -5.0),
        ("TranslateY", 3.0),
        ("Posterize", 2.0),
        ("Solarize", 99.5),
        ("Equalize", 0.0),
    ):
        place = torch.full((12,), OPERATIONS.index(operation))
        result = apply(images, place, torch.full((12,), strength))
        for image, changed in zip(images, result, strict=True):
            assert torch.equal(changed, official(image, operation, strength)), operation


def test_one_way_and_the_other_differ() -> None:
    images = pictures(12, 3, (32, 32))[:1].expand(2, -1, -1, -1)
    for operation in SIGNED:
        strength = torch.tensor([1.0, -1.0]) * official_strength("rand", operation, 15, (32, 32))
        up, down = apply(images, torch.full((2,), OPERATIONS.index(operation)), strength)
        assert (up != down).float().mean() > 0.3, operation


@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize("size", [(32, 32), (224, 100)])
def test_strengths_are_torchvisions(policy: Policy, size: tuple[int, int]) -> None:
    table = policies._strengths(policy, *size, torch.device("cpu"))
    assert set(OPERATIONS) == set(OFFICIAL[policy]._AUGMENTATION_SPACE)
    for i, operation in enumerate(OPERATIONS):
        assert OFFICIAL[policy]._AUGMENTATION_SPACE[operation][1] == (operation in SIGNED)
        for bin_ in range(31):
            expected = official_strength(policy, operation, bin_, size)
            assert float(table[0, i, bin_]) == pytest.approx(expected, rel=1e-6)
            mirrored = -expected if operation in SIGNED else expected
            assert float(table[1, i, bin_]) == pytest.approx(mirrored, rel=1e-6)


def chi2(counts: Counter[tuple[float, ...]], expected: dict[tuple[float, ...], float]) -> float:
    """Wilson-Hilferty's normal deviate of the chi-square statistic."""
    assert set(counts) <= set(expected)
    value = sum((counts[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    free = len(expected) - 1
    return float(((value / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free)))


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_choices_are_distributed_as_torchvisions(policy: Policy) -> None:
    """Every operation as likely, its magnitude as in the definition, both signs as likely."""
    count = 60_000
    operations, strengths = choices(keys(count), policy, 1, 9, (32, 32))
    cells: Counter[tuple[float, ...]] = Counter()
    for i in range(len(OPERATIONS)):
        for bin_ in [9] if policy == "rand" else range(31):
            value = official_strength(policy, OPERATIONS[i], bin_, (32, 32))
            share = count / len(OPERATIONS) / (1 if policy == "rand" else 31)
            for sign in (1, -1) if OPERATIONS[i] in SIGNED else (1, 1):
                cells[i, round(sign * value, 3) + 0.0] += share / 2  # type: ignore[assignment]
    pairs = zip(operations[:, 0].tolist(), strengths[:, 0].tolist(), strict=True)
    seen = Counter((i, round(value, 3) + 0.0) for i, value in pairs)
    assert chi2(seen, cells) < 3.1


def test_operations_in_turn_are_unrelated() -> None:
    operations, strengths = choices(keys(40_000), "rand", 2, 9, (32, 32))
    pairs = Counter(map(tuple, operations.tolist()))
    assert chi2(pairs, {(i, j): 40_000 / 196 for i in range(14) for j in range(14)}) < 3.1
    turned = (operations == OPERATIONS.index("Brightness")).all(1)
    signs = Counter(map(tuple, strengths[turned].sign().tolist()))
    share = int(turned.sum()) / 4
    assert chi2(signs, {(a, b): share for a in (1.0, -1.0) for b in (1.0, -1.0)}) < 3.1


def test_each_image_by_its_own_choice() -> None:
    images, operations = pictures(56, 3, (32, 32)), torch.arange(56) % 14
    strength = torch.linspace(0.1, 0.9, 56)
    together = apply(images, operations, strength)
    for i in range(56):
        alone = apply(images[i : i + 1], operations[i : i + 1], strength[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("size", [(32, 32), (3, 50)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sorting_images_or_choosing_among_results_is_the_same(
    channels: int, size: tuple[int, int]
) -> None:
    """What a CPU computes, and what devices do that cannot count without waiting."""
    images, operations = pictures(42, channels, size), torch.arange(42) % 14
    before, strength = images.clone(), torch.linspace(0.1, 0.9, 42)
    fewer = policies._sorted(images, operations, strength)
    assert torch.equal(policies._all_ways(images, operations, strength), fewer)
    assert torch.equal(images, before)


def test_no_images_are_no_error() -> None:
    none = torch.zeros(0, 3, 9, 9, dtype=torch.uint8)
    assert apply(none, torch.zeros(0).long(), torch.zeros(0)).shape == none.shape


def test_tiny_images_keep_their_sharpness() -> None:
    images = pictures(6, 3, (2, 9))
    place = torch.full((6,), OPERATIONS.index("Sharpness"))
    assert torch.equal(apply(images, place, torch.full((6,), 0.9)), images)


def test_runs_by_shape_alone() -> None:
    operations, strengths = choices(keys(4).to("meta"), "trivial", 2, 9, (8, 8))
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert apply(images, operations[:, 0], strengths[:, 0]).shape == (4, 3, 8, 8)
