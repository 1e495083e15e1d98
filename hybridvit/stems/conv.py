"""A stack of convolutions instead of the patch projection (Xiao et al. 2021)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.patches import grid_of
from hybridvit.stems.masked import Norm, as_tokens, hide, make_norm, normalise, projection


class ConvStem(Stem):
    """3x3 convolutions, each with norm and ReLU, then a 1x1 projection (Xiao et al. 2021, sec. 3).

    The default is the stem of the paper's ViT_C-4GF, with stride 16 and a receptive field of 31 px;
    ViT_C-1GF has half the channels. To keep the FLOPs of the linear stem, the paper takes one
    encoder block fewer: set `encoder.args.depth`.

    Args:
        channels: of each convolution.
        strides: of each convolution, 1 or 2; by default 2.
        norm: BatchNorm as in the paper, or GroupNorm.
        masked: hide hidden patches inside the stem, too (docs/masked-stems.md).

    Raises:
        ValueError: no channels, or strides that do not match them.
    """

    def __init__(
        self,
        *,
        dim: int,
        channels: tuple[int, ...] = (48, 96, 192, 384),
        strides: tuple[int, ...] | None = None,
        norm: Norm = "batch",
        masked: bool = False,
    ) -> None:
        super().__init__()
        strides = _check(channels, strides)
        self.patch_px = math.prod(strides)
        self.couples_batch = norm == "batch"
        self.masked = masked
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for (before, after), stride in zip(pairwise((3, *channels)), strides, strict=True):
            conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            self.convs.append(conv)
            self.norms.append(make_norm(norm, after))
        self.proj = projection(channels[-1], dim)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        visible = visible if self.masked else None
        x = hide(images, visible)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(normalise(norm, conv(x), visible))
        return as_tokens(self.proj(x))


def _check(channels: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, ...]:
    if not channels or min(channels) < 1:
        raise ValueError(f"stem 'conv': channels={list(channels)} needs one layer of 1 or more")
    if strides is None:
        strides = (2,) * len(channels)
    if len(strides) != len(channels):
        raise ValueError(
            f"stem 'conv': {len(strides)} strides for {len(channels)} convolutions; give one each"
        )
    if not {1, 2}.issuperset(strides):
        raise ValueError(
            f"stem 'conv': strides={list(strides)} must be 1 or 2 each; a 3x3 convolution does not "
            "cover more"
        )
    return tuple(strides)
