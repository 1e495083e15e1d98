"""Multi-head self-attention (Dosovitskiy et al. 2021, Appendix A, eqs. 5-8)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d) queries, keys and values.

    The fused kernel is the fast path on GPUs. On CPUs its backward pass is several times slower
    than two plain matrix products at the sizes of a ViT, and on the meta device only the plain
    ones count as what they cost.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
    return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    """Self-attention of (B, N, D) tokens with `heads` heads of width D / heads."""

    def __init__(
        self, dim: int, heads: int, *, bias: bool, qk_norm: bool, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, d)
        dropout = self.dropout if self.training else 0.0
        out = attend(self.q_norm(q), self.k_norm(k), v, dropout)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, n, d))
        return projected
