"""Splits kept on the device."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from hybridvit.data.resident import Resident, fits
from hybridvit.data.splits import ArraySplit, DecodedSplit, subset


def decoded(count: int) -> DecodedSplit:
    return DecodedSplit(
        lambda i: Image.new("RGB", (9, 9), (i % 256, i // 256, 7)),
        torch.arange(count),
        (4, 4),
        3,
    )


def test_holds_every_image_in_order() -> None:
    split = decoded(700)
    resident = Resident(split, "cpu", progress=False)
    assert len(resident) == 700
    assert resident.images().dtype == torch.uint8
    assert torch.equal(resident.images(), split.read_many(range(700)))
    assert torch.equal(resident.labels, split.labels)


def test_holds_the_images_of_a_subset() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 2, 2)
    split = subset(ArraySplit(images, torch.arange(10)), torch.tensor([8, 3]))
    resident = Resident(split, "cpu", progress=False)
    assert resident.images()[:, 0, 0, 0].tolist() == [8, 3]
    assert resident.index.tolist() == resident.labels.tolist() == [8, 3]


@pytest.mark.parametrize("picked", [torch.arange(10), torch.tensor([8, 3])])
def test_arrays_of_that_size_stay_where_they_are(picked: torch.Tensor) -> None:
    whole = ArraySplit(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
    resident = Resident(subset(whole, picked), "cpu", progress=False)
    whole.images[int(picked[0])] = 7
    assert resident.images()[0, 0, 0, 0] == 7
    assert resident.images(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [7, 0]


def test_enlarged_arrays_are_resized_once() -> None:
    split = ArraySplit(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8), torch.zeros(3), (5, 5))
    assert torch.equal(
        Resident(split, "cpu", progress=False).images(),
        torch.full((3, 1, 5, 5), 9, dtype=torch.uint8),
    )


def test_progress_is_shown_while_decoding_slowly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm

    original = tqdm.tqdm
    options: list[dict[str, object]] = []

    def record(**given: object) -> object:
        options.append(given)
        return original(**{**given, "delay": 0})

    monkeypatch.setattr(tqdm, "tqdm", record)
    Resident(decoded(5), "cpu", progress=True)
    assert "decode" in capsys.readouterr().err
    Resident(decoded(5), "cpu", progress=False)
    assert capsys.readouterr().err == ""
    assert all(given["delay"] for given in options)


def test_a_damaged_image_stops_decoding() -> None:
    def decode(place: int) -> Image.Image:
        raise ValueError("image 'x.jpg' cannot be decoded")

    with pytest.raises(ValueError, match=r"x\.jpg"):
        Resident(DecodedSplit(decode, torch.zeros(600), (4, 4), 3), "cpu", progress=False)


def test_fits_up_to_a_gibibyte() -> None:
    def of(count: int, side: int) -> bool:
        split = DecodedSplit(lambda i: Image.new("L", (1, 1)), torch.zeros(count), (side, side), 1)
        return fits(split)

    assert of(2**10, 2**10)
    assert not of(2**10 + 1, 2**10)
