import math

import pytest
import torch
from conftest import make_objective

from hybridvit.contracts import DataSpec
from hybridvit.targets.hog import HogTarget


def make(channels: int = 3, patch: int = 4, **args: int) -> HogTarget:
    data = DataSpec(10, (16, 16), channels, (0.5,) * 3, (0.5,) * 3)
    model = make_objective(stem_args={"patch": patch}).model
    return HogTarget(model=model, data=data, **args)


def brute_force(
    image: list[list[float]], cell: int, bins: int
) -> dict[tuple[int, int], list[float]]:
    """Histograms of one channel by cell, pixel by pixel."""
    size = len(image)

    def at(row: int, column: int) -> float:
        def reflect(i: int) -> int:
            return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

        return image[reflect(row)][reflect(column)]

    cells: dict[tuple[int, int], list[float]] = {}
    for row in range(size):
        for column in range(size):
            across = at(row, column + 1) - at(row, column - 1)
            down = at(row + 1, column) - at(row - 1, column)
            degrees = math.degrees(math.atan2(down, across)) % 180
            histogram = cells.setdefault((row // cell, column // cell), [0.0] * bins)
            histogram[int(degrees / (180 / bins)) % bins] += math.hypot(across, down)
    for histogram in cells.values():
        norm = math.sqrt(sum(v * v for v in histogram))
        histogram[:] = [v / max(norm, 1e-12) for v in histogram]
    return cells


@pytest.mark.parametrize(("cells", "bins"), [(1, 9), (2, 9), (2, 4), (4, 8)])
def test_histograms_equal_a_loop(cells: int, bins: int) -> None:
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    side = 4 // cells
    histograms = make(cells=cells, bins=bins).histograms(images)
    for b in range(2):
        for c in range(3):
            expected = brute_force(images[b, c].tolist(), side, bins)
            for (row, column), histogram in expected.items():
                found = histograms[b, c, :, row, column].tolist()
                assert found == pytest.approx(histogram, abs=1e-9)


def test_patches_hold_their_own_cells() -> None:
    target, images = make(cells=2, bins=9), torch.rand(1, 3, 16, 16)
    encoded = target.encode(images)
    assert encoded.shape == (1, 16, target.outputs) == (1, 16, 3 * 9 * 4)
    histograms = target.histograms(images)  # (1, 3, 9, 8, 8)
    for n in range(16):
        row, column = 2 * (n // 4), 2 * (n % 4)
        cut = histograms[0, :, :, row : row + 2, column : column + 2]
        assert torch.equal(encoded[0, n].view(3, 9, 2, 2), cut)


def test_a_vertical_edge_has_a_horizontal_gradient_and_a_vertical_line() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1.0
    target = make(patch=16, cells=1)
    encoded = target.encode(image)
    assert encoded.view(3, 9)[:, 0].tolist() == pytest.approx([1.0] * 3)  # 0 degrees
    picture = target.decode(encoded, image, torch.zeros(1, 1, dtype=torch.long))[0, 0, 0]
    middle, side = picture[:, 7:9].mean(), picture[:, :4].mean()
    assert middle > 0.3 > side


def test_flat_images_give_no_histogram_and_no_nan() -> None:
    assert not make().encode(torch.full((1, 3, 16, 16), 0.5)).any()


def test_the_loss_is_the_mean_square() -> None:
    target, values = make(), torch.rand(2, 3, 108)
    assert float(target.loss(values + 0.1, values)) == pytest.approx(0.01, rel=1e-4)
    guess = float(target.metrics(values, values)["constant_guess_loss"])
    assert guess == pytest.approx(
        float(values.flatten(0, 1).var(0, unbiased=False).mean()), rel=1e-4
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [({"bins": 0}, "bins=0 should be at least 1"), ({"cells": 3}, "cells=3 should divide .* 4 px")],
)
def test_errors(args: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)
