import pytest
import torch
import torch.nn.functional as F

from hybridvit.patches import patchify, unpatchify


def test_patchify_equals_a_loop() -> None:
    images = torch.rand(2, 3, 8, 12)
    patches = patchify(images, 4)
    n = 0
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, n], patch.flatten(1))
            n += 1


def test_patchify_equals_unfold() -> None:
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(patchify(images, 4), F.unfold(images, 4, stride=4).mT)


def test_unpatchify_is_the_inverse() -> None:
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 2), (4, 6), 2), images)


def test_a_stride_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stride of 5 px does not divide images of 8 x 12 px"):
        patchify(torch.rand(1, 3, 8, 12), 5)
