"""Position embeddings, which the encoder owns so that a stem ablation ablates the stem alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int
) -> Tensor:
    """A learned embedding (1, prefix + h * w, D) for another grid, by 2-D bicubic interpolation.

    The rows of class and register tokens are kept (Dosovitskiy et al. 2021, section 3.2).
    """
    if old == new:
        return pos_embed
    head, grid = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), new, mode="bicubic", antialias=True).to(head.dtype)
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
