"""Convolution and pooling tokenizer (Compact Transformers, Hassani et al. 2021, section 3.3)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Depth, Stem, Tokens
from hybridvit.patches import grid_of
from hybridvit.stems.masked import as_tokens, check_kernel, hide


class CCTStem(Stem):
    """Convolution, ReLU and max pooling, `layers` times; the last convolution gives the tokens.

    The default is the tokenizer of CCT-14/7x2 (stride 16); CCT-7/3x1, the paper's for images of
    32 px, has `layers: 1, kernel: 3, stride: 1` (stride 2). The convolutions have no bias.

    Args:
        layers: convolutions, each followed by pooling.
        kernel, stride: of each convolution, in pixels of its input.
        pool_kernel, pool_stride: of each pooling; 1 and 1 for none.
        channels: of the convolutions before the last.
        masked: hide hidden patches inside the stem, too (docs/masked-stems.md).

    Raises:
        ValueError: no layers or channels, or a kernel that is even or too small for its stride.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: Depth = 2,
        kernel: int = 7,
        stride: int = 2,
        pool_kernel: int = 3,
        pool_stride: int = 2,
        channels: int = 64,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1 or channels < 1:
            raise ValueError(
                f"stem 'cct': layers={layers} and channels={channels} must be at least 1"
            )
        check_kernel("cct", "kernel", kernel, stride)
        check_kernel("cct", "pool_kernel", pool_kernel, pool_stride, least=1)
        self.patch_px = (stride * pool_stride) ** layers
        self.pool = nn.MaxPool2d(pool_kernel, pool_stride, pool_kernel // 2)
        self.masked = masked
        widths = [3] + [channels] * (layers - 1) + [dim]
        self.convs = nn.ModuleList()
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            self.convs.append(conv)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        visible = visible if self.masked else None
        x = images
        for conv in self.convs:
            x = F.relu(conv(hide(x, visible)))
            x = self.pool(hide(x, visible))
        return as_tokens(x)
