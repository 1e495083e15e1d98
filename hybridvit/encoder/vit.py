"""The encoder of the Vision Transformer (Dosovitskiy et al. 2021, section 3.1): patch tokens to
features of an image.

Parameter names are timm's, so that weights move between the two without a table.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.encoder.attention import AXES, Attention
from hybridvit.encoder.block import Block, RunBlock, run_block
from hybridvit.encoder.mlp import Activation, make_activation, make_mlp
from hybridvit.encoder.pooling import AttentionPool
from hybridvit.encoder.positions import (
    IN_ATTENTION,
    ON_TOKENS,
    UNPLACED,
    Combine,
    Places,
    Position,
    TokenPositions,
    places_of,
    relative_logits,
)
from hybridvit.patches import take


class Encoder(nn.Module):
    """A ViT of any size (default: tiny).

    Args:
        grid: (h, w) patches that the position embedding is made for.
        dim: token width D; depth: number of blocks L; heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer in units of D; of both halves for `swiglu`.
        mlp: two layers with an activation between, or a gated unit (Shazeer 2020).
        layer_scale: initial value of a learned per-channel factor of each branch, or none.
        registers: extra learned tokens that nobody reads (Darcet et al. 2024).
        position: the paper's ablation (Appendix D.4) and beyond. On tokens: one learned vector a
            patch, learned vectors of column and row side by side, or fixed sines and cosines of
            them. In attention: logits from 1-D offsets, a learned bias by 2-D offset, or queries
            and keys rotated by column and row. Or none.
        position_at: positions on tokens enter once before the first block, or before every block,
            with an embedding each or one for all (Table 8).
        position_combine: z + p, z * (1 + p) with learned p = 0 at first, or [z W; p], where
            `position_dim` of the D channels are the position's and W is learned.
        position_on_prefix: class and register tokens have rows in the table of learned_1d. All
            other positions leave these tokens alone, or give them zeros in `concat`.
        attention: of all tokens to all, or axial (Appendix D.6): by turns, blocks attend along
            rows and along columns; class and register tokens see all and are seen by all. The
            paper puts two such blocks in the place of one: twice the depth.
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
        dim: Annotated[int, range(1, 65_537)] = 192,
        depth: Annotated[int, range(1_001)] = 12,
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
        position: Position = "learned_1d",
        position_at: Literal["input", "every_layer", "every_layer_shared"] = "input",
        position_combine: Combine = "add",
        position_dim: int | None = None,
        position_on_prefix: bool = True,
        attention: Literal["full", "axial"] = "full",
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool = False,
        pool: Literal["token", "mean", "map"] = "token",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        # Training may lend another function, that compiles a block or keeps less of it.
        self.run_block: RunBlock = run_block
        rates = (dropout, attention_dropout, drop_path)
        _check(dim, depth, heads, mlp_ratio, registers, class_token, pool, rates)
        _check_positions(position, position_at, position_combine, position_dim, dim, heads)
        _check_depth(depth, pool, position_at, attention, position)
        self.grid, self.dim, self.depth, self.head_dim = grid, dim, depth, dim // heads
        self.pool_kind = pool
        self.position, self.position_at, self.attention = position, position_at, attention
        self.position_combine, self.position_on_prefix = position_combine, position_on_prefix
        self.prefix = int(class_token) + registers
        self.dropout, self.attention_dropout = nn.Dropout(dropout), attention_dropout
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.on_tokens = TokenPositions(
            position, position_combine, grid, position_dim or dim, self.prefix, position_on_prefix
        ) if position in ON_TOKENS else None  # fmt: skip
        in_blocks = position_at == "every_layer"
        self.pos_embed, self.pos_embed_map = self._make_positions(not in_blocks)
        norm = partial(_norm, dim, norm_eps)
        self.norm_pre = norm(pre_norm)
        self.blocks = nn.Sequential()
        for i in range(depth):
            attn = Attention(dim, heads, bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps,
                             dropout=attention_dropout,
                             position=relative_logits(position, grid, dim, heads),
                             axis=AXES[i % 2] if attention == "axial" else None)  # fmt: skip
            layers = make_mlp(mlp, dim, int(dim * mlp_ratio), activation, dropout)
            rate = drop_path * i / max(1, depth - 1)
            block = Block(attn, layers, dim, norm_eps, layer_scale, dropout, rate,
                          *self._make_positions(in_blocks))  # fmt: skip
            self.blocks.append(block)
        self.norm = norm(final_norm and not fc_norm)
        act = make_activation(activation)
        self.attn_pool = AttentionPool(dim, heads, mlp_ratio=mlp_ratio, norm_eps=norm_eps,
                                       activation=act) if pool == "map" else None  # fmt: skip
        self.fc_norm = norm(final_norm and fc_norm)
        self._init_weights()

    def forward(self, tokens: Tokens, read: Tensor | None = None) -> Tensor:
        """Tokens after the last block, (B, P + N, D), the P class and register tokens first.

        Args:
            read: (B, R) int64, rows of these tokens to give, (B, R, D). The last block computes
                no others where it can.
        """
        z = self.norm_pre(self.embed(tokens))  # z_0, eq. 1
        places = places_of(tokens, self.prefix, self.position, self.attention, self.head_dim)
        block: Any
        for block in self.blocks:
            if self.position_at != "input":
                holder = block if self.position_at == "every_layer" else self
                z = self._place(z[:, : self.prefix], z[:, self.prefix :], tokens, holder)
            some = None
            if read is not None and block is self.blocks[-1] and self._tokens_are_alone(places):
                some, read = read, None
            z = self.run_block(block, z, places, block.survivors(z), some)  # z_1 to z_L
        encoded: Tensor = self.norm(z if read is None else take(z, read))  # eq. 4, for every token
        return encoded

    def features(self, tokens: Tokens) -> Tensor:
        """Image features y (B, D)."""
        if self.pool_kind == "token":
            first = torch.zeros(len(tokens.x), 1, dtype=torch.int64, device=tokens.x.device)
            return self.pool(self(tokens, first))
        return self.pool(self(tokens))

    def embed(self, tokens: Tokens) -> Tensor:
        """Eq. 1: class token, patch tokens, plus position embedding, (B, P + N, D)."""
        x = tokens.x
        learned = (self.cls_token, self.reg_token)
        prefix = [token.expand(len(x), -1, -1) for token in learned if token is not None]
        first = torch.cat([x.new_empty(len(x), 0, self.dim), *prefix], dim=1)
        z = self._place(first, x, tokens, self if self.position_at == "input" else None)
        embedded: Tensor = self.dropout(z)
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

    def _tokens_are_alone(self, places: Places) -> bool:
        """Whether a block gives some tokens the same values without the others: attention does
        not depend on places, and no dropout draws for all tokens at once."""
        drops = self.dropout.p > 0 or self.attention_dropout > 0
        return places is UNPLACED and not (self.training and drops)

    def _place(
        self, prefix: Tensor, patches: Tensor, tokens: Tokens, holder: Encoder | Block | None
    ) -> Tensor:
        """All tokens (B, P + N, D), with the positions that the encoder or a block holds."""
        if self.on_tokens is not None and holder is not None:
            assert holder.pos_embed is not None
            of_prefix, of_patches = self.on_tokens.of(holder.pos_embed, tokens)
            prefix = self.on_tokens.combine(prefix, of_prefix, holder.pos_embed_map)
            patches = self.on_tokens.combine(patches, of_patches, holder.pos_embed_map)
        return torch.cat([prefix, patches], dim=1) if self.prefix else patches

    def _make_positions(self, here: bool) -> tuple[Tensor | None, nn.Linear | None]:
        if self.on_tokens is None or not here:
            return None, None
        return self.on_tokens.table(), self.on_tokens.map(self.dim)

    def _init_weights(self) -> None:
        # Xavier for every linear layer, 0.02 for the positions, as in the paper's code; which has
        # layers of their own for queries, keys and values, larger by the root of 2 than of one.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A factor 1 + p starts at 1.
        std = 0.0 if self.on_tokens is not None and self.on_tokens.how == "multiply" else 0.02
        for name, parameter in self.named_parameters():
            if name.endswith("pos_embed"):
                nn.init.normal_(parameter, std=std)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        holder: Any
        for holder in (self, *self.blocks):
            if holder.pos_embed_map is not None:
                nn.init.eye_(holder.pos_embed_map.weight)  # z W is z without its last channels


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
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"encoder: dropout, attention_dropout and drop_path must be in [0, 1), not {rates}"
        )


