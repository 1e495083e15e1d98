"""Histograms of oriented gradients (Dalal and Triggs 2005), as in MaskFeat (Wei et al. 2022)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit.contracts import DataSpec, Target
from hybridvit.patches import patchify

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class HogTarget(Target):
    """Histograms of a patch's gradient directions, the target of MaskFeat; L2.

    Gradients are central differences of each channel, the border reflected. Directions are taken
    modulo 180 degrees and counted by magnitude in `bins` equal bins, per cell and channel; each
    histogram has L2 norm 1 (or 0 where there is no gradient).

    Args:
        bins: directions (9 in the paper).
        cells: cells per side of a patch; 2 in the paper, of 8 px in patches of 16 px.

    Raises:
        ValueError: cells that do not divide the patch.
    """

    def __init__(self, *, model: HybridViT, data: DataSpec, bins: int = 9, cells: int = 2) -> None:
        super().__init__()
        self.patch_px, self.channels = model.stem.patch_px, data.channels
        if bins < 1:
            raise ValueError(f"target 'hog': bins={bins} should be at least 1; 9 is usual")
        if cells < 1 or self.patch_px % cells:
            raise ValueError(
                f"target 'hog': cells={cells} should divide the patch side of {self.patch_px} px"
            )
        self.bins, self.cells = bins, cells
        self.outputs = self.channels * cells**2 * bins

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to histograms (B, N, C bins cells^2)."""
        histograms = self.histograms(images[:, : self.channels].float())
        return patchify(histograms.flatten(1, 2), self.cells)

    def histograms(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, bins, H / cell, W / cell), each histogram of norm 1."""
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        magnitude = (across.square() + down.square()).sqrt()
        turn = torch.atan2(down, across) / math.pi * self.bins  # in (-bins, bins]
        where = turn.floor().long() % self.bins
        votes = torch.zeros_like(magnitude)[:, :, None].repeat(1, 1, self.bins, 1, 1)
        votes = votes.scatter(2, where[:, :, None], magnitude[:, :, None])
        cell = self.patch_px // self.cells
        cells = F.avg_pool2d(votes.flatten(1, 2), cell) * cell**2
        return F.normalize(cells.unflatten(1, (-1, self.bins)), dim=2)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of outputs (B, M, outputs)."""
        return F.mse_loss(outputs, target)

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of the constant guess: the batch's mean histograms."""
        guess = target.mean(dim=(0, 1), keepdim=True)
        return {"constant_guess_loss": self.loss(guess.expand_as(target), target)}

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """Each cell's edges as lines, as bright as their bin: (B, M, 1, P, P)."""
        b, m, _ = outputs.shape
        shape = (self.channels, self.bins, self.cells, self.cells)
        weights = outputs.reshape(b, m, *shape).mean(dim=2).clamp(min=0)
        strokes = self.strokes(self.patch_px // self.cells).to(weights)
        picture = torch.einsum("bmkrc,kyx->bmrycx", weights, strokes)
        return picture.reshape(b, m, 1, self.patch_px, self.patch_px).clamp(0, 1)

    def strokes(self, side: int) -> Tensor:
        """(bins, side, side): a line through the middle, across each bin's gradient."""
        angle = (torch.arange(self.bins) + 0.5) * math.pi / self.bins
        axis = torch.arange(side) - (side - 1) / 2
        along = axis[None, :, None] * angle.sin()[:, None, None]
        along = along + axis[None, None, :] * angle.cos()[:, None, None]
        return (1 - along.abs()).clamp(min=0)
