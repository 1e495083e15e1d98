"""What `Stem` promises, for every registered stem with its defaults."""

from __future__ import annotations

import pytest
import torch

from hybridvit.contracts import Stem
from hybridvit.stems import STEMS

SIZES = [(64, 64), (64, 96)]
NAMES = sorted(STEMS)


def make(name: str) -> Stem:
    """A stem with lively weights: those that start at zero would hide a dependence."""
    torch.manual_seed(0)
    stem = STEMS[name](dim=8)
    with torch.no_grad():
        for parameter in stem.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.rand_like(parameter) + 0.1)
    return stem


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_have_the_shape_of_the_declared_stride(name: str, size: tuple[int, int]) -> None:
    stem = make(name)
    grid = (size[0] // stem.patch_px, size[1] // stem.patch_px)
    visible = torch.ones(2, *grid, dtype=torch.bool)
    for tokens in (stem(torch.randn(2, 3, *size)), stem(torch.randn(2, 3, *size), visible)):
        assert tokens.x.shape == (2, grid[0] * grid[1], 8)
        assert tokens.grid == grid
        assert tokens.index is None


@pytest.mark.parametrize("name", NAMES)
def test_shifting_the_image_by_the_stride_shifts_the_tokens(name: str) -> None:
    # GroupNorm and padding see more than a patch, so equality holds for no hybrid. But away from
    # the border a shift by the true stride changes tokens far less than one by half of it.
    stem = make(name).eval()
    p = stem.patch_px
    x = torch.randn(1, 3, 6 * p, 6 * p, generator=torch.Generator().manual_seed(1))

    def distance(shift: int) -> float:
        with torch.no_grad():
            still = stem(x).x.view(6, 6, 8)
            moved = stem(x.roll((shift, shift), (2, 3))).x.view(6, 6, 8)
        return (moved[2:5, 2:5] - still[1:4, 1:4]).norm().item()

    assert distance(p) < 0.7 * distance(p // 2)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    stem = make(name)
    images = torch.randn(2, 3, 64, 64, requires_grad=True)  # some stems have no parameters
    stem(images).x.square().sum().backward()
    assert images.grad is not None
    for key, parameter in stem.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_patch_locality_is_as_declared(name: str, training: bool) -> None:
    stem = make(name).train(training)
    p = stem.patch_px
    x = torch.randn(1, 3, 4 * p, 4 * p, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[..., p : 2 * p, 2 * p : 3 * p] += 1  # patch 6, and no other
    with torch.no_grad():
        changed = (stem(x).x - stem(other).x)[0].abs().amax(dim=1) > 0
    assert changed[6]
    alone = int(changed.sum()) == 1
    assert alone == stem.is_patch_local


@pytest.mark.parametrize("name", NAMES)
def test_batch_coupling_is_as_declared(name: str) -> None:
    stem = make(name).double()
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    other = x.clone()
    other[1:] += 1 + torch.randn_like(other[1:])
    with torch.no_grad():
        gap = (stem(x).x[0] - stem(other).x[0]).abs().max()
        assert (gap > 1e-9) == stem.couples_batch
        stem.eval()
        torch.testing.assert_close(stem(x).x[0], stem(other).x[0])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_the_stride_does_not_divide_are_refused(name: str) -> None:
    stem = make(name)
    bad = stem.patch_px + 1
    message = rf"a stride of {stem.patch_px} px does not divide images of {stem.patch_px} x {bad}"
    with pytest.raises(ValueError, match=message):
        stem(torch.randn(1, 3, stem.patch_px, bad))
