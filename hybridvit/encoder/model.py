"""The Vision Transformer of Dosovitskiy et al. 2021, section 3.1, as equations 1-4.

Parameter names are timm's, so that weights move between the two without a table.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.encoder.attention import Attention
from hybridvit.encoder.mlp import Activation, make_activation, make_mlp
from hybridvit.encoder.pooling import AttentionPool
from hybridvit.encoder.positions import interpolate
from hybridvit.patches import patchify, take, unpatchify


class Encoder(nn.Module):
    """A ViT of any size (default: tiny).

    Args:
        grid: (h, w) patches that the position embedding is made for.
        dim: token width D; depth: number of blocks L; heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer in units of D; of both halves for `swiglu`.
        mlp: two layers with an activation between, or a gated unit (Shazeer 2020).
        layer_scale: initial value of a learned per-channel factor of each branch, or none.
        registers: extra learned tokens that nobody reads (Darcet et al. 2024).
        position: one learned vector a position, or none.
        position_on_prefix: class and register tokens have a position too.
        pre_norm: a norm before the first block (CLIP).
        final_norm: the norm of eq. 4; with `fc_norm` it comes after pooling instead of before.
        pool: the class token, the mean of the patch tokens, or attention pooling.
        dropout: after embedding, attention projection and both MLP layers (Appendix B.1).
        drop_path: stochastic depth, from 0 at the first block to this at the last.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        mlp: Literal["mlp", "swiglu"] = "mlp",
        activation: Activation = "gelu",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        class_token: bool = True,
        registers: int = 0,
        position: Literal["learned_1d", "none"] = "learned_1d",
        position_on_prefix: bool = True,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool = False,
        pool: Literal["token", "mean", "map"] = "token",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        rates = (dropout, attention_dropout, drop_path)
        _check(dim, depth, heads, mlp_ratio, registers, class_token, pool, rates)
        self.grid, self.dim, self.depth = grid, dim, depth
        self.pool_kind = pool
        self.position_on_prefix = position_on_prefix
        self.prefix = int(class_token) + registers
        self.dropout = nn.Dropout(dropout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        learned = position == "learned_1d"
        length = grid[0] * grid[1] + (self.prefix if position_on_prefix else 0)
        self.pos_embed = nn.Parameter(torch.empty(1, length, dim)) if learned else None
        norm = partial(_norm, dim, norm_eps)
        self.norm_pre = norm(pre_norm)
        self.blocks = nn.Sequential()
        for i in range(depth):
            attn = Attention(dim, heads, bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps,
                             dropout=attention_dropout)  # fmt: skip
            layers = make_mlp(mlp, dim, int(dim * mlp_ratio), activation, dropout)
            rate = drop_path * i / max(1, depth - 1)
            self.blocks.append(Block(attn, layers, dim, norm_eps, layer_scale, dropout, rate))
        self.norm = norm(final_norm and not fc_norm)
        act = make_activation(activation)
        self.attn_pool = AttentionPool(dim, heads, mlp_ratio=mlp_ratio, norm_eps=norm_eps,
                                       activation=act) if pool == "map" else None  # fmt: skip
        self.fc_norm = norm(final_norm and fc_norm)
        self._init_weights()

    def forward(self, tokens: Tokens) -> Tensor:
        """All tokens after the last block, (B, P + N, D), the P class and register tokens first."""
        z = self.norm_pre(self.embed(tokens))  # z_0, eq. 1
        z = self.blocks(z)  # z_L, eqs. 2 and 3
        encoded: Tensor = self.norm(z)  # eq. 4, for every token
        return encoded

    def embed(self, tokens: Tokens) -> Tensor:
        """Eq. 1: class token, patch tokens, plus position embedding, (B, P + N, D)."""
        x = tokens.x
        learned = (self.cls_token, self.reg_token)
        prefix = [token.expand(len(x), -1, -1) for token in learned if token is not None]
        if self.pos_embed is not None:
            rows = self.prefix if self.position_on_prefix else 0
            pos = interpolate(self.pos_embed, self.grid, tokens.grid, rows)
            of_prefix, of_patches = pos[:, :rows], pos[:, rows:]
            if tokens.index is not None:  # positions follow their tokens
                of_patches = of_patches[0][tokens.index]
            x = x + of_patches
            if rows:
                prefix = [torch.cat(prefix, dim=1) + of_prefix]
        embedded: Tensor = self.dropout(torch.cat([*prefix, x], dim=1))
        return embedded

    def pool(self, z: Tensor) -> Tensor:
        """Encoded tokens (B, P + N, D) to image features y (B, D)."""
        if self.attn_pool is not None:
            y = self.attn_pool(z[:, self.prefix :])
        elif self.pool_kind == "token":
            y = z[:, 0]
        else:
            y = z[:, self.prefix :].mean(dim=1)
        pooled: Tensor = self.fc_norm(y)
        return pooled

    def _init_weights(self) -> None:
        # As in the paper's code: Xavier for every linear layer, 0.02 for the positions.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_embed, self.reg_token):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)


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
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.skip(self.ls1(self.dropout(self.attn(self.norm1(z)))))  # eq. 2
        return z + self.skip(self.ls2(self.mlp(self.norm2(z))))  # eq. 3

    def skip(self, branch: Tensor) -> Tensor:
        """Stochastic depth: drop the branch of whole images in training (Huang et al. 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class LayerScale(nn.Module):
    """A learned factor a channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class HybridViT(nn.Module):
    """Stem and encoder, with the normalisation of the images as a part of the model.

    Args:
        mean, std: per channel, of images in [0, 1].
        head: features to logits; objectives that classify set it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stem: Stem,
        encoder: Encoder,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.head = head
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels that the position embedding was made for."""
        h, w = self.encoder.grid
        return h * self.stem.patch_px, w * self.stem.patch_px

    def tokens(
        self, images: Tensor, visible: Tensor | None = None, keep: Tensor | None = None
    ) -> Tokens:
        """Patch tokens of images (B, 3, H, W) in [0, 1].

        Args:
            visible: (B, h, w) bool for the stem, see `Stem.forward`.
            keep: (B, K) int64, row-major positions to give tokens of; by default all. A
                patch-local stem computes no others: it is given the kept patches side by side, as
                one image of 1 x K patches.
        """
        normalised = (images - self.mean) / self.std
        if keep is None:
            tokens: Tokens = self.stem(normalised, visible)
            return tokens
        p = self.stem.patch_px
        if self.stem.is_patch_local:
            strip = unpatchify(take(patchify(normalised, p), keep), (1, keep.shape[1]), p)
            x = self.stem(strip).x
        else:
            x = take(self.stem(normalised, visible).x, keep)
        return Tokens(x, (images.shape[-2] // p, images.shape[-1] // p), keep)

    def features(self, images: Tensor) -> Tensor:
        """One feature vector an image, (B, D): what every probe uses."""
        return self.encoder.pool(self.encoder(self.tokens(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), or features (B, D) without a head."""
        y = self.features(images)
        return y if self.head is None else self.head(y)


def _check(
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    registers: int,
    class_token: bool,
    pool: str,
    rates: tuple[float, ...],
) -> None:
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"encoder: heads={heads} must divide dim={dim}")
    if int(dim * mlp_ratio) < 2:
        raise ValueError(f"encoder: mlp_ratio={mlp_ratio} leaves no hidden layer; 4 is usual")
    if depth < 0 or registers < 0:
        raise ValueError(f"encoder: depth={depth} and registers={registers} must not be negative")
    if pool == "token" and not class_token:
        raise ValueError("encoder: pool='token' needs class_token=true; or use pool='mean'")
    if pool == "token" and depth == 0:
        raise ValueError(
            "encoder: with depth=0 the class token sees no patch; use pool='mean' or 'map'"
        )
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"encoder: dropout, attention_dropout and drop_path must be in [0, 1), not {rates}"
        )


def _norm(dim: int, eps: float, wanted: bool) -> nn.Module:
    return nn.LayerNorm(dim, eps) if wanted else nn.Identity()
