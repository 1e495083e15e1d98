"""What masked-patch prediction predicts (Dosovitskiy et al. 2021, Appendix B.1.2).

A target turns a patch (C, P, P) in [0, 1] into what a head's outputs are compared with. Grey data
sets are predicted from one channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


class ColorTarget:
    """The class of the mean colour of each of `cells` x `cells` cells of a patch.

    Raises:
        ValueError: `cells` does not divide the patch side.
    """

    def __init__(self, cells: int, channels: int, patch_px: int) -> None:
        if patch_px % cells:
            raise ValueError(
                f"objective 'masked_patch': target 'downsampled' needs a patch side that {cells} "
                f"divides, not {patch_px} px; use target 'mean_color' or another stride"
            )
        self.cells, self.channels, self.patch_px = cells, channels, patch_px
        self.classes = LEVELS**channels
        self.outputs = cells**2 * self.classes

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (B, M, C, P, P) to classes (B, M, cells^2)."""
        side = self.patch_px // self.cells
        cut: Tensor = patches.unflatten(-1, (self.cells, side)).unflatten(-3, (self.cells, side))
        colors = cut.mean(dim=(-1, -3))  # (B, M, C, cells, cells)
        return color_classes(colors.flatten(-2).mT)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of outputs (B, M, outputs)."""
        return F.cross_entropy(self._logits(prediction).flatten(0, 2), target.flatten())

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Accuracy; that of always guessing the batch's majority colour; entropy in nats."""
        counts = torch.zeros(self.classes, device=target.device)
        counts = counts.scatter_add(0, target.flatten(), torch.ones_like(target.flatten()).float())
        p = counts / target.numel()
        return {
            "accuracy": (self._logits(prediction).argmax(-1) == target).float().mean(),
            "constant_guess_accuracy": p.max(),
            "target_entropy": -torch.xlogy(p, p).sum(),
        }

    def decode(self, prediction: Tensor) -> Tensor:
        """The most likely colours as patches (B, M, C, P, P)."""
        colors = class_colors(self._logits(prediction).argmax(-1), self.channels)
        side = self.patch_px // self.cells
        cells: Tensor = colors.mT.unflatten(-1, (self.cells, self.cells))
        return cells.repeat_interleave(side, dim=-1).repeat_interleave(side, dim=-2)

    def _logits(self, prediction: Tensor) -> Tensor:
        logits: Tensor = prediction.unflatten(-1, (self.cells**2, self.classes))
        return logits


class PixelTarget:
    """The patch itself; mean squared error (the paper's L2)."""

    def __init__(self, channels: int, patch_px: int) -> None:
        self.channels, self.patch_px = channels, patch_px
        self.outputs = channels * patch_px**2

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (B, M, C, P, P) to values (B, M, C P^2)."""
        return patches.flatten(2)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of outputs (B, M, outputs)."""
        return F.mse_loss(prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of the constant guess: the batch's mean patch."""
        mean = target.mean(dim=(0, 1), keepdim=True)
        return {"constant_guess_loss": (target - mean).square().mean()}

    def decode(self, prediction: Tensor) -> Tensor:
        """Outputs as patches (B, M, C, P, P) in [0, 1]."""
        shape = (self.channels, self.patch_px, self.patch_px)
        pixels: Tensor = prediction.unflatten(-1, shape)
        return pixels.clamp(0, 1)


def make_target(name: str, channels: int, patch_px: int) -> ColorTarget | PixelTarget:
    """A target by its name in the config."""
    if name == "pixels":
        return PixelTarget(channels, patch_px)
    return ColorTarget(1 if name == "mean_color" else 4, channels, patch_px)
