"""Random boxes against torchvision's, and antialiased resizing against torchvision's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hybridvit import draws
from hybridvit.data import crops
from hybridvit.data.crops import DRAWS, Boxes, crop_boxes, erased_boxes, inside, resize

ASPECT = (3 / 4, 4 / 3)


def uniforms(count: int) -> Tensor:
    index = torch.arange(count)
    return draws.uniform(draws.image_keys(0, torch.zeros_like(index), index), 1, DRAWS)


def noise(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, *size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_an_attempt_that_does_not_fit_is_drawn_again() -> None:
    draw = uniforms(300)
    boxes = crop_boxes(draw, (20, 30), (0.08, 1.0), ASPECT)
    tries = set()
    for i in range(300):
        u = draw[i].double().tolist()
        for attempt in range(10):
            area = (0.08 + 0.92 * u[attempt]) * 600
            ratio = (4 / 3) ** (2 * u[10 + attempt] - 1)
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < width <= 30 and 0 < height <= 20:
                break
        else:
            raise AssertionError("none of ten attempts fits")
        expected = [int(u[20] * (21 - height)), int(u[21] * (31 - width)), height, width]
        assert [int(side[i]) for side in boxes] == expected
        tries.add(attempt)
    assert {0, 1, 2} <= tries


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 40), (0, 13, 10, 13)), ((40, 10), (13, 0, 13, 10)), ((9, 10), (0, 0, 9, 10))],
)
def test_the_largest_centred_box_where_no_attempt_fits(
    size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    draw = uniforms(3)
    draw[:, :10] = 1 - 2**-24  # the whole area, which fits in no aspect that is drawn
    draw[:, 10:20] = 0 if size == (9, 10) else 0.5
    boxes = crop_boxes(draw, size, (0.9, 1.0), ASPECT)
    assert [side.tolist() for side in boxes] == [[value] * 3 for value in expected]
    if size != (9, 10):
        given = v2.RandomResizedCrop(8, scale=(0.99, 1.0)).make_params([torch.zeros(3, *size)])
        assert tuple(given[k] for k in ("top", "left", "height", "width")) == expected


def same_distribution(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Kolmogorov-Smirnov of each number, and of two sums, which show how they are related."""
    one, two = torch.tensor(ours), torch.tensor(theirs)
    for mix in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1], [2, 0, 1, 0]):
        weights = torch.tensor(mix)
        assert ks_2samp((one * weights).sum(1), (two * weights).sum(1)).pvalue > 1e-3, mix


