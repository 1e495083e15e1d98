import math

import pytest
import torch

from hybridvit.patches import unpatchify
from hybridvit.targets.colors import ColorTarget, class_colors, color_classes


def as_image(patches: torch.Tensor) -> torch.Tensor:
    """Patches (B, M, C, P, P) side by side, as one row of an image."""
    return unpatchify(patches.flatten(2), (1, patches.shape[1]), patches.shape[-1])


def brute_class(color: list[float]) -> int:
    """Bins of a colour, digit by digit in base 8."""
    value = 0
    for channel in color:
        value = value * 8 + min(7, max(0, math.floor(8 * channel)))
    return value


def test_512_classes_for_rgb_and_8_for_grey() -> None:
    assert ColorTarget(1, 3, 4).classes == 512
    assert ColorTarget(1, 1, 4).classes == 8


def test_color_classes_equal_a_loop() -> None:
    colors = torch.rand(200, 3)
    assert color_classes(colors).tolist() == [brute_class(c) for c in colors.tolist()]


@pytest.mark.parametrize(
    ("color", "expected"),
    [([0.0, 0.0, 0.0], 0), ([1.0, 1.0, 1.0], 511), ([0.125, 0.0, 0.0], 64), ([0.0, 0.0, 0.99], 7)],
)
def test_edges_of_the_bins(color: list[float], expected: int) -> None:
    assert color_classes(torch.tensor(color)).item() == expected


def test_class_colors_lie_in_their_class() -> None:
    classes = torch.arange(512)
    assert torch.equal(color_classes(class_colors(classes, 3)), classes)


def test_mean_color_equals_a_loop() -> None:
    patches = torch.rand(2, 5, 3, 6, 6)
    encoded = ColorTarget(1, 3, 6).encode(as_image(patches))
    assert encoded.shape == (2, 5, 1)
    for b in range(2):
        for m in range(5):
            color = [float(patches[b, m, c].double().mean()) for c in range(3)]
            assert encoded[b, m, 0] == brute_class(color)


def test_downsampled_equals_a_loop() -> None:
    patches = torch.rand(2, 3, 3, 8, 8)
    encoded = ColorTarget(4, 3, 8).encode(as_image(patches))
    assert encoded.shape == (2, 3, 16)
    for b in range(2):
        for m in range(3):
            for row in range(4):
                for column in range(4):
                    cell = patches[b, m, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                    color = [float(cell[c].double().mean()) for c in range(3)]
                    assert encoded[b, m, 4 * row + column] == brute_class(color)


def test_downsampled_needs_a_side_that_4_divides() -> None:
    with pytest.raises(ValueError, match="needs a patch side that 4 divides, not 6 px"):
        ColorTarget(4, 3, 6)


def test_loss_is_the_mean_cross_entropy() -> None:
    target = ColorTarget(4, 1, 8)
    outputs = torch.randn(2, 3, target.outputs, dtype=torch.float64)
    classes = torch.randint(8, (2, 3, 16))
    expected = 0.0
    for b in range(2):
        for m in range(3):
            for cell in range(16):
                logits = outputs[b, m, 8 * cell : 8 * cell + 8]
                expected -= float(logits.log_softmax(0)[classes[b, m, cell]])
    assert float(target.loss(outputs, classes)) == pytest.approx(expected / (2 * 3 * 16), rel=1e-10)


def test_constant_guess_and_entropy_of_known_classes() -> None:
    target = ColorTarget(1, 1, 4)
    classes = torch.tensor([[[0], [0], [0], [5]]])
    metrics = target.metrics(torch.zeros(1, 4, 8), classes)
    assert float(metrics["constant_guess_accuracy"]) == 0.75
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(metrics["target_entropy"]) == pytest.approx(entropy, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.75  # all-zero logits: class 0


@pytest.mark.parametrize("cells", [1, 4])
def test_decoding_the_right_answer_gives_each_cells_color(cells: int) -> None:
    target = ColorTarget(cells, 3, 8)
    patches = torch.rand(1, 2, 3, 8, 8)
    classes = target.encode(as_image(patches))
    logits = torch.nn.functional.one_hot(classes, 512).float().flatten(-2)
    decoded = target.decode(logits, as_image(patches), torch.arange(2)[None])
    assert decoded.shape == patches.shape
    # Each decoded cell lies within half a bin of the true mean, so it has the same class.
    assert torch.equal(target.encode(as_image(decoded)), classes)
