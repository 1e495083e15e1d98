"""ConvNeXt stages as a stem (Liu et al. 2022, "A ConvNet for the 2020s")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hybridvit.contracts import Depth, Stem, Tokens
from hybridvit.encoder.mlp import Mlp
from hybridvit.patches import grid_of
from hybridvit.stems.masked import as_tokens, hide, projection

_EPS = 1e-6  # of every LayerNorm, as in the paper's code


class ConvNeXtStem(Stem):
    """The first stages of a ConvNeXt, LayerNorm and a 1x1 projection.

    The default is ConvNeXt-T without its last stage (stride 16). The first convolution cuts
    patches; a stage after the first begins with LayerNorm and a convolution whose kernel is its
    stride. LayerNorm is over channels: it takes no statistics over positions.

    Args:
        depths: blocks per stage.
        channels: of each stage.
        strides: of each stage; by default 4 for the first and 2 for the others.
        masked: hide hidden patches inside the stem, too (docs/masked-stems.md).

    Raises:
        ValueError: lists of different lengths, or a number below 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        depths: tuple[Depth, ...] = (3, 3, 9),
        channels: tuple[int, ...] = (96, 192, 384),
        strides: tuple[int, ...] | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        strides = _check(depths, channels, strides)
        self.patch_px = math.prod(strides)
        self.masked = masked
        self.root = _patch_conv(3, channels[0], strides[0])
        self.root_norm = nn.LayerNorm(channels[0], _EPS)
        self.layers = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            if i > 0:
                self.layers.append(Downsample(channels[i - 1], width, strides[i]))
            self.layers.extend(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(channels[-1], _EPS)
        self.proj = projection(channels[-1], dim)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        visible = visible if self.masked else None
        x = _over_channels(self.root_norm, self.root(hide(images, visible)))
        for layer in self.layers:
            x = layer(x, visible)
        x = _over_channels(self.norm, x)
        return as_tokens(self.proj(hide(x, visible)))


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, an MLP of ratio 4, LayerScale; plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, _EPS)
        self.mlp = Mlp(channels, 4 * channels, nn.GELU(), 0.0)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))  # LayerScale
        for layer in (self.conv_dw, self.mlp.fc1, self.mlp.fc2):
            _init(layer)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        y = self.conv_dw(hide(x, visible)).movedim(1, -1)  # (B, H, W, C)
        y = self.gamma * self.mlp(self.norm(y))
        out: Tensor = x + y.movedim(-1, 1)
        return out


class Downsample(nn.Module):
    """LayerNorm and a convolution of patches."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, _EPS)
        self.conv = _patch_conv(channels, out, stride)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        x = _over_channels(self.norm, x)
        y: Tensor = self.conv(hide(x, visible))
        return y


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of the last axis, applied to the channels of (B, C, H, W)."""
    y: Tensor = norm(x.movedim(1, -1))
    return y.movedim(-1, 1)


def _patch_conv(channels: int, out: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, stride, stride)
    _init(conv)
    return conv


def _init(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # typed as optional


def _check(
    depths: tuple[int, ...], channels: tuple[int, ...], strides: tuple[int, ...] | None
) -> tuple[int, ...]:
    if strides is None:
        strides = (4,) + (2,) * (len(depths) - 1)
    if not len(depths) == len(channels) == len(strides):
        raise ValueError(
            f"stem 'convnext': {len(depths)} depths, {len(channels)} channels and {len(strides)} "
            "strides; give one each per stage"
        )
    if not depths or min((*depths, *channels, *strides)) < 1:
        raise ValueError(
            f"stem 'convnext': depths={list(depths)}, channels={list(channels)} and "
            f"strides={list(strides)} need one stage and numbers of at least 1"
        )
    return tuple(strides)
