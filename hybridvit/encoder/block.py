"""A transformer block (Dosovitskiy et al. 2021, eqs. 2 and 3).

Parameter names are timm's, so that weights move between the two without a table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridvit.encoder.attention import Attention
from hybridvit.encoder.positions import UNPLACED, Places
from hybridvit.patches import take


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(
        self,
        attn: Attention,
        mlp: nn.Module,
        dim: int,
        norm_eps: float,
        layer_scale: float | None,
        dropout: float,
        drop_path: float,
        pos_embed: Tensor | None = None,
        pos_embed_map: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed, self.pos_embed_map = pos_embed, pos_embed_map
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(
        self,
        z: Tensor,
        places: Places = UNPLACED,
        survivors: Survivors = (None, None),
        read: Tensor | None = None,
    ) -> Tensor:
        """Eqs. 2 and 3, (B, N, D). It reads no `drop_path`, so that compiled once it serves all
        blocks.

        Args:
            read: (B, R) int64, the rows to compute alone, (B, R, D), where tokens attend alike
                wherever they are.
        """
        of_attention, of_mlp = survivors
        x = self.norm1(z)
        if read is None:
            attended = self.attn(x, places)
        else:
            z, attended = take(z, read), self.attn.of_some(take(x, read), x)
        z = z + scaled(self.ls1(self.dropout(attended)), of_attention)
        return z + scaled(self.ls2(self.mlp(self.norm2(z))), of_mlp)

    def survivors(self, z: Tensor) -> Survivors:
        """Stochastic depth: drop branches of whole images in training (Huang et al. 2016).

        Returns:
            the factors (B, 1, 1) of both branches, if any are dropped.
        """
        if not self.training or self.drop_path == 0:
            return (None, None)
        keep = torch.rand(2, len(z), 1, 1, device=z.device) >= self.drop_path
        of_attention, of_mlp = keep / (1 - self.drop_path)
        return (of_attention, of_mlp)


Survivors = tuple[Tensor, Tensor] | tuple[None, None]
RunBlock = Callable[[Block, Tensor, Places, Survivors, Tensor | None], Tensor]


def run_block(
    block: Block, z: Tensor, places: Places, survivors: Survivors, read: Tensor | None
) -> Tensor:
    """Tokens z (B, P + N, D) after a block, or some of them."""
    after: Tensor = block(z, places, survivors, read)
    return after


def scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    """A branch (B, N, D) times a factor (B, 1, 1), if there is one."""
    return branch if factor is None else branch * factor.to(branch.dtype)


class LayerScale(nn.Module):
    """A learned factor a channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
