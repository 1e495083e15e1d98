"""Linear projection of flattened patches (Dosovitskiy et al. 2021, eq. 1)."""

from __future__ import annotations

from torch import Tensor, nn

from hybridvit.contracts import PatchSide, Stem, Tokens
from hybridvit.patches import grid_of, patchify


class LinearStem(Stem):
    """Linear map E of each flattened patch: the pure ViT (eq. 1).

    Args:
        patch: pixels per patch side P.
    """

    is_patch_local = True

    def __init__(self, *, dim: int, patch: PatchSide = 16, bias: bool = True) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"stem 'linear': patch={patch} must be at least 1 pixel")
        self.patch_px = patch
        self.proj = nn.Linear(3 * patch**2, dim, bias=bias)
        nn.init.trunc_normal_(self.proj.weight, std=(3 * patch**2) ** -0.5)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.proj(patchify(images, self.patch_px))  # (B, N, 3 P^2) -> (B, N, D)
        return Tokens(x, grid_of(images.shape[-2:], self.patch_px))
