"""ResNet feature-map tokens: the hybrids of Dosovitskiy et al. 2021, section 3.1 and 4.1.

The network is BiT's (Kolesnikov et al. 2020) in its post-activation form, as in
google-research/vision_transformer `models_resnet.py`: weight-standardised convolutions with SAME
padding, GroupNorm, bottleneck blocks. With BatchNorm it is the ResNet of He et al. 2016.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Depth, PatchSide, Stem, Tokens
from hybridvit.patches import grid_of
from hybridvit.stems.masked import Norm, as_tokens, hide, make_norm, normalise, projection


class ResNetStem(Stem):
    """ResNet feature map with weight standardisation and GroupNorm: the paper's hybrid.

    R50 with stage 4 removed and its layers in stage 3 (stride 16) is `blocks: [3, 4, 9]`, the
    default; R50 with stage 4 (stride 32) `[3, 4, 6, 3]`; R26 `[2, 2, 2, 2]`; `[]` is the root
    alone. GroupNorm takes its statistics over the whole feature map, so every token depends on
    every pixel. Weight standardisation makes up for what GroupNorm lacks beside BatchNorm (Qiao et
    al. 2019); with `norm: batch` the convolutions are plain.

    Args:
        blocks: bottleneck blocks per stage.
        strides: stride of each stage; by default 1 for the first and 2 for the others.
        width: factor of all channels and of the number of groups (32 at width 1).
        root_kernel, root_stride: of the first convolution, in pixels.
        root_pool: 3x3 max pooling of stride 2 after the root.
        patch: side of a patch on the feature map (1 in the paper).
        norm: GroupNorm and weight standardisation, or BatchNorm without.
        masked: hide hidden patches inside the stem, too (docs/masked-stems.md).

    Raises:
        ValueError: a width that gives no whole group, strides that do not match the blocks.
    """

    def __init__(
        self,
        *,
        dim: int,
        blocks: tuple[Depth, ...] = (3, 4, 9),
        strides: tuple[int, ...] | None = None,
        width: float = 1.0,
        root_kernel: int = 7,
        root_stride: int = 2,
        root_pool: bool = True,
        patch: PatchSide = 1,
        norm: Norm = "group",
        masked: bool = False,
    ) -> None:
        super().__init__()
        groups, strides = _check(width, blocks, strides, root_kernel, root_stride, patch)
        self.root = StdConv(3, 2 * groups, root_kernel, root_stride, norm == "group")
        self.root_norm = make_norm(norm, 2 * groups, groups)
        self.root_pool = root_pool
        channels = 2 * groups
        stages = []
        for i, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            out = 8 * groups * 2**i
            steps = [stride] + [1] * (count - 1)
            sizes = [channels] + [out] * (count - 1)
            pairs = zip(sizes, steps, strict=True)
            stages.append(nn.Sequential(*(Bottleneck(n, out, s, groups, norm) for n, s in pairs)))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.proj = projection(channels, dim, patch)
        self.couples_batch = norm == "batch"
        self.masked = masked
        self.patch_px = root_stride * (2 if root_pool else 1) * math.prod(strides) * patch

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        visible = visible if self.masked else None
        x = self.root(hide(images, visible))
        x = F.relu(normalise(self.root_norm, x, visible))
        if self.root_pool:
            x = hide(F.max_pool2d(pad_same(x, 3, 2, value=-math.inf), 3, 2), visible)
        stage: Any
        for stage in self.stages:
            for block in stage:
                x = block(x, visible)
        return as_tokens(self.proj(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; norm and ReLU after each, ReLU after the sum."""

    def __init__(
        self, channels: int, out: int, stride: int, groups: int, norm: Norm = "group"
    ) -> None:
        super().__init__()
        mid, std = out // 4, norm == "group"
        self.conv1, self.norm1 = StdConv(channels, mid, 1, 1, std), make_norm(norm, mid, groups)
        self.conv2, self.norm2 = StdConv(mid, mid, 3, stride, std), make_norm(norm, mid, groups)
        self.conv3, self.norm3 = StdConv(mid, out, 1, 1, std), make_norm(norm, out, groups)
        nn.init.zeros_(self.norm3.weight)  # each block starts as its shortcut
        self.downsample = (
            nn.Sequential(StdConv(channels, out, 1, stride, std), make_norm(norm, out, groups))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        y = F.relu(normalise(self.norm1, self.conv1(x), visible))
        y = F.relu(normalise(self.norm2, self.conv2(y), visible))
        y = normalise(self.norm3, self.conv3(y), visible)
        if isinstance(self.downsample, nn.Sequential):
            conv, norm = self.downsample
            x = normalise(norm, conv(x), visible)
        return F.relu(y + x)


class StdConv(nn.Conv2d):
    """Convolution with SAME padding whose filters are standardised (Qiao et al. 2019), or plain."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, standardise: bool = True
    ) -> None:
        super().__init__(channels, out, kernel, stride, bias=False)
        self.standardise = standardise
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.standardise:  # layer normalisation of each filter, which is one kernel
            flat = weight.flatten(1)
            weight = F.layer_norm(flat, flat.shape[1:], eps=1e-8).view_as(weight)
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom, left, right = same_pads(x, kernel, stride)
        if (top, left) == (bottom, right):  # the convolution pads, without a copy
            return F.conv2d(x, weight, stride=stride, padding=(top, left))
        return F.conv2d(pad_same(x, kernel, stride), weight, stride=stride)


def same_pads(x: Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding (top, bottom, left, right): output side ceil(input / stride), the
    odd pixel at the end."""

    def around(size: int) -> tuple[int, int]:
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    return (*around(x.shape[-2]), *around(x.shape[-1]))


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Images or features (B, C, H, W) with `same_pads` around them."""
    top, bottom, left, right = same_pads(x, kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value)


def _check(
    width: float,
    blocks: tuple[int, ...],
    strides: tuple[int, ...] | None,
    root_kernel: int,
    root_stride: int,
    patch: int,
) -> tuple[int, tuple[int, ...]]:
    groups = 32 * width
    if groups < 1 or groups != int(groups):
        raise ValueError(f"stem 'resnet': width={width} must be a multiple of 1/32")
    if strides is None:
        strides = (1,) + (2,) * (len(blocks) - 1) if blocks else ()
    if len(strides) != len(blocks):
        raise ValueError(
            f"stem 'resnet': {len(strides)} strides for {len(blocks)} stages; give one each"
        )
    if min((*blocks, *strides, root_kernel, root_stride, patch)) < 1:
        raise ValueError("stem 'resnet': blocks, strides, root and patch must be at least 1")
    return int(groups), tuple(strides)
