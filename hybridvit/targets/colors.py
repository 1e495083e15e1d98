"""The classes of a patch's colours (Dosovitskiy et al. 2021, Appendix B.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit.contracts import DataSpec, Target
from hybridvit.patches import patchify

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

BITS = 3
LEVELS = 2**BITS


def color_classes(colors: Tensor) -> Tensor:
    """Colours (..., C) in [0, 1] to classes (...): 3 bits a channel, 8^C classes, red highest.

    A channel's bin is floor(8 x), clipped to 7.
    """
    bins = (colors * LEVELS).floor().clamp(0, LEVELS - 1).long()
    weights = LEVELS ** torch.arange(colors.shape[-1] - 1, -1, -1, device=colors.device)
    classes: Tensor = (bins * weights).sum(dim=-1)
    return classes


def class_colors(classes: Tensor, channels: int) -> Tensor:
    """The middle of each class's colour cube: (...) to (..., C)."""
    weights = LEVELS ** torch.arange(channels - 1, -1, -1, device=classes.device)
    bins: Tensor = classes[..., None] // weights % LEVELS
    colors: Tensor = (bins.float() + 0.5) / LEVELS
    return colors


def mean_color(*, model: HybridViT, data: DataSpec) -> ColorTarget:
    """Mean colour of a patch, 3 bits a channel: 512 classes (8 for grey)."""
    return ColorTarget(1, data.channels, model.stem.patch_px)


def downsampled(*, model: HybridViT, data: DataSpec) -> ColorTarget:
    """Mean colours of 4 x 4 cells of a patch, 3 bits a channel."""
    return ColorTarget(4, data.channels, model.stem.patch_px)


class ColorTarget(Target):
    """The class of the mean colour of each of `cells` x `cells` cells of a patch.

    Grey data sets are predicted from one channel.

    Raises:
        ValueError: `cells` does not divide the patch side.
    """

    def __init__(self, cells: int, channels: int, patch_px: int) -> None:
        super().__init__()
        if patch_px % cells:
            raise ValueError(
                f"target 'downsampled' needs a patch side that {cells} divides, not {patch_px} px; "
                "use target 'mean_color' or another stride"
            )
        self.cells, self.channels, self.patch_px = cells, channels, patch_px
        self.classes = LEVELS**channels
        self.outputs = cells**2 * self.classes

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to classes (B, N, cells^2)."""
        c, side = self.channels, self.patch_px // self.cells
        patches = patchify(images[:, :c], self.patch_px)
        cut: Tensor = patches.unflatten(-1, (c, self.cells, side, self.cells, side))
        colors = cut.mean(dim=(-1, -3))  # (B, N, C, cells, cells)
        return color_classes(colors.flatten(-2).mT)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of outputs (B, M, outputs)."""
        return F.cross_entropy(self._logits(outputs).flatten(0, 2), target.flatten())

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Accuracy; that of always guessing the batch's majority colour; entropy in nats."""
        counts = torch.zeros(self.classes, device=target.device)
        counts = counts.scatter_add(0, target.flatten(), torch.ones_like(target.flatten()).float())
        p = counts / target.numel()
        return {
            "accuracy": (self._logits(outputs).argmax(-1) == target).float().mean(),
            "constant_guess_accuracy": p.max(),
            "target_entropy": -torch.xlogy(p, p).sum(),
        }

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """The most likely colours as patches (B, M, C, P, P)."""
        colors = class_colors(self._logits(outputs).argmax(-1), self.channels)
        side = self.patch_px // self.cells
        cells: Tensor = colors.mT.unflatten(-1, (self.cells, self.cells))
        return cells.repeat_interleave(side, dim=-1).repeat_interleave(side, dim=-2)

    def _logits(self, outputs: Tensor) -> Tensor:
        logits: Tensor = outputs.unflatten(-1, (self.cells**2, self.classes))
        return logits
