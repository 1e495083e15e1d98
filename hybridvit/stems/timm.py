"""Tokens from a feature map of any timm backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvit.backbones import create_timm
from hybridvit.contracts import PatchSide, Stem, Tokens
from hybridvit.data.files import one_line
from hybridvit.patches import grid_of
from hybridvit.stems.masked import as_tokens, projection


def timm_stem(
    *,
    dim: int,
    backbone: str = "resnet26d",
    level: int = 4,
    patch: PatchSide = 1,
    pretrained: bool = False,
) -> FeatureMapStem:
    """Feature map of any timm backbone, by name and level.

    Args:
        backbone: a name that `timm.list_models()` shows.
        level: index of the feature map; for ResNets level k has stride 2^(k+1).
        patch: side of a patch on the feature map.
        pretrained: load timm's weights (downloads them). The images are then normalised with the
            mean and std that the weights were trained with, not with the data set's.

    Raises:
        ValueError: unknown backbone, no feature maps, no such level, or a backbone that takes
            images of one size only.
    """
    if patch < 1:
        raise ValueError(f"stem 'timm': patch={patch} must be at least 1")
    try:
        network = create_timm(backbone, pretrained, features_only=True, out_indices=(level,))
        proj = projection(network.feature_info.channels()[-1], dim, patch)
        stem = FeatureMapStem(network, proj)
    except ValueError as error:
        raise ValueError(f"stem 'timm': {error} (backbone={backbone!r}, level={level})") from error
    if pretrained:
        known = network.pretrained_cfg
        stem.normalisation = (tuple(known["mean"]), tuple(known["std"]))
    return stem


class FeatureMapStem(Stem):
    """A network's last feature map, projected to tokens.

    Args:
        backbone: (B, 3, H, W) to a feature map (B, C, H', W'), or a list of them.
        proj: (B, C, H', W') to (B, D, h, w): a convolution over patches of the feature map, or
            nothing where C is D already.
        size: side of the square image with which the backbone's stride is measured.

    The stride is measured, not assumed: names such as "r_s16_p8" do not tell it.

    Raises:
        ValueError: a backbone that does not map images of that size to a feature map.
    """

    def __init__(self, backbone: nn.Module, proj: nn.Conv2d | nn.Identity, size: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.proj = proj
        self.couples_batch = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()
        )
        # The projection's share is not measured: it would drop the rest of a map that it does not
        # divide, and so look like a larger stride.
        self.patch_px = self._measure_stride(size)
        if isinstance(proj, nn.Conv2d):
            self.patch_px *= proj.stride[0]

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        return as_tokens(self.proj(self._features(images)))

    def _features(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        x: Tensor = features[-1] if isinstance(features, list | tuple) else features
        return x

    def _measure_stride(self, size: int) -> int:
        modes = [(module, module.training) for module in self.backbone.modules()]
        image = next(self.backbone.parameters()).new_zeros(1, 3, size, size)
        self.backbone.eval()
        try:
            with torch.no_grad():
                shape = tuple(self._features(image).shape)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"a stem needs a backbone that takes images of any size, and this one refuses "
                f"{size} x {size} px ({one_line(error)})"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        channels = self.proj.in_channels if isinstance(self.proj, nn.Conv2d) else shape[1]
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or size % shape[3]:
            raise ValueError(
                f"the backbone maps {size} x {size} px to {shape}; a stem needs a feature map "
                f"(B, C, h, w) whose side divides the image's"
            )
        return size // shape[3]
