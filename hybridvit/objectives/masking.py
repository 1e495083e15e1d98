"""Which patches are hidden, and how. Every draw is a function of the image's key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hybridvit import draws

_WHICH = draws.stream("masking.which")
_HOW = draws.stream("masking.how")
_SOURCE = draws.stream("masking.source")
_UNITS = draws.stream("masking.units")
_BLOCKS = draws.stream("masking.blocks")
_CUT = draws.stream("masking.cut")

Mask = Literal["random", "block"]
LEAST_BLOCK = 16 / 196  # of all units: a block's smallest area (Bao et al. 2022, Algorithm 1)
ASPECTS = (0.3, 1 / 0.3)  # height to width of a block (there)


@dataclass(frozen=True)
class Masking:
    """Masks that hide the same number of patches of every image.

    Args:
        grid: (h, w) patches.
        kind: single units, or blocks of them (after Bao et al. 2022, Algorithm 1). There a block
            is at most as large as what is still missing; here as all that is to be hidden, so that
            blocks are fewer and larger, and the last one is cut to the count, row by row.
        ratio: share of hidden units, rounded up.
        unit: patches per side of a unit; units are hidden as a whole.

    Raises:
        ValueError: units that do not tile the grid; a ratio that hides nothing or everything.
    """

    grid: tuple[int, int]
    kind: Mask
    ratio: float
    unit: int

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.unit < 1 or h % self.unit or w % self.unit:
            sides = [u for u in range(1, min(h, w) + 1) if not (h % u or w % u)]
            valid = [str(u) for u in sides if h * w > u * u]  # one unit cannot be hidden in part
            raise ValueError(
                f"masking: unit={self.unit} does not tile the grid of {h} x {w} patches; choose "
                f"from {', '.join(valid)}"
            )
        if not 0 < self.ratio < 1 or not 0 < self.hidden_units < self.units[0] * self.units[1]:
            raise ValueError(
                f"masking: ratio={self.ratio} of {self.units[0]} x {self.units[1]} units of "
                f"{self.unit} x {self.unit} patches should hide some and leave some"
            )

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of units."""
        return self.grid[0] // self.unit, self.grid[1] // self.unit

    @property
    def hidden_units(self) -> int:
        """Hidden units an image."""
        # 0.6 * 15 is 9.000000000000002 or 8.999...; neither should round up to 10.
        return math.ceil(round(self.units[0] * self.units[1] * self.ratio, 9))

    @property
    def hidden(self) -> int:
        """Hidden patches an image."""
        return self.hidden_units * self.unit**2

    def draw(self, key: Tensor) -> Tensor:
        """(B, h, w) bool for keys (B,), true where hidden."""
        rows, columns = self.units
        rank = draws.permutation(key, _UNITS, rows * columns)  # of units, (B, rows * columns)
        if self.kind == "block":
            rank = torch.argsort(self._order(key, rank), dim=1)
        first = rank[:, : self.hidden_units]
        none = torch.zeros(len(key), rows * columns, dtype=torch.bool, device=key.device)
        units: Tensor = none.scatter(1, first, True).unflatten(1, (rows, columns))
        return units.repeat_interleave(self.unit, dim=1).repeat_interleave(self.unit, dim=2)

    def _order(self, key: Tensor, rank: Tensor) -> Tensor:
        """(B, units), in whose order units are hidden: blocks one after the other, each row by row
        from above or from below, then by rank what no block covers."""
        block, blocks = self._first_block(key)
        count = rank.shape[1]
        place = torch.arange(count, device=key.device)
        from_below = draws.integers(key, _CUT, 1, 2) == 1
        place = torch.where(from_below, count - 1 - place, place)
        return block + torch.where(block < blocks, place, rank) / count

    def _first_block(self, key: Tensor) -> tuple[Tensor, int]:
        """(B, units): which of a series of random blocks covers a unit first, the series' length
        where none does; and that length."""
        rows, columns = self.units
        least = max(1.0, LEAST_BLOCK * rows * columns)
        blocks = 2 * math.ceil(self.hidden_units / least) + 2
        u = draws.uniform(key, _BLOCKS, 4 * blocks).view(-1, 4, blocks, 1)
        area = least + (max(self.hidden_units, least) - least) * u[:, 0]
        low, high = math.log(ASPECTS[0]), math.log(ASPECTS[1])
        aspect = torch.exp(low + (high - low) * u[:, 1])
        inside = []
        sides = (area * aspect).sqrt(), (area / aspect).sqrt()
        for length, share, side in zip((rows, columns), (u[:, 2], u[:, 3]), sides, strict=True):
            extent = side.round().clamp(1, length)  # (B, blocks, 1)
            start = (share * (length - extent + 1)).floor()
            place = torch.arange(length, device=key.device)
            inside.append((place >= start) & (place < start + extent))
        covers = (inside[0][:, :, :, None] & inside[1][:, :, None, :]).flatten(2)
        number = torch.arange(blocks, device=key.device)[:, None]
        return torch.where(covers, number, blocks).amin(dim=1), blocks


def kept(hidden: Tensor, count: int) -> Tensor:
    """(B, count) positions of the patches that are not hidden, in order; each image has `count`."""
    return torch.argsort(hidden.flatten(1).to(torch.int8), dim=1, stable=True)[:, :count]


class Corruption(NamedTuple):
    """BERT's corruption of N patches an image, M of them corrupted."""

    corrupted: Tensor  # (B, M) int64, the positions to predict
    masked: Tensor  # (B, N) bool: to become the mask embedding
    source: Tensor  # (B, N) int64: the patch whose content stands here; its own unless replaced


def corrupted_count(count: int, ratio: float) -> int:
    """`ratio` of `count`, rounded down; 100 * 0.29 is 28.999999999999996."""
    return math.floor(round(count * ratio, 9))


def bert_corruption(
    key: Tensor, count: int, *, ratio: float = 0.5, masked: float = 0.8, replaced: float = 0.1
) -> Corruption:
    """Corrupt `ratio` of `count` patches (exact, rounded down) as in Appendix B.1.2 of the paper.

    Of the corrupted ones a share `masked` is masked and a share `replaced` replaced by another
    patch of the same image, drawn among those that are not hidden; the rest stays as it is.
    """
    m = corrupted_count(count, ratio)
    corrupted = draws.permutation(key, _WHICH, count)[:, :m]
    how = draws.uniform(key, _HOW, m)
    none = torch.zeros(len(key), count, dtype=torch.bool, device=key.device)
    is_masked = none.scatter(1, corrupted, how < masked)
    is_replaced = none.scatter(1, corrupted, (how >= masked) & (how < masked + replaced))

    hidden = is_masked | is_replaced
    left = count - hidden.sum(dim=1, keepdim=True)
    choice = (draws.uniform(key, _SOURCE, count) * left).long()  # (B, N), each below `left`
    own = torch.arange(count, device=key.device).expand_as(choice)
    source = torch.where(is_replaced, kept(hidden, count).gather(1, choice), own)
    return Corruption(corrupted, is_masked, source)
