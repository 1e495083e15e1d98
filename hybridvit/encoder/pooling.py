"""From the encoder's tokens to one feature vector an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvit.encoder.attention import attend
from hybridvit.encoder.mlp import Mlp


class AttentionPool(nn.Module):
    """Multi-head attention pooling with one learned query (Zhai et al. 2022, section 3.4)."""

    def __init__(
        self, dim: int, heads: int, *, mlp_ratio: float, norm_eps: float, activation: nn.Module
    ) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, dropout=0.0)
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) tokens to (B, D)."""
        b, n, d = x.shape
        q = self.q(self.latent).reshape(1, 1, self.heads, -1).expand(b, -1, -1, -1)
        k, v = self.kv(x).reshape(b, n, 2, self.heads, -1).unbind(2)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = self.proj(out.transpose(1, 2).reshape(b, d))
        pooled: Tensor = y + self.mlp(self.norm(y))
        return pooled
