"""LinearStem against the strided convolution that computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridvit.stems.linear import LinearStem


@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_strided_convolution_with_the_same_weights(bias: bool) -> None:
    stem = LinearStem(dim=7, patch=4, bias=bias).double()
    if bias:
        torch.nn.init.normal_(stem.proj.bias)
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    tokens = stem(images)
    expected = F.conv2d(images, stem.proj.weight.view(7, 3, 4, 4), stem.proj.bias, stride=4)
    assert tokens.grid == (3, 5)
    assert tokens.index is None
    torch.testing.assert_close(tokens.x, expected.flatten(2).mT, rtol=1e-12, atol=1e-12)


def test_has_the_parameters_of_equation_1() -> None:
    assert sum(p.numel() for p in LinearStem(dim=768).parameters()) == 768 * (3 * 16**2 + 1)


def test_first_weights_keep_the_variance_of_the_pixels() -> None:
    stem = LinearStem(dim=400)
    x = stem(torch.randn(4, 3, 32, 32)).x
    assert x.var().item() == pytest.approx(1.0, rel=0.3)
    assert stem.proj.bias.abs().max() == 0


def test_refuses_empty_patches() -> None:
    with pytest.raises(ValueError, match="patch=0 must be at least 1 pixel"):
        LinearStem(dim=8, patch=0)