def _check_depth(depth: int, pool: str, position_at: str, attention: str, position: str) -> None:
    if pool == "token" and depth == 0:
        raise ValueError(
            "encoder: with depth=0 the class token sees no patch; use pool='mean' or 'map'"
        )
    if position_at != "input" and depth == 0:
        raise ValueError(
            f"encoder: position_at={position_at!r} needs a layer; use depth=1 or more, or 'input'"
        )
    if position in IN_ATTENTION and depth == 0:
        raise ValueError(
            f"encoder: position={position!r} acts in attention, of which depth=0 has none; use "
            "depth=1 or more, or another position"
        )
    if attention == "axial" and (depth == 0 or depth % 2):
        raise ValueError(
            f"encoder: attention='axial' needs blocks in pairs, along rows and along columns; "
            f"use an even depth, not {depth}"
        )


def _check_positions(
    position: str, at: str, combine: str, position_dim: int | None, dim: int, heads: int
) -> None:
    if position not in ON_TOKENS and (at, combine) != ("input", "add"):
        what = "puts nothing on tokens" if position == "none" else "acts in attention"
        raise ValueError(
            f"encoder: position={position!r} {what} and takes neither position_at={at!r} nor "
            f"position_combine={combine!r}; leave them at 'input' and 'add'"
        )
    if (combine == "concat") != (position_dim is not None):
        raise ValueError(
            f"encoder: position_dim={position_dim} does not fit position_combine={combine!r}; "
            "'concat' needs the channels of a position, such as position_dim=32, the others none"
        )
    if position_dim is not None and not 0 < position_dim < dim:
        raise ValueError(
            f"encoder: position_dim={position_dim} must be at least 1 and less than dim={dim}"
        )
    for kind, multiple, width, name in (
        ("learned_2d", 2, position_dim or dim, "position_dim" if position_dim else "dim"),
        ("sincos_2d", 4, position_dim or dim, "position_dim" if position_dim else "dim"),
        ("rope_2d", 4, dim // heads, "dim / heads"),
    ):
        if position == kind and width % multiple:
            raise ValueError(
                f"encoder: position={kind!r} shares channels among two axes; {name}={width} "
                f"must be a multiple of {multiple}"
            )


def _norm(dim: int, eps: float, wanted: bool) -> nn.Module:
    return nn.LayerNorm(dim, eps) if wanted else nn.Identity()
