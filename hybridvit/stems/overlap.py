"""Overlapping patch projection, as in CvT (Wu et al. 2021) and PVTv2 (Wang et al. 2022)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from hybridvit.contracts import PatchSide, Stem, Tokens
from hybridvit.patches import grid_of
from hybridvit.stems.masked import as_tokens, check_kernel, hide


class OverlapStem(Stem):
    """One convolution whose kernel is larger than its stride, then LayerNorm.

    PVTv2, section 3.2: kernel 2 P - 1, stride P, padding P - 1.

    Args:
        patch: stride P in pixels.
        kernel: pixels per side that a token sees, odd; by default 2 P - 1.
        masked: hide hidden patches inside the stem, too (docs/masked-stems.md).

    Raises:
        ValueError: a kernel that is even or does not reach over the patch.
    """

    def __init__(
        self,
        *,
        dim: int,
        patch: PatchSide = 16,
        kernel: Annotated[int, range(1, 2_048)] | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        kernel = 2 * patch - 1 if kernel is None else kernel
        check_kernel("overlap", "kernel", kernel, patch)
        self.patch_px = patch
        self.masked = masked
        self.proj = nn.Conv2d(3, dim, kernel, patch, padding=kernel // 2)
        nn.init.trunc_normal_(self.proj.weight, std=(3 * kernel**2) ** -0.5)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # Conv2d types it as optional
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid_of(images.shape[-2:], self.patch_px)
        tokens = as_tokens(self.proj(hide(images, visible if self.masked else None)))
        return tokens._replace(x=self.norm(tokens.x))
