"""A stem of which each training step takes a fifth of a second: `slow_parts:register`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.patches import patchify

if TYPE_CHECKING:
    from hybridvit.registry import Parts


class Slow(Stem):
    """Linear map of flattened patches, after a pause."""

    patch_px = 4
    is_patch_local = True

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * self.patch_px**2, dim)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        if self.training:
            time.sleep(0.2)
        x = self.proj(patchify(images, self.patch_px))
        return Tokens(x, (images.shape[-2] // self.patch_px, images.shape[-1] // self.patch_px))


def register(parts: Parts) -> None:
    """Add it."""
    parts.stems.add("slow", Slow)