@pytest.mark.parametrize("size", [(64, 64), (30, 64)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    transform, picture = v2.RandomResizedCrop(8, scale=(0.08, 1.0)), [torch.zeros(3, *size)]
    theirs = [list(transform.make_params(picture).values()) for _ in range(3000)]
    ours = torch.stack(crop_boxes(uniforms(3000), size, (0.08, 1.0), ASPECT), dim=1)
    same_distribution(ours.tolist(), theirs)


@pytest.mark.parametrize("size", [(64, 64), (20, 64)])
def test_erased_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    transform, picture = v2.RandomErasing(scale=(0.02, 0.33)), [torch.zeros(3, *size)]
    given = [transform.make_params(picture) for _ in range(3000)]
    theirs = [[p["i"], p["j"], p["h"] * (p["v"] is not None), p["w"]] for p in given]
    boxes = erased_boxes(uniforms(3000), size, (0.02, 0.33), (1 / 3.3, 1 / 0.3))
    same_distribution(torch.stack(boxes, dim=1).tolist(), theirs)
    assert (boxes.height < size[0]).all()


def test_no_box_where_none_is_smaller_than_the_image() -> None:
    boxes = erased_boxes(uniforms(50), (4, 4), (0.99, 1.0), (0.999, 1.001))
    assert not inside(boxes, (4, 4)).any()


def test_inside_is_the_box() -> None:
    boxes = Boxes(*(torch.tensor(side) for side in ([1, 0], [2, 0], [2, 4], [1, 3])))
    result, expected = inside(boxes, (4, 5)), torch.zeros(2, 4, 5, dtype=torch.bool)
    expected[0, 1:3, 2:3] = True
    expected[1, 0:4, 0:3] = True
    assert torch.equal(result, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "out"),
    [((33, 40), (24, 24)), ((33, 40), (48, 60)), ((200, 150), (16, 32)), ((8, 8), (8, 8))],
)
def test_parts_are_resized_as_by_torchvision(
    size: tuple[int, int], out: tuple[int, int], channels: int
) -> None:
    images, flipped = noise(30, channels, size), torch.arange(30) % 3 == 0
    boxes = crop_boxes(uniforms(30), size, (0.02, 1.0), ASPECT)
    result = resize(images, boxes, out, flipped)
    assert result.dtype == torch.uint8
    for i in range(30):
        box = [int(side[i]) for side in boxes]
        expected = tv.resized_crop(images[i], *box, list(out), antialias=True)
        expected = expected.flip(2) if flipped[i] else expected
        difference = (result[i].float() - expected.float()).abs()
        assert difference.mean() < 0.35  # of 255; each pass rounds, torchvision at times the last
        assert difference.max() <= 2


def test_a_box_of_the_output_size_is_copied() -> None:
    images = noise(4, 3, (12, 12))
    boxes = Boxes(*(torch.tensor(side) for side in ([0, 1, 2, 3], [4, 3, 2, 1], [8] * 4, [8] * 4)))
    result = resize(images, boxes, (8, 8), torch.zeros(4, dtype=torch.bool))
    for i in range(4):
        assert torch.equal(result[i], images[i, :, i : i + 8, 4 - i : 12 - i])


def test_flat_colours_stay() -> None:
    value = torch.arange(256, dtype=torch.uint8)[:, None, None, None]
    boxes = crop_boxes(uniforms(256), (100, 90), (0.01, 1.0), ASPECT)
    for out in ((7, 9), (110, 130)):
        result = resize(value.expand(256, 1, 100, 90), boxes, out, torch.zeros(256).bool())
        assert torch.equal(result, value.expand(256, 1, *out))


@pytest.mark.parametrize(
    ("size", "out"), [((40, 40), (40, 40)), ((28, 20), (20, 28)), ((256, 200), (64, 64))]
)
def test_pixels_do_not_depend_on_the_batch(size: tuple[int, int], out: tuple[int, int]) -> None:
    images, flipped = noise(19, 3, size), torch.arange(19) % 2 == 0
    boxes = crop_boxes(uniforms(19), size, (0.02, 1.0), ASPECT)
    together = resize(images, boxes, out, flipped)
    for part in (slice(0, 1), slice(3, 10), slice(18, 19)):
        some = Boxes(*(side[part] for side in boxes))
        assert torch.equal(resize(images[part], some, out, flipped[part]), together[part])


@pytest.mark.parametrize(("pixels", "count"), [(9, 9), (9, 16), (16, 9)])
def test_weights_that_are_looked_up_are_those_computed(
    pixels: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every box, both ways round."""
    boxes = [(s, n, f) for n in range(1, pixels + 1) for s in range(pixels - n + 1) for f in (0, 1)]
    start, length, flipped = torch.tensor(boxes).unbind(1)
    found = [
        (crops._weights(start, length, pixels, count), flipped * 0),
        (crops._weights(start, length, pixels, count, flipped.bool()), flipped),
    ]
    monkeypatch.setattr(crops, "KEPT", 0)
    for looked_up, ways in found:
        computed = crops._weights(start, length, pixels, count, ways.bool())
        assert torch.equal(looked_up, computed)
        assert (computed.sum(2) - 1).abs().max() < 0.01
    assert not torch.equal(found[0][0], found[1][0])


def test_runs_by_shape_alone() -> None:
    boxes = crop_boxes(uniforms(5).to("meta"), (9, 9), (0.1, 1.0), ASPECT)
    images = torch.empty(5, 3, 9, 9, dtype=torch.uint8, device="meta")
    flipped = torch.empty(5, dtype=torch.bool, device="meta")
    assert resize(images, boxes, (6, 4), flipped).shape == (5, 3, 6, 4)
    assert inside(erased_boxes(uniforms(5).to("meta"), (9, 9), (0.1, 1.0), ASPECT), (9, 9)).is_meta
