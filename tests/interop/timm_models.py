"""Small timm models of any structure, redrawn so that every tensor matters."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import (
    HybridEmbed,
    StdConv2dSame,
)
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import (
    VisionTransformer,
)
from torch import Tensor, nn

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random value for a tensor of either library, such that outputs stay finite and lively."""
    factor = like.ndim == 1 and name.endswith(("weight", "gamma", "running_var"))
    if factor or name in ("mean", "std"):
        return torch.rand(like.shape, generator=generator).to(like.dtype) * 0.6 + 0.7
    if like.ndim == 1:
        scale = 0.3
    elif like.shape[0] == 1:  # class token, registers, positions, latent query
        scale = 0.5
    else:
        scale = (like.numel() / like.shape[0]) ** -0.5
    return torch.randn(like.shape, generator=generator).to(like.dtype) * scale


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Every parameter and floating buffer anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(draw(name, tensor, generator))


def images(height: int, width: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    cfg = getattr(model, "pretrained_cfg", None) or {"mean": (0, 0, 0), "std": (1, 1, 1)}
    mean, std = like.new_tensor(cfg["mean"]), like.new_tensor(cfg["std"])
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


@torch.no_grad()
def error(theirs: Any, ours: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs relative to the largest output."""
    mean, std = statistics(theirs, x)
    expected, got = theirs((x - mean) / std), ours(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == x.dtype
    assert expected.abs().max() > 0.1
    return ((got - expected).abs().max() / expected.abs().max()).item()


def assert_equal(theirs: Any, ours: nn.Module, size: tuple[int, int], batch: int = 1) -> None:
    for dtype, bound in RELATIVE.items():
        if dtype == next(theirs.parameters()).dtype:
            assert error(theirs, ours, images(*size, dtype, batch)) < bound


TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return VisionTransformer(**(TINY | options))


def bit(layers: tuple[int, ...] = (1, 1), **options: Any) -> nn.Module:
    standard: dict[str, Any] = {
        "preact": False, "stem_type": "same", "num_classes": 0, "global_pool": "",
        "channels": (32, 64), "stem_chs": 8, "conv_layer": partial(StdConv2dSame, eps=1e-8),
        "norm_layer": partial(timm.layers.GroupNormAct, num_groups=4),
    }  # fmt: skip
    return ResNetV2(list(layers), **(standard | options))


def hybrid(backbone: nn.Module, embed: dict[str, Any] | None = None, **options: Any) -> Any:
    layer = partial(HybridEmbed, backbone=backbone, **(embed or {}))
    return vit(**({"embed_layer": layer, "patch_size": 1, "img_size": 32} | options))


def bn_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
    )


def edited_bit(part: str, name: str, value: Any) -> nn.Module:
    backbone = bit()
    setattr(backbone.get_submodule(part), name, value)
    return backbone
