"""RawStem: pixels in other coordinates, and nothing that learns."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.stems.raw import RawStem


def patches(images: torch.Tensor, p: int) -> torch.Tensor:
    b, _, h, w = images.shape
    cut = [
        images[:, :, r : r + p, c : c + p].reshape(b, -1)
        for r in range(0, h, p)
        for c in range(0, w, p)
    ]
    return torch.stack(cut, dim=1)


def test_has_no_parameters_and_nothing_of_it_is_trained() -> None:
    stem = RawStem(dim=8, patch=4)
    assert list(stem.parameters()) == []
    assert list(stem.state_dict()) == ["weight"]
    objective = make_objective("masked_patch", "raw", stem_args={"patch": 4})
    before = objective.model.stem.weight.clone()
    objective(make_batch()).loss.backward()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    optimizer.step()
    assert torch.equal(objective.model.stem.weight, before)


@pytest.mark.parametrize("dim", [48, 64, 200])
def test_wide_tokens_hold_every_pixel(dim: int) -> None:
    stem = RawStem(dim=dim, patch=4).double()
    images = torch.randn(2, 3, 8, 12).double()
    tokens = stem(images)
    assert tokens.grid == (2, 3)
    torch.testing.assert_close(
        tokens.x @ stem.weight * 48 / dim, patches(images, 4), rtol=1e-5, atol=1e-5
    )
    gram = stem.weight.mT @ stem.weight
    torch.testing.assert_close(gram, dim / 48 * torch.eye(48).double(), rtol=1e-5, atol=1e-5)


def test_narrow_tokens_are_a_projection() -> None:
    weight = RawStem(dim=20, patch=4).weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(20), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [20, 48, 400])
def test_tokens_have_the_variance_of_pixels(dim: int) -> None:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert RawStem(dim=dim, patch=4)(images).x.var().item() == pytest.approx(1.0, rel=0.1)


def test_every_run_has_the_same_projection_and_draws_nothing() -> None:
    first = RawStem(dim=20, patch=4).weight
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(RawStem(dim=20, patch=4).weight, first)
    assert torch.equal(torch.get_rng_state(), state)
    seeds = [make_objective(stem="raw", stem_args={"patch": 4}, seed=s) for s in (0, 1)]
    assert torch.equal(seeds[0].model.stem.weight, seeds[1].model.stem.weight)


def test_refuses_empty_patches() -> None:
    with pytest.raises(ValueError, match="stem 'raw': patch=0 must be at least 1 pixel"):
        RawStem(dim=8, patch=0)
