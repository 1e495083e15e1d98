"""CCTStem against plain loops and the paper's token counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_oracle import check_tokens, convolve, max_pool, sparse
from torch import nn

from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.stems.cct import CCTStem

OPTIONS = [
    {"layers": 1, "kernel": 3, "stride": 1},
    {"layers": 1, "kernel": 7, "stride": 2},
    {"layers": 2, "kernel": 3, "stride": 1},
    {"layers": 1, "kernel": 5, "stride": 3, "pool_kernel": 1, "pool_stride": 1},
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_a_loop_over_visible_positions(options: dict[str, Any], masked: bool) -> None:
    torch.manual_seed(0)
    stem = CCTStem(dim=5, channels=4, masked=masked, **options).double()
    images = torch.randn(2, 3, 12, 24, dtype=torch.float64)
    grid = (12 // stem.patch_px, 24 // stem.patch_px)
    visible = torch.rand(2, *grid) < (0.5 if masked else 1)
    x = sparse(images, visible)
    kernel, pool, pool_stride = options["kernel"], stem.pool.kernel_size, stem.pool.stride
    for conv in stem.convs:
        x = convolve(x, conv.weight, None, options["stride"], kernel // 2).map(F.relu)
        x = max_pool(x, pool, pool_stride, pool // 2)
    tokens = stem(images, visible)
    assert tokens.grid == x.side == grid
    check_tokens(tokens.x, x)


@pytest.mark.parametrize(
    ("options", "size", "tokens"),
    [
        ({}, 224, 196),  # CCT-14/7x2
        ({"layers": 1, "kernel": 3, "stride": 1}, 32, 256),  # CCT-7/3x1
        ({"layers": 2, "kernel": 3, "stride": 1}, 32, 64),  # CCT-2/3x2
    ],
)
def test_token_counts_are_the_papers(options: dict[str, Any], size: int, tokens: int) -> None:
    with torch.device("meta"):
        stem = CCTStem(dim=384, **options)
        out = stem(torch.empty(1, 3, size, size))
    assert out.x.shape == (1, tokens, 384)
    assert size // stem.patch_px == out.grid[0]


def test_default_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        stem = CCTStem(dim=384)
    assert stem.patch_px == 16
    assert sum(p.numel() for p in stem.parameters()) == 49 * (3 * 64 + 64 * 384)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in stem.modules())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # r = 1 + sum of (kernel - 1) x product of the strides before.
        ({}, 1 + 6 + 2 * 2 + 6 * 4 + 2 * 8),
        ({"layers": 1, "kernel": 3, "stride": 1}, 1 + 2 + 2),
        ({"layers": 1, "pool_kernel": 1, "pool_stride": 1}, 7),
        ({"layers": 2, "kernel": 3, "pool_kernel": 5}, 1 + 2 + 4 * 2 + 2 * 4 + 4 * 8),
    ],
)
def test_receptive_field_follows_the_recurrence(options: dict[str, Any], expected: int) -> None:
    stem = CCTStem(dim=8, channels=4, **options)
    assert receptive_field(stem, 128) == expected
    assert not mixes_globally(stem, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers=0 and channels=64 must be at least 1"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"kernel": 4}, "kernel=4 must be odd and at least 3 for a stride of 2"),
        ({"kernel": 1, "stride": 1}, "kernel=1 must be odd and at least 3"),
        ({"kernel": 5, "stride": 4}, "kernel=5 must be odd and at least 7"),
        ({"pool_kernel": 2}, "pool_kernel=2 must be odd and at least 3 for a stride of 2"),
        ({"pool_stride": 0}, "stride of 0, which must be at least 1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CCTStem(dim=8, **options)
    assert str(caught.value).startswith("stem 'cct': ")
    assert "\n" not in str(caught.value)
