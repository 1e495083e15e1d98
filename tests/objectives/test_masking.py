import math

import pytest
import torch
import torch.nn.functional as F

from hybridvit.objectives.masking import Mask, Masking, bert_corruption, kept
from hybridvit.patches import take

KEYS = torch.arange(2000) * 7919 + 11
COUNT = 49


def within(hits: int, trials: int, p: float) -> bool:
    """Inside five standard deviations of a binomial."""
    return abs(hits - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


def test_half_of_the_patches_are_corrupted_exactly_and_once() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    assert corruption.corrupted.shape == (2000, 24)
    assert all(len(set(row)) == 24 for row in corruption.corrupted.tolist())


def test_of_them_80_10_10_are_masked_replaced_and_kept() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    own = torch.arange(COUNT)
    total = 2000 * 24
    masked = int(corruption.masked.sum())
    assert within(masked, total, 0.8)
    # A replaced patch never draws itself, because it is hidden.
    replaced = int((corruption.source != own).sum())
    assert within(replaced, total, 0.1)
    assert not (corruption.masked & (corruption.source != own)).any()


def test_only_corrupted_patches_are_touched() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    touched = corruption.masked | (corruption.source != torch.arange(COUNT))
    allowed = torch.zeros_like(touched).scatter(1, corruption.corrupted, True)
    assert not (touched & ~allowed).any()


def test_every_position_is_equally_often_corrupted() -> None:
    counts = bert_corruption(KEYS, COUNT).corrupted.flatten().bincount(minlength=COUNT)
    for hits in counts.tolist():
        assert within(hits, 2000, 24 / 49)


def test_replacements_come_from_patches_that_are_not_hidden() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    own = torch.arange(COUNT)
    for masked, source in zip(corruption.masked, corruption.source, strict=True):
        hidden = {int(i) for i in own if masked[i] or source[i] != i}
        for i in own.tolist():
            if int(source[i]) != i:
                assert int(source[i]) not in hidden


def test_sources_are_spread_evenly_over_the_visible_patches() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    replaced = corruption.source != torch.arange(COUNT)
    counts = corruption.source[replaced].bincount(minlength=COUNT)
    for hits in counts.tolist():
        assert within(hits, int(replaced.sum()), 1 / 49)


def test_a_mask_is_a_function_of_its_key() -> None:
    together, alone = bert_corruption(KEYS[:3], 16), bert_corruption(KEYS[1:2], 16)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_ratio(ratio: float) -> None:
    assert bert_corruption(KEYS[:2], 16, ratio=ratio).corrupted.shape[1] == int(16 * ratio)


def test_take_equals_a_loop() -> None:
    patches, index = torch.rand(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = torch.stack([patches[b, index[b]] for b in range(2)])
    assert torch.equal(take(patches, index), expected)


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize(
    ("grid", "unit", "ratio", "hidden"),
    [
        ((14, 14), 1, 0.75, 147),  # MAE: keeps int(196 * 0.25) = 49
        ((14, 14), 2, 0.6, 4 * 30),  # SimMIM: ceil(49 * 0.6) = 30 units
        ((7, 7), 1, 0.4, 20),
        ((3, 5), 1, 0.6, 9),
        ((8, 4), 4, 0.5, 16),
        ((1, 2), 1, 0.5, 1),
    ],
)
def test_every_image_hides_the_same_number_in_whole_units(
    kind: Mask, grid: tuple[int, int], unit: int, ratio: float, hidden: int
) -> None:
    masking = Masking(grid, kind, ratio, unit)
    mask = masking.draw(KEYS[:200])
    assert mask.shape == (200, *grid)
    assert masking.hidden == hidden
    assert mask.sum(dim=(1, 2)).tolist() == [hidden] * 200
    for row in range(0, grid[0], unit):
        for column in range(0, grid[1], unit):
            cut = mask[:, row : row + unit, column : column + unit].flatten(1)
            assert (cut.all(dim=1) | ~cut.any(dim=1)).all()


def test_random_masks_hide_every_unit_equally_often() -> None:
    counts = Masking((7, 7), "random", 0.5, 1).draw(KEYS).sum(dim=0)
    for hits in counts.flatten().tolist():
        assert within(hits, 2000, 25 / 49)


def test_blocks_are_compact() -> None:
    # Neighbours that are hidden together: much more often than in random masks, as in BEiT.
    def together(kind: Mask) -> float:
        mask = Masking((14, 14), kind, 0.4, 1).draw(KEYS[:500])
        return float((mask[:, :, 1:] & mask[:, :, :-1]).float().mean() / mask.float().mean())

    assert together("random") == pytest.approx(0.4, abs=0.02)
    assert together("block") > 0.7


def test_no_block_is_cut_into_single_units() -> None:
    """Whole rows of the last one are hidden, and at most one in part."""
    mask = Masking((14, 14), "block", 0.4, 1).draw(KEYS[:500])
    framed = F.pad(mask, (1, 1, 1, 1))
    beside = framed[:, :-2, 1:-1] | framed[:, 2:, 1:-1] | framed[:, 1:-1, :-2] | framed[:, 1:-1, 2:]
    assert (mask & ~beside).sum() / mask.sum() < 0.001  # 0.014 where units are cut at random
    share = mask.float().mean(dim=0)
    assert float(share[:7].mean()) == pytest.approx(float(share[7:].mean()), rel=0.05)


def test_blocks_differ_between_images_and_reach_every_place() -> None:
    mask = Masking((14, 14), "block", 0.4, 1).draw(KEYS[:500])
    share = mask.float().mean(dim=0)
    assert share.min() > 0.02  # corners are rare: few positions of a rectangle reach them
    assert share.max() < 0.8
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 490


@pytest.mark.parametrize("kind", ["random", "block"])
def test_a_drawn_mask_is_a_function_of_its_key(kind: Mask) -> None:
    masking = Masking((6, 6), kind, 0.5, 2)
    assert torch.equal(masking.draw(KEYS[:5])[3:4], masking.draw(KEYS[3:4]))


def test_kept_are_the_others_in_order() -> None:
    hidden = Masking((5, 4), "random", 0.5, 1).draw(KEYS[:20])
    expected = [[i for i, h in enumerate(m.flatten().tolist()) if not h] for m in hidden]
    assert kept(hidden, 10).tolist() == expected


@pytest.mark.parametrize(
    ("grid", "ratio", "unit", "message"),
    [
        ((7, 7), 0.6, 2, r"unit=2 does not tile the grid of 7 x 7 patches; choose from 1$"),
        ((8, 12), 0.6, 0, "choose from 1, 2, 4"),
        ((8, 8), 0.0, 1, "ratio=0.0 of 8 x 8 units"),
        ((8, 8), 1.0, 1, "ratio=1.0"),
        ((4, 4), 0.9, 2, "ratio=0.9 of 2 x 2 units of 2 x 2 patches should hide some and leave"),
    ],
)
def test_masking_errors(grid: tuple[int, int], ratio: float, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(grid, "random", ratio, unit)


@pytest.mark.parametrize(("ratio", "count"), [(0.29, 29), (0.57, 57), (0.5, 50), (0.295, 29)])
def test_shares_are_rounded_down_but_not_by_rounding_errors(ratio: float, count: int) -> None:
    assert bert_corruption(KEYS[:1], 100, ratio=ratio).corrupted.shape[1] == count
