"""OverlapStem against timm's PVTv2 embedding and a loop over visible positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_oracle import check_tokens, convolve, sparse
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import nn

from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.stems.overlap import OverlapStem


@pytest.mark.parametrize(("patch", "kernel"), [(4, 7), (2, 3), (4, 9)])
def test_equals_pvts_embedding_with_the_same_weights(patch: int, kernel: int) -> None:
    theirs = OverlapPatchEmbed(kernel, patch, embed_dim=8).double()
    nn.init.uniform_(theirs.norm.weight)
    nn.init.normal_(theirs.norm.bias)
    stem = OverlapStem(dim=8, patch=patch, kernel=kernel).double()
    stem.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 5 * patch, 3 * patch, dtype=torch.float64)
    tokens = stem(images)
    assert tokens.grid == (5, 3)
    torch.testing.assert_close(tokens.x, theirs(images).flatten(1, 2))


def test_masked_tokens_equal_a_loop_over_visible_positions() -> None:
    torch.manual_seed(0)
    stem = OverlapStem(dim=5, patch=3, masked=True).double()
    nn.init.normal_(stem.proj.bias)
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    visible = torch.rand(2, 3, 4) < 0.5
    x = convolve(sparse(images, visible), stem.proj.weight, stem.proj.bias, 3, 2)
    check_tokens(stem(images, visible).x, x.map(lambda v: stem.norm(v).detach()))


def test_masking_is_a_fill_with_the_mean() -> None:
    # Nothing else is inside to be masked.
    stem = OverlapStem(dim=5, patch=4, masked=True)
    images, visible = torch.randn(2, 3, 8, 12), torch.rand(2, 2, 3) < 0.5
    hidden = ~visible.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    filled = stem(images.masked_fill(hidden, 0))
    assert torch.equal(stem(images, visible).x, filled.x)


@pytest.mark.parametrize(("patch", "kernel"), [(4, None), (4, 9), (8, 15), (1, 3)])
def test_receptive_field_is_the_kernel(patch: int, kernel: int | None) -> None:
    stem = OverlapStem(dim=8, patch=patch, kernel=kernel)
    assert receptive_field(stem, 64) == (kernel or 7)
    assert not mixes_globally(stem, 64)


def test_default_is_the_papers_kernel() -> None:
    stem = OverlapStem(dim=8)
    assert stem.patch_px == 16
    assert stem.proj.weight.shape == (8, 3, 31, 31)
    assert stem.proj.weight.std().item() == pytest.approx((3 * 31**2) ** -0.5, rel=0.05)
    assert stem.proj.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 4, "kernel": 8}, "kernel=8 must be odd and at least 7 for a stride of 4"),
        ({"patch": 4, "kernel": 5}, "kernel=5 must be odd and at least 7"),
        ({"patch": 1}, "kernel=1 must be odd and at least 3"),
        ({"patch": 0}, "a stride of 0, which must be at least 1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OverlapStem(dim=8, **options)
    assert str(caught.value).startswith("stem 'overlap': ")
    assert "\n" not in str(caught.value)
