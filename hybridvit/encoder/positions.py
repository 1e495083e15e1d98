"""Position embeddings, which the encoder owns so that a stem ablation ablates the stem alone.

Some act on tokens (`TokenPositions`): learned or fixed vectors that are added, multiplied or
concatenated. The others act in attention, on pairs of patches (`RelativePosition`, `RelativeBias`)
or on queries and keys (`rotate`). Class and register tokens have no place on the grid: only
`learned_1d` gives them vectors, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Tokens

Position = Literal[
    "learned_1d", "learned_2d", "sincos_2d", "relative", "relative_bias", "rope_2d", "none"
]
Combine = Literal["add", "multiply", "concat"]
ON_TOKENS = ("learned_1d", "learned_2d", "sincos_2d")
IN_ATTENTION = ("relative", "relative_bias", "rope_2d")


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


def moved(position: Position, table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A learned table of an encoder as it is for another grid: what the encoder itself computes
    when it sees one.

    As it was if it has other rows than `position` has on the old grid; and for `relative`, whose
    1-D offsets on one grid are several on another.
    """
    h, w = old
    if position == "learned_1d" and table.shape[1] >= h * w:
        return interpolate(table, old, new, table.shape[1] - h * w)
    if position == "learned_2d" and table.shape[1] == w + h:
        columns, rows = table.split((w, h), dim=1)
        columns = interpolate(columns, (1, w), (1, new[1]), 0)
        return torch.cat([columns, interpolate(rows, (1, h), (1, new[0]), 0)], dim=1)
    if position == "relative_bias" and table.shape[1] == (2 * h - 1) * (2 * w - 1):
        return interpolate(table, *_offset_grids(old, new), 0)
    return table


# --- on tokens ---


def sincos_2d(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed embedding (1, h * w, D) as in MoCo v3 and MAE (Chen et al. 2021, He et al. 2022).

    Sines and cosines of the column in the first D / 2 channels, of the row in the others, at
    D / 4 frequencies 10000^(-k / (D / 4)) (Vaswani et al. 2017).
    """
    numbers = partial(torch.arange, device=device, dtype=torch.float32)
    frequencies = 10_000 ** -(numbers(dim // 4) / (dim // 4))
    y, x = (torch.outer(numbers(count), frequencies) for count in grid)
    columns, rows = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (x, y))
    return _of_axes(columns[None], rows[None])


@dataclass(frozen=True)
class TokenPositions:
    """How tokens carry positions (Dosovitskiy et al. 2021, Appendix D.4).

    The tables are held by the encoder or, one for each layer, by its blocks.
    """

    kind: Position
    how: Combine
    grid: tuple[int, int]  # that tables are made for
    dim: int  # channels of a position
    prefix: int  # class and register tokens
    own_rows: bool  # these have rows in the table of learned_1d

    @property
    def rows(self) -> int:
        """Rows of a table that belong to class and register tokens."""
        return self.prefix if self.kind == "learned_1d" and self.own_rows else 0

    def table(self) -> Tensor:
        """A new table: a fixed buffer, or a parameter still to be filled.

        learned_1d: (1, rows + h * w, d). learned_2d: (1, w + h, d / 2), columns before rows.
        """
        h, w = self.grid
        if self.kind == "sincos_2d":
            return nn.Buffer(sincos_2d(self.grid, self.dim), persistent=False)
        if self.kind == "learned_2d":
            return nn.Parameter(torch.empty(1, w + h, self.dim // 2))
        return nn.Parameter(torch.empty(1, self.rows + h * w, self.dim))

    def map(self, dim: int) -> nn.Linear | None:
        """What makes room for a concatenated position: D to D - d channels, at first a cut."""
        return nn.Linear(dim, dim - self.dim, bias=False) if self.how == "concat" else None

    def of(self, table: Tensor, tokens: Tokens) -> tuple[Tensor | None, Tensor]:
        """A table's vectors: (1, P, d) for class and register tokens, or none, and (1 or B, N, d)
        for patch tokens."""
        if self.kind == "learned_2d":
            table = _of_axes(*table.split(self.grid[::-1], dim=1))
        if self.kind != "sincos_2d":
            table = interpolate(table, self.grid, tokens.grid, self.rows)
        elif tokens.grid != self.grid:
            table = sincos_2d(tokens.grid, self.dim, table.device).to(table.dtype)
        of_prefix, of_patches = table[:, : self.rows], table[:, self.rows :]
        if tokens.index is not None:  # positions follow their tokens
            of_patches = of_patches[0][tokens.index]
        return of_prefix if self.rows else None, of_patches

    def combine(self, z: Tensor, p: Tensor | None, to_content: nn.Linear | None) -> Tensor:
        """Tokens z (B, T, D) with their positions p (1 or B, T, d), if they have any."""
        if to_content is not None:
            p = z.new_zeros(1, z.shape[1], self.dim) if p is None else p
            return torch.cat([to_content(z), p.expand(len(z), -1, -1)], dim=-1)
        if p is None:
            return z
        return z + p if self.how == "add" else z * (1 + p)


def _of_axes(columns: Tensor, rows: Tensor) -> Tensor:
    """(1, w, d / 2) and (1, h, d / 2), concatenated for every patch: (1, h * w, d)."""
    h, w = rows.shape[1], columns.shape[1]
    columns = columns[:, None].expand(-1, h, -1, -1)
    rows = rows[:, :, None].expand(-1, -1, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(1, 2)


# --- in attention ---


class Places(NamedTuple):
    """Where a batch's tokens are, as attention wants to know it: made once for all blocks.

    What is not used is None.
    """

    prefix: int = 0  # class and register tokens, which come first and have no place
    grid: tuple[int, int] = (0, 0)
    # (1 or B, N, N): query minus key in rows and columns, as a row-major position in the
    # (2 h - 1, 2 w - 1) table of all offsets.
    offsets: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None  # cosines, sines (1 or B, 1, P + N, d / 2)
    # (1 or B, 1, P + N, P + N): 0 where query and key share a row, or a column, else -inf.
    masks: dict[str, Tensor] | None = None


UNPLACED = Places()


def places_of(
    tokens: Tokens,
    prefix: int,
    position: Position,
    attention: Literal["full", "axial"],
    head_dim: int,
) -> Places:
    """What attention has to know of the places of tokens, whichever of them are there."""
    if attention == "full" and position not in IN_ATTENTION:
        return UNPLACED
    (h, w), x = tokens.grid, tokens.x
    index = torch.arange(h * w, device=x.device)[None] if tokens.index is None else tokens.index
    row, column = index // w, index % w  # (1 or B, N)
    offsets = rotation = masks = None
    if position in ("relative", "relative_bias"):
        offsets = (_pairs(row) + h - 1) * (2 * w - 1) + _pairs(column) + w - 1
    if position == "rope_2d":
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = rope_angles(row.to(dtype), column.to(dtype), head_dim)
        angles = F.pad(angles, (0, 0, prefix, 0))[:, None]  # class and register tokens stay
        rotation = angles.cos(), angles.sin()
    if attention == "axial" and (offsets is not None or tokens.index is not None):
        masks = {"row": _mask(_pairs(row), prefix), "column": _mask(_pairs(column), prefix)}
    return Places(prefix, tokens.grid, offsets, rotation, masks)


def _pairs(x: Tensor) -> Tensor:
    """(B, N) to differences of query and key, (B, N, N)."""
    return x[:, :, None] - x[:, None, :]


def _mask(differences: Tensor, prefix: int) -> Tensor:
    apart = F.pad(differences, (prefix, 0, prefix, 0)) != 0  # no token is apart from the prefix
    return torch.zeros(apart.shape, device=apart.device).masked_fill(apart, -torch.inf)[:, None]


class RelativePosition(nn.Module):
    """Logits of attention with embeddings of offsets for keys: q . r(p_q - p_k) / sqrt(d).

    The 1-D relative attention of Dosovitskiy et al. 2021, Appendix D.4: p are row-major positions,
    and each of the 2 h w - 1 offsets has an embedding of D channels, d for each head. For another
    grid they are laid out by the offset's rows and columns and interpolated in two dimensions.
    """

    def __init__(self, grid: tuple[int, int], dim: int, heads: int) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads
        self.pos_embed = nn.Parameter(torch.empty(1, 2 * grid[0] * grid[1] - 1, dim))

    def forward(self, q: Tensor, places: Places) -> Tensor:
        """Logits (B, heads, N, N) of the patches' queries (B, heads, N, d)."""
        assert places.offsets is not None
        h, w = self.grid
        dy, dx = (torch.arange(1 - n, n, device=q.device) for n in (h, w))
        flat = (dy[:, None] * w + dx + h * w - 1).flatten()  # 2-D offsets as 1-D ones, from 0
        table: Tensor = self.pos_embed
        offsets = places.offsets
        if places.grid == self.grid:
            offsets = flat[offsets]
        else:
            table = interpolate(table[:, flat], *_offset_grids(self.grid, places.grid), 0)
        r = table[0].unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, M, d)
        logits: Tensor = q * q.shape[-1] ** -0.5 @ r.mT  # (B, heads, N, M)
        return logits.gather(-1, offsets[:, None].expand(*logits.shape[:3], -1))


