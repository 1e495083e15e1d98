"""Pixels as they are: the control without anything to learn."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridvit.contracts import PatchSide, Stem, Tokens
from hybridvit.patches import grid_of, patchify


class RawStem(Stem):
    """Flattened patches times a fixed random matrix W (D, n), n = 3 P^2; no parameters.

    W is the same in every run. Its columns are orthogonal, W^T W = (D / n) I, if n <= D: tokens
    then hold all pixels, x W n / D. Else its rows are orthonormal, and tokens are a projection of
    the pixels to D dimensions. Either way a token's numbers have the pixels' variance.

    Args:
        patch: pixels per patch side P.
    """

    is_patch_local = True
    weight: Tensor  # (D, n)

    def __init__(self, *, dim: int, patch: PatchSide = 16) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"stem 'raw': patch={patch} must be at least 1 pixel")
        self.patch_px = patch
        self.register_buffer("weight", _orthogonal(dim, 3 * patch**2))

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = patchify(images, self.patch_px) @ self.weight.mT  # (B, N, n) -> (B, N, D)
        return Tokens(x, grid_of(images.shape[-2:], self.patch_px))


def _orthogonal(rows: int, columns: int) -> Tensor:
    shape = (max(rows, columns), min(rows, columns))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q *= r.diagonal().sign()  # the signs are free; these make the decomposition unique
    weight: Tensor = q * (rows / columns) ** 0.5 if rows >= columns else q.mT
    return weight.float().contiguous()
