"""The whole model: images to features and logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.encoder.layout import laid_out
from hybridvit.encoder.vit import Encoder
from hybridvit.patches import grid_of, patchify, take, unpatchify


class HybridViT(nn.Module):
    """Stem and encoder, with the normalisation of the images as a part of the model.

    Args:
        mean, std: per channel, of images in [0, 1].
        head: features to logits; objectives that classify set it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stem: Stem,
        encoder: Encoder,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.head = head
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels that the position embedding was made for."""
        h, w = self.encoder.grid
        return h * self.stem.patch_px, w * self.stem.patch_px

    def tokens(
        self, images: Tensor, visible: Tensor | None = None, keep: Tensor | None = None
    ) -> Tokens:
        """Patch tokens of images (B, 3, H, W) in [0, 1].

        Args:
            visible: (B, h, w) bool for the stem, see `Stem.forward`.
            keep: (B, K) int64, row-major positions to give tokens of; by default all. A
                patch-local stem computes no others: it is given the kept patches side by side, as
                one image of 1 x K patches.
        """
        normalised = (images - self.mean).div_(self.std)
        if keep is None:
            tokens: Tokens = self.stem(laid_out(normalised, self.stem), visible)
            return tokens
        p = self.stem.patch_px
        if self.stem.is_patch_local:
            strip = unpatchify(take(patchify(normalised, p), keep), (1, keep.shape[1]), p)
            x = self.stem(strip).x
        else:
            x = take(self.stem(laid_out(normalised, self.stem), visible).x, keep)
        return Tokens(x, grid_of(images.shape[-2:], p), keep)

    def features(self, images: Tensor) -> Tensor:
        """One feature vector an image, (B, D): what every probe uses."""
        return self.encoder.features(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), or features (B, D) without a head."""
        y = self.features(images)
        return y if self.head is None else self.head(y)