class RelativeBias(nn.Module):
    """One learned number for each head and 2-D offset between patches, added to attention's
    logits (Liu et al. 2021, section 3.2, Swin; Bao et al. 2022, BEiT). Interpolated to another
    grid in two dimensions."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, (2 * grid[0] - 1) * (2 * grid[1] - 1), heads))

    def forward(self, q: Tensor, places: Places) -> Tensor:
        """Logits (1 or B, heads, N, N) for patches."""
        assert places.offsets is not None
        table = interpolate(self.pos_embed, *_offset_grids(self.grid, places.grid), 0)
        return table[0].T[:, places.offsets].transpose(0, 1)


def _offset_grids(
    old: tuple[int, int], new: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1)


def relative_logits(
    position: Position, grid: tuple[int, int], dim: int, heads: int
) -> RelativePosition | RelativeBias | None:
    """The part of a block's attention that a position needs, if it needs one."""
    if position == "relative":
        return RelativePosition(grid, dim, heads)
    return RelativeBias(grid, heads) if position == "relative_bias" else None


def rope_angles(row: Tensor, column: Tensor, head_dim: int) -> Tensor:
    """Angles (..., d / 2) of rows and columns (...): d / 4 of the column, then d / 4 of the row.

    Frequencies are 100^(-k / (d / 4)), the axial ones of Heo et al. 2024.
    """
    k = torch.arange(head_dim // 4, device=row.device, dtype=row.dtype)
    frequencies = 100 ** -(k / (head_dim // 4))
    return torch.cat([column[..., None] * frequencies, row[..., None] * frequencies], dim=-1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, heads, T, d), each pair of channels (k, k + d / 2) turned by its angle
    (Su et al. 2021, RoFormer)."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
