"""Multi-head self-attention (Dosovitskiy et al. 2021, Appendix A, eqs. 5-8)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.encoder.linear import Linear, linear
from hybridvit.encoder.positions import (
    UNPLACED,
    Places,
    RelativeBias,
    RelativePosition,
    rotate,
)

Axis = Literal["row", "column"]
AXES: tuple[Axis, Axis] = ("row", "column")


LONG = 128  # tokens


def attend(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (B, heads, N, d) keys, (B, heads, N, e) values and
    (B, heads, M, d) queries: (B, heads, M, e).

    Args:
        bias: (1 or B, 1 or heads, M, N), -inf where a query must not see a key.
    """
    if prefers_fused(q, k, dropout, bias):
        mask = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # The scale is a factor of the product, which saves a pass over the queries.
    logits = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=shape[-1] ** -0.5)
    if bias is not None:
        logits = (logits.unflatten(0, shape[:2]) + bias).flatten(0, 1)
    attended: Tensor = F.dropout(logits.softmax(dim=-1), dropout).to(v.dtype) @ v
    whole: Tensor = attended.unflatten(0, shape[:2])
    return whole


def prefers_fused(q: Tensor, k: Tensor, dropout: float, bias: Tensor | None) -> bool:
    """Whether the fused kernel is the faster one, forward and backward together, as
    `benchmarks/attention.py` measures it.

    On CPUs its backward pass in bf16 is several times slower than plain matrix products; in float32
    it gains from one or two hundred tokens on. GPUs, which were not measured, always take it. On
    the meta device only plain products count as what they cost.
    """
    if q.is_cuda:
        return True
    plain_cpu = q.device.type == "cpu" and q.dtype == torch.float32
    return plain_cpu and k.shape[2] >= LONG and dropout == 0 and bias is None


def attend_along(
    axis: Axis, q: Tensor, k: Tensor, v: Tensor, places: Places, dropout: float = 0.0
) -> Tensor:
    """Axial attention of all patches of a grid, in order, after the class and register tokens.

    A patch attends to its row (or column) and to the class and register tokens, these to all
    tokens: what `attend` gives with `Places.masks`, for the cost of the pairs that are not masked.
    """
    first, (h, w) = places.prefix, places.grid
    lines, where = (h, 2) if axis == "row" else (w, 3)

    def cut(x: Tensor) -> Tensor:  # (B, heads, P + N, d) to (B * lines, heads, length, d)
        grid: Tensor = x[:, :, first:].unflatten(2, (h, w))
        return grid.movedim(where, 1).flatten(0, 1)

    def cut_with_prefix(x: Tensor) -> Tensor:
        prefix = x[:, None, :, :first].expand(-1, lines, -1, -1, -1).flatten(0, 1)
        return torch.cat([prefix, cut(x)], dim=2)

    out = attend(cut(q), cut_with_prefix(k), cut_with_prefix(v), dropout)
    whole: Tensor = out.unflatten(0, (-1, lines))
    patches = whole.movedim(1, where).flatten(2, 3)
    if first == 0:
        return patches
    return torch.cat([attend(q[:, :, :first], k, v, dropout), patches], dim=2)


class Attention(nn.Module):
    """Self-attention of (B, N, D) tokens with `heads` heads of width D / heads.

    Args:
        position: logits that depend on the offset between patches; class and register tokens
            have none.
        axis: patches attend along their row or column (and to class and register tokens) only.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool,
        qk_norm: bool,
        norm_eps: float,
        dropout: float,
        position: RelativePosition | RelativeBias | None = None,
        axis: Axis | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.axis = axis
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, norm_eps) if qk_norm else nn.Identity()
        self.position = position
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, places: Places = UNPLACED) -> Tensor:
        q, k, v = self._heads(x, places)
        out = self._attend(q, k, v, places, self.dropout if self.training else 0.0)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(x.shape))
        return projected

    def weights(self, x: Tensor, places: Places = UNPLACED) -> Tensor:
        """How much of each value (last) a token takes, (B, heads, N, N), in the way that
        `forward` attends: what it would give for values that are one-hot."""
        q, k, _ = self._heads(x, places)
        one_hot = torch.eye(x.shape[1], dtype=q.dtype, device=q.device)
        return self._attend(q, k, one_hot.expand(*q.shape[:2], -1, -1), places, 0.0)

    def of_some(self, queries: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives for tokens (B, M, D), which are some of all the tokens (B, N, D),
        where attention does not depend on their places."""
        (b, m, d), heads = queries.shape, (self.heads, -1)
        weights, biases = self.qkv.weight, self.qkv.bias
        q = linear(queries, weights[:d], None if biases is None else biases[:d])
        kv = linear(x, weights[d:], None if biases is None else biases[d:])
        q = q.unflatten(2, heads).transpose(1, 2)  # (B, heads, M, d)
        k, v = (part.transpose(1, 2) for part in kv.unflatten(2, (2, *heads)).unbind(2))
        dropout = self.dropout if self.training else 0.0
        out = attend(self.q_norm(q), self.k_norm(k), v, dropout)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, m, d))
        return projected

    def _heads(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, d) each."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = self.q_norm(q), self.k_norm(k)
        if places.rotation is not None:
            q, k = rotate(q, places.rotation), rotate(k, places.rotation)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places, dropout: float) -> Tensor:
        if self.axis is not None and places.masks is None:
            return attend_along(self.axis, q, k, v, places, dropout)
        return attend(q, k, v, dropout, self._bias(q, places))

    def _bias(self, q: Tensor, places: Places) -> Tensor | None:
        mask = places.masks[self.axis] if self.axis and places.masks else None
        if self.position is None:
            return mask
        logits = self.position(q[:, :, places.prefix :], places)
        bias = F.pad(logits, (places.prefix, 0, places.prefix, 0))
        return bias if mask is None else bias + mask
