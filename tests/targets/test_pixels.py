from typing import Any

import pytest
import torch
from conftest import make_objective

from hybridvit.contracts import DataSpec
from hybridvit.patches import patchify
from hybridvit.targets.pixels import PixelTarget

DATA = DataSpec(10, (16, 16), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
ALL = torch.arange(16).expand(2, -1)


def make(channels: int = 3, **args: object) -> PixelTarget:
    data = DataSpec(10, (16, 16), channels, DATA.mean, DATA.std)
    return PixelTarget(model=make_objective().model, data=data, **args)  # type: ignore[arg-type]


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_plain_pixels_are_the_patches() -> None:
    target = make()
    assert torch.equal(target.encode(images()), patchify(images(), 4))
    assert target.outputs == 48


def test_one_channel_of_grey_images() -> None:
    assert torch.equal(make(channels=1).encode(images()), patchify(images()[:, :1], 4))


@pytest.mark.parametrize("window", [None, 2, 8, 16])
def test_windows_equal_a_loop(window: int | None) -> None:
    side = window or 4
    data = (images().double() - torch.tensor(DATA.mean).double().view(3, 1, 1)) / torch.tensor(
        DATA.std
    ).double().view(3, 1, 1)
    for b in range(2):
        for top in range(0, 16, side):
            for left in range(0, 16, side):
                cut = data[b, :, top : top + side, left : left + side]
                values = cut.flatten().tolist()
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                data[b, :, top : top + side, left : left + side] = (cut - mean) / (
                    variance + 1e-6
                ) ** 0.5
    encoded = make(normalize="window", window=window).encode(images())
    torch.testing.assert_close(encoded.double(), patchify(data, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "data", "window"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_right_answer_decodes_to_the_image(normalize: str, channels: int) -> None:
    target = make(channels, normalize=normalize)
    decoded = target.decode(target.encode(images()), images(), ALL)
    assert decoded.shape == (2, 16, channels, 4, 4)
    expected = patchify(images()[:, :channels], 4)
    torch.testing.assert_close(decoded.flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "data"])
def test_without_windows_a_patch_may_be_one_pixel(normalize: Any) -> None:
    model = make_objective(stem_args={"patch": 1}).model
    target = PixelTarget(model=model, data=DATA, normalize=normalize)
    assert target.outputs == 3


def test_losses() -> None:
    values = torch.randn(2, 3, 48)
    assert float(make().loss(values + 0.5, values)) == pytest.approx(0.25)
    assert float(make(loss="l1").loss(values - 0.5, values)) == pytest.approx(0.5)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_no_constant_guess_is_better(loss: str) -> None:
    target, values = make(loss=loss), torch.randn(2, 5, 48)
    best = float(target.metrics(values, values)["constant_guess_loss"])
    patch = values.flatten(0, 1)
    others = [patch.mean(0), patch.median(0).values, patch[0], torch.zeros(48)]
    assert best <= min(float(target.loss(o.expand_as(values), values)) for o in others) + 1e-6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"normalize": "window", "window": 3}, "windows of 3 px .*choose from 2, 4, 8, 16"),
        ({"normalize": "window", "window": 1}, "windows of 1 px"),
        ({"window": 4}, "window=4 has no effect with normalize='none'"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)
