"""ResNet feature-map tokens: the hybrids of Dosovitskiy et al. 2021, section 3.1 and 4.1.

The network is BiT's (Kolesnikov et al. 2020) in its post-activation form, as in
google-research/vision_transformer `models_resnet.py`: weight-standardised convolutions with SAME
padding, GroupNorm, bottleneck blocks.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.patches import check_divides


class ResNetStem(Stem):
    """ResNet feature map with weight standardisation and GroupNorm: the paper's hybrid.

    R50 with stage 4 removed and its layers in stage 3 (stride 16) is `blocks: [3, 4, 9]`, the
    default; R50 with stage 4 (stride 32) `[3, 4, 6, 3]`; R26 `[2, 2, 2, 2]`; `[]` is the root
    alone. GroupNorm takes its statistics over the whole feature map, so every token depends on
    every pixel.

    Args:
        blocks: bottleneck blocks per stage.
        strides: stride of each stage; by default 1 for the first and 2 for the others.
        width: factor of all channels and of the number of groups (32 at width 1).
        root_kernel, root_stride: of the first convolution, in pixels.
        root_pool: 3x3 max pooling of stride 2 after the root.
        patch: side of a patch on the feature map (1 in the paper).

    Raises:
        ValueError: a width that gives no whole group, strides that do not match the blocks.
    """

    def __init__(
        self,
        *,
        dim: int,
        blocks: tuple[int, ...] = (3, 4, 9),
        strides: tuple[int, ...] | None = None,
        width: float = 1.0,
        root_kernel: int = 7,
        root_stride: int = 2,
        root_pool: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        groups, strides = _check(width, blocks, strides, root_kernel, root_stride, patch)
        self.root = StdConv(3, 2 * groups, root_kernel, root_stride)
        self.root_norm = nn.GroupNorm(groups, 2 * groups)
        self.root_pool = root_pool
        channels = 2 * groups
        stages = []
        for i, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            out = 8 * groups * 2**i
            steps = [stride] + [1] * (count - 1)
            sizes = [channels] + [out] * (count - 1)
            stages.append(
                nn.Sequential(
                    *(Bottleneck(n, out, s, groups) for n, s in zip(sizes, steps, strict=True))
                )
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        nn.init.trunc_normal_(self.proj.weight, std=(channels * patch**2) ** -0.5)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # Conv2d types it as optional
        self.patch_px = root_stride * (2 if root_pool else 1) * math.prod(strides) * patch

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        check_divides(images, self.patch_px)
        x = F.relu(self.root_norm(self.root(images)))
        if self.root_pool:
            x = F.max_pool2d(pad_same(x, 3, 2, value=-math.inf), 3, 2)
        x = self.proj(self.stages(x))  # (B, D, h, w)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; norm and ReLU after each, ReLU after the sum."""

    def __init__(self, channels: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        mid = out // 4
        self.conv1, self.norm1 = StdConv(channels, mid, 1), nn.GroupNorm(groups, mid)
        self.conv2, self.norm2 = StdConv(mid, mid, 3, stride), nn.GroupNorm(groups, mid)
        self.conv3, self.norm3 = StdConv(mid, out, 1), nn.GroupNorm(groups, out)
        nn.init.zeros_(self.norm3.weight)  # each block starts as its shortcut
        self.downsample = (
            nn.Sequential(StdConv(channels, out, 1, stride), nn.GroupNorm(groups, out))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.downsample(x))


class StdConv(nn.Conv2d):
    """Convolution with SAME padding whose filters are standardised (Qiao et al. 2019)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        centred = flat - flat.mean(dim=1, keepdim=True)
        weight = centred * (centred.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, weight.view_as(self.weight), stride=self.stride)


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME padding: output side ceil(input / stride), the odd pixel at the end."""

    def around(size: int) -> list[int]:
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return [total // 2, total - total // 2]

    pads = [*around(x.shape[-1]), *around(x.shape[-2])]
    return F.pad(x, pads, value=value) if any(pads) else x


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
